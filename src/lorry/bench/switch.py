"""Switching between loaded adapters: the time must not depend on how many are loaded; PEFT's set_adapter beside it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import lorry
from lorry.bench._crowd import Crowd, counts
from lorry.bench._measure import interleaved, lines, machine, threads
from lorry.bench._registry import register


def run(
    rounds: int = 9,
    layers: int = 24,
    hidden: int = 64,
    inner: int = 172,
    rank: int = 8,
    most: int = 100,
    peer: bool = True,
    peer_most: int = 10,
) -> dict[str, Any]:
    """Measure one `lorry.activate` among 1, 10 and 100 adapters on a Llama of 168 sites, PEFT with up to `peer_most`.

    Before PEFT's 100th adapter lie minutes of attaching the others.
    """
    crowd = Crowd(layers, hidden, inner, rank)
    result: dict[str, Any] = {"machine": machine("cpu"), "loaded": {}}
    with threads(1):
        for count in counts(most):
            crowd.fill(count)
            row = {"lorry_ms": _milliseconds(partial(lorry.activate, crowd.model), count, rounds, 50)}
            if peer and count <= peer_most:
                row["peft_ms"] = _milliseconds(crowd.peer(count).set_adapter, count, 3, 1)
                row["ratio"] = row["peft_ms"] / row["lorry_ms"]
            result["loaded"][count] = row
    return result


def _milliseconds(switch: Callable[[str], object], count: int, rounds: int, repeat: int) -> float:
    """Return the time of one switch, from going to the first adapter and to the last."""

    def both() -> None:
        switch("a0")
        switch(f"a{count - 1}")

    return statistics.median(interleaved({"both": both}, rounds, warm_up=1, repeat=repeat)["both"]) / 2 * 1e3


def table(result: dict[str, Any]) -> Any:
    """Return milliseconds of a switch, and how many times longer PEFT takes."""
    rows = [(str(n), r["lorry_ms"], r.get("peft_ms", "-"), r.get("ratio", "-")) for n, r in result["loaded"].items()]
    return lines(f"Switching, {result['machine']}", ("loaded", "lorry ms", "peft ms", "peft / lorry"), rows)


register("switch", run, table, help=__doc__)
