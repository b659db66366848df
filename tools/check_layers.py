"""Check that the source keeps its layers, its sizes and its safety: ``python tools/check_layers.py [SRC]``.

Read from the syntax tree, so imports inside functions and under ``TYPE_CHECKING`` count too, and so do calls of
``importlib.import_module``. No modules may import each other in a circle. Prints a line for each violation and exits
1. To let a package use a neighbour of its band, add it to ``NEIGHBOURS``.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from module_graph import Import, circles, edges, imports

PACKAGE = "lorry"

#: Lowest first. A package may import packages of lower bands and itself.
BANDS: tuple[tuple[str, ...], ...] = (
    ("kernels",),
    ("core",),
    ("methods",),
    ("formats",),
    ("roots", "attention"),
    ("pocket",),
    (
        "training",
        "merging",
        "serving",
        "depot",
        "transfer",
        "protection",
        "federated",
        "diffusion",
        "multimodal",
    ),
    ("bench",),
    ("systems",),
    ("claims", "demo"),
    ("cli", "web"),
)
LEVEL = {name: level for level, names in enumerate(BANDS) for name in names}

#: Within a band: who may import which neighbour.
NEIGHBOURS: dict[str, frozenset[str]] = {
    "transfer": frozenset({"training"}),
    "protection": frozenset({"training", "diffusion"}),
    "federated": frozenset({"training", "merging"}),
    "diffusion": frozenset({"training"}),
    "multimodal": frozenset({"training"}),
    "serving": frozenset({"training"}),
    "cli": frozenset({"web"}),
}

#: Packages that may import these parts of lorry only, whatever their band would allow.
ONLY: dict[str, frozenset[str]] = {"pocket": frozenset()}

#: The lowest band that may use the public face (``from lorry import attach``): below it, that is a cycle.
FACE_FROM = LEVEL["bench"]

#: The module that holds the public face for ``lorry/__init__.py``.
FACE = "face"

#: The public face itself may import these packages.
FACE_MAY = frozenset(name for names in BANDS[: LEVEL["training"] + 1] for name in names)

#: Third-party roots that may be imported at the top of a module: anywhere, and also in the thin faces.
TOP_LEVEL = frozenset({"torch", "safetensors"})
#: A module of Triton kernels is a module of decorated functions; it is itself imported only where a kernel is used.
TOP_LEVEL_KERNELS = frozenset({"triton"})
TOP_LEVEL_FACES = frozenset({"typer", "click", "rich", "pydantic", "yaml", "fastapi", "starlette", "uvicorn"})
#: A thin face below the highest band: FastAPI finds the types of a route's arguments among the names of its module.
FACES_BELOW = (("lorry", "serving", "http"),)

#: The third-party roots that the three lowest packages may use at all, inside functions: storages of a base
#: weight and compilers of kernels, each present only where the user's model or machine already brings it.
LOW_PACKAGES = frozenset({"kernels", "core", "methods"})
LOW_MAY = TOP_LEVEL | {"bitsandbytes", "torchao", "triton"}

#: The one module that may import what it is told to: it discovers the files of packages that are handed to it.
MAY_IMPORT_COMPUTED = "lorry/core/registry.py"

PICKLES = frozenset({"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"})
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60


def main(argv: list[str] | None = None) -> int:
    """Check the tree given (default: ``src``) and return the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    source = Path(arguments[0]) if arguments else Path(__file__).resolve().parents[1] / "src"
    package = source / PACKAGE
    if not package.is_dir():
        print(
            f"expected the package at {package}, found nothing; give the folder that holds it",
            file=sys.stderr,
        )
        return 2
    files = sorted(package.rglob("*.py"))
    problems = [problem for file in files for problem in check_file(file, source)]
    problems += circle_problems(source)
    for problem in problems:
        print(problem)
    print(f"layers: {len(files)} files, {len(problems)} problems")
    return 1 if problems else 0


def check_file(file: Path, source: Path) -> Iterator[str]:
    """Yield a line for each violation in one file below ``source``."""
    text = file.read_text(encoding="utf-8")
    try:
        tree = ast.parse(text, filename=str(file))
    except SyntaxError as error:
        yield f"{file}:{error.lineno}: does not parse: {error.msg}"
        return
    parts = file.relative_to(source).with_suffix("").parts
    unit = unit_of(parts)
    for found in imports(tree, parts):
        if found.name is None and file.relative_to(source).as_posix() == MAY_IMPORT_COMPUTED:
            continue
        problem = judge(unit, found, source / PACKAGE, face=parts[:3] in FACES_BELOW)
        if problem:
            yield f"{file}:{found.line}: {problem}"
    for line, problem in [*sizes(tree, text), *unsafe_loads(tree)]:
        yield f"{file}:{line}: {problem}"


