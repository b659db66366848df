"""B-LoRA: style and content of one picture as two halves of one adapter (arXiv 2403.14572).

A LoRA on two blocks of the network is trained jointly on one picture. Afterwards either half stands alone: the
content half restyled by words, the style half on other things, or halves of different pictures together.

    adapter = attach(pipeline.unet)          # then train it on one picture, with the prompt "A [v]"
    halves = split(adapter)                  # {"content": ..., "style": ...}
    compose({"content": halves["content"], "style": other["style"]}).save("mixed")

The blocks are those that the authors found in SDXL; other networks must be probed for theirs (`lorry probe`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from lorry.core.errors import OptionError, some
from lorry.core.life import api
from lorry.core.life.adapter import Adapter
from lorry.core.method.start import mix_seed
from lorry.formats.file import AdapterFile
from lorry.formats.regroup import part_of, union
from lorry.formats.snapshot import as_file

#: The blocks of SDXL's U-Net: the fourth and the fifth of its six middle ones.
BLOCKS = {"content": "up_blocks.0.attentions.0", "style": "up_blocks.0.attentions.1"}
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
PROMPT = "A [v]"


def attach(
    network: nn.Module,
    blocks: Mapping[str, str] | None = None,
    *,
    rank: int = 64,
    name: str = "b-lora",
    seed: int = 0,
) -> Adapter:
    """Attach a fresh LoRA to the attention of the blocks: A is drawn from N(0, 1/rank²), the scale is 1.

    Parameters
    ----------
    network
        A U-Net, or any network with these blocks.
    blocks
        What a half is called -> path of its block; `BLOCKS` if not given.

    Raises
    ------
    SiteError
        The network lacks a block, or a block has no attention with these projections.
    OptionError
        Two halves share a block.
    """
    blocks = _checked(blocks)
    targets = [f"{projection} in {block}" for block in blocks.values() for projection in PROJECTIONS]
    method = {"method": "lora", "rank": rank}
    adapter = api.attach(network, method, targets=targets, name=name, seed=seed)
    adapter.metadata["b-lora"] = {"blocks": dict(blocks)}
    with torch.no_grad():
        for path, entry in adapter.entries.items():
            start = torch.Generator().manual_seed(mix_seed(seed, path))
            a = entry.tensors()["A"]
            a.copy_(torch.randn(a.shape, generator=start) / rank)
    return adapter


def split(adapter: Adapter | AdapterFile, blocks: Mapping[str, str] | None = None) -> dict[str, AdapterFile]:
    """Return the halves of an adapter by name, each an adapter as data.

    Parameters
    ----------
    adapter
        On a model, or a file; not changed.
    blocks
        As in `attach`; if not given those that the adapter was trained with.

    Raises
    ------
    AdapterError
        A half is empty.
    """
    file = as_file(adapter)
    return {half: part_of(file, [block], half) for half, block in _checked(blocks or _known(file)).items()}


def compose(
    halves: Mapping[str, AdapterFile],
    scales: Mapping[str, float] | None = None,
    *,
    preset: Literal["linear", "released"] = "linear",
    name: str = "composed",
) -> AdapterFile:
    """Return halves of different pictures as one adapter.

    Parameters
    ----------
    halves
        From `split`; not changed. One half alone leaves the other block to the base.
    scales
        Half -> how strong it is, 1 if not given.
    preset
        ``linear``: the update is multiplied by the scale. ``released``: by its square, as the authors' program does,
        which multiplies both factors.

    Raises
    ------
    AdapterError, OptionError
        Two halves sit in one block, or a scale is for no half.
    """
    scales = dict(scales or {})
    stray = sorted(set(scales) - set(halves))
    if stray:
        raise OptionError(f"There is a scale for '{stray[0]}', but the halves are {some(halves)}.")
    if preset not in ("linear", "released"):
        raise OptionError(f"preset must be 'linear' or 'released', found {preset!r}.")
    scaled = dict(halves)
    for half, scale in scales.items():
        scaled[half] = part_of(halves[half], list(halves[half].sites))
        scaled[half].rescale(scale if preset == "linear" else scale**2)
    return union(scaled, name)


def _known(file: AdapterFile) -> Mapping[str, str]:
    for one in (file, *file.components.values()):
        found = one.metadata.get("b-lora", {})
        if isinstance(found, Mapping) and isinstance(found.get("blocks"), Mapping):
            return {str(half): str(block) for half, block in found["blocks"].items()}
    return BLOCKS


def _checked(blocks: Mapping[str, str] | None) -> Mapping[str, str]:
    blocks = BLOCKS if blocks is None else blocks
    for half, block in blocks.items():
        inside = [h for h, b in blocks.items() if h != half and (b == block or b.startswith(f"{block}."))]
        if inside:
            raise OptionError(f"'{half}' and '{inside[0]}' share the block '{block}'; halves must not overlap.")
    if not blocks:
        raise OptionError("Name at least one block.")
    return blocks
