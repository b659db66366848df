"""Pocket skills: adapters trained together on the pocket model, for as long as a study needs them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lorry
from lorry import pocket
from lorry.core.life.adapter import Adapter
from lorry.training import Fleet, Job

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
        learning_rate=rate,
        schedule="cosine",
        seed=seed,
        **more,
    )


@contextmanager
def trained(jobs: Sequence[Job], model: Any = None) -> Iterator[tuple[Any, Any, dict[str, Adapter]]]:
    """Train jobs together on the pocket model; gives model, tokenizer and adapters, none of them active.

    Parameters
    ----------
    jobs
        With names of their own.
    model
        A pocket model to train on; a fresh one if not given. The adapters leave it afterwards.
    """
    fresh, tokenizer = pocket.load()
    base = fresh if model is None else model
    with tempfile.TemporaryDirectory() as folder:
        result = Fleet(base, tokenizer, jobs, folder, progress=False).train()
        failed = [one["name"] for one in result.report["jobs"] if one["status"].startswith("failed")]
        if failed:
            raise RuntimeError(f"Training of {failed} failed.")
        lorry.activate(base, None)
        try:
            yield base, tokenizer, result.adapters
        finally:
            for adapter in result.adapters.values():
                adapter.detach()
