"""Studies: variants of training compared over learning rates, ranks, batch sizes and seeds."""

from __future__ import annotations

from .analysis import Analysis, SharedRate, Standing, analyse
from .options import Cell, Study
from .records import Record, Timing
from .run import StudyResult, run_study

__all__ = [
    "Analysis",
    "Cell",
    "Record",
    "SharedRate",
    "Standing",
    "Study",
    "StudyResult",
    "Timing",
    "analyse",
    "run_study",
]
