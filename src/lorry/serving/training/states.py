"""A model as its training left it, in one file: written aside while training goes on."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorry.core.errors import CheckpointError
from lorry.core.life.adapter import Adapter
from lorry.serving.training.folders import fill_adapter, sync
from lorry.training.optim import optimizer_tensors

_WEIGHTS, _OPTIMIZER = "weights/", "optimizer/"


def snapshot(adapter: Adapter, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return copies of an adapter's tensors and of its optimizer's state, which later steps do not change."""
    found = {_WEIGHTS + name: tensor for name, tensor, _ in adapter.named_tensors()}
    found |= {_OPTIMIZER + name: tensor for name, tensor in optimizer_tensors(optimizer, adapter).items()}
    # cloned on their device, and contiguous, which the file wants
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format).cpu() for name, tensor in found.items()}


def write_state(tensors: Mapping[str, Tensor], facts: Mapping[str, object], final: Path) -> None:
    """Write a snapshot; the file is there whole, and on the disk, or not at all.

    Raises
    ------
    CheckpointError
        The disk refuses.
    """
    draft: Path | None = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=final.parent, prefix=".draft-")
        os.close(handle)
        draft = Path(name)
        save_file(dict(tensors), draft, metadata={"facts": json.dumps(dict(facts))})
        sync(draft)
        os.replace(draft, final)
        sync(final.parent)
    except (OSError, SafetensorError) as error:
        if draft is not None:
            draft.unlink(missing_ok=True)
        raise CheckpointError(f"The model's state {final.name} cannot be written ({error}).") from error


def read_state(adapter: Adapter, file: Path) -> dict[str, Tensor]:
    """Copy a state's tensors into an adapter, all of them or none; returns the optimizer's.

    Raises
    ------
    CheckpointError
        The file cannot be read, or does not fit.
    """
    found: dict[str, dict[str, Tensor]] = {_WEIGHTS: {}, _OPTIMIZER: {}}
    try:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():
                kind, _, rest = name.partition("/")
                found[f"{kind}/"][rest] = opened.get_tensor(name)
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"The model's state {file.name} cannot be read ({type(error).__name__}).") from error
    fill_adapter(adapter, found[_WEIGHTS])
    return found[_OPTIMIZER]
