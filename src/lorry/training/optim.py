"""Optimizers of jobs: chosen by name, grouped by rate, clipped and saved each on its own."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.errors import OptionError, near_misses
from lorry.core.life.adapter import Adapter
from lorry.core.registry import Registry

from .jobs import Job

#: Optimizers by name beside those of ``torch.optim``; classes that are called as these are.
OPTIMIZERS: Registry[type[torch.optim.Optimizer]] = Registry("optimizer")
# LBFGS wants the loss again within a step, SparseAdam wants sparse gradients: neither fits a joint pass.
_UNFIT = ("LBFGS", "SparseAdam")


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """Return the optimizer that is registered under this name, or else the class in ``torch.optim``, whatever its case.

    Raises
    ------
    OptionError
        There is none (with near misses), or it does not fit a joint pass.
    """
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    base = torch.optim.Optimizer
    known = {
        n.lower(): cls
        for n, cls in vars(torch.optim).items()
        if inspect.isclass(cls) and issubclass(cls, base) and cls is not base and n not in _UNFIT
    }
    key = name.lower().replace("_", "").replace("-", "")
    if key not in known:
        raise OptionError(
            f"There is no optimizer '{name}'.{near_misses(key, [*known, *OPTIMIZERS])} There are: "
            f"{', '.join(sorted([*known, *OPTIMIZERS]))}."
        )
    return known[key]


def rate_groups(adapter: Adapter) -> dict[float, list[tuple[str, nn.Parameter]]]:
    """Return the trained parameters by the factor that their method gives their rate (LoRA+), with their names."""
    groups: dict[float, list[tuple[str, nn.Parameter]]] = {}
    for prefix, home in adapter.homes():
        method = adapter.entries[prefix].method if prefix in adapter.entries else adapter.method
        for name, tensor in home.tensors().items():
            if home.specs[name].trained and isinstance(tensor, nn.Parameter):
                factor = float(method.rate_factors.get(name, 1.0))
                groups.setdefault(factor, []).append((f"{prefix}.{name}", tensor))
    return groups


def make_optimizer(job: Job, adapter: Adapter) -> torch.optim.Optimizer:
    """Return the job's optimizer over its adapter's parameters; each group keeps its rate factor as ``factor``.

    Raises
    ------
    OptionError
        The optimizer is unknown, or lacks an option that the job sets.
    """
    cls = optimizer_class(job.optimizer)
    accepted = inspect.signature(cls).parameters
    options: dict[str, Any] = {"lr": job.learning_rate, "weight_decay": job.weight_decay}
    for name, value, unset in (("betas", job.betas, None), ("momentum", job.momentum, 0.0)):
        if value != unset:
            if name not in accepted:
                raise OptionError(f"Job '{job.name}': the optimizer {cls.__name__} has no option '{name}'.")
            options[name] = value
    groups = [{"params": [p for _, p in named], "factor": factor} for factor, named in rate_groups(adapter).items()]
    if "weight_decay" not in accepted and not job.weight_decay:
        del options["weight_decay"]
    if "fused" in accepted and all(p.device.type in ("cpu", "cuda") for p in adapter.parameters()):
        options["fused"] = True  # one call for all tensors: a job has many small ones
    return cls(groups, **options)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of each group to `rate` times the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the gradients that there are."""
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def clip_gradients(grads: list[Tensor], largest: float | None) -> float:
    """Scale gradients in place so that their joint norm is at most `largest`; returns the norm before."""
    if not grads:
        return 0.0
    norm = torch.linalg.vector_norm(torch.stack([n.float() for n in torch._foreach_norm(grads)])).item()
    if largest is not None and largest < norm < float("inf"):
        torch._foreach_mul_(grads, largest / norm)
    return norm


def _indexed(optimizer: torch.optim.Optimizer, adapter: Adapter) -> Iterator[tuple[int, str]]:
    names = {id(p): name for name, p in adapter.named_parameters()}
    every = (p for group in optimizer.param_groups for p in group["params"])
    return ((i, names[id(p)]) for i, p in enumerate(every))


def optimizer_tensors(optimizer: torch.optim.Optimizer, adapter: Adapter) -> dict[str, Tensor]:
    """Return the optimizer's state as tensors named ``PARAMETER/KEY``; a plain number becomes a tensor."""
    state = optimizer.state_dict()["state"]
    tensors = {}
    for index, name in _indexed(optimizer, adapter):
        for key, value in state.get(index, {}).items():
            if value is not None:
                tensors[f"{name}/{key}"] = value.detach() if isinstance(value, Tensor) else torch.tensor(value)
    return tensors


def load_optimizer(optimizer: torch.optim.Optimizer, adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` returned."""
    by_name: dict[str, dict[str, Any]] = {}
    for full, value in tensors.items():
        name, _, key = full.rpartition("/")
        by_name.setdefault(name, {})[key] = value.clone()
    state = {index: by_name[name] for index, name in _indexed(optimizer, adapter) if name in by_name}
    if state:
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
