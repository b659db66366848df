"""Options as the source of a dataclass declares them, read without importing it.

The flags of `lorry train` are those of a job, whose module needs torch. Help and shell completion would wait for torch
at every key stroke, so the declarations are read from the source; a test holds them against the class itself.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Declared:
    """A field declared by `lorry.core.options.option`.

    Attributes
    ----------
    name
        Of the field.
    type
        Its annotation as text.
    default
        Its default as text, ``MISSING`` for a field that must be given.
    help
        What it is for.
    """

    name: str
    type: str
    default: str
    help: str


@lru_cache
def _tree(path: str) -> ast.Module:
    return ast.parse((_ROOT / path).read_text(encoding="utf-8"))


def declared_options(path: str, owner: str) -> list[Declared]:
    """Return the fields of the dataclass `owner` in a file of the package, in their order.

    Parameters
    ----------
    path
        Relative to the package, e.g. ``training/jobs.py``.
    owner
        Name of the class.
    """
    (body,) = (n.body for n in _tree(path).body if isinstance(n, ast.ClassDef) and n.name == owner)
    fields = []
    for line in body:
        made = line.value if isinstance(line, ast.AnnAssign) else None
        if isinstance(line, ast.AnnAssign) and isinstance(made, ast.Call) and ast.unparse(made.func) == "option":
            default, text = made.args[:2]
            shown = str(default.value) if isinstance(default, ast.Constant) else ast.unparse(default)
            fields.append(
                Declared(ast.unparse(line.target), ast.unparse(line.annotation), shown, ast.literal_eval(text))
            )
    return fields


def declared_mapping(path: str, name: str) -> dict[str, str]:
    """Return the mapping that a file of the package writes down under a name."""
    for line in _tree(path).body:
        if isinstance(line, ast.Assign) and [ast.unparse(t) for t in line.targets] == [name]:
            found: dict[str, str] = ast.literal_eval(line.value)
            return found
    raise KeyError(f"{path} has no mapping {name}")
