"""Roles that take turns on one growing text: four ways of sharing its cache, and attention over values in two parts.

A tool's words and a role's answer follow each other; the model has random weights and the roles' adapters one A at
values, so that every scheme can serve them. Answers have a fixed length, whatever they say.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import lorry
from lorry.bench._measure import clock, integers, interleaved, lines, llama, machine, ratios, threads
from lorry.bench._registry import register
from lorry.core.errors import OptionError
from lorry.kernels.split_attention import expanding_attention, split_attention
from lorry.serving.agents import POLICIES, Trajectory

#: What others are held against.
ALONE, WHOLE = "non-shared", "full-shared"
_VOCABULARY = 512


def run(
    rounds: int = 3,
    roles: int = 3,
    turns: int = 9,
    prompt: int = 512,
    observation: int = 256,
    answer: int = 8,
    layers: int = 4,
    hidden: int = 512,
    inner: int = 1408,
    rank: int = 8,
    lengths: str = "256,512,1024,2048,4096",
) -> dict[str, Any]:
    """Measure `turns` turns of `roles` roles: a tool adds `observation` tokens, a role `answer` tokens.

    After that, attention of one query over `lengths` keys whose values are made whole first (*expanding*), or
    multiplied in the other order (*reordered*).
    """
    if min(rounds, roles, turns, prompt, observation, answer, rank) < 1:
        raise OptionError("Rounds, roles, turns, prompt, observation, answer and rank must be at least 1.")
    total = prompt + turns * (observation + answer)
    model = llama(layers, hidden, inner, _VOCABULARY, max_position_embeddings=total + 1).eval()
    names = _adapted(model, roles, rank)
    text = torch.randint(0, _VOCABULARY, (total,), generator=torch.Generator().manual_seed(0)).tolist()
    numbers, forwarded = dict[str, int](), dict[str, int]()
    firsts: dict[str, list[float]] = {policy: [] for policy in POLICIES}

    def play(policy: str) -> None:
        trajectory = Trajectory(model, {name: name for name in names}, policy)
        trajectory.append(text[:prompt])
        first = []
        for turn in range(turns):
            start = prompt + turn * observation
            trajectory.append(text[start : start + observation])
            first.append(_turn(trajectory, names[turn % roles], answer))
        numbers[policy], forwarded[policy] = trajectory.numbers, trajectory.counts.total
        firsts[policy].append(statistics.fmean(first[1:] or first))  # the first turn is the same work for all

    with threads(1), torch.no_grad():
        seconds = interleaved({policy: partial(play, policy) for policy in POLICIES}, rounds, warm_up=1)
        shape = {length: _shape(length, max(hidden // 64, 1), rank, rounds) for length in integers(lengths)}
    faster, sooner = _inverse(seconds), _inverse({policy: each[1:] for policy, each in firsts.items()})
    found = {
        policy: {
            "throughput": faster[policy],
            "first_token": sooner[policy],
            "numbers": numbers[policy],
            "numbers_to_full": numbers[policy] / numbers[WHOLE],
            "numbers_to_alone": numbers[policy] / numbers[ALONE],
            "forwarded": forwarded[policy],
            "forwarded_to_alone": forwarded[policy] / forwarded[ALONE],
        }
        for policy in POLICIES
    }
    return {
        "machine": machine("cpu"), "roles": roles, "turns": turns, "tokens": total, "rank": rank,
        "schemes": found, "expanding_to_reordered": shape,
    }  # fmt: skip


def _turn(trajectory: Trajectory, role: str, answer: int) -> float:
    """Let a role answer; return the seconds until its first token."""
    start, came = clock("cpu"), []
    trajectory.turn(role, answer, on_token=lambda _: came.append(clock("cpu")))
    return came[0] - start


def _inverse(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return how many times faster than `ALONE` each is, round by round."""
    return {
        name: {"ratio": 1 / each["ratio"], "least": 1 / each["most"], "most": 1 / each["least"]}
        for name, each in ratios(seconds, ALONE).items()
    }


def _adapted(model: nn.Module, roles: int, rank: int) -> list[str]:
    """Attach an adapter for each role, on queries and values, with the first one's A at values."""
    names = [f"role{number}" for number in range(roles)]
    shared: dict[str, torch.Tensor] = {}
    for seed, name in enumerate(names):
        adapter = lorry.attach(model, {"method": "lora", "rank": rank}, targets=["*.q_proj", "*.v_proj"], name=name)
        draw = torch.Generator().manual_seed(seed)
        for path, entry in adapter.entries.items():
            tensors = entry.tensors()
            tensors["B"].data.copy_(torch.randn(tensors["B"].shape, generator=draw) * 0.02)
            if path.endswith("v_proj"):
                tensors["A"].data.copy_(shared.setdefault(path, tensors["A"].detach().clone()))
        adapter.train(False)
    return names


def _shape(keys: int, heads: int, rank: int, rounds: int) -> dict[str, float]:
    """Return the ratio of expanding to reordered attention of one query over so many keys."""
    draw = torch.Generator().manual_seed(keys)
    q, k, v = (torch.randn(1, heads, n, 64, generator=draw) for n in (1, keys, keys))
    low, up = torch.randn(1, keys, rank, generator=draw), torch.randn(heads * 64, rank, generator=draw)
    ways: dict[str, Callable[..., object]] = {"expanding": expanding_attention, "reordered": split_attention}
    cases = {name: partial(way, q, k, v, low, up, 0.125) for name, way in ways.items()}
    return ratios(interleaved(cases, max(rounds, 5), repeat=20), "reordered")["expanding"]


def table(result: dict[str, Any]) -> Any:
    """Return the schemes and the shape as rich tables."""
    from rich.console import Group

    rows = [
        (
            name,
            _spread(each["throughput"]),
            _spread(each["first_token"]),
            f"{each['numbers_to_alone']:.3f}",
            f"{each['numbers_to_full']:.3f}",
            f"{each['forwarded_to_alone']:.3f}",
        )
        for name, each in result["schemes"].items()
    ]
    columns = ("scheme", "throughput to non-shared", "sooner to the first token", "cache to non-shared",
               "cache to full-shared", "tokens run to non-shared")  # fmt: skip
    title = f"{result['roles']} roles, {result['turns']} turns, {result['tokens']} tokens, {result['machine']}"
    shape = [(str(keys), _spread(each)) for keys, each in result["expanding_to_reordered"].items()]
    return Group(
        lines(title, columns, rows),
        lines(f"One query, values of rank {result['rank']}", ("keys", "expanding to reordered"), shape),
    )


def _spread(each: dict[str, float]) -> str:
    return f"{each['ratio']:.2f} ({each['least']:.2f} - {each['most']:.2f})"


register("agents", run, table, help=__doc__)
