"""One training step with every registered method: time, products counted in FLOPs, memory, beside the bare base and
plain LoRA.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

import lorry
from lorry.bench._cases import options, targets
from lorry.bench._count import flops, training_memory
from lorry.bench._measure import interleaved, lines, llama, machine, threads
from lorry.bench._registry import register
from lorry.bench._step import frozen, step
from lorry.core.errors import LorryError
from lorry.core.method.registry import METHODS


def run(
    only: Sequence[str] | str | None = None,
    rounds: int = 5,
    layers: int = 4,
    hidden: int = 512,
    inner: int = 1408,
    batch: int = 2,
    length: int = 256,
    rank: int = 8,
    dtype: str = "float32",
    device: str = "cpu",
    memory: bool = True,
) -> dict[str, Any]:
    """Measure forward and backward of the methods `only` (slugs; a text is split at commas), of all if not given.

    LoRA is always among them. On the CPU what training takes is counted too, if `memory`.

    Returns
    -------
    dict
        ``floor_flops``, and for each method ``time`` (median ratio to the frozen base, with ``least`` and ``most``),
        ``flops`` (the same ratio, counted), ``time_to_lora`` and ``flops_to_lora`` (what it adds to the base, as a
        ratio to what LoRA adds), ``over`` (the former by the latter; beyond 2 a method is slower than twice its share
        of FLOPs) and ``memory`` as in `training_memory`. ``left_out`` tells which methods do not fit this model.
    """
    kind = getattr(torch, dtype)
    torch.manual_seed(0)
    tokens = torch.randint(0, 512, (batch, length), device=device)

    def base() -> nn.Module:
        # in every case gradients pass the whole base, so that what a method adds is its own
        return frozen(llama(layers, hidden, inner).to(device, kind).train())

    models: dict[str, nn.Module] = {"floor": base()}
    left_out: dict[str, str] = {}
    for slug in _chosen(only):
        model = base()
        try:
            lorry.attach(model, options(slug, rank), targets=targets(slug))
        except LorryError as reason:
            left_out[slug] = str(reason)
            continue
        models[slug] = model
    with threads(1):
        cases = {name: partial(step, model, tokens) for name, model in models.items()}
        seconds = interleaved(cases, rounds, device, warm_up=1)
        counted = {name: flops(case) for name, case in cases.items()}
        found = {n: _row(n, seconds, counted) for n in models if n != "floor"}
        if memory and device == "cpu":
            for name, row in found.items():
                row["memory"] = training_memory(models[name], partial(step, models[name], tokens, keep=True))
        return {
            "machine": machine(device),
            "dtype": dtype,
            "tokens": batch * length,
            "floor_flops": counted["floor"],
            "methods": found,
            "left_out": left_out,
        }


def _chosen(only: Sequence[str] | str | None) -> list[str]:
    if only is None:
        return ["lora", *(m for m in METHODS if m != "lora")]
    names = only.split(",") if isinstance(only, str) else list(only)
    for name in names:
        METHODS.find(name)
    return ["lora", *(n for n in names if n != "lora")]


def _row(name: str, seconds: dict[str, list[float]], counted: dict[str, int]) -> dict[str, Any]:
    floor = seconds["floor"]
    ratios = [a / b for a, b in zip(seconds[name], floor, strict=True)]
    more = statistics.median(ratios) - 1
    lora = statistics.median(a / b for a, b in zip(seconds["lora"], floor, strict=True)) - 1
    lora_flops = counted["lora"] - counted["floor"]
    row: dict[str, Any] = {"time": more + 1, "least": min(ratios), "most": max(ratios)}
    row["flops"] = counted[name] / counted["floor"]
    row["time_to_lora"] = more / lora
    row["flops_to_lora"] = (counted[name] - counted["floor"]) / lora_flops
    row["over"] = row["time_to_lora"] / row["flops_to_lora"] if row["flops_to_lora"] > 0 else float("nan")
    return row


def table(result: dict[str, Any]) -> Any:
    """Return the methods, and why some are missing."""
    from rich.console import Group
    from rich.text import Text

    rows = []
    for name, found in result["methods"].items():
        memory = found.get("memory")
        held = [f"{memory[k] / 1e6:.2f}" for k in ("gradients", "optimizer", "kept", "peak")] if memory else ["-"] * 4
        count = f"{memory['trained']:,}" if memory else "-"
        rows.append(
            (
                name,
                f"{found['time']:.2f} ({found['least']:.2f} - {found['most']:.2f})",
                f"{found['flops']:.3f}",
                f"{found['time_to_lora']:.2f}",
                f"{found['flops_to_lora']:.2f}",
                f"{found['over']:.2f}" + (" *" if found["over"] > 2 else ""),
                count,
                *held,
            )
        )
    columns = ("method", "time", "FLOPs", "extra time", "extra FLOPs", "time / FLOPs", "trained")
    title = (
        f"{result['tokens']} tokens, {result['dtype']}, {result['machine']}: time and FLOPs to the frozen base, extra "
        "to plain LoRA's, bytes in MB; * slower than twice its share"
    )
    notes = [Text(f"{slug}: left out: {why}") for slug, why in result["left_out"].items()]
    return Group(lines(title, (*columns, "gradients", "optimizer", "kept", "peak"), rows), *notes)


register("methods", run, table, help=__doc__)
