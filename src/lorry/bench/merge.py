"""Merging into the base and unmerging, against one in-place addmm for each weight, and PEFT."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

import lorry
from lorry.bench._measure import interleaved, llama, machine, ratio_table, ratios, threads
from lorry.bench._registry import register


def run(
    rounds: int = 9,
    layers: int = 4,
    hidden: int = 512,
    inner: int = 1408,
    rank: int = 16,
    dtype: str = "float32",
    peer: bool = True,
) -> dict[str, Any]:
    """Measure merge and unmerge; Lorry's merge keeps the original weights, so that unmerging restores every byte.

    *addmm to new memory* is the least that keeping the originals costs: the same sum, written beside them.
    """
    kind = getattr(torch, dtype)
    model = llama(layers, hidden, inner).to(kind)
    adapter = lorry.attach(model, {"method": "lora", "rank": rank})
    for parameter in adapter.parameters():
        parameter.data.normal_(0, 0.02)
    weights = [(e.site.stored, *e.tensors().values()) for e in adapter.entries.values()]
    cases: dict[str, Any] = {"addmm": lambda: _floor(weights)}
    merges: list[Any] = [(lambda: adapter.merge(safe=False), adapter.unmerge), (adapter.merge, adapter.unmerge)]
    names = ["lorry", "lorry safe"]
    kept: list[torch.Tensor] = []
    merges.append((lambda: kept.extend(torch.addmm(w, b.to(kind), a.to(kind)) for w, a, b in weights), kept.clear))
    names.append("addmm to new memory")
    if peer:
        other = _peft(llama(layers, hidden, inner).to(kind), rank)
        merges += [
            (other.merge_adapter, other.unmerge_adapter),
            (lambda: other.merge_adapter(safe_merge=True), other.unmerge_adapter),
        ]
        names += ["peft", "peft safe"]
    result: dict[str, Any] = {"machine": machine("cpu"), "dtype": dtype}
    with threads(1), torch.no_grad():
        seconds = interleaved(cases, rounds) | _in_turn(dict(zip(names, merges, strict=True)), rounds)
    result["ratios"] = ratios(seconds, "addmm")
    return result


def _floor(weights: list[tuple[torch.Tensor, ...]]) -> None:
    with torch.no_grad():
        for weight, a, b in weights:
            weight.addmm_(b.to(weight.dtype), a.to(weight.dtype), alpha=1e-9)


def _in_turn(merges: dict[str, tuple[Any, Any]], rounds: int) -> dict[str, list[float]]:
    """Merge and unmerge each in turn, so that all find the allocator in the same state, and drop two warm-up rounds."""
    seconds: dict[str, list[float]] = {f"{name} {what}": [] for name in merges for what in ("merge", "unmerge")}
    for _ in range(rounds + 2):
        for name, both in merges.items():
            for what, action in zip(("merge", "unmerge"), both, strict=True):
                start = time.process_time()
                action()
                seconds[f"{name} {what}"].append(time.process_time() - start)
    return {name: taken[2:] for name, taken in seconds.items()}


def _peft(model: nn.Module, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)).base_model


def table(result: dict[str, Any]) -> Any:
    """Return the ratios."""
    return ratio_table(
        f"Merging, {result['dtype']}, {result['machine']}", result["ratios"], "one addmm for each weight"
    )


register("merge", run, table, help=__doc__)
