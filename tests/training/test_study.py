"""Studies of variants: the scores that runs have alone, results that stay, and refusals that say what to do."""

import json
import os
import signal

import pytest
import torch
from training.tiny_bases import tiny_llama, token_rows

import lorry
from lorry.core.errors import OptionError
from lorry.training.data_errors import DataError
from lorry.training.fleet import Fleet
from lorry.training.study import Record, Study, run_study
from lorry.training.study.fleets import Bench
from lorry.training.study.options import beyond

DATA, HELD, TEST = (token_rows(n, (6, 12), seed) for n, seed in ((24, 1), (8, 2), (8, 3)))
JOB = {"data": DATA, "eval_data": HELD, "steps": 4, "targets": "q_proj"}


def study(out, **changes) -> Study:
    values = {
        "base": "tiny", "out": str(out), "job": JOB, "variants": ["lora", "dora"], "rates": [1e-3, 1e-2, 3e-1],
        "ranks": [2], "batch_sizes": [4], "seeds": [0, 1], "timed_steps": 0, "checkpoint_every": 0,
    }  # fmt: skip
    return Study.from_dict({**values, **changes})


def load():
    return tiny_llama(), None


def scores(result) -> dict[str, float | None]:
    return {record.cell.name: record.score for record in result.records}


def never():
    raise AssertionError("nothing was left to train")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return run_study(study(tmp_path_factory.mktemp("study"), test=TEST, timed_steps=1), load)


def test_each_run_has_the_score_that_it_has_alone(done, tmp_path):
    assert len(done.records) == 12 and {r.status for r in done.records} == {"done"}
    for record in done.records[::5]:
        job = study(tmp_path).job_of(record.cell)
        assert (job.learning_rate, job.seed, job.make_method().rank) == (record.rate, record.seed, 2)
        alone = Fleet(tiny_llama(), None, [job], tmp_path / job.name, progress=False).train()[job.name]
        assert record.score == pytest.approx(alone["eval"]["end"]["loss"], rel=1e-5)
        assert record.start == pytest.approx(alone["eval"]["start"]["loss"], rel=1e-5)
        assert (record.parameters, record.steps) == (alone["parameters"], 4)


def test_test_data_choose_nothing_and_are_what_is_reported(done, tmp_path):
    record = done.records[3]
    job = study(tmp_path, job={**JOB, "eval_data": TEST}).job_of(record.cell)
    alone = Fleet(tiny_llama(), None, [job], tmp_path / "one", progress=False).train()[job.name]
    assert record.test == pytest.approx(alone["eval"]["end"]["loss"], rel=1e-5)
    assert record.test != pytest.approx(record.score, rel=1e-3)
    best = done.analysis.standings[0]
    at_best = [r for r in done.records if (r.variant, r.rate) == (best.variant, best.rate)]
    assert best.mean == pytest.approx(sum(r.test for r in at_best) / len(at_best))
    assert done.analysis.chosen_by == "test apart"


def test_the_report_has_everything_in_a_page_a_picture_and_json(done):
    names = ("report.json", "report.html", "rates.png", "rates.svg", "study.json")
    assert all((done.folder / name).stat().st_size > 100 for name in names)
    report = json.loads((done.folder / "report.json").read_text())
    assert report == json.loads(json.dumps(done.report))
    assert {s["variant"] for s in report["standings"]} == {"lora", "dora"} and len(report["records"]) == 12
    assert all(s["seconds"] > 0 for s in report["standings"])
    assert sum(s["time_share"] for s in report["standings"]) == pytest.approx(1)
    page = (done.folder / "report.html").read_text()
    assert "data:image/png;base64," in page and "learning rate" in page and "src='http" not in page


def test_finished_runs_are_not_run_again_and_a_grid_may_grow(done):
    again = run_study(study(done.folder, test=TEST, timed_steps=1), never)
    assert again.records == done.records and again.report == done.report
    grown = run_study(study(done.folder, test=TEST, timed_steps=1, seeds=[0, 1, 2], variants=["lora"]), load)
    assert len(grown.records) == 9 and {r.variant for r in grown.records} == {"lora"}
    old = scores(done)
    assert all(score == old[name] for name, score in scores(grown).items() if name in old)


