"""Flux adapters in the original model's names: fused projections are cut for the layers that diffusers has instead.

The original keeps query, key and value (in single blocks also the MLP's first layer) in one linear layer, diffusers in
one each. Rows of B belong to outputs, so they are cut, and every part has A whole: the updates are the fused one's rows
exactly. The last modulation says shift before scale, diffusers says scale before shift.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorry.core.errors import CheckpointError
from lorry.core.sites.site import Site
from lorry.formats.file import AdapterFile
from lorry.formats.stored import StoredSite

_DOUBLE = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_mod_lin": ("norm1_context.linear",),
}
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}
_AROUND = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer_linear": "proj_out",
    "final_layer_adaLN_modulation_1": "norm_out.linear",
}
_SHIFT_FIRST = "final_layer_adaLN_modulation_1"
_BLOCK = re.compile(r"(double|single)_blocks_(\d+)_(.+)")
NOTE = "names of the original Flux were read as diffusers', and fused projections were cut, exactly"


@dataclass(frozen=True)
class Renamed:
    """Where diffusers keeps a layer of the original.

    Attributes
    ----------
    paths
        The layers that hold its outputs, in order.
    swapped
        Whether diffusers has the second half of the outputs first.
    """

    paths: tuple[str, ...]
    swapped: bool = False


def in_diffusers(path: str) -> Renamed | None:
    """Return where diffusers keeps what the original Flux calls so, with dots or underscores; None for other names."""
    flat = path.replace(".", "_").removeprefix("diffusion_model_")
    if flat in _AROUND:
        return Renamed((_AROUND[flat],), swapped=flat == _SHIFT_FIRST)
    found = _BLOCK.fullmatch(flat)
    if found is None:
        return None
    double = found[1] == "double"
    block = f"{'' if double else 'single_'}transformer_blocks.{found[2]}"
    parts = (_DOUBLE if double else _SINGLE).get(found[3])
    return Renamed(tuple(f"{block}.{part}" for part in parts)) if parts else None


def placed(
    file: AdapterFile, part: StoredSite, find: Callable[[str], Site | None]
) -> list[tuple[StoredSite, Site]] | None:
    """Return what is stored for a layer of the original, cut for the layers of a diffusers model.

    Parameters
    ----------
    file
        Where its tensors are read.
    part
        The layer; not changed.
    find
        Gives the site of a path in diffusers' words.

    Returns
    -------
    Each part with its site; None if the name is no such layer's, or the model lacks one of its parts.

    Raises
    ------
    CheckpointError
        The sizes are not those of the model's layers.
    """
    renamed = in_diffusers(part.path)
    sites = [find(path) for path in renamed.paths] if renamed is not None else []
    known = [site for site in sites if site is not None]
    if renamed is None or len(known) < len(sites):
        return None
    values = file.site_tensors(part, known[0].kind.name, ())
    _check(file, part, known, values)
    if renamed.swapped:
        values = {n: t if n == "A" else torch.cat(t.chunk(2)[::-1]) for n, t in values.items()}
    cut: list[tuple[StoredSite, Site]] = []
    start = 0
    for site in known:
        stop = start + site.out_features
        # copies, since every site may be trained apart from the others
        own = {n: (t if n == "A" else t[start:stop]).clone() for n, t in values.items()}
        cut.append((replace(part, path=site.path, keys={}, values=own), site))
        start = stop
    return cut


def _check(file: AdapterFile, part: StoredSite, sites: list[Site], values: dict[str, Tensor]) -> None:
    """Raise `CheckpointError` unless the fused layer's sizes are those of the model's layers together."""
    outputs = [site.out_features for site in sites]
    inputs = sites[0].in_features
    found = (values["B"].shape[0], values["A"].shape[-1])
    if found == (sum(outputs), inputs):
        return
    names = ", ".join(f"'{site.path}' ({site.out_features})" for site in sites)
    raise CheckpointError(
        f"'{file.where}' has {found[1]} inputs and {found[0]} outputs at '{part.path}', but this model has {inputs} "
        f"inputs and {sum(outputs)} outputs there: {names}; nothing was loaded. It is an adapter for a Flux of another "
        "width."
    )
