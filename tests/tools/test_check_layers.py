"""The import-layer check: what it forbids, what it lets through, and that this repository keeps it."""

from pathlib import Path

import check_layers
import pytest

ROOT = Path(__file__).resolve().parents[2]


def problems(tmp_path: Path, module: str, code: str) -> list[str]:
    """The violations of one module in a small package that has every part that the cases name."""
    for part in ("core", "kernels", "methods", "training", "merging", "transfer", "bench", "pocket", "cli"):
        (tmp_path / "lorry" / part).mkdir(parents=True, exist_ok=True)
    file = tmp_path / "lorry" / f"{module}.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(code)
    return list(check_layers.check_file(file, tmp_path))


FORBIDDEN = [
    ("core/a", "from lorry.training import run", "a higher layer"),
    ("core/a", "from ..training import run", "a higher layer"),
    ("core/a", "def f():\n    import lorry.methods.lora", "a higher layer"),
    (
        "core/a",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lorry.methods import x",
        "a higher layer",
    ),
    ("kernels/a", "from lorry.core import sites", "a higher layer"),
    ("core/a", "import triton", "top of a module"),
    ("core/a", "import lorry", "public face"),
    ("core/a", "from lorry import attach", "public face"),
    ("core/a", "from lorry import training", "a higher layer"),
    ("merging/a", "from lorry.training import run", "a neighbour"),
    ("pocket/a", "from lorry.core import sites", "no other part of lorry"),
    ("__init__", "from lorry.bench import run", "public face may not"),
    ("new/a", "from lorry.core import sites", "has no band"),
    ("core/a", "def f():\n    import transformers", "core may use only"),
    ("training/a", "import transformers", "top of a module"),
    ("serving/a", "import fastapi", "top of a module"),
    ("serving/http/a", "import transformers", "top of a module"),
    ("training/a", "try:\n    import numpy\nexcept ImportError:\n    pass", "top of a module"),
    ("training/a", "class A:\n    import rich", "top of a module"),
    ("training/a", "def f():\n    import pickle", "pickle"),
    ("training/a", "import torch\nx = torch.load('a')", "unpickles"),
    ("training/a", "from torch import load", "unpickles"),
    ("training/a", "x = (", "does not parse"),
    ("core/a", "import importlib\nimportlib.import_module('lorry.methods.lora')", "a higher layer"),
    ("core/a", "def f():\n    from importlib import import_module as get\n    get('lorry.methods')", "a higher layer"),
    ("core/a", "__import__('lorry.training')", "a higher layer"),
    ("training/a", "import importlib as i\nx = i.import_module(name='pickle')", "pickle"),
    ("training/a", "import importlib\nimportlib.import_module('transformers')", "top of a module"),
    ("training/a", "import importlib\nx = importlib.import_module(f'lorry.{name}')", "name is computed"),
    ("training/a", "import importlib.util\nx = importlib.import_module('.a', __package__)", "name is computed"),
    ("training/a", "from importlib import import_module\nx = map(import_module, names)", "name is computed"),
    ("training/a", "import builtins\nx = builtins.__import__(name)", "name is computed"),
    ("training/core/registry", "import importlib\nimportlib.import_module(name)", "name is computed"),
]


@pytest.mark.parametrize(("module", "code", "message"), FORBIDDEN)
def test_forbidden(tmp_path: Path, module: str, code: str, message: str) -> None:
    found = problems(tmp_path, module, code)
    assert len(found) == 1, found
    assert message in found[0]


