"""Serving many adapters: throughput as their number grows, beside PEFT and transformers, and two kinds of memory.

All requests come at once, with prompts and answers of different lengths, and adapters drawn evenly: the hard case, in
which hardly two requests share one. Nobody is asked for the same prompt twice.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from lorry.bench._measure import integers, interleaved, lines, machine, ratio_table, ratios, threads
from lorry.bench._registry import register
from lorry.bench._serve_load import Served, Shape, asked
from lorry.bench._serve_pools import pools
from lorry.core.errors import OptionError

#: With how many adapters each way of PEFT's is measured.
NAMES, SWITCH, MERGE = 32, 100, 16


def run(
    rounds: int = 5,
    layers: int = 2,
    hidden: int = 256,
    inner: int = 704,
    ranks: str = "4,8,16,32",
    requests: int = 64,
    inputs: str = "8,48",
    answers: str = "8,32",
    batch: int = 32,
    adapters: str = "5,100,2000",
    peers: bool = True,
    pool_bytes: int = 128 << 20,
    held: int = 8,
) -> dict[str, Any]:
    """Answer `requests` requests at once on a Llama of random weights: with different numbers of `adapters` of mixed
    `ranks` on all linear layers, and with the peers. `inputs` and `answers` are the least and most tokens, `batch` how
    many requests run together. The pools are compared by how many requests run at once, with memory for `held` adapters
    of the largest rank and as much again.
    """
    counts = integers(adapters)
    if not counts or min(counts) < 1:
        raise OptionError(f"Expected numbers of adapters of at least 1, found {adapters!r}.")
    shape = Shape(
        layers,
        hidden,
        inner,
        tuple(integers(ranks)),
        requests,
        _pair(inputs, "inputs"),
        _pair(answers, "answers"),
        batch,
    )
    cases: dict[str, Any] = {}
    with threads(1), ExitStack() as scope:
        own = sorted({0, *counts, *((NAMES, SWITCH, MERGE) if peers else ())})
        for count in own:
            cases[_name(count)] = Served(shape, count, pool_bytes=pool_bytes)
        if peers:
            cases |= _peers(shape, scope)
        seconds = interleaved(cases, rounds, warm_up=1)
        tokens = [sum(each.answer for each in asked(shape, 0, 2 + number)) for number in range(rounds)]
        result: dict[str, Any] = {
            "machine": machine("cpu"),
            "shape": dataclasses.asdict(shape),
            "rounds": rounds,
            "tokens per second": {
                name: statistics.median(t / s for t, s in zip(tokens, each, strict=True))
                for name, each in seconds.items()
            },
            "adapters": _only(ratios(seconds, _name(min(counts))), [_name(count) for count in (0, *counts)]),
            "pools": pools(shape, max(min(max(counts), 100), len(shape.ranks)), held, seed=0),
        }
        for peer, count in _AGAINST.items() if peers else ():
            result.setdefault("peers", {})[peer] = ratios(seconds, _name(count))[peer]
    return result


def _name(count: int) -> str:
    return f"{count} adapters" if count else "bare base"


#: Each peer, and with how many adapters the engine's throughput is held against it.
_AGAINST = {
    f"PEFT, adapter_names, {NAMES} adapters": NAMES,
    f"PEFT, set_adapter, {SWITCH} adapters": SWITCH,
    f"PEFT, merge and unmerge, {MERGE} adapters": MERGE,
    "transformers, continuous batching, bare base": 0,
    "transformers, padded batches, bare base": 0,
}


def _peers(shape: Shape, scope: ExitStack) -> dict[str, Any]:
    from lorry.bench import _serve_peers as ways

    made = [
        ways.peft_names(shape, NAMES),
        ways.peft_switch(shape, SWITCH),
        ways.peft_merge(shape, MERGE),
        scope.enter_context(ways.continuous_batching(shape)),
        ways.batched_generate(shape),
    ]
    return dict(zip(_AGAINST, made, strict=True))


def _pair(given: str, what: str) -> tuple[int, int]:
    found = integers(given)
    if len(found) != 2 or not 1 <= found[0] <= found[1]:
        raise OptionError(f"Expected '{what}' as least and most tokens, such as 8,48; found {given!r}.")
    return found[0], found[1]


def _only(found: Mapping[str, dict[str, float]], names: list[str]) -> dict[str, dict[str, float]]:
    return {name: found[name] for name in names}


def table(result: dict[str, Any]) -> Any:
    """Return throughput and ratios of time, and what ran at once in the pools."""
    from rich.console import Group

    shape, first = result["shape"], next(name for name in result["adapters"] if name != "bare base")
    title = (
        f"{shape['requests']} requests, width {shape['hidden']}, {shape['layers']} layers, "
        f"ranks {list(shape['ranks'])}, batch {shape['batch']}, {result['machine']}"
    )
    shown = [
        lines(
            f"Throughput: {title}", ("case", "tokens of answers per second"), list(result["tokens per second"].items())
        ),
        ratio_table("Time by the number of adapters", result["adapters"], first),
    ]
    if "peers" in result:
        shown.append(ratio_table("Time of peers", result["peers"], "Lorry with as many adapters"))
    rows = [
        (kind, name, each["at most"], each["on average"], each["steps"])
        for kind, ways in result["pools"].items()
        for name, each in ways.items()
    ]
    columns = ("burst", "pool", "running, at most", "on average", "steps")
    return Group(*shown, lines("Requests that run at once, in the same memory", columns, rows))


register("serve", run, table, help=__doc__)
