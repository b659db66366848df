"""``lorry train --find-rate``: a sweep of learning rates for each job, in place of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorry.cli.output import note, out, print_json, table

if TYPE_CHECKING:
    from lorry.cli.run_file import RunFile
    from lorry.training.jobs import Job


def advise(run: RunFile, model: Any, jobs: Sequence[Job], as_json: bool) -> None:
    """Print which rate is best for each job, and the losses of all that were tried."""
    from lorry.cli.bases import load_tokenizer
    from lorry.training.find_rate import find_rate

    tokenizer = load_tokenizer(run.base)
    found = {}
    for job in jobs:
        note(f"trying learning rates for '{job.name}'")
        folder = Path(run.out) / "rates" / job.name
        options: dict[str, Any] = {
            "max_pad_ratio": run.max_pad_ratio,
            "max_tokens": run.max_tokens,
            "base_dropout": run.base_dropout,
        }
        found[job.name] = find_rate(model, tokenizer, job, folder, **options)
    if as_json:
        print_json({"jobs": {name: advice.to_dict() for name, advice in found.items()}})
        return
    for name, advice in found.items():
        rows = []
        for trial in advice.trials:
            losses = ["-" if value is None else f"{value:.4f}" for value in (trial.start, trial.loss)]
            rows.append((f"{trial.rate:g}", *losses, "best" if trial.rate == advice.rate else trial.status))
        columns = ("rate", "held-out loss before", f"after {advice.steps} steps", "")
        out().print(table(f"Learning rates of '{name}'", columns, rows, right=columns[:3]))
        out().print(
            f"{advice} Train with --learning-rate {advice.rate:g}.", markup=False, highlight=False, soft_wrap=True
        )
        if advice.picture:
            note(f"plot and table are in {Path(advice.picture).parent}")
