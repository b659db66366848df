"""Merging two rank-16 adapters against PEFT's add_weighted_adapter, for the same result, over layer widths.

Both sides start from two adapters attached to the same linear layer (scale 1, where PEFT's types are what they say)
and end with a third, attached one; Lorry's time includes its receipt. Runs are interleaved; ratios are of medians.
Peak memory is measured in fresh processes, as the growth of the resident set's high-water mark over its level before
the merge.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorry.bench._measure import integers
from lorry.bench._registry import register

#: Lorry's method and options -> PEFT's combination type, for results that are equal.
PAIRS: dict[str, tuple[str, dict[str, Any], str]] = {
    "svd": ("svd", {}, "svd"),
    "cat": ("cat", {}, "cat"),
    "linear": ("linear", {"form": "root"}, "linear"),
}
WEIGHTS = [0.7, 0.4]


class Layer(nn.Module):
    """One linear layer of random weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width, bias=False)


def _factors(width: int, rank: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        drawn: torch.Tensor = torch.randn(*shape, generator=generator) / width**0.5
        return drawn

    return [(draw(rank, width), draw(width, rank)) for _ in range(2)]


def _lorry(width: int, rank: int, seed: int, name: str) -> Callable[[], torch.Tensor]:
    """Return a function that merges anew at each call and returns the update."""
    import lorry
    from lorry.merging import merge

    method, options, _ = PAIRS[name]
    model = Layer(width)
    adapters = []
    for i, (a, b) in enumerate(_factors(width, rank, seed)):
        adapter = lorry.attach(
            model, {"method": "lora", "rank": rank}, targets=["proj"], name=f"a{i}", activate=False
        ).train(False)
        for key, value in (("A", a), ("B", b)):
            adapter.entries["proj"].home.replace(key, value)
        adapters.append(adapter)

    def run() -> Any:
        merged = merge(adapters, weights=WEIGHTS, method=method, options=options).attach(model, "both", activate=False)
        merged.detach()
        return merged.entries["proj"]

    return run


def _peft(width: int, rank: int, seed: int, name: str) -> Callable[[], torch.Tensor]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["proj"])
    model = get_peft_model(Layer(width), config, adapter_name="a0")
    model.add_adapter("a1", config)
    layer = model.base_model.model.proj
    with torch.no_grad():
        for i, (a, b) in enumerate(_factors(width, rank, seed)):
            layer.lora_A[f"a{i}"].weight.copy_(a)
            layer.lora_B[f"a{i}"].weight.copy_(b)

    def run() -> Any:
        if "both" in layer.lora_A:
            model.delete_adapter("both")
        model.add_weighted_adapter(["a0", "a1"], WEIGHTS, "both", combination_type=PAIRS[name][2])
        return layer

    return run


def _delta(result: Any) -> torch.Tensor:
    """Return the update of either side's result."""
    if hasattr(result, "get_delta_weight"):
        found: torch.Tensor = result.get_delta_weight("both")
        return found.detach()
    update: torch.Tensor = result.delta()
    return update


_SIDES = {"lorry": _lorry, "peft": _peft}


def _status(field: str) -> int:
    """Return a field of the process's status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0


def _peak(side: str, width: int, rank: int, seed: int, name: str, threads: int, queue: Any) -> None:
    """Put the peak of one merge's memory, in bytes, after a small merge has loaded all code."""
    torch.set_num_threads(threads)
    try:
        _SIDES[side](64, min(rank, 16), seed, name)()
        run = _SIDES[side](width, rank, seed, name)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        run()
        queue.put(_status("VmHWM") - before)
    except OSError:
        queue.put(None)


def _peak_of(side: str, width: int, rank: int, seed: int, name: str, threads: int) -> int | None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(side, width, rank, seed, name, threads, queue))
    process.start()
    process.join()
    return queue.get() if process.exitcode == 0 else None


def run(
    widths: Sequence[int] | str | int = (1024, 2048, 4096),
    rank: int = 16,
    types: Sequence[str] | str = ("svd", "cat", "linear"),
    repeats: int = 5,
    peer_seconds: float = 120.0,
    threads: int = 1,
    seed: int = 0,
    memory: bool = True,
) -> dict[str, Any]:
    """Measure both sides.

    Parameters
    ----------
    widths, rank, types
        What is merged; texts are split at commas.
    repeats
        Runs of each side; the peer stops earlier once it has used `peer_seconds`, after at least one timed run.
    peer_seconds
        See `repeats`.
    threads, seed
        Of torch, and of the factors.
    memory
        Measure peak memory too.
    """
    widths = integers(widths)
    types = types.split(",") if isinstance(types, str) else types
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        cases = [_case(t, w, rank, repeats, peer_seconds, seed) for t in types for w in widths]
    finally:
        torch.set_num_threads(before)
    if memory:
        for case in cases:
            for side in _SIDES:
                case[f"{side}_peak_bytes"] = _peak_of(side, case["width"], rank, seed, case["type"], threads)
    return {"rank": rank, "threads": threads, "torch": torch.__version__, "peft": _version(), "cases": cases}


def _version() -> str:
    from importlib.metadata import version

    return version("peft")


def _case(name: str, width: int, rank: int, repeats: int, budget: float, seed: int) -> dict[str, Any]:
    runs = {side: make(width, rank, seed, name) for side, make in _SIDES.items()}
    results = {
        "lorry": runs["lorry"]()
    }  # a first, untimed run of the fast side; the peer's slow types have no cold start to speak of
    times: dict[str, list[float]] = {side: [] for side in runs}
    for _ in range(repeats):
        for side, call in runs.items():
            if side == "peft" and sum(times[side]) > budget:
                continue
            start = time.process_time()
            results[side] = call()
            times[side].append(time.process_time() - start)
    ours, theirs = _delta(results["lorry"]), _delta(results["peft"])
    medians = {side: statistics.median(values) for side, values in times.items()}
    return {
        "type": name,
        "width": width,
        "ratio": medians["peft"] / medians["lorry"],
        "difference": float((ours - theirs).norm() / ours.norm()),
        **{f"{side}_seconds": medians[side] for side in runs},
        **{f"{side}_spread": (min(times[side]), max(times[side])) for side in runs},
        **{f"{side}_runs": len(times[side]) for side in runs},
    }


def table(result: dict[str, Any]) -> Any:
    """Return the result as a table for the terminal."""
    from rich.table import Table

    shown = Table(title=f"two rank-{result['rank']} adapters, {result['threads']} thread(s), PEFT {result['peft']}")
    for column in ("type", "width", "lorry", "peft", "ratio", "difference", "lorry peak", "peft peak"):
        shown.add_column(column, justify="right")
    for case in result["cases"]:
        peaks = [f"{p / 2**20:.1f} MiB" if (p := case.get(f"{s}_peak_bytes")) is not None else "-" for s in _SIDES]
        shown.add_row(
            case["type"],
            str(case["width"]),
            f"{case['lorry_seconds'] * 1e3:.1f} ms",
            f"{case['peft_seconds'] * 1e3:.1f} ms",
            f"{case['ratio']:.1f}x",
            f"{case['difference']:.1e}",
            *peaks,
        )
    return shown


register("merge-adapters", run, table, help=__doc__)
