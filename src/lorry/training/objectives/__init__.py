"""What jobs learn: objectives, one file each. A file registers its class; nothing else names it.

An objective is a frozen dataclass whose fields are the user's options. `OBJECTIVES` maps names to them; a new one is a
file like these, or any other `lorry.training.task.Task` that a job is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lorry.training.columns import COMPLETION_COLUMNS
from lorry.training.data_errors import DataError, suggest
from lorry.training.task import TASKS, Task

from .classification import Classification
from .text import Causal, Chat, Completion

__all__ = [
    "COMPLETION_COLUMNS",
    "OBJECTIVES",
    "Causal",
    "Chat",
    "Classification",
    "Completion",
    "make_objective",
]

TASKS.source(__name__, __path__)

OBJECTIVES = TASKS
"""Name to class of what a job may learn."""


def make_objective(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """Build an objective by name from parsed options.

    Raises
    ------
    DataError
        An unknown name or option, with near misses.
    """
    if name not in OBJECTIVES:
        raise DataError(f"Unknown objective {name!r}; {suggest(name, OBJECTIVES)}")
    cls = OBJECTIVES[name]
    known = [f.name for f in fields(cls)]
    for option in options or {}:
        if option not in known:
            raise DataError(f"Objective {name!r} has no option {option!r}; {suggest(option, known)}")
    made: Task = cls(**dict(options or {}))
    return made
