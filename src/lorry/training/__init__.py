"""Training: jobs, fleets of jobs on one base, their tasks, data, dynamics, checkpoints and reports."""

from __future__ import annotations

from .data_errors import DataError
from .fleet import Fleet, FleetResult, train
from .hooks import Dynamic, Moment, register_dynamic
from .jobs import Job, jobs_from
from .starts import Start, register_start
from .task import TASKS, Batch, Examples, Setting, Task

__all__ = [
    "TASKS",
    "Batch",
    "DataError",
    "Dynamic",
    "Examples",
    "Fleet",
    "FleetResult",
    "Job",
    "Moment",
    "Setting",
    "Start",
    "Task",
    "jobs_from",
    "register_dynamic",
    "register_start",
    "train",
]
