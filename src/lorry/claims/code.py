"""Which code decides what a claim's trial finds, as digests of files, so that a record tells whether it is older.

The code of a claim is

- the file of its study, and the files of `lorry.claims` that this imports, one through another, but for the ledger
  itself (`HOUSEKEEPING`), whose share in a result, seeds and effort, is in the record;
- the files of `lorry.methods` and `lorry.merging` that those import or name: a class by its import, a method by its
  slug in ``{"method": "lora"}``, a merge method by its slug wherever merging is imported; and what these files import
  within the two packages;
- of `lorry.training` and `lorry.pocket`, the files that define the names which the study and its helpers import, but
  for `PROMISED`.

The core, the kernels and the formats are left out: what they promise (a forward pass, a gradient, a saved file) is held
by the laws and by tests in float64, and a change that broke a promise would fail there. So are the files of a job and
of a fleet: that a job trained with others becomes what it becomes alone, in a plain loop, is such a promise. If they
counted, every record would be older than every commit. A digest is one of the syntax tree: comments, docstrings and
layout do not count.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lorry.core.method.registry import METHODS
from lorry.merging import merge_methods

ROOT = Path(__file__).resolve().parents[1]
#: Packages whose files are followed to what they import, and those of which only the files that are named count.
FOLLOWED, NAMED = ("claims", "methods", "merging"), ("training", "pocket")
#: Files of the ledger that decide no result.
HOUSEKEEPING = frozenset(
    {"claims/__init__.py", "claims/code.py", "claims/ledger.py", "claims/page.py", "claims/sheets.py"}
)
#: Files whose promise to a study is held by tests: fields of a job, and that a fleet changes no job's result.
PROMISED = frozenset({"training/jobs.py", "training/fleet.py"})
DIGITS = 12


def code_of(study: Callable[..., Any]) -> dict[str, str]:
    """Return the digest of each file that decides what a study finds.

    Returns
    -------
    dict
        Path within the package (or the file's name, for a study outside of it) -> digest, by path.
    """
    own = Path(inspect.getsourcefile(study) or "").resolve()
    if not own.is_relative_to(ROOT):
        return {own.name: digest(own)} if own.is_file() else {}
    return dict(code_from(own.relative_to(ROOT).as_posix()))


def changed(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the files that differ between two codes, or are in one of them only."""
    return sorted(path for path in {*then, *now} - PROMISED if then.get(path) != now.get(path))


@cache
def code_from(start: str, root: Path = ROOT) -> Mapping[str, str]:
    """Return the digest of each file that decides a result, by path.

    Parameters
    ----------
    start
        The study's file, as a path within the package.
    root
        The package.
    """
    found, waiting = {start}, [start]
    while waiting:
        for path in _parts(root, waiting.pop()):
            if path not in found and path not in HOUSEKEEPING | PROMISED:
                found.add(path)
                if path.startswith(tuple(f"{room}/" for room in FOLLOWED)):
                    waiting.append(path)
    if any(path.startswith("merging/") for path in found):
        named = {file for path in found if path.startswith("claims/") for file in _merges(root, path)}
        found |= named | {more for path in named for more in code_from(path, root)}
    return {path: digest(root / path) for path in sorted(found)}


def _parts(root: Path, path: str) -> Iterator[str]:
    """The files that a file imports or, if it is one of claims, names by a method's slug."""
    here = path.startswith("claims/")
    rooms = (*FOLLOWED, *NAMED) if here else FOLLOWED[1:]
    for module, name in _imports(root, path):
        for file in _files(root, module, name):
            if file.startswith(tuple(f"{room}/" for room in rooms)):
                yield file
    if here:
        slugs = {value for value in _methods(tree(root / path)) if value in METHODS}
        yield from _sources(root, (METHODS[slug].cls for slug in slugs))


def _merges(root: Path, path: str) -> Iterator[str]:
    """The merge methods that a file names, or all of them if it asks the registry for all."""
    known, node = merge_methods(), tree(root / path)
    every = any(name == "merge_methods" for _, name in _imports(root, path))
    texts = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)}
    yield from _sources(root, (method.function for slug, method in known.items() if every or slug in texts))


def _methods(node: ast.AST) -> Iterator[str]:
    """Texts that stand for a method: ``{"method": TEXT}`` or ``f(method=TEXT)``."""
    for part in ast.walk(node):
        pairs: list[tuple[Any, Any]] = []
        if isinstance(part, ast.Dict):
            pairs = [(k.value, v) for k, v in zip(part.keys, part.values, strict=True) if isinstance(k, ast.Constant)]
        elif isinstance(part, ast.Call):
            pairs = [(word.arg, word.value) for word in part.keywords]
        for key, value in pairs:
            if key == "method" and isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value.value


def _sources(root: Path, things: Iterable[Any]) -> Iterator[str]:
    """The files that define classes, functions, or functions with arguments given."""
    for thing in things:
        module = getattr(thing, "func", thing).__module__
        if module.startswith("lorry."):
            yield from _files(root, module.partition(".")[2].replace(".", "/"), "*")


def _imports(root: Path, path: str) -> list[tuple[str, str]]:
    """What a file imports of Lorry, wherever in it: modules as paths without ending, and names (`*` for a module)."""
    found: list[tuple[str, str]] = []
    for node in ast.walk(tree(root / path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, "*") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ["lorry", *Path(path).parent.parts][: len(Path(path).parts) + 1 - node.level] if node.level else []
            found += [(".".join([*above, *filter(None, [node.module])]), alias.name) for alias in node.names]
    return [(m.partition(".")[2].replace(".", "/"), name) for m, name in found if m.split(".")[0] == "lorry"]


def _files(root: Path, module: str, name: str) -> Iterator[str]:
    """The files behind an import: the module, or where a package has the name from."""
    if (root / f"{module}.py").is_file():
        yield f"{module}.py"
        return
    own, inner = f"{module}/__init__.py".lstrip("/"), f"{module}/{name}".lstrip("/")
    if not (root / own).is_file():
        return
    if (root / f"{inner}.py").is_file() or (root / inner / "__init__.py").is_file():
        yield from _files(root, inner, "*")
    elif module:  # `import lorry` names nothing
        whole = name == "*" and module in NAMED
        behind = [(origin, given) for origin, given in _imports(root, own) if whole or given == name]
        yield from (file for origin, given in behind for file in _files(root, origin, given))
        if name == "*" or not behind:
            yield own


@cache
def tree(path: Path) -> ast.Module:
    """Parse a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def digest(path: Path) -> str:
    """Return the digest of what a file does; equal for two files that differ in comments, docstrings or layout."""
    return hashlib.sha256("".join(_words(tree(path))).encode()).hexdigest()[:DIGITS]


def _words(node: Any) -> Iterator[str]:
    """A syntax tree as text; in words of our own, since those of `ast.dump` differ between versions of Python."""
    if isinstance(node, ast.AST):
        yield f"({type(node).__name__}"
        for field, value in ast.iter_fields(node):
            if value is not None and value != [] and field not in ("ctx", "kind", "type_comment"):
                yield f" {field}="
                yield from _words(value)
        yield ")"
    elif isinstance(node, list):
        for part in node:
            # a text that stands alone is a docstring
            if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant) and _text(part.value)):
                yield from _words(part)
    else:
        yield repr(node)


def _text(constant: ast.Constant) -> bool:
    return isinstance(constant.value, str)
