"""A retriever as a folder: an adapter with its projection head beside it, in one file that says how it attends."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import safetensors.torch
from torch import nn

from lorry.core.errors import CheckpointError, OptionError
from lorry.core.life.adapter import Adapter
from lorry.core.receipt import Receipt
from lorry.formats.file import AdapterFile
from lorry.formats.folders import inside
from lorry.formats.save import save_adapter
from lorry.formats.tensors import TensorFile, check_finite
from lorry.serving.modes.direction import Direction
from lorry.serving.modes.mode import Mode

PROJECTION = "projection.safetensors"
_FIELD = "lorry_mode"


def save_retriever(
    adapter: Adapter | AdapterFile,
    head: nn.Linear,
    path: str | os.PathLike[str],
    *,
    attention: str = "bidirectional",
    **options: Any,
) -> Receipt:
    """Write an adapter and the projection that was trained with it as one folder, in one step.

    Parameters
    ----------
    adapter
        As for `lorry.save`.
    head
        Linear, from the hidden size to the width of the token vectors.
    path
        The folder.
    attention
        ``bidirectional``, or ``causal`` for a retriever that was trained so.
    options
        Of `lorry.formats.save.save_adapter`.

    Raises
    ------
    CheckpointError
        A tensor is not finite, or the disk refuses.
    OptionError
        Another direction, or a head that is not linear.
    """
    if not isinstance(head, nn.Linear):
        raise OptionError(f"The head of a retriever is a torch.nn.Linear, found {type(head).__name__}.")
    tensors = {name: value.detach().cpu().contiguous() for name, value in head.named_parameters()}
    check_finite(tensors, PROJECTION)
    said = json.dumps({"attention": _direction(attention, PROJECTION)})
    blob = safetensors.torch.save(tensors, {_FIELD: said})
    return save_adapter(adapter, path, extra={PROJECTION: blob}, **options)


def load_mode(path: str | os.PathLike[str], name: str = "retrieval", adapter: str | None = None) -> Mode:
    """Return the mode that a retriever's folder holds; the adapter itself is loaded by `lorry.load`.

    Parameters
    ----------
    path
        The folder.
    name
        Of the mode.
    adapter
        Under which the adapter is loaded; the mode's name if not given.

    Raises
    ------
    CheckpointError
        The folder holds no projection, or a broken one.
    """
    file = inside(Path(path).expanduser(), PROJECTION)
    if file is None:
        raise CheckpointError(
            f"'{path}' is no retriever: it holds no {PROJECTION}. Save one with lorry.serving.modes.save_retriever, or "
            "serve it as an adapter."
        )
    opened = TensorFile(file)
    try:
        tensors = {key: opened.read(key) for key in opened.places}
    finally:
        opened.close()
    attention: Any = _direction(_said(opened.metadata, file), file)
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if weight is None or weight.ndim != 2 or set(tensors) - {"weight", "bias"}:
        raise CheckpointError(f"'{file}' must hold a weight (width, hidden), and a bias or none; found {set(tensors)}.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise CheckpointError(f"'{file}': the bias is {tuple(bias.shape)}, but the weight {tuple(weight.shape)}.")
    check_finite(tensors, file)
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype, device="meta")
    head.load_state_dict(tensors, assign=True)
    head.requires_grad_(False)
    return Mode(name, adapter or name, attention, head, cache=False)


def _said(metadata: Mapping[str, str], file: Path) -> object:
    """Return the direction that a projection's file names."""
    try:
        said = json.loads(metadata.get(_FIELD, "null"))
    except ValueError:
        said = None
    if not isinstance(said, dict):
        raise CheckpointError(f"'{file}' does not say how its mode attends; save it with save_retriever.")
    return said.get("attention")


def _direction(value: object, where: object) -> str:
    if value not in get_args(Direction):
        raise OptionError(f"'{where}': attention is {' or '.join(get_args(Direction))}, found {value!r}.")
    return str(value)
