"""Training: jobs, fleets of jobs on one base, their data, objectives, checkpoints and reports."""

from __future__ import annotations

from .data_errors import DataError
from .fleet import Fleet, FleetResult, train
from .jobs import Job, jobs_from

__all__ = ["DataError", "Fleet", "FleetResult", "Job", "jobs_from", "train"]
