"""Progress bars: one for each job, on a terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from .run import RUNNING, Run


class Bars:
    """Bars with loss and tokens per second of each job; nothing at all where they are not shown.

    Parameters
    ----------
    runs
        The jobs.
    show
        True or False; None shows them on a terminal only.
    console
        A rich console; None makes one on standard error.
    """

    def __init__(self, runs: Sequence[Run], show: bool | None, console: Any = None) -> None:
        self.runs = list(runs)
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._before: dict[str, tuple[int, float]] = {}
        self._speed: dict[str, float] = {}
        self._drawn = 0.0
        if show is False:
            return
        from rich.console import Console

        console = console or Console(stderr=True)
        if show or console.is_terminal:
            self._bars = _bars(console)

    def __enter__(self) -> Bars:
        """Show the bars."""
        if self._bars is not None:
            self._bars.start()
            for run in self.runs:
                self._tasks[run.name] = self._bars.add_task(run.name, total=run.total or 1, loss="", speed="", note="")
            self.update(force=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Draw the last state and leave it on the screen."""
        if self._bars is not None:
            self.update(force=True)
            self._bars.stop()

    def update(self, force: bool = False) -> None:
        """Draw, at most ten times a second."""
        now = time.monotonic()
        if self._bars is None or (now - self._drawn < 0.1 and not force):
            return
        self._drawn = now
        for run in self.runs:
            p = run.progress
            before, then = self._before.get(run.name, (p.size_seen, now))
            if run.name not in self._before or now - then > 1.0:
                self._before[run.name] = (p.size_seen, now)
                if p.size_seen > before:
                    self._speed[run.name] = (p.size_seen - before) / (now - then)
            speed = self._speed.get(run.name)
            note = "" if p.status == RUNNING else p.status
            self._bars.update(
                self._tasks[run.name],
                completed=p.step,
                total=run.total or 1,
                loss="" if p.last_loss is None else f"loss {p.last_loss:.4f}",
                speed="" if speed is None or note else f"{speed:,.0f} {run.unit}/s",
                note=note,
            )


def _bars(console: Any) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("[bold]{task.description}", markup=True),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}", markup=False),
        TextColumn("{task.fields[speed]}", markup=False),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        refresh_per_second=8,
    )
