"""`lorry simulate`: the simulation's figures as a table, as JSON and as a picture, and costs measured here."""

import json

import pytest
from serving.tiny_engines import tiny
from typer.testing import CliRunner

from lorry.cli.main import MISUSE, app
from lorry.serving.engine import Engine
from lorry.serving.options import EngineOptions
from lorry.serving.scheduling.deployment import Deployment
from lorry.serving.scheduling.measure import measured
from lorry.serving.scheduling.simulate import simulate
from lorry.serving.scheduling.workload import Workload

FLAGS = ["--adapters", "50", "--seconds", "10", "--ranks", "4,64", "--alpha", "0.5", "--pages", "900"]


def test_the_figures_are_those_of_the_simulation(tmp_path):
    picture = tmp_path / "figures.png"
    flags = ["--replicas", "1,3", "--rate-each", "3", "--seed", "2", "--plot", str(picture), "--json"]
    result = CliRunner().invoke(app, ["simulate", *FLAGS, *flags])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    for row, number in zip(rows, (1, 3), strict=True):
        workload = Workload(adapters=50, rate=3.0 * number, seconds=10.0, alpha=0.5, ranks=(4, 64), seed=2)
        expected = simulate(Deployment(replicas=number, pages=900, seed=2), workload).row()
        assert {name: row[name] for name in expected} == expected
        assert row["adapter share"] == expected["adapter pages"] / 900 > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_table_says_what_one_load_asks_of_several_numbers_of_replicas():
    result = CliRunner().invoke(app, ["simulate", *FLAGS, "--replicas", "1,4", "--rate", "12"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    one, four = (line.split() for line in result.stdout.splitlines() if line.split()[:1] in (["1"], ["4"]))
    waited = [float(row[5]) for row in (one, four)]
    assert waited[0] > waited[1] > 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--replicas", "0"], "--replicas"),
        (["--ranks", "x"], "--ranks"),
        (["--rate", "1", "--rate-each", "1"], "--rate-each"),
        (["--policy", "none"], "none"),
        (["--routing", "none"], "none"),
        (["--pages", "0"], "pages"),
    ],
)
def test_what_cannot_be_simulated_is_refused(flags, says):
    result = CliRunner().invoke(app, ["simulate", *flags])
    assert result.exit_code == MISUSE and says in result.stderr


def test_costs_are_measured_on_an_engine_which_is_idle_again():
    engine = Engine(tiny(), None, EngineOptions(pages=64))
    try:
        costs = measured(engine)
        assert set(costs) == {"step_seconds", "decode_seconds", "prompt_seconds"}
        assert costs["step_seconds"] > 0 and min(costs.values()) >= 0
        assert Deployment(**costs).step_seconds == costs["step_seconds"]
        assert engine.idle and engine.stats().finished == 1 + 16 + 4 + 4
    finally:
        engine.close()
