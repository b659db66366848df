"""A system runs whole, says what came out, and leaves its figures as a file."""

import json

import pytest

from lorry.core.errors import OptionError
from lorry.core.registry import Registry
from lorry.systems import SYSTEMS, Outcome, Run, run, system


@pytest.fixture
def counting(monkeypatch):
    """One system, `counting`, alone in a registry of its own."""
    alone = Registry("system", "`lorry systems` lists them.")
    monkeypatch.setattr("lorry.systems.catalogue.SYSTEMS", alone)

    @system("counting", title="Counts.", source="none")
    def count(given: Run) -> Outcome:
        (given.out / "count.txt").write_text(str(given.scaled(10)))
        return Outcome(f"{given.scaled(10)} of 10.", ("what", "count"), [("ten", given.scaled(10))], ["count.txt"])

    return count


def test_a_run_writes_its_figures(counting, tmp_path):
    outcome = run("counting", Run(tmp_path / "a" / "b", seed=3, effort=0.5))
    facts = json.loads((tmp_path / "a" / "b" / "outcome.json").read_text())
    assert outcome.says == facts["says"] == "5 of 10."
    assert facts["rows"] == [["ten", 5]] and facts["seed"] == 3 and facts["effort"] == 0.5
    assert [path.name for path in (tmp_path / "a" / "b").iterdir() if path.name.startswith(".")] == []


def test_what_cannot_be_run_is_refused_before_anything_is_written(counting, tmp_path):
    with pytest.raises(OptionError, match="counting"):
        run("countin", Run(tmp_path / "x"))
    with pytest.raises(OptionError, match="effort"):
        run("counting", Run(tmp_path / "x", effort=0))
    with pytest.raises(OptionError, match="There is no folder"):
        run("counting", Run(tmp_path / "x", data=tmp_path / "none"))
    assert not (tmp_path / "x").exists()


def test_every_system_says_what_it_is_and_where_it_was_published():
    for name, each in SYSTEMS.items():
        assert name == each.name and each.title.endswith(".") and each.source, name
