"""By what an adapter is measured: what was asked for, or what it was trained with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorry.core.errors import OptionError


def training_facts(path: Path) -> dict[str, Any]:
    """Return what an adapter's metadata say about its training; nothing for adapters of other tools."""
    from lorry.formats.reader import open_adapter

    with open_adapter(path) as file:
        found = file.metadata.get("training")
    return dict(found) if isinstance(found, Mapping) else {}


def chosen_objective(name: str | None, options: Mapping[str, Any], facts: Sequence[Mapping[str, Any]]) -> Any:
    """Return the objective that was asked for, or else the one that the first adapter with a known
    one was trained with.
    """
    from lorry.training.jobs import Job
    from lorry.training.objectives import OBJECTIVES, make_objective

    if name is not None:
        return _measurable(make_objective(name, options))
    fields = {f.name for f in dataclasses.fields(Job)}
    for fact in facts:
        job = fact.get("job")
        if not isinstance(job, Mapping):
            continue
        kept: dict[str, Any] = {k: job[k] for k in ("objective", "columns", "max_length") if k in job and k in fields}
        trained = Job.from_dict({"name": "eval", "data": "-", **kept}).make_objective()
        # rows are never packed here: each is measured on its own
        known = {f.name for f in dataclasses.fields(trained)}  # type: ignore[arg-type]
        unknown = sorted(options.keys() - known)
        if unknown:
            raise OptionError(
                f"Objective '{trained.name}' has no option '{unknown[0]}'. It has: {', '.join(sorted(known))}."
            )
        changed = {**({"packing": False} if "packing" in known else {}), **options}
        return _measurable(dataclasses.replace(trained, **changed))  # type: ignore[type-var]
    raise OptionError(f"No adapter says what it was trained for: give --objective (one of {', '.join(OBJECTIVES)}).")


def _measurable(goal: Any) -> Any:
    """Refuse objectives whose rows cannot be measured one by one, without what a job draws or asks beside them."""
    from lorry.training.task import Task
    from lorry.training.text_task import TextTask

    kind = type(goal)
    plain = isinstance(goal, TextTask) and kind.collate is TextTask.collate and kind.draw is Task.draw
    if not plain or goal.outputs is not None or goal.task not in ("causal-lm", "sequence-classification"):
        raise OptionError(
            f"Rows of '{goal.name}' cannot be measured one by one. Give its job eval_data or hold_out; the metrics are "
            "in the run's report then."
        )
    return goal
