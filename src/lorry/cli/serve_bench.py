"""``lorry serve --bench``: a workload replayed against the engine, with a table and a picture of what users see."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorry.cli.output import note, out, print_json, table

if TYPE_CHECKING:
    from lorry.serving.engine import Engine
    from lorry.serving.replay import Replayed
    from lorry.serving.scheduling.workload import Workload


def workload_of(options: dict[str, Any], adapters: int) -> Workload:
    """Return the workload of the command line, over so many adapters.

    Raises
    ------
    OptionError
        An unknown option or one out of its range.
    """
    from lorry.core.options import from_options
    from lorry.serving.scheduling.workload import Workload

    return from_options(Workload, {**options, "adapters": max(adapters, 1)})


def bench_engine(
    engine: Engine, names: list[str], workload: Workload, most: int, plot: Path | None, as_json: bool
) -> None:
    """Replay a workload and print what came of it."""
    from lorry.serving.replay import fitted, replay
    from lorry.serving.service import Service

    asked = fitted(workload, engine)
    if asked != workload:
        note(
            f"the model and the pool hold {engine.context} tokens, so prompts have {asked.shortest_input} to "
            f"{asked.longest_input} tokens and answers {asked.shortest_output} to {asked.longest_output}"
        )
    note(f"{asked.rate:g} requests in a second for {asked.seconds:g} s ...")
    service = Service(engine, max_requests=most)
    try:
        found = asyncio.run(replay(service, asked, names))
    finally:
        service.close()
    figures = found.figures()
    if plot is not None:
        from lorry.cli.pictures import replayed

        note(f"wrote {replayed(found, plot)}")
    if as_json:
        print_json({"workload": vars(asked), "figures": figures, "failed": _failed(found)})
        return
    rows = [(name, _said(name, value)) for name, value in figures.items()]
    rows += [(f"failed: {why}", str(count)) for why, count in _failed(found).items()]
    out().print(table("Replay", ("what", "figure"), rows, right=("figure",)))


def _failed(found: Replayed) -> dict[str, int]:
    whys = [each.why for each in found.timings if each.why]
    return {why: whys.count(why) for why in dict.fromkeys(whys)}


def _said(name: str, value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if "within" in name or name.startswith(("adapter", "prefix")):
        return f"{value:.1%}"
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