ALLOWED = [
    (
        "core/a",
        "import torch\nfrom safetensors.torch import save\nimport json\nfrom lorry.kernels import rows",
    ),
    ("core/a", "def f():\n    import bitsandbytes"),
    ("kernels/a", "import triton\nimport triton.language as tl"),
    ("core/a", "from . import sites\nfrom .sites import Site"),
    ("methods/a", "from lorry.core.sites.site import Site"),
    ("training/a", "def f():\n    import transformers"),
    ("serving/http/a", "from fastapi import APIRouter\nimport pydantic"),
    ("training/a", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import transformers"),
    ("transfer/a", "from lorry.training import run"),
    ("bench/a", "import lorry\nfrom lorry import attach, training"),
    ("cli/main", "import typer\nfrom rich.table import Table\nimport lorry.bench"),
    ("__init__", "from lorry.core import sites\nfrom .merging import merge"),
    ("training/a", "'''No pickle, no torch.load().'''"),
    ("training/a", "import importlib\nx = importlib.import_module('lorry.core.sites')"),
    ("training/a", "def f():\n    import importlib\n    importlib.import_module('transformers')"),
    ("training/a", "from importlib.metadata import version\nimport_module = version\nversion('torch')"),
    ("core/registry", "import importlib\nimportlib.import_module(f'{package}.{name}')"),
]


@pytest.mark.parametrize(("module", "code"), ALLOWED)
def test_allowed(tmp_path: Path, module: str, code: str) -> None:
    assert problems(tmp_path, module, code) == []


def test_guard_covers_only_the_typing_branch(tmp_path: Path) -> None:
    code = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import rich\nelse:\n    import numpy\n"
    found = problems(tmp_path, "training/a", code)
    assert len(found) == 1
    assert "numpy" in found[0]


def tree(tmp_path: Path, files: dict[str, str]) -> Path:
    """A package of these modules, each with its text."""
    for module, code in files.items():
        file = tmp_path / "lorry" / f"{module}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code)
    return tmp_path


TYPING = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lorry.core.a import A"
CIRCLES = {
    "at the top": {"core/a": "from lorry.core import b", "core/b": "import lorry.core.a"},
    "under TYPE_CHECKING": {"core/a": "from lorry.core.b import f", "core/b": TYPING},
    "in a function": {"core/a": "from .b import f", "core/b": "def f():\n    from .a import g"},
    "through importlib": {
        "core/a": "from lorry.core.b import f",
        "core/b": "import importlib\ndef f():\n    importlib.import_module('lorry.core.a')",
    },
    "of three": {
        "core/a": "import lorry.core.b",
        "core/b": "import lorry.core.c",
        "core/c": "def f():\n    import lorry.core.a",
    },
    "with the package itself": {"core/__init__": "from .a import f", "core/a": "from lorry.core import g"},
}


@pytest.mark.parametrize("files", CIRCLES.values(), ids=CIRCLES)
def test_a_circle_is_found(tmp_path: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = check_layers.circle_problems(tree(tmp_path, files))
    assert "a circle of imports" in found
    for module in files:
        assert "lorry." + module.replace("/", ".").removesuffix(".__init__") in found
    assert check_layers.main([str(tmp_path)]) == 1
    assert found in capsys.readouterr().out


def test_the_circle_that_is_named_is_the_shortest_of_its_modules(tmp_path: Path) -> None:
    files = {
        "core/a": "import lorry.core.b",
        "core/b": "import lorry.core.c",
        "core/c": "import lorry.core.a\nimport lorry.core.d",
        "core/d": "\nimport lorry.core.c",
    }
    (found,) = check_layers.circle_problems(tree(tmp_path, files))
    assert "4 modules" in found
    assert "core.c imports lorry.core.d (line 2), lorry.core.d imports lorry.core.c (line 2)" in found
    assert "core.a imports" not in found


def test_circles_apart_are_told_apart(tmp_path: Path) -> None:
    pairs = {"core/a": "import lorry.core.b", "core/b": "import lorry.core.a"}
    others = {module.replace("core", "kernels"): code.replace("core", "kernels") for module, code in pairs.items()}
    assert len(check_layers.circle_problems(tree(tmp_path, pairs | others))) == 2


STRAIGHT = {
    "a diamond": {
        "core/a": "import lorry.core.b, lorry.core.c",
        "core/b": "import lorry.core.d",
        "core/c": "import lorry.core.d",
        "core/d": "",
    },
    "a package that gathers its modules": {
        "core/__init__": "from .a import f\nfrom .b import g",
        "core/a": "",
        "core/b": "from .a import f",
    },
    "a module that names itself": {"core/a": "def f():\n    from lorry.core.a import f"},
    "a name in a text": {"core/a": "import lorry.core.b", "core/b": "x = 'lorry.core.a'"},
}


@pytest.mark.parametrize("files", STRAIGHT.values(), ids=STRAIGHT)
def test_no_circle_is_invented(tmp_path: Path, files: dict[str, str]) -> None:
    assert check_layers.circle_problems(tree(tmp_path, files)) == []


@pytest.mark.parametrize(("lines", "count"), [(59, 0), (60, 1)])
def test_function_size(tmp_path: Path, lines: int, count: int) -> None:
    assert len(problems(tmp_path, "core/a", "def f():\n" + "    x = 1\n" * lines)) == count


@pytest.mark.parametrize(("lines", "count"), [(500, 0), (501, 1)])
def test_file_size(tmp_path: Path, lines: int, count: int) -> None:
    assert len(problems(tmp_path, "core/a", "x = 1\n" * lines)) == count


def test_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problems(tmp_path, "core/a", "import torch")
    assert check_layers.main([str(tmp_path)]) == 0
    problems(tmp_path, "core/a", "import numpy")
    assert check_layers.main([str(tmp_path)]) == 1
    assert "numpy" in capsys.readouterr().out
    assert check_layers.main([str(tmp_path / "absent")]) == 2


def test_this_repository_keeps_its_layers(capsys: pytest.CaptureFixture[str]) -> None:
    status = check_layers.main([str(ROOT / "src")])
    assert status == 0, capsys.readouterr().out
