"""The ledger itself: records survive writing, verdicts follow from figures, rates are chosen on validation."""

import json
import math
import statistics

import pytest

from lorry.claims import Finding, Panel, Setting, compare, ledger, read_records, tune, verdicts
from lorry.claims.verdicts import together
from lorry.core.errors import LorryError, OptionError


def a_finding(verdict="reproduced"):
    panel = Panel("accuracy by rank", "accuracy", {"a": [[0.5, 0.25], [1.0, 1 / 3]]}, (1, 2), "rank", log_x=True)
    return Finding(verdict, "It came out.", [panel], {"a": 1e-3}, ["A note."])


def a_claim(key="works", verdict="reproduced"):
    return ledger.Claim("thing", key, "It works.", "a paper", "A trial.", lambda setting: a_finding(verdict))


def test_a_record_survives_writing(tmp_path):
    record = ledger.run(a_claim(), Setting(seeds=(3, 4), effort=0.5))
    (path,) = ledger.write_records([record], tmp_path)
    (found,) = read_records(tmp_path)
    assert found.name == "thing/works" and found.seeds == (3, 4) and found.effort == 0.5
    assert found.finding.panels[0].series["a"][1][1] == pytest.approx(1 / 3, rel=1e-4)
    assert found.code == record.code and list(found.code) == ["test_ledger.py"]
    assert found.finding.panels[0].log_x and found.finding.notes == ["A note."]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_record_takes_the_place_of_its_older_one_alone(tmp_path):
    setting = Setting()
    ledger.write_records([ledger.run(a_claim(key), setting) for key in ("one", "two")], tmp_path)
    ledger.write_records([ledger.run(a_claim("one", "not reproduced"), setting)], tmp_path)
    assert {r.key: r.finding.verdict for r in read_records(tmp_path)} == {"one": "not reproduced", "two": "reproduced"}


@pytest.mark.parametrize("text", ["{}", "[1]", '{"version": 1, "records": [{"slug": "x"}]}', "no json"])
def test_a_foreign_file_is_refused(tmp_path, text):
    (tmp_path / "thing.json").write_text(text)
    with pytest.raises(LorryError, match=r"thing\.json"):
        read_records(tmp_path)


def test_a_newer_file_is_refused(tmp_path):
    (tmp_path / "thing.json").write_text(json.dumps({"version": ledger.VERSION + 1, "records": []}))
    with pytest.raises(LorryError, match="update Lorry"):
        read_records(tmp_path)


def test_unknown_verdicts_and_series_that_do_not_fit_are_refused():
    for verdict in ("maybe", compare([0.3, -0.1])):
        with pytest.raises(ValueError, match="verdict"):
            Finding(verdict, "", [])
    with pytest.raises(ValueError, match="places"):
        Panel("x", "y", {"a": [[1.0]]}, (1, 2))


def test_unknown_slugs_have_near_misses():
    with pytest.raises(OptionError, match="mos"):
        ledger.claims("moss")


def test_a_claim_is_found_by_its_name_and_there_are_no_two_of_one_name():
    one = ledger.CLAIMS.find("mos/equal-budget")
    assert one in ledger.claims("mos") and one.name == "mos/equal-budget"
    with pytest.raises(OptionError, match="mos/equal-budget"):
        ledger.CLAIMS.find("mos/equal-budgets")
    again = ledger.claim(one.slug, one.key, says=one.says, source=one.source, trial=one.trial)
    with pytest.raises(OptionError, match="Two claims are called 'mos/equal-budget'"):
        again(lambda setting: a_finding())
    assert ledger.CLAIMS["mos/equal-budget"] is one


def test_each_contender_gets_the_rate_that_is_best_on_validation():
    def run(best):
        def once(rate, seed):
            return {"validation": -abs(rate - best), "test": 10 * rate + seed}

        return once

    trial = tune({"low": run(1.0), "middle": run(2.0)}, (1.0, 2.0, 3.0), (0, 1))
    assert trial.rates == {"low": 1.0, "middle": 2.0}
    assert trial.metrics["middle"]["test"] == [20.0, 21.0]
    assert trial.gain("middle", "low") == [10.0, 10.0]
    assert not trial.notes


def peak(best, tried):
    """A contender whose best rate is `best`; notes the rates that it is run at."""

    def once(rate, seed):
        tried.append(rate)
        return {"validation": -abs(math.log(rate / best)), "test": rate}

    return once


def test_a_grid_whose_best_rate_is_at_an_end_is_widened_by_itself():
    tried = {name: [] for name in ("inside", "low", "high")}
    best = {"inside": 1e-2, "low": 1e-3, "high": 0.9}
    trial = tune({name: peak(best[name], rates) for name, rates in tried.items()}, (3e-3, 1e-2, 3e-2, 1e-1), (0,))
    assert tried["inside"] == [3e-3, 1e-2, 3e-2, 1e-1]
    assert tried["low"] == [3e-3, 1e-2, 3e-2, 1e-1, 1e-3, 3e-4]
    assert tried["high"] == [3e-3, 1e-2, 3e-2, 1e-1, 0.3, 1, 3]
    assert trial.rates == {"inside": 1e-2, "low": 1e-3, "high": 1} and trial.notes == ()


def test_a_grid_is_not_widened_for_ever_and_what_is_left_at_the_edge_is_said():
    tried = []
    trial = tune({"hot": peak(1e9, tried)}, (1.0, 10.0), (0,))
    assert tried == [10.0**power for power in range(2 + verdicts.WIDEST)]
    assert trial.notes == ("The best rate of hot, 100000, is at the edge of its grid.",)


def test_single_rates_and_ties_are_not_widened():
    tried = []
    tune({"one": peak(1e9, tried)}, (0.1,), (0,))
    assert tried == [0.1]
    assert tune({"flat": lambda rate, seed: {"validation": 0.5}}, (1.0, 2.0, 3.0), (0,)).rates == {"flat": 2.0}


def test_statements():
    assert compare([0.1, 0.2]) == "reproduced"
    assert compare([0.3, -0.1]) == "on average"
    assert compare([0.1, -0.2]) == "not reproduced"
    assert compare([0.1, 0.2], margin=0.16) == "not reproduced"


@pytest.mark.parametrize(
    "statements, verdict",
    [
        (("reproduced", "reproduced"), "reproduced"),
        (("reproduced", "not reproduced"), "partly"),
        (("on average", "reproduced"), "partly"),
        (("on average", "not reproduced"), "not reproduced"),
        (("on average", "on average"), "not reproduced"),
        (("on average",), "not reproduced"),
        ((), "not reproduced"),
    ],
)
def test_partly_needs_a_statement_that_held_on_every_seed(statements, verdict):
    assert together(statements) == verdict


def test_every_record_of_the_package_belongs_to_a_claim_and_was_run_in_full():
    known = {(one.slug, one.key): one for one in ledger.claims()}
    records = read_records()
    assert {(r.slug, r.key) for r in records} == set(known)
    for record in records:
        one = known[record.slug, record.key]
        assert record.effort == 1 and len(record.seeds) >= 3
        assert (record.says, record.source, record.trial) == (one.says, one.source, one.trial)
        for panel in record.finding.panels:
            for places in panel.series.values():
                assert all(statistics.fmean(values) == statistics.fmean(values) for values in places)
