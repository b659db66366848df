"""Fixtures for all tests. The environment is set before torch or transformers is imported by any of them."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

import lorry  # noqa: E402, F401 - before transformers, so that any build of torchvision can be imported

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # one, unless somebody asks for more

ROOT = Path(__file__).resolve().parents[1]
#: Optional real data and weights beside the checkout; tests that need them skip where they are absent.
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of optional real data and weights."""
    if not (SHARED / "data").is_dir():
        pytest.skip("no ../shared/data beside the checkout")
    return SHARED


@pytest.fixture(autouse=True)
def gradients_stay_on():
    """A mode that one test leaves behind would decide what the next ones see."""
    yield
    left = not torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert not left, "the test left gradients switched off"
