"""Regular expressions that come out of files, matched in bounded time.

Python's own matcher goes back over its choices, and a few characters are enough to keep it busy for ever. A pattern
of a file is therefore read here first. Where the number of ways in which it can match is small, Python's matcher
runs it; otherwise all ways are followed at once (Thompson's construction), in time proportional to the length of
the pattern times that of the path. Syntax beyond that (references to groups, looking behind, flags) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from lorry.core.errors import CheckpointError

_MOST_TEXT, _MOST_DEPTH, _MOST_STEPS, _MOST_REPEATS = 200_000, 40, 50_000, 1000
#: Ways that Python's matcher may try at most, and how many a repeat without a bound counts for.
_MOST_WAYS, _UNBOUNDED_WAYS = 100_000.0, 64.0
_CLASSES: dict[str, Callable[[str], bool]] = {
    "d": str.isdecimal,
    "w": lambda c: c.isalnum() or c == "_",
    "s": str.isspace,
}
_CONTROL = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v"}
Test = Callable[[str], bool]


@dataclass(frozen=True)
class _Node:
    """A part of a pattern: a character, a sequence, a choice, a repeat, a look ahead, or a place."""

    sort: Literal["char", "sequence", "choice", "repeat", "ahead", "place"]
    parts: tuple[_Node, ...] = ()
    test: Test | None = None
    least: int = 0
    most: int | None = None
    negated: bool = False
    place: str = ""


class Pattern:
    """A regular expression of a file.

    Raises
    ------
    CheckpointError
        It is wrong, too large, or uses syntax that cannot be matched in bounded time.
    """

    def __init__(self, text: str) -> None:
        if not isinstance(text, str) or len(text) > _MOST_TEXT:
            raise CheckpointError(
                f"Expected a regular expression of at most {_MOST_TEXT} characters, found {text!r:.80}."
            )
        try:
            quick = re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise CheckpointError(f"'{text:.80}' is a wrong regular expression: {error}.") from None
        tree = _Parser(text).whole()
        self._quick = quick if _ways(tree) <= _MOST_WAYS else None
        self._program = None if self._quick is not None else _Program(tree, text)

    def fullmatch(self, path: str) -> bool:
        """Whether the whole path matches."""
        if self._quick is not None:
            return self._quick.fullmatch(path) is not None
        assert self._program is not None
        return self._program.fullmatch(path)


@lru_cache(maxsize=4096)
def pattern(text: str) -> Pattern:
    """Return the pattern of a text; each is read once."""
    return Pattern(text)


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.depth = 0

    def refuse(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"The regular expression '{self.text:.80}' of the file uses {what}, which is not matched in bounded time "
            "or not understood here; write it with groups, choices, classes, repeats and looks ahead."
        )

    def peek(self, token: str) -> bool:
        return self.text.startswith(token, self.at)

    def take(self, token: str) -> bool:
        if not self.peek(token):
            return False
        self.at += len(token)
        return True

    def whole(self) -> _Node:
        tree = self.choice()
        if self.at != len(self.text):
            raise self.refuse("a closing bracket without an opening one")
        return tree

    def choice(self) -> _Node:
        self.depth += 1
        if self.depth > _MOST_DEPTH:
            raise self.refuse(f"more than {_MOST_DEPTH} nested groups")
        branches = [self.sequence()]
        while self.take("|"):
            branches.append(self.sequence())
        self.depth -= 1
        return branches[0] if len(branches) == 1 else _Node("choice", tuple(branches))

    def sequence(self) -> _Node:
        parts = []
        while self.at < len(self.text) and not self.peek("|") and not self.peek(")"):
            parts.append(self.repeated(self.atom()))
        return _Node("sequence", tuple(parts))

    def repeated(self, node: _Node) -> _Node:
        found = re.compile(r"[*+?]|\{(\d*)(,?)(\d*)\}").match(self.text, self.at)
        if found is None or found[0] in ("{}", "{,}"):
            return node
        self.at = found.end()
        least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(found[0], (None, None))
        if least is None:
            least = int(found[1] or 0)
            most = int(found[3]) if found[3] else None if found[2] else least
        self.take("?")
        if self.text[self.at : self.at + 1] in ("*", "+", "{"):
            raise self.refuse("repeats without a way back")
        if least > _MOST_REPEATS or (most or 0) > _MOST_REPEATS:
            raise self.refuse(f"more than {_MOST_REPEATS} repeats")
        return _Node("repeat", (node,), least=least, most=most)

    def atom(self) -> _Node:
        char = self.text[self.at]
        self.at += 1
        if char == "(":
            return self.group()
        if char == "[":
            return _Node("char", test=self.members())
        if char == ".":
            return _Node("char", test=lambda c: c != "\n")
        if char in "^$":
            return _Node("place", place=char)
        if char == "\\":
            return self.escaped()
        return _Node("char", test=char.__eq__)

    def group(self) -> _Node:
        sort: Literal["sequence", "ahead"] = "sequence"
        negated = False
        if self.take("?"):
            if self.take("=") or self.peek("!"):
                negated, sort = self.take("!"), "ahead"
            elif not self.take(":"):
                named = re.compile(r"P<\w+>").match(self.text, self.at)
                if named is None:
                    raise self.refuse(f"'(?{self.text[self.at : self.at + 2]}'")
                self.at = named.end()
        inner = self.choice()
        if not self.take(")"):
            raise self.refuse("a group without its end")
        return _Node(sort, (inner,), negated=negated)

    def escaped(self) -> _Node:
        char = self.text[self.at]
        self.at += 1
        if char in "bBAZ":
            return _Node("place", place=char)
        return _Node("char", test=self.escape(char))

    def escape(self, char: str) -> Test:
        """Return the test of an escaped character."""
        if char.lower() in _CLASSES:
            test = _CLASSES[char.lower()]
            return test if char.islower() else lambda c: not test(c)
        if char in _CONTROL:
            return _CONTROL[char].__eq__
        if char.isalnum():
            raise self.refuse(f"'\\{char}'")
        return char.__eq__

    def members(self) -> Test:
        """Return the test of a class in square brackets."""
        negated = self.take("^")
        tests: list[Test] = []
        first = True
        while first or not self.peek("]"):
            first = False
            low, test = self.member()
            if self.peek("-") and self.text[self.at + 1 : self.at + 2] != "]":
                self.at += 1
                high, _ = self.member()
                if low is None or high is None:
                    raise self.refuse("a range between classes")
                test = _between(low, high)
            tests.append(test)
        self.at += 1
        return lambda c: any(t(c) for t in tests) != negated

    def member(self) -> tuple[str | None, Test]:
        char = self.text[self.at]
        self.at += 1
        if char != "\\":
            return char, char.__eq__
        char = self.text[self.at]
        self.at += 1
        test = self.escape(char)
        return (None if char.lower() in _CLASSES else _CONTROL.get(char, char)), test


def _between(low: str, high: str) -> Test:
    return lambda c: low <= c <= high


def _ways(node: _Node) -> float:
    """Return how many ways Python's matcher may have to try, from above."""
    if node.sort in ("char", "place"):
        return 1.0
    if node.sort == "choice":
        return sum(_ways(p) for p in node.parts)
    if node.sort == "repeat":
        inner = node.parts[0]
        if inner.sort == "char":
            return _UNBOUNDED_WAYS if node.most is None else 1.0 + node.most - node.least
        if node.most is None:
            return float("inf")
        ways = _ways(inner)
        return (1.0 + node.most - node.least) * (ways**node.most if node.most < 64 or ways <= 1 else float("inf"))
    ways = 1.0
    for part in node.parts:
        ways = min(ways * _ways(part), 1e30)
    return ways