def test_a_study_that_is_stopped_goes_on_where_it_was(tmp_path):
    whole = run_study(study(tmp_path / "whole", fleet=6), load)
    seen = []

    def stop(finished, planned, records):
        seen.append(finished)
        if finished == 7.5:  # in the middle of the second fleet
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_study(study(tmp_path / "parts", fleet=6, checkpoint_every=1), load, told=stop)
    assert seen[-1] == 7.5 and len(list((tmp_path / "parts" / "cells").iterdir())) == 6
    (left,) = (tmp_path / "parts" / "fleets").iterdir()
    assert (left / "checkpoints").is_dir()
    steps = []
    rest = run_study(
        study(tmp_path / "parts", fleet=6, checkpoint_every=1), load, told=lambda done, *_: steps.append(done)
    )
    assert steps[:2] == [6, 9]  # the step after the one that was done
    assert scores(rest) == scores(whole) and not list((tmp_path / "parts" / "fleets").iterdir())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_runs_that_diverge_are_stopped_recorded_and_not_repeated(tmp_path, optimizer):
    job = {**JOB, "optimizer": optimizer, "max_grad_norm": None, "steps": 12, "targets": ["q_proj", "down_proj"]}
    made = study(tmp_path, job=job, variants=["lora"], rates=[1e-3, 1e18], seeds=[0], diverged=3.0)
    result = run_study(made, load)
    tame, wild = result.records
    assert tame.status == "done" and wild.status == "diverged"
    assert wild.score is None and wild.steps < 12 and wild.reason
    assert result.analysis.standings[0].diverged == 1 and result.report["runs"]["diverged"] == 1
    assert wild.reason in (tmp_path / "report.html").read_text().replace("&#x27;", "'")
    assert scores(run_study(made, never)) == scores(result)


def test_the_multiple_above_which_a_run_has_diverged_is_the_users(tmp_path):
    job = {**JOB, "max_grad_norm": None, "steps": 8, "targets": "lm_head"}
    one = {"job": job, "variants": ["lora"], "rates": [1e-3, 1.0], "seeds": [0]}
    strict = run_study(study(tmp_path / "a", **one, diverged=1.05), load).records[1]
    lax = run_study(study(tmp_path / "b", **one, diverged=None), load).records[1]
    assert (strict.status, lax.status) == ("diverged", "done") and strict.steps < lax.steps == 8
    assert "more than 1.05 times" in strict.reason


def test_a_grid_is_widened_where_the_best_rate_is_at_its_end(tmp_path):
    result = run_study(study(tmp_path, rates=[1e-5, 1e-4], variants=["lora"], widen=2, seeds=[0]), load)
    assert [r.rate for r in result.records] == [1e-5, 1e-4, 1e-3, 1e-2]
    assert beyond({0.003: 3.0, 0.01: 2.0, 0.03: 1.0}, min) == pytest.approx(0.1)
    assert beyond({0.003: 3.0, 0.01: 2.0, 0.03: 1.0}, max) == pytest.approx(0.001)
    assert beyond({0.003: 3.0, 0.01: 1.0, 0.03: 2.0}, min) is None


def test_fleets_stay_within_memory_and_give_the_same(tmp_path):
    job = {**JOB, "targets": "all-linear", "max_length": 16}
    few = {"variants": ["lora"], "rates": [1e-3, 1e-2], "ranks": [16], "job": job}
    tight = Bench(study(tmp_path / "tight", **few, max_memory=1_300_000), *load())
    jobs = [tight.job(cell) for cell in tight.study.cells()]
    assert not tight._fits(jobs)  # but halves of them do
    assert scores(run_study(tight.study, load)) == pytest.approx(
        scores(run_study(study(tmp_path / "free", **few), load))
    )
    with pytest.raises(OptionError, match="max_memory"):
        run_study(study(tmp_path / "less", **few, seeds=[0], max_memory=1000), load)


def test_nothing_stays_on_the_model(tmp_path):
    model = tiny_llama()
    mine = lorry.attach(model, "lora", name="mine")
    before, random = {n: p.clone() for n, p in model.state_dict().items()}, torch.random.get_rng_state()
    run_study(study(tmp_path, seeds=[0], rates=[1e-3, 1e-2]), lambda: (model, None))
    assert list(lorry.adapters(model)) == ["mine"] and lorry.adapters(model)["mine"] is mine
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)


def test_on_a_cluster_the_results_are_the_same(done, tmp_path):
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": PATH}})
    try:
        spread = run_study(study(tmp_path, test=TEST, fleet=6, timed_steps=1), load, ray=True)
    finally:
        ray.shutdown()
    assert {k: pytest.approx(v, rel=1e-5) for k, v in scores(done).items()} == scores(spread)
    assert len(spread.times) == 2


