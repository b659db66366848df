"""Weights on disk: a folder that appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorry.core.errors import CheckpointError
from lorry.core.life.adapter import Adapter
from lorry.formats.reader import open_adapter
from lorry.training.optim import optimizer_tensors

OPTIMIZER = "optimizer.safetensors"
FACTS = "training.json"


def written(final: Path, write: Callable[[Path], None]) -> int:
    """Let `write` fill a folder that takes its place when it is whole; returns its size in bytes.

    Raises
    ------
    CheckpointError
        The disk refuses.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=final.parent, prefix=".draft-"))
    except OSError as error:
        raise CheckpointError(f"Cannot write to {final.parent.name}: {error.strerror}.") from error
    try:
        write(draft)
        size = 0
        for path in sorted(draft.rglob("*")):
            if path.is_file():
                size += path.stat().st_size
                sync(path)
        draft.chmod(0o755)
        sync(draft)
        if final.exists():
            old = Path(tempfile.mkdtemp(dir=final.parent, prefix=".draft-"))
            os.replace(final, old / "old")
            os.replace(draft, final)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(draft, final)
        sync(final.parent)
        return size
    except OSError as error:
        raise CheckpointError(f"Cannot write {final.name}: {error.strerror}.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def clear_drafts(root: Path) -> None:
    """Remove what a process that was killed left half written."""
    for left in root.rglob(".draft-*"):
        remove(left)


def remove(path: Path) -> None:
    """Remove a file or a folder, as far as the system lets."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def save_training(adapter: Adapter, optimizer: torch.optim.Optimizer, facts: Mapping[str, Any], final: Path) -> int:
    """Write an adapter as a Lorry folder with the state of its optimizer; returns the size in bytes."""

    def write(draft: Path) -> None:
        adapter.save(draft)
        state = optimizer_tensors(optimizer, adapter)
        save_file({name: tensor.cpu().contiguous().clone() for name, tensor in state.items()}, draft / OPTIMIZER)
        (draft / FACTS).write_text(json.dumps(dict(facts)), encoding="utf-8")

    return written(final, write)


def save_sampler(adapter: Adapter, final: Path, format: str = "auto") -> int:
    """Write an adapter alone; returns the size in bytes."""
    return written(final, lambda draft: _only(adapter, draft, format))


def _only(adapter: Adapter, draft: Path, format: str) -> None:
    adapter.save(draft, format=format)


def copy_folder(source: Path, final: Path) -> int:
    """Copy a folder; returns the size in bytes."""
    return written(final, lambda draft: _copied(source, draft))


def _copied(source: Path, draft: Path) -> None:
    shutil.copytree(source, draft, dirs_exist_ok=True)


def read_adapter(adapter: Adapter, folder: Path) -> None:
    """Copy a folder's tensors into an adapter with the same sites and ranks, all of them or none.

    Raises
    ------
    CheckpointError
        The folder cannot be read, or does not fit.
    """
    with open_adapter(folder) as file:
        found = {f"{path}.{name}": tensor for path in file.sites for name, tensor in file.tensors(path).items()}
    fill_adapter(adapter, found)


def fill_adapter(adapter: Adapter, found: Mapping[str, Tensor]) -> None:
    """Copy tensors into an adapter, by ``PATH.TENSOR``, all of them or none; raise `CheckpointError` if they differ."""
    own = {name: tensor for name, tensor, _ in adapter.named_tensors()}
    wrong = sorted(own.keys() ^ found.keys()) or sorted(n for n in own if own[n].shape != found[n].shape)
    if wrong:
        raise CheckpointError(
            f"The saved weights do not fit this model: {len(wrong)} tensors differ, first '{wrong[0]}'. Create a model "
            "with the rank and the modules that they were trained with."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(found[name])


def read_optimizer(folder: Path) -> dict[str, Tensor]:
    """Return the saved state of an optimizer; see `lorry.training.optim.load_optimizer`."""
    try:
        return load_file(folder / OPTIMIZER)
    except (OSError, SafetensorError) as error:
        raise CheckpointError("These weights were saved without the state of the optimizer.") from error


def sync(path: Path) -> None:
    """Let a file or folder be on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
