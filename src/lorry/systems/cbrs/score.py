"""How good extracted records are: F1 over fields and the likeness of trees.

Source: arXiv 2604.16665, whose reported rows are ``0.8 macro-F1 + 0.2 tree similarity``. Its code is not public, so two
things are our reading: the F1 of a field counts the values at its path over all messages, and trees are compared by
their edit distance over the size of the larger one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorry.core.errors import OptionError

from .record import normalised

OF_FIELDS, OF_TREES = 0.8, 0.2


@dataclass(frozen=True)
class Score:
    """What extracted records are worth, each value within 0 to 1.

    Attributes
    ----------
    fields
        F1 of each path that occurs in true or extracted records.
    tree
        Mean likeness of trees.
    valid
        Part of the answers that are JSON objects.
    """

    fields: Mapping[str, float]
    tree: float
    valid: float

    @property
    def f1(self) -> float:
        """Mean over the fields."""
        return sum(self.fields.values()) / len(self.fields)

    @property
    def final(self) -> float:
        """What is reported."""
        return OF_FIELDS * self.f1 + OF_TREES * self.tree


def score(answers: Sequence[str], truth: Sequence[Mapping[str, Any]], *, rename: bool = True) -> Score:
    """Compare answers with the true records.

    Parameters
    ----------
    answers
        As they were written; one that is no JSON object counts as having nothing right.
    truth
        The records.
    rename
        Give variant keys the names of the schema first; if not, a key that is written otherwise is an error.

    Raises
    ------
    OptionError
        There are none, or not one answer for each record.
    """
    if not truth or len(answers) != len(truth):
        raise OptionError(f"Expected one answer for each record, found {len(answers)} for {len(truth)}.")
    right: Counter[str] = Counter()
    said: Counter[str] = Counter()
    there: Counter[str] = Counter()
    likeness, valid = 0.0, 0
    for answer, true in zip(answers, truth, strict=True):
        expected = Counter(leaves(true))
        there.update(_by_path(expected))
        given = parsed(answer)
        if given is None:
            continue
        valid += 1
        if rename:
            given, _ = normalised(given)
        found = Counter(leaves(given))
        said.update(_by_path(found))
        right.update(_by_path(expected & found))
        likeness += tree_likeness(given, true)
    fields = {path: 2 * right[path] / (said[path] + there[path]) for path in sorted({*said, *there})}
    return Score(fields, likeness / len(truth), valid / len(truth))


def parsed(answer: str) -> dict[str, Any] | None:
    """Return the JSON object that an answer is, or None."""
    try:
        value = json.loads(answer)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield path and text of each leaf; an element of a list has the list's path, an empty list one empty leaf."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from leaves(each, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        if not value:
            yield path, ""
        for each in value:
            yield from leaves(each, path)
    else:
        yield path, " ".join(str(value).casefold().split())


def _by_path(values: Counter[tuple[str, str]]) -> Counter[str]:
    found: Counter[str] = Counter()
    for (path, _), count in values.items():
        found[path] += count
    return found


def tree_likeness(first: Any, second: Any) -> float:
    """Return 1 less the edit distance of two JSON trees over the size of the larger; the order of keys is none."""
    from zss import simple_distance

    a, b = _tree("", first), _tree("", second)
    return 1 - float(simple_distance(a, b)) / max(_size(a), _size(b))


def _tree(label: str, value: Any) -> Any:
    from zss import Node

    node = Node(label)
    if isinstance(value, Mapping):
        for key in sorted(value):
            node.addkid(_tree(key, value[key]))
    elif isinstance(value, list):
        for each in value:
            node.addkid(_tree("item", each))
    else:
        node.addkid(Node(f"={' '.join(str(value).casefold().split())}"))
    return node


def _size(node: Any) -> int:
    return 1 + sum(_size(kid) for kid in node.children)
