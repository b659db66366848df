"""How many requests run at once in a unified pool, and in fixed halves of the same memory, when they come in bursts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lorry.bench._serve_load import Asked, Served, Shape, asked

#: Bursts: of adapters of the smallest rank, of the largest, of all, and of few adapters with long prompts.
BURSTS = ("small ranks", "large ranks", "mixed ranks", "few adapters, long prompts")


def _burst(shape: Shape, kind: str, adapters: int, seed: int) -> list[Asked]:
    """Return a burst; adapters go round, so that as many as possible are asked for at once."""
    if kind == BURSTS[3]:
        shape = dataclasses.replace(shape, inputs=(2 * shape.inputs[1], 4 * shape.inputs[1]))
    able = list(range(adapters))
    if kind in BURSTS[:2]:
        rank = (min if kind == BURSTS[0] else max)(shape.ranks)
        able = [number for number in able if shape.rank(number) == rank]
    elif kind == BURSTS[3]:
        able = able[: len(shape.ranks)]
    load = asked(shape, 1, seed)
    return [dataclasses.replace(each, adapter=able[place % len(able)]) for place, each in enumerate(load)]


def run_burst(served: Served, load: Sequence[Asked]) -> dict[str, Any]:
    """Answer a burst; return how many ran at once, at most and on average, and how many steps it took."""
    for request in served.requests(load):
        served.engine.submit(request)
    running = []
    while not served.engine.idle:
        served.engine.step()
        running.append(served.engine.stats().running)
    return {"at most": max(running), "on average": sum(running) / len(running), "steps": len(running)}


def pools(shape: Shape, adapters: int, held: int, seed: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Return for each burst what became of it in either pool, whose memory is for so many adapters of the largest rank,
    and as much again.
    """
    shape = dataclasses.replace(shape, batch=shape.requests)
    largest = max(range(min(adapters, len(shape.ranks))), key=shape.rank)
    probe = Served(shape, largest + 1)
    size = next(each.bytes for each in probe.engine.adapters() if each.name == f"a{largest}")
    memory = 2 * held * (size + 4096)  # a slot is a little larger than the adapter
    found: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in BURSTS}
    for name, options in (("unified", {"pool": "unified"}), ("halves", {"pool": "slots", "slots": held})):
        served = Served(shape, adapters, pool_bytes=memory, **options)
        for kind in BURSTS:
            found[kind][name] = run_burst(served, _burst(shape, kind, adapters, seed))
    return found