PATH = os.pathsep.join(p for p in (*os.environ.get("PYTHONPATH", "").split(os.pathsep), "tests") if p)


# -- what a variant is


def test_a_variant_is_any_combination_or_a_name(tmp_path):
    made = study(
        tmp_path,
        variants={
            "plain": "lora", "dora": None, "plus": {"dynamics": "lora-plus", "alpha": 4},
            "both": {"method": "rslora", "start": "orthogonal", "dynamics": ["lora-plus", "gradient-noise"]},
            "orthogonal": None, "allora": None,
        },
    )  # fmt: skip
    jobs = {cell.variant: made.job_of(cell) for cell in made.cells()}
    assert jobs["dora"].make_method().info.slug == "dora" and jobs["plus"].make_method().alpha == 4
    assert jobs["orthogonal"].make_start().name == "orthogonal"
    assert [d.name for d in jobs["both"].make_dynamics()] == ["lora-plus", "gradient-noise"]
    assert [d.name for d in jobs["allora"].make_dynamics()] == ["allora"]
    listed = study(tmp_path, variants=["lora", {"wide": {"alpha": 8}}, {"name": "other", "method": "dora"}])
    assert list(listed.variants) == ["lora", "wide", "other"]


# -- what is refused


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rates": [1e-3]}, "at least two values.*such as"),
        ({"rates": [1e-3, 1e-3]}, "different numbers"),
        ({"rates": [1e-3, -1.0]}, "must be positive"),
        ({"seeds": [0.5]}, "whole numbers"),
        ({"variants": ["lora", "lroa"]}, "no method, preset, start or dynamic 'lroa'.*'lora'"),
        ({"variants": {"a": {"method": "lroa"}}}, "Variant 'a'.*'lora'"),
        ({"variants": ["lora", {"name": "lora", "alpha": 4}]}, "Two variants are called 'lora'"),
        ({"variants": {"a b": "lora"}}, "consists of letters"),
        ({"variants": {"a": {"learning_rate": 1.0}}}, "axis of the study; give it as 'rates'"),
        ({"variants": {"a": {"data": "x"}}}, "shared by all variants"),
        ({"variants": {"a": {"method": "ia3"}}}, "Variant 'a' of rank 2"),
        ({"variants": {"a": {"rank": 2}, "b": {"start": "nowhere"}}}, "Variant 'b' of rank 2.*no start 'nowhere'"),
        ({"variants": {}}, "at least one variant"),
        ({"job": {**JOB, "learning_rate": 1.0}}, "no place under 'job': give it as 'rates'"),
        ({"job": {**JOB, "rank": 1}}, "give it as 'ranks'"),
        ({"job": {"data": DATA, "steps": 2}}, "hold_out as a fraction"),
        ({"job": {**JOB, "stepps": 2}}, "stepps"),
        ({"better": "max"}, "belongs to a score"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, changes, says):
    with pytest.raises(OptionError, match=says):
        study(tmp_path, **changes)


def test_data_and_scores_that_are_missing_are_refused(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        run_study(study(tmp_path, job={**JOB, "data": str(tmp_path / "nowhere.jsonl")}), never)
    with pytest.raises(OptionError, match="no score 'perplexty'.*perplexity"):
        run_study(study(tmp_path, score="perplexty"), load)
    assert run_study(study(tmp_path, score="perplexity", seeds=[0]), load, overwrite=True).analysis.better == "min"


def test_a_folder_of_another_study_is_refused_unless_it_may_go(tmp_path):
    first = {"rates": [1e-3, 1e-2], "seeds": [0], "variants": ["lora"]}
    run_study(study(tmp_path, **first), load)
    with pytest.raises(OptionError, match="another study: steps of variant 'lora' was 4, is 5.*another folder"):
        run_study(study(tmp_path, **first, job={**JOB, "steps": 5}), never)
    with pytest.raises(OptionError, match="another study: data was"):
        run_study(study(tmp_path, **first, job={**JOB, "data": TEST}), never)
    replaced = run_study(study(tmp_path, **first, job={**JOB, "steps": 5}), load, overwrite=True)
    assert {r.steps for r in replaced.records} == {5}
    other = tmp_path / "trained"
    other.mkdir()
    (other / "report.json").write_text("{}")
    with pytest.raises(OptionError, match="something else"):
        run_study(study(other, **first), never)


def test_a_record_survives_writing(done):
    record = done.records[0]
    assert Record(**json.loads(json.dumps(record.to_dict()))) == record
