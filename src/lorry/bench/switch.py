"""Switching between loaded adapters: the time must not depend on how many are loaded; PEFT's set_adapter beside it."""

from __future__ import annotations

import statistics
from typing import Any

import lorry
from lorry.bench._measure import interleaved, lines, llama, machine, threads


def run(
    rounds: int = 9,
    layers: int = 24,
    hidden: int = 64,
    inner: int = 172,
    rank: int = 8,
    most: int = 100,
    peer: bool = True,
) -> dict[str, Any]:
    """Measure one `lorry.activate` among 1, 10 and 100 adapters on a Llama of 168 sites."""
    model = llama(layers, hidden, inner)
    other: Any = None
    result: dict[str, Any] = {"machine": machine("cpu"), "loaded": {}}
    with threads(1):
        for count in (c for c in (1, 10, 100) if c <= most):
            for number in range(len(lorry.adapters(model)), count):
                lorry.attach(model, {"method": "lora", "rank": rank}, name=f"a{number}", activate=False).train(False)
            first, last = "a0", f"a{count - 1}"

            def switch(first: str = first, last: str = last) -> None:
                lorry.activate(model, first)
                lorry.activate(model, last)

            row = {"lorry_ms": statistics.median(interleaved({"s": switch}, rounds, repeat=50)["s"]) / 2 * 1e3}
            if peer:
                other = _filled(other, count, layers, hidden, inner, rank)

                def set_adapter(peer: Any = other, first: str = first, last: str = last) -> None:
                    peer.set_adapter(first)
                    peer.set_adapter(last)

                row["peft_ms"] = statistics.median(interleaved({"s": set_adapter}, 3, warm_up=1)["s"]) / 2 * 1e3
                row["ratio"] = row["peft_ms"] / row["lorry_ms"]
            result["loaded"][count] = row
    return result


def _filled(other: Any, count: int, layers: int, hidden: int, inner: int, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, target_modules="all-linear")
    if other is None:
        other = get_peft_model(llama(layers, hidden, inner), config, adapter_name="a0")
    for number in range(len(other.peft_config), count):
        other.add_adapter(f"a{number}", config)
    return other


def table(result: dict[str, Any]) -> Any:
    """Return milliseconds of a switch, and how many times longer PEFT takes."""
    rows = [(str(n), r["lorry_ms"], r.get("peft_ms", "-"), r.get("ratio", "-")) for n, r in result["loaded"].items()]
    return lines(f"Switching, {result['machine']}", ("loaded", "lorry ms", "peft ms", "peft / lorry"), rows)
