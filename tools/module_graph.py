"""What the modules of a package import, read from their syntax trees: names, module graph, circles.

Imports inside functions and under ``TYPE_CHECKING`` count, and so do ``importlib.import_module`` and ``__import__``.
``check_layers.py`` judges what is found here, ``draw_rooms.py`` draws it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

_IMPORTERS = frozenset({"import_module", "__import__"})


@dataclass(frozen=True)
class Import:
    """One imported name.

    Attributes
    ----------
    name
        Dotted, with what is imported from a module behind it; None for a call whose name is computed.
    line
        Where it stands.
    top_level
        Outside of functions, so that it runs when the module is imported.
    typing_only
        Under ``TYPE_CHECKING``.
    """

    name: str | None
    line: int
    top_level: bool
    typing_only: bool


def imports(tree: ast.Module, parts: tuple[str, ...]) -> list[Import]:
    """Find all imports of a module.

    Parameters
    ----------
    tree
        The module.
    parts
        Its path below the source folder, without the suffix: relative imports are made absolute.
    """
    here = parts[:-1]  # the package that a single leading dot means, for a module and for an __init__ alike
    modules, functions = _importers(tree)
    literal: set[ast.AST] = set()
    found: list[Import] = []

    def visit(node: ast.AST, top: bool, typing_only: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, top, typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                stem = here[: len(here) - node.level + 1]
                base = ".".join([*stem, *([base] if base else [])])
            found.extend(Import(f"{base}.{alias.name}", node.lineno, top, typing_only) for alias in node.names)
        elif isinstance(node, ast.Call) and _is_importer(node.func, modules, functions):
            name = _literal_name(node)
            if name is not None:
                literal.add(node.func)
                found.append(Import(name, node.lineno, top, typing_only))
        elif _is_importer(node, modules, functions) and node not in literal:
            # a call with a computed name, or the function handed on to be called elsewhere
            found.append(Import(None, getattr(node, "lineno", 1), top, typing_only))
        inner_top = top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        guarded = set(node.body) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) else set()
        for child in ast.iter_child_nodes(node):
            visit(child, inner_top, typing_only or child in guarded)

    visit(tree, True, False)
    return found


def _importers(tree: ast.Module) -> tuple[set[str], set[str]]:
    """Return the names under which a module knows ``importlib``, and those of its importing functions."""
    modules, functions = set(), {"__import__"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {a.asname or "importlib" for a in node.names if a.name.partition(".")[0] == "importlib"}
            modules |= {a.asname or a.name for a in node.names if a.name == "builtins"}
        elif isinstance(node, ast.ImportFrom) and node.module in ("importlib", "builtins"):
            functions |= {a.asname or a.name for a in node.names if a.name in _IMPORTERS}
    return modules, functions


def _is_importer(node: ast.AST, modules: set[str], functions: set[str]) -> bool:
    if isinstance(node, ast.Name):
        return node.id in functions
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return node.attr in _IMPORTERS and node.value.id in modules
    return False


def _literal_name(call: ast.Call) -> str | None:
    """Return the absolute name that a call imports; None if it is computed or relative."""
    given = call.args[0] if call.args else next((k.value for k in call.keywords if k.arg == "name"), None)
    name = given.value if isinstance(given, ast.Constant) else None
    return name if isinstance(name, str) and name and not name.startswith(".") else None


@dataclass(frozen=True)
class Edge:
    """One module imports another, in a file at a line."""

    source: str
    target: str
    line: int


def module_files(source: Path, package: str) -> dict[str, Path]:
    """Return the modules of a package below `source` by dotted name; a package is its ``__init__``."""
    found = {}
    for file in sorted((source / package).rglob("*.py")):
        parts = file.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def edges(source: Path, package: str) -> list[Edge]:
    """Return who imports whom inside a package, in the order of files and lines; files must parse.

    A name counts for the deepest module that it names: ``from lorry.core import errors`` is an import of
    ``lorry.core.errors``. That importing a module runs the packages above it is left out of account, and so is a
    package that imports its own name.
    """
    files = module_files(source, package)
    found = []
    for module, file in files.items():
        parts = file.relative_to(source).with_suffix("").parts
        for one in imports(ast.parse(file.read_text(encoding="utf-8")), parts):
            target = one.name or ""
            while target and target not in files:
                target = target.rpartition(".")[0]
            if target and target != module:
                found.append(Edge(module, target, one.line))
    return found


def circles(found: Iterable[Edge]) -> list[tuple[list[str], list[Edge]]]:
    """Return every set of modules that all reach each other, with a shortest circle of imports among them.

    Parameters
    ----------
    found
        The edges of a graph.

    Returns
    -------
    list
        Of pairs: the modules in alphabetical order, and the edges of one circle, of the shortest there is.
    """
    graph: dict[str, dict[str, Edge]] = {}
    for edge in found:
        graph.setdefault(edge.source, {}).setdefault(edge.target, edge)
        graph.setdefault(edge.target, {})
    left = sorted(graph)
    result = []
    while left:
        start = left[0]
        group = sorted({other for other in _reached(graph, start) if start in _reached(graph, other)} | {start})
        left = [module for module in left if module not in group]
        if len(group) > 1:
            result.append((group, min((_shortest(graph, module) for module in group), key=len)))
    return result


def _reached(graph: Mapping[str, Mapping[str, Edge]], start: str) -> set[str]:
    """Return what can be reached from a module by one import or more."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        new = [target for target in graph[waiting.pop()] if target not in seen]
        seen.update(new)
        waiting.extend(new)
    return seen


def _shortest(graph: Mapping[str, Mapping[str, Edge]], start: str) -> list[Edge]:
    """Return a shortest way from a module back to itself; there must be one."""
    ways: dict[str, list[Edge]] = {start: []}
    waiting = [start]
    for module in waiting:
        for target, edge in sorted(graph[module].items()):
            if target == start:
                return [*ways[module], edge]
            if target not in ways:
                ways[target] = [*ways[module], edge]
                waiting.append(target)
    raise AssertionError(f"{start} lies on no circle")
