"""Published systems, each run whole by one command: ``lorry systems run NAME``.

A system is composed of parts that lie in a folder of their own, here or in `lorry.multimodal` or `lorry.transfer`;
one file in `lorry.systems.runs` runs it from data to figures and registers that run with `system`.
"""

from __future__ import annotations

from . import runs
from .catalogue import SYSTEMS, Outcome, Run, System, run, system

SYSTEMS.source(runs.__name__, runs.__path__)

__all__ = ["SYSTEMS", "Outcome", "Run", "System", "run", "system"]