class _Program:
    """All ways of a pattern at once: steps that read a character, split, test a place, look ahead, or end."""

    def __init__(self, tree: _Node, text: str) -> None:
        self.text = text
        self.steps: list[tuple[str, object, int, int]] = [("end", None, 0, 0)]
        self.start = self._emit(tree, 0)
        self._seen: dict[tuple[int, int], bool] = {}

    def _add(self, sort: str, value: object, first: int, second: int = 0) -> int:
        if len(self.steps) >= _MOST_STEPS:
            raise CheckpointError(f"The regular expression '{self.text:.80}' of the file is too large.")
        self.steps.append((sort, value, first, second))
        return len(self.steps) - 1

    def _emit(self, node: _Node, then: int) -> int:
        """Add the steps of a part that go on at `then`; return the first."""
        if node.sort == "char":
            return self._add("char", node.test, then)
        if node.sort == "place":
            return self._add("place", node.place, then)
        if node.sort == "ahead":
            return self._add("ahead", node.negated, then, self._emit(node.parts[0], 0))
        if node.sort == "choice":
            starts = [self._emit(p, then) for p in node.parts]
            first = starts[0]
            for other in starts[1:]:
                first = self._add("split", None, first, other)
            return first
        if node.sort == "repeat":
            return self._repeat(node, then)
        for part in reversed(node.parts):
            then = self._emit(part, then)
        return then

    def _repeat(self, node: _Node, then: int) -> int:
        inner = node.parts[0]
        if node.most is None:
            loop = self._add("split", None, then, then)
            self.steps[loop] = ("split", None, self._emit(inner, loop), then)
            then = loop
        else:
            after = then
            for _ in range(node.most - node.least):
                then = self._add("split", None, self._emit(inner, then), after)
        for _ in range(node.least):
            then = self._emit(inner, then)
        return then

    def fullmatch(self, path: str) -> bool:
        """Whether the whole path matches."""
        self._seen = {}
        return self._run(self.start, path, 0, whole=True)

    def _run(self, start: int, path: str, at: int, *, whole: bool) -> bool:
        threads = self._closed([start], path, at)
        while threads:
            if 0 in threads and (at == len(path) or not whole):
                return True
            if at == len(path):
                return False
            char = path[at]
            at += 1
            steps = [self.steps[t] for t in threads]
            threads = self._closed([s[2] for s in steps if s[0] == "char" and s[1](char)], path, at)  # type: ignore[operator]
        return False

    def _closed(self, starts: list[int], path: str, at: int) -> set[int]:
        """Return the steps that are reached without reading a character."""
        reached: set[int] = set()
        left = starts
        while left:
            number = left.pop()
            if number in reached:
                continue
            reached.add(number)
            sort, value, first, second = self.steps[number]
            if sort == "split":
                left += (first, second)
            elif (sort == "place" and _holds(str(value), path, at)) or (
                sort == "ahead" and self._ahead(second, path, at) != value
            ):
                left.append(first)
        return reached

    def _ahead(self, start: int, path: str, at: int) -> bool:
        key = (start, at)
        if key not in self._seen:
            self._seen[key] = self._run(start, path, at, whole=False)
        return self._seen[key]


def _holds(place: str, path: str, at: int) -> bool:
    if place in "^A":
        return at == 0
    if place in "$Z":
        return at == len(path) or (place == "$" and at == len(path) - 1 and path[at] == "\n")
    word = _CLASSES["w"]
    edge = (at > 0 and word(path[at - 1])) != (at < len(path) and word(path[at]))
    return edge == (place == "b")
