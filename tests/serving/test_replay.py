"""A workload replayed on a real engine: every request is sent and counted, and failures are told."""

import asyncio
import json

import pytest
from serving.tiny_engines import adapt, engine, tiny
from typer.testing import CliRunner

import lorry
from lorry.cli.main import MISUSE, app
from lorry.serving.replay import fitted, quantile, replay
from lorry.serving.scheduling.workload import Workload, arrivals
from lorry.serving.service import Service

WORK = Workload(
    adapters=3, rate=60, seconds=0.3, cv=2, shortest_input=2, longest_input=9, shortest_output=1, longest_output=5
)


def replayed(names, work=WORK, most=4096):
    model = tiny()
    for seed, name in enumerate(names):
        adapt(model, name, seed=seed)
    own = engine(model)
    service = Service(own, max_requests=most)
    try:
        return asyncio.run(replay(service, work, names)), own.stats()
    finally:
        service.close()
        own.close()


@pytest.mark.parametrize("names", [("a", "b", "c"), ()])
def test_every_request_is_answered_to_its_length(names):
    found, stats = replayed(names)
    asked = arrivals(WORK)
    assert [each.arrival for each in found.timings] == asked and len(asked) > 5
    assert [each.tokens for each in found.timings] == [each.output for each in asked]
    assert not any(each.why for each in found.timings)
    assert all(0 <= each.first - each.arrival.time and each.first <= each.end for each in found.timings)
    assert stats.finished == len(asked) and stats.running == stats.waiting == 0
    figures = found.figures()
    assert figures["requests"] == figures["served"] == len(asked)
    assert figures["first token within 6 s"] == 1
    if names:
        known = [each.ready for each in found.timings]
        assert known[0] is False and True in known  # paged in with the first request for it, and kept
        assert figures["adapter in the pool on arrival"] == sum(known) / len(known)
    else:
        assert "adapter in the pool on arrival" not in figures


def test_what_fails_is_told_and_not_counted_as_served():
    found, _ = replayed((), most=1, work=Workload(**{**vars(WORK), "rate": 400, "seconds": 0.1}))
    failed = [each for each in found.timings if each.why]
    assert failed and all("under way" in each.why and each.end is None for each in failed)
    assert found.figures()["served"] == len(found.timings) - len(failed) == len(found.to_end)
    assert found.figures()["first token within 6 s"] < 1


def test_a_workload_fits_the_engine_and_names_fit_the_workload():
    own = engine(tiny())
    long = fitted(Workload(longest_input=1000, shortest_input=900, longest_output=1000), own)
    assert long.shortest_input <= long.longest_input == 64 and long.longest_input + long.longest_output == own.context
    assert fitted(WORK, own) == WORK
    service = Service(own)
    try:
        with pytest.raises(lorry.OptionError, match="3 adapters, but 1 are named"):
            asyncio.run(replay(service, WORK, ("a",)))
    finally:
        service.close()


def test_quantiles_are_values_that_were_seen():
    assert [quantile([1.0, 2.0, 3.0, 4.0], share) for share in (0, 0.5, 0.99, 1)] == [1.0, 3.0, 4.0, 4.0]


def test_the_command_prints_figures_and_draws_them(tmp_path):
    plot = tmp_path / "replay.png"
    settings = ["rate=50", "seconds=0.2", "longest_output=3", "shortest_output=1"]
    flags = [flag for each in settings for flag in ("--workload", each)]
    result = CliRunner().invoke(app, ["serve", "pocket", "--bench", "--json", "--plot", str(plot), *flags])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["figures"]["served"] == said["figures"]["requests"] > 3 and not said["failed"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    wrong = CliRunner().invoke(app, ["serve", "pocket", "--bench", "--workload", "rat=3"])
    assert wrong.exit_code == MISUSE and "'rate'" in wrong.stderr
    alone = CliRunner().invoke(app, ["serve", "pocket", "--plot", str(plot)])
    assert alone.exit_code == MISUSE and "--plot belongs to --bench" in alone.stderr