def circle_problems(source: Path) -> list[str]:
    """Return a line for each circle of imports below ``source``; none while a file does not parse."""
    try:
        found = edges(source, PACKAGE)
    except SyntaxError:  # check_file says so
        return []
    problems = []
    for group, circle in circles(found):
        way = ", ".join(f"{edge.source} imports {edge.target} (line {edge.line})" for edge in circle)
        more = f" ({len(group)} modules reach each other: {', '.join(group)})" if len(group) > len(circle) else ""
        problems.append(
            f"{circle[0].source}: a circle of imports: {way}{more}; move what they share into a module below them"
        )
    return problems


def unit_of(parts: tuple[str, ...]) -> str:
    """The part of lorry that a module belongs to; ``lorry`` itself for the public face."""
    inner = parts[1] if len(parts) > 1 else "__init__"
    return PACKAGE if inner in ("__init__", FACE) else "cli" if inner == "__main__" else inner


def judge(unit: str, found: Import, package: Path, *, face: bool = False) -> str | None:
    """What is wrong with this import from this package, if anything; `face` for a thin face below the highest band."""
    if found.name is None:
        return (
            "imports a module whose name is computed: write the import out, or register what is to be found in a "
            "lorry.core.registry.Registry"
        )
    root, _, rest = found.name.partition(".")
    if root == PACKAGE:
        return judge_inside(unit, rest.partition(".")[0], package)
    if root in PICKLES:
        return f"imports {root}: a pickle is never opened; use safetensors or json"
    if root in sys.stdlib_module_names or root == "__future__" or found.typing_only:
        return None
    if found.top_level:
        faces = face or LEVEL.get(unit) == LEVEL["cli"]
        extra = TOP_LEVEL_FACES if faces else TOP_LEVEL_KERNELS if unit == "kernels" else frozenset()
        if root not in TOP_LEVEL | extra:
            return f"imports {root} at the top of a module: import it in the function that uses it"
    if unit in LOW_PACKAGES and root not in LOW_MAY:
        return f"{unit} may use only {', '.join(sorted(LOW_MAY))}, not {root}: move this to a higher layer"
    return None


def judge_inside(unit: str, target: str, package: Path) -> str | None:
    """The rule between two parts of lorry; ``target``, the name after ``lorry.``, may be a public name."""
    if target == FACE and unit == PACKAGE:
        return None
    is_part = bool(target) and target != FACE and ((package / target).is_dir() or (package / f"{target}.py").is_file())
    for name in (unit, target) if is_part else (unit,):
        if name != PACKAGE and name not in LEVEL:
            return f"{name} has no band: add it to BANDS in tools/check_layers.py"
    if unit in ONLY and target != unit:
        allowed = ", ".join(sorted(ONLY[unit])) or "no other part of lorry"
        return None if target in ONLY[unit] else f"{unit} may import {allowed}, not lorry.{target}"
    if not is_part:
        if unit == PACKAGE or LEVEL[unit] >= FACE_FROM:
            return None
        return f"{unit} imports the public face (lorry.{target}): import it from the part that defines it"
    if unit == PACKAGE:
        return None if target in FACE_MAY else f"the public face may not import lorry.{target}"
    allowed_here = target == unit or LEVEL[target] < LEVEL[unit] or target in NEIGHBOURS.get(unit, frozenset())
    if allowed_here:
        return None
    relation = "a neighbour" if LEVEL[target] == LEVEL[unit] else "a higher layer"
    return f"{unit} imports lorry.{target}, {relation}: move what is shared down, or see NEIGHBOURS"


def sizes(tree: ast.Module, text: str) -> Iterator[tuple[int, str]]:
    """Files and functions over their limits."""
    lines = len(text.splitlines())
    if lines > MAX_FILE_LINES:
        yield 1, f"{lines} lines, limit {MAX_FILE_LINES}: split it by what its parts are about"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield node.lineno, f"{node.name}: {length} lines, limit {MAX_FUNCTION_LINES}"


def unsafe_loads(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Uses of ``torch.load``, which unpickles, under any spelling that the syntax shows."""
    message = "uses torch.load, which unpickles: read safetensors"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "load":
            if isinstance(node.value, ast.Name) and node.value.id == "torch":
                yield node.lineno, message
        elif isinstance(node, ast.ImportFrom) and node.module in {"torch", "torch.serialization"}:
            if any(alias.name == "load" for alias in node.names):
                yield node.lineno, message


if __name__ == "__main__":
    sys.exit(main())
