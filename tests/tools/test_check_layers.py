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
    ("training/a", "try:\n    import numpy\nexcept ImportError:\n    pass", "top of a module"),
    ("training/a", "class A:\n    import rich", "top of a module"),
    ("training/a", "def f():\n    import pickle", "pickle"),
    ("training/a", "import torch\nx = torch.load('a')", "unpickles"),
    ("training/a", "from torch import load", "unpickles"),
    ("training/a", "x = (", "does not parse"),
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
    ("training/a", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import transformers"),
    ("transfer/a", "from lorry.training import run"),
    ("bench/a", "import lorry\nfrom lorry import attach, training"),
    ("cli/main", "import typer\nfrom rich.table import Table\nimport lorry.bench"),
    ("__init__", "from lorry.core import sites\nfrom .merging import merge"),
    ("training/a", "'''No pickle, no torch.load().'''"),
]


@pytest.mark.parametrize(("module", "code"), ALLOWED)
def test_allowed(tmp_path: Path, module: str, code: str) -> None:
    assert problems(tmp_path, module, code) == []


def test_guard_covers_only_the_typing_branch(tmp_path: Path) -> None:
    code = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import rich\nelse:\n    import numpy\n"
    found = problems(tmp_path, "training/a", code)
    assert len(found) == 1
    assert "numpy" in found[0]


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
