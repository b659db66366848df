"""Fusing into the base and unfusing, against one in-place addmm for each weight, and PEFT."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import lorry
from lorry.bench._measure import llama, machine, ratio_table, ratios, threads
from lorry.bench._registry import register
from lorry.core.life.adapter import Adapter

_WARM_UP = 2


def run(
    rounds: int = 9,
    layers: int = 4,
    hidden: int = 512,
    inner: int = 1408,
    rank: int = 16,
    dtype: str = "float32",
    peer: bool = True,
) -> dict[str, Any]:
    """Measure fusing and unfusing; Lorry keeps the original weights, so that unfusing restores every byte.

    *addmm to new memory* is the least that keeping the originals costs: the same sum, written beside them; with
    *keep=False* they are given up, and there is no unfusing.
    """
    kind = getattr(torch, dtype)
    model = llama(layers, hidden, inner).to(kind)
    adapter = lorry.attach(model, {"method": "lora", "rank": rank})
    for parameter in adapter.parameters():
        parameter.data.normal_(0, 0.02)
    weights = [(e.site.stored, *e.tensors().values()) for e in adapter.entries.values()]
    ways: list[Any] = [(lambda: _floor(weights), None)]
    ways += [(lambda: adapter.fuse(safe=False), adapter.unfuse), (adapter.fuse, adapter.unfuse)]
    names = ["addmm", "lorry", "lorry safe"]
    spare = _spare(llama(layers, hidden, inner).to(kind), rank, rounds + _WARM_UP)
    ways.append((lambda: next(spare).fuse(keep=False), None))
    names.append("lorry keep=False")
    kept: list[torch.Tensor] = []
    ways.append((lambda: kept.extend(torch.addmm(w, b.to(kind), a.to(kind)) for w, a, b in weights), kept.clear))
    names.append("addmm to new memory")
    if peer:
        other = _peft(llama(layers, hidden, inner).to(kind), rank)
        ways += [
            (other.merge_adapter, other.unmerge_adapter),
            (lambda: other.merge_adapter(safe_merge=True), other.unmerge_adapter),
        ]
        names += ["peft", "peft safe"]
    result: dict[str, Any] = {"machine": machine("cpu"), "dtype": dtype}
    with threads(1), torch.no_grad():
        seconds = _in_turn(dict(zip(names, ways, strict=True)), rounds)
    result["ratios"] = ratios(seconds, "addmm")
    return result


def _spare(model: nn.Module, rank: int, count: int) -> Iterator[Adapter]:
    """Return adapters of one model, each to be fused for good once."""
    options = {"method": "lora", "rank": rank}
    adapters = [lorry.attach(model, options, name=f"spare{n}", activate=False) for n in range(count)]
    for adapter in adapters:
        for parameter in adapter.parameters():
            parameter.data.normal_(0, 1e-4)
        adapter.train(False)
    return iter(adapters)


def _floor(weights: list[tuple[torch.Tensor, ...]]) -> None:
    with torch.no_grad():
        for weight, a, b in weights:
            weight.addmm_(b.to(weight.dtype), a.to(weight.dtype), alpha=1e-9)


def _in_turn(ways: dict[str, tuple[Any, Any]], rounds: int) -> dict[str, list[float]]:
    """Fuse and unfuse each in turn, so that all find the allocator in the same state, and drop the warm-up rounds."""
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds + _WARM_UP):
        for name, (fuse, unfuse) in ways.items():
            steps = {name: fuse} if unfuse is None else {f"{name} fuse": fuse, f"{name} unfuse": unfuse}
            for what, action in steps.items():
                start = time.process_time()
                action()
                seconds.setdefault(what, []).append(time.process_time() - start)
    return {name: taken[_WARM_UP:] for name, taken in seconds.items()}


def _peft(model: nn.Module, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)).base_model


def table(result: dict[str, Any]) -> Any:
    """Return the ratios."""
    return ratio_table(f"Fusing, {result['dtype']}, {result['machine']}", result["ratios"], "one addmm for each weight")


register("fuse", run, table, help=__doc__)
