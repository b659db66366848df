"""PEFT's adapters whose start changed the base, made plain LoRA again by what was saved of them before training."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorry.core.errors import CheckpointError, some
from lorry.core.receipt import Receipt
from lorry.formats.folders import PEFT_CONFIG, TENSORS, inside, located, write_folder
from lorry.formats.peft_config import read_json
from lorry.formats.save import sealed
from lorry.formats.tensors import TensorFile

#: Starts that took ``scale · B0 A0`` out of the base weight, so that the pair describes what is missing there.
_LOW_RANK = ("pissa", "olora", "corda", "lora_ga")
#: Fields that say how the adapter started; an adapter that is plain LoRA has no use for them.
_STARTS = ("corda_config", "lora_ga_config", "eva_config", "loftq_config")


def with_initial(
    path: str | os.PathLike[str],
    initial: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = True,
) -> Receipt:
    """Make a plain LoRA of twice the rank from a PEFT folder that was saved unconverted, without a model or PEFT.

    The start took ``scale · B0 A0`` out of the base's weights, so on the base as it was the update is ``scale · (B A -
    B0 A0)``: ``[A; A0]`` and ``[B, -B0]``, exactly.

    Parameters
    ----------
    path
        The folder with the trained adapter.
    initial
        The folder that was saved of it before its first step.
    out
        The folder to write; load it with `lorry.load` or PEFT.
    overwrite
        Replace an adapter that lies at `out`.

    Returns
    -------
    Receipt
        How many tensors it holds at how many sites.

    Raises
    ------
    CheckpointError
        A folder is missing or no LoRA of PEFT's, the two do not belong together, or the start changed the base by more
        than a product (LoftQ); nothing is written then.
    """
    trained, values = _opened(path)
    before, initially = _opened(initial)
    start = str(values.get("init_lora_weights", True)).lower()
    if not start.startswith(_LOW_RANK):
        raise CheckpointError(
            f"'{path}' was trained with init_lora_weights='{start}', which did not take a product of its factors "
            f"out of the base; an initial adapter helps after {', '.join(_LOW_RANK)}."
        )
    _check_pair(trained, before, values, initially, (path, initial))
    tensors: dict[str, Tensor] = {}
    sites = 0
    for name, value in trained.items():
        if _is_factor(name, "A"):
            tensors[name], sites = torch.cat([value, before[name].to(value)], dim=0), sites + 1
        elif _is_factor(name, "B"):
            tensors[name] = torch.cat([value, -before[name].to(value)], dim=1)
        else:
            tensors[name] = value
    text = json.dumps(_doubled(values), indent=2, sort_keys=True).encode()
    write_folder(Path(out), {TENSORS: sealed(tensors)[0], PEFT_CONFIG: text}, overwrite=overwrite)
    note = f"{start} saved unconverted: what it took out of the base is in the second half of the rank"
    return Receipt("convert", Path(out).name, len(tensors), len(tensors), sites, "unknown", notes=(note,))


def _opened(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the config of a folder."""
    place = located(path)
    config = inside(place, PEFT_CONFIG) if place.is_dir() else None
    if config is None or inside(place, TENSORS) is None:
        raise CheckpointError(f"'{place}' is no folder of PEFT's: it lacks {PEFT_CONFIG} or {TENSORS}.")
    values = read_json(config)
    if str(values.get("peft_type", "LORA")).upper() != "LORA":
        raise CheckpointError(
            f"'{place}' is an adapter of PEFT's tuner {values['peft_type']}, which has no such start."
        )
    file = TensorFile(place / TENSORS)
    try:
        return {name: file.read(name) for name in file.places}, values
    finally:
        file.close()


def _is_factor(name: str, which: str) -> bool:
    return any(part in (f"lora_{which}", f"lora_embedding_{which}") for part in name.split("."))


def _check_pair(
    trained: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    values: Mapping[str, Any],
    initially: Mapping[str, Any],
    paths: tuple[str | os.PathLike[str], str | os.PathLike[str]],
) -> None:
    """Raise `CheckpointError` unless one adapter may be the other before training."""
    numbers = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
    differing = [n for n in numbers if (values.get(n) or 0) != (initially.get(n) or 0)]
    factors = [n for n in trained if _is_factor(n, "A") or _is_factor(n, "B")]
    strange = [n for n in factors if n not in before or before[n].shape != trained[n].shape]
    if differing or strange or not factors:
        raise CheckpointError(
            f"'{paths[1]}' is not the adapter of '{paths[0]}' before training: they differ in "
            f"{some(differing + strange)}. Give the folder that was saved of it before its first step."
        )


def _doubled(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config with twice the ranks, and alphas that keep the scale."""
    factor = math.sqrt(2) if values.get("use_rslora") else 2

    def alpha(value: float) -> float:
        return value * factor

    changed = dict(values)
    changed["r"] = 2 * int(values.get("r", 8))
    changed["lora_alpha"] = alpha(values.get("lora_alpha", 8))
    changed["rank_pattern"] = {k: 2 * int(v) for k, v in (values.get("rank_pattern") or {}).items()}
    changed["alpha_pattern"] = {k: alpha(v) for k, v in (values.get("alpha_pattern") or {}).items()}
    changed["init_lora_weights"] = True
    return {k: v for k, v in changed.items() if k not in _STARTS}
