"""Pocket skills: adapters of all contenders, rates and seeds trained together on the pocket model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lorry
from lorry import pocket
from lorry.core.adapter import Adapter
from lorry.training import Fleet, Job

from .ledger import Setting
from .verdicts import Trial, chosen

#: Jobs that share a pass over the base.
TOGETHER = 8
ROWS = 32


def job(
    name: str,
    method: Any,
    skills: str | Sequence[str],
    steps: int,
    rate: float,
    seed: int,
    rows: int = ROWS,
    **more: Any,
) -> Job:
    """A job on the words of one or several skills in equal shares."""
    wanted = [skills] if isinstance(skills, str) else list(skills)
    count = -(-steps * rows // len(wanted))
    lines = [line for skill in wanted for line in pocket.examples(skill, "train", min(count, 3200), seed)]
    return Job(
        name=name,
        data=[{"prompt": line.prompt, "completion": line.answer} for line in lines],
        method=method,
        objective="completion",
        steps=steps,
        batch_size=rows,
        rate=rate,
        schedule="cosine",
        seed=seed,
        **more,
    )


@contextmanager
def trained(jobs: Sequence[Job], model: Any = None) -> Iterator[tuple[Any, Any, dict[str, Adapter]]]:
    """Train jobs together on the pocket model; gives model, tokenizer and adapters, none of them active.

    Args:
        jobs: with names of their own.
        model: a pocket model to train on; a fresh one if not given. The adapters leave it afterwards.
    """
    fresh, tokenizer = pocket.load()
    base = fresh if model is None else model
    with tempfile.TemporaryDirectory() as folder:
        result = Fleet(base, tokenizer, jobs, folder, progress=False).train()
        failed = [one["name"] for one in result.report["jobs"] if one["status"].startswith("failed")]
        if failed:
            raise RuntimeError(f"training of {failed} failed")
        lorry.activate(base, None)
        try:
            yield base, tokenizer, result.adapters
        finally:
            for adapter in result.adapters.values():
                adapter.detach()


def score(model: Any, tokenizer: Any, skill: str, count: int, validation: bool = False) -> float:
    """Exact match on test words with whatever is active; validation words are another draw, none of them test words."""
    lines = pocket.examples(skill, "test", 2 * count, seed=1)
    return pocket.exact_match(model, tokenizer, lines[count:] if validation else lines[:count])


def tune(
    contenders: Mapping[str, Any],
    skills: str | Sequence[str],
    rates: Sequence[float],
    setting: Setting,
    steps: int,
    words: int = 100,
) -> Trial:
    """Train every contender at every rate with every seed on skills, and keep each one's best rate.

    Args:
        contenders: name -> method, or mapping with its options.
        skills: one, or several that each contender has to learn together in one job.
        rates: the same grid for all.
        setting: seeds and effort.
        steps: of each job, at full effort.
        words: test words of each skill, and as many for the choice of the rate.

    Returns:
        Metrics ``validation`` and ``test``, means over the skills.
    """
    wanted = [skills] if isinstance(skills, str) else list(skills)
    grid = [(name, rate, seed) for seed in setting.seeds for rate in rates for name in contenders]
    results: dict[str, dict[float, list[dict[str, float]]]] = {name: {r: [] for r in rates} for name in contenders}
    model, _ = pocket.load()
    for start in range(0, len(grid), TOGETHER):
        part = grid[start : start + TOGETHER]
        jobs = [
            job(f"job{i}", contenders[name], wanted, setting.much(steps, 2), rate, seed)
            for i, (name, rate, seed) in enumerate(part)
        ]
        with trained(jobs, model) as (base, tokenizer, adapters):
            for i, (name, rate, _) in enumerate(part):
                lorry.activate(base, adapters[f"job{i}"].name)
                count = setting.much(words, 8)
                row = {
                    metric: sum(score(base, tokenizer, one, count, validation) for one in wanted) / len(wanted)
                    for metric, validation in (("validation", True), ("test", False))
                }
                lorry.activate(base, None)
                results[name][rate].append(row)
    return chosen(results)
