"""How the tensors of an adapter start, and how they are laid out over its sites."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lorry.core.errors import AdapterError
from lorry.core.method.base import Method
from lorry.core.method.spec import Layout, TensorSpec
from lorry.core.sites.site import Site


def mix_seed(*parts: object) -> int:
    """Return a seed that depends on all parts and on nothing else."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "little")


def joint_layout(chosen: Sequence[tuple[Site, Method]]) -> Layout:
    """Return the layout of sites that may use different methods; each method lays out its own sites together."""
    groups: dict[Method, list[Site]] = {}
    last, group = None, list[Site]()
    for site, method in chosen:
        if method is not last:  # most often there is one method, and its hash is one of all its options
            last, group = method, groups.setdefault(method, [])
        group.append(site)
    joint = Layout({})
    for method, sites in groups.items():
        layout = method.layout(sites)
        doubled = joint.shared.keys() & layout.shared.keys()
        if doubled:
            raise AdapterError(
                f"Options that differ by site do not work where sites share tensors ({sorted(doubled)})."
            )
        joint.sites.update(layout.sites)
        joint.shared.update(layout.shared)
        joint.sharing.update(layout.sites if layout.shared else ())
    return joint


def fresh(spec: TensorSpec, seed: int, dtype: torch.dtype) -> Tensor:
    """Return a tensor as it starts: drawn in float32 on the CPU, whatever the target, so that a seed means one
    thing.
    """
    kind = spec.dtype or torch.float32
    tensor = torch.empty(spec.shape, dtype=kind)
    spec.init(tensor, torch.Generator().manual_seed(seed))
    return tensor if spec.dtype is not None else tensor.to(dtype)
