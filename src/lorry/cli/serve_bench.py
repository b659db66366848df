"""``lorry serve --bench``: a workload replayed on an engine or a running server, and what users see of it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorry.cli.output import note, out, print_json, table

if TYPE_CHECKING:
    from lorry.serving.engine import Engine
    from lorry.serving.replay import Bounded, Replayed
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
    """Replay a workload on an engine and print what came of it."""
    from lorry.serving.replay import replay
    from lorry.serving.service import Service

    asked = _fitted(workload, engine)
    service = Service(engine, max_requests=most)
    try:
        found = asyncio.run(replay(service, asked, names))
    finally:
        service.close()
    _tell(found, plot, as_json)


def bench_server(
    url: str, key: str | None, names: list[str], options: dict[str, Any], plot: Path | None, as_json: bool
) -> None:
    """Replay a workload on a running server and print what came of it; without names, over all that it lists."""
    from lorry.serving.replay_url import Remote

    remote = Remote(url, key)
    names = names or remote.adapters
    asked = _fitted(workload_of(options, len(names)), remote)
    _tell(asyncio.run(remote.replay(asked, names)), plot, as_json)


def _fitted(workload: Workload, asked: Bounded) -> Workload:
    from lorry.serving.replay import fitted

    found = fitted(workload, asked)
    if found != workload:
        note(
            f"prompt and answer may have {asked.context} tokens, so prompts have {found.shortest_input} to "
            f"{found.longest_input} tokens and answers {found.shortest_output} to {found.longest_output}"
        )
    note(f"{found.rate:g} requests in a second for {found.seconds:g} s ...")
    return found


def _tell(found: Replayed, plot: Path | None, as_json: bool) -> None:
    figures = found.figures()
    if plot is not None:
        from lorry.cli.pictures import replayed

        note(f"wrote {replayed(found, plot)}")
    if as_json:
        print_json({"workload": vars(found.workload), "figures": figures, "failed": _failed(found)})
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
