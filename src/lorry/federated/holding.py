"""Adapters of a federation on a model: the start that all share, what was received, and the offset."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lorry.core.life.adapter import Adapter
from lorry.core.life.api import attach
from lorry.core.method.base import Method
from lorry.core.method.start import mix_seed
from lorry.merging.factors import Factors
from lorry.methods.lora import LoRA

from .options import Federation

_OFFSET = "federated-offset"


def method_of(options: Federation, rank: int) -> Method:
    """Return the job's method at a client's rank."""
    method = options.make_job().make_method()
    return method if getattr(method, "rank", rank) == rank else method.with_options(rank=rank)


@contextmanager
def start(model: nn.Module, options: Federation, rank: int, seed: int, name: str) -> Iterator[Adapter]:
    """Attach an adapter at the start that a seed means, the same on every machine; it is detached at the end.

    With ``freeze: B`` the factors change places: B is drawn and A begins at zero.
    """
    job = options.make_job()
    adapter = attach(
        model,
        method_of(options, rank),
        targets=job.targets,
        exclude=job.exclude,
        layers=job.layers,
        train_also=modules_of(options),
        name=name,
        seed=seed,
        activate=False,
    )
    try:
        if options.freeze == "B":
            for path in pair_paths(adapter):
                home = adapter.entries[path].home.tensors()
                bound = 1 / math.sqrt(home["B"].shape[-1])
                generator = torch.Generator().manual_seed(mix_seed(seed, path, "B"))
                drawn = (2 * torch.rand(home["B"].shape, generator=generator) - 1) * bound
                with torch.no_grad():
                    home["B"].copy_(drawn)
                    home["A"].zero_()
        yield adapter
    finally:
        adapter.detach()


def pair_paths(adapter: Adapter) -> list[str]:
    """Return the sites at which the adapter is a pair of A and B."""
    return [path for path, entry in adapter.entries.items() if set(entry.home.tensors()) == {"A", "B"}]


def values(adapter: Adapter) -> dict[str, Tensor]:
    """Return copies of all tensors, float32 on the CPU."""
    return {name: t.detach().float().cpu().clone() for name, t, _ in adapter.named_tensors()}


def is_frozen(name: str, adapter: Adapter, options: Federation) -> bool:
    """Whether a tensor is never trained: the frozen factor of a pair, or what the method itself freezes."""
    path, _, factor = name.rpartition(".")
    return (factor == options.freeze and path in pair_paths(adapter)) or not _spec_trained(adapter, name)


def _spec_trained(adapter: Adapter, name: str) -> bool:
    return any(found == name and spec.trained for found, _, spec in adapter.named_tensors())


def sent_names(adapter: Adapter, options: Federation) -> list[str]:
    """Return the names of the tensors that are trained, and so sent."""
    return [name for name, _, _ in adapter.named_tensors() if not is_frozen(name, adapter, options)]


@torch.no_grad()
def load(adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Put received tensors in the place of the adapter's."""
    for name, tensor, _ in adapter.named_tensors():
        if name in tensors:
            tensor.copy_(tensors[name])


@contextmanager
def beside(model: nn.Module, offset: Mapping[str, Factors]) -> Iterator[str | None]:
    """Attach an offset, not active, and yield its name; None where there is none."""
    if not offset:
        yield None
        return
    adapter = attach_factors(model, offset, _OFFSET)
    try:
        yield adapter.name
    finally:
        adapter.detach()


def attach_factors(
    model: nn.Module,
    factors: Mapping[str, Factors],
    name: str,
    modules: Sequence[str] = (),
    extra: Mapping[str, Tensor] | None = None,
) -> Adapter:
    """Attach a plain LoRA that holds factors, scale 1 at every site, not active; `extra` fills whole modules."""
    ranks = {path: {"rank": f.rank, "alpha": float(f.rank)} for path, f in factors.items()}
    adapter = attach(
        model,
        LoRA(rank=1),
        targets=list(factors),
        site_options=ranks,
        train_also=modules,
        name=name,
        activate=False,
    )
    found = {f"{path}.{key}": getattr(f, key.lower()).float() for path, f in factors.items() for key in "AB"}
    load(adapter, {**found, **(extra or {})})
    adapter.train(False)
    return adapter


def modules_of(options: Federation) -> list[str]:
    """Return the modules that are trained whole."""
    modules = options.make_job().modules_to_save
    return [modules] if isinstance(modules, str) else list(modules)
