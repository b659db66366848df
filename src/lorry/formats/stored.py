"""What a file says of one site, before any model is known, and how its tensors become Lorry's own.

Lorry's A is ``(*lead, rank, in)`` and B ``(*lead, out, rank)`` at every kind of site. PEFT keeps a
convolution's A as ``(rank, channels, *kernel)``, and flattens a bank of E experts to A ``(E * rank, in)``
(experts outer) and B ``(out, rank * E)`` (experts inner).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorry.core.errors import CheckpointError
from lorry.core.method.base import Method
from lorry.core.sites.site import Site


@dataclass(slots=True)
class StoredSite:
    """An adapter at one site as a file has it.

    Attributes
    ----------
    path
        The site in the file's words: wrapper prefixes are stripped, kohya's underscores are not resolved.
    method
        The method there.
    keys
        Lorry's name of each tensor -> the file's.
    depth
        How many further parameters of the same module PEFT wrapped outside of this one.
    parameter
        Whether PEFT targeted a parameter of the module, so that rank and alpha are looked up by the parameter's name,
        which only the model tells.
    kind, shape, kernel
        Of the site, where the file tells (Lorry's own does); the kernel is a convolution's ``(channels, *size)``.
    component
        Which model of a pipeline it belongs to (``unet``, ``text_encoder``), where the file tells.
    values
        Tensors by Lorry's names and in Lorry's layout, in place of the file's: of an adapter that was edited, or
        that never was a file.
    unsaved
        Names among them that are rebuilt from the seed and never written.
    site
        The place in a model, for an adapter that was taken from one.
    """

    path: str
    method: Method
    keys: dict[str, str] = field(default_factory=dict)
    depth: int = 0
    kind: str | None = None
    shape: tuple[int, ...] | None = None
    kernel: tuple[int, ...] = ()
    component: str = ""
    values: dict[str, Tensor] | None = None
    unsaved: frozenset[str] = frozenset()
    site: Site | None = None
    parameter: bool = False


def canonical(name: str, value: Tensor, kind: str | None, lead: tuple[int, ...]) -> Tensor:
    """Return a tensor of PEFT's, kohya's or diffusers' layout in Lorry's; what does not fit is left for the
    check of shapes.
    """
    if lead:
        count = lead[0]
        if name == "A" and value.ndim == 2 and value.shape[0] % count == 0:
            return value.reshape(count, -1, value.shape[1])
        if name == "B" and value.ndim == 2 and value.shape[1] % count == 0:
            return value.reshape(value.shape[0], -1, count).permute(2, 0, 1)
        return value
    if value.ndim > 2:
        if name == "magnitude" or (name == "B" and value.numel() == value.shape[0] * value.shape[1]):
            return value.reshape(-1) if name == "magnitude" else value.reshape(value.shape[0], value.shape[1])
        if name == "A" and (kind in (None, "conv") or value.numel() == value.shape[0] * value.shape[1]):
            return value.flatten(1)
    return value


def doubled_by_peft(path: str, kind: str | None) -> bool:
    """Whether PEFT adds the update at this site `OUT_PROJ_TIMES`."""
    return kind == "qkv" and path.endswith(".out_proj")


def foreign(name: str, value: Tensor, kind: str, kernel: Sequence[int]) -> Tensor:
    """Return a tensor of Lorry's in PEFT's layout; `kernel` is ``(channels, *kernel size)`` of a
    convolution.
    """
    if kind == "experts":
        if name == "A":
            return value.reshape(-1, value.shape[-1])
        return value.permute(1, 2, 0).reshape(value.shape[1], -1)
    if kind == "conv":
        if name == "A":
            return value.reshape(value.shape[0], *kernel)
        ones = (1,) * (len(kernel) - 1)
        return value.reshape(1, -1, *ones) if name == "magnitude" else value.reshape(*value.shape, *ones)
    return value


def peft_modules(sites: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return for each site ``(path, kind)`` the module under which PEFT keeps its tensors.

    PEFT wraps the parameters of one module from the first to the last, so the last one is outermost and the
    others lie under a ``base_layer`` each. It reaches the output projection of an attention module through
    the wrapper of the packed weight.
    """
    banks: dict[str, list[str]] = {}
    for path, kind in sites:
        if kind == "experts":
            banks.setdefault(path.rpartition(".")[0], []).append(path)
    modules = {}
    for path, kind in sites:
        owner = path.rpartition(".")[0]
        if kind == "experts":
            modules[path] = owner + ".base_layer" * (len(banks[owner]) - 1 - banks[owner].index(path))
        elif kind == "qkv":
            modules[path] = owner if path.endswith(".in_proj_weight") else f"{owner}.base_layer.out_proj"
        else:
            modules[path] = path
    return modules


#: Lorry's tensor name -> PEFT's, for embeddings and for everything else.
PEFT_NAMES = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
PEFT_EMBEDDING = {"A": "lora_embedding_A", "B": "lora_embedding_B", "magnitude": "lora_magnitude_vector"}
_READ = {
    "lora_A": "A",
    "lora_B": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "magnitude",
}
PREFIX = "base_model.model."
#: What a bias of lora_B is called until it is bound to a model.
LORA_BIAS = "lora_bias"
#: PEFT 0.21 adds the update of an attention module's output projection twice: it merges it itself and lets
#: the inner layer merge it too. So that outputs are equal, B is halved there on writing, doubled on reading.
OUT_PROJ_TIMES = 2.0


@dataclass
class PeftKeys:
    """The keys of a PEFT file, sorted.

    Attributes
    ----------
    sites
        ``(module, depth)`` -> Lorry's tensor name -> key.
    whole
        Parameter path -> key, for modules that were trained or saved whole.
    """

    sites: dict[tuple[str, int], dict[str, str]]
    whole: dict[str, str]


def sort_peft_keys(keys: Mapping[str, Any], where: str) -> PeftKeys:
    """Sort the keys of a PEFT file by site.

    Raises
    ------
    CheckpointError
        A key of a variant that Lorry does not carry, or two keys for one tensor.
    """
    found = PeftKeys({}, {})
    size = len(PREFIX)
    for key in keys:
        path = key[size:] if key.startswith(PREFIX) else key
        module, mark, tail = path.rpartition(".lora_")
        if not mark:
            found.whole[path.removesuffix(".modules_to_save")] = key
            continue
        first, _, rest = tail.partition(".")
        name = _READ.get("lora_" + first)
        if name == "B" and rest == "bias":
            name = LORA_BIAS
        elif name is None or rest.endswith("bias"):
            raise CheckpointError(
                f"'{where}' holds the tensor '{key}', which belongs to a variant of LoRA that Lorry does "
                f"not carry. Known are {', '.join(_READ)}, with a bias of lora_B alone."
            )
        depth = 0
        if "base_layer" in module:
            while module.endswith(".base_layer"):
                module, depth = module[:-11], depth + 1
            module = module.replace(".base_layer.", ".")
        site = found.sites.setdefault((module, depth), {})
        if name in site:
            raise CheckpointError(f"'{where}' holds two tensors for {name} of '{module}': '{site[name]}' and '{key}'.")
        site[name] = key
    return found


def check_complete(keys: Mapping[str, str], path: str, wanted: Sequence[str], where: str) -> None:
    """Raise `CheckpointError` if a site lacks one of its tensors or has one too many."""
    missing = [n for n in wanted if n not in keys]
    if missing:
        raise CheckpointError(
            f"'{where}' lacks {' and '.join(missing)} of '{path}', though it holds "
            f"{', '.join(sorted(keys.values()))}. The file is incomplete; save it again."
        )
    surplus = [key for name, key in keys.items() if name not in wanted]
    if surplus:
        raise CheckpointError(f"'{where}' holds {', '.join(surplus)}, which the method at '{path}' does not have.")


def unfolded_mid(down: Tensor, mid: Tensor) -> Tensor:
    """Return A ``(rank, channels, *kernel)`` of a convolution in three steps: pointwise `down`, `mid` over
    the kernel.
    """
    exact = torch.promote_types(down.dtype, torch.float32)
    return torch.einsum("rs...,sc->rc...", mid.to(exact), down.flatten(1).to(exact)).to(down.dtype)
