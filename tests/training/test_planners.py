"""Planners of passes: jobs whose samples are packed together equal jobs trained alone; what cannot be is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws.drawing import effort
from training.results import difference, tensors
from training.tiny_bases import class_rows, stories, tiny_bert, tiny_llama, token_rows

from lorry.core.errors import OptionError
from lorry.core.life.api import adapters
from lorry.core.method.start import mix_seed
from lorry.training import Fleet, Job, train
from lorry.training.attaching import attach_job
from lorry.training.joint import train_pass
from lorry.training.pass_planner import PLANNERS, PassPlanner, planner_from

PLAN = {"planner": "lorafusion", "capacity": 60, "steps": 3}


def base():
    return tiny_llama().double()


def jobs(steps=9):
    """Different methods, optimizers, lengths, and sizes of global batches."""
    made = {
        "long": dict(data=token_rows(24, (20, 50), 1), method="lora", learning_rate=3e-3, batch_size=3),
        "short": dict(
            data=token_rows(40, (3, 12), 2), method="dora", rank=2, batch_size=2, gradient_accumulation_steps=3
        ),
        "plain": dict(
            data=token_rows(30, (5, 20), 3),
            method="rslora",
            optimizer="sgd",
            learning_rate=0.3,
            momentum=0.9,
            batch_size=4,
        ),
    }
    common = {"dtype": "float64", "steps": steps, "targets": "all-linear"}
    return [Job.from_dict({"name": n, "seed": i, **common, **made[n]}) for i, n in enumerate(made)]


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    return train(base(), None, jobs(), tmp_path_factory.mktemp("planned"), planner=PLAN)


def moved(result, job):
    """How far an adapter went from its start."""
    start = attach_job(base(), job)
    return difference(tensors(result, job.name), {n: t.detach() for n, t, _ in start.named_tensors()})


@pytest.mark.parametrize("name", ["long", "short", "plain"])
def test_jobs_packed_together_equal_jobs_trained_alone(planned, name, tmp_path):
    job = next(j for j in jobs() if j.name == name)
    alone = train(base(), None, job, tmp_path)
    assert planned[name]["steps"] == alone[name]["steps"] == 9
    assert difference(tensors(planned, name), tensors(alone, name)) < 1e-9
    assert moved(alone, job) > 1e-3
    assert planned[name]["last_loss"] == pytest.approx(alone[name]["last_loss"], abs=1e-9)
    assert planned[name]["tokens"] == alone[name]["tokens"]


def test_two_runs_are_the_same_to_the_last_bit(planned, tmp_path):
    again = train(base(), None, jobs(), tmp_path, planner=PLAN)
    for job in jobs():
        assert difference(tensors(planned, job.name), tensors(again, job.name)) == 0.0


def test_a_run_that_is_resumed_equals_one_that_went_through(planned, tmp_path):
    first = Fleet(base(), None, jobs(), tmp_path, planner=PLAN)
    first._tick()
    first.save_checkpoint()
    assert [run.progress.step for run in first.runs] == [3, 3, 3]
    resumed = train(base(), None, jobs(), tmp_path, planner=PLAN, resume=True)
    for job in jobs():
        assert difference(tensors(planned, job.name), tensors(resumed, job.name)) == 0.0


@given(st.integers(0, 10**6), st.integers(51, 120), st.integers(1, 4), st.sampled_from(("highs", "first-fit")))
@effort(4)
def test_any_capacity_and_window_is_lossless(planned, tmp_path_factory, seed, capacity, steps, solver):
    plan = {"planner": "lorafusion", "capacity": capacity, "steps": steps, "solver": solver, "slack": seed % capacity}
    other = train(base(), None, jobs(), tmp_path_factory.mktemp("any"), planner=plan)
    for job in jobs():
        assert difference(tensors(planned, job.name), tensors(other, job.name)) < 1e-9


def test_passes_hold_every_sample_of_a_round_once_within_the_capacity(tmp_path):
    fleet = Fleet(base(), None, jobs(), tmp_path, planner=PLAN)
    for run in fleet.runs:
        run.open_step()
    shares = fleet.rounds.shares({run.name: run for run in fleet.runs})
    assert [(s.name, s.step) for s in shares] == [(n, i) for n in ("long", "short", "plain") for i in range(3)]
    passes = fleet.planner.passes(shares)
    for share in shares:
        parts = [p for group in passes for p in group if (p.name, p.step) == (share.name, share.step)]
        assert sorted(i for part in parts for i in part.chosen) == sorted(share.chosen)
        assert sum(part.auxiliary for part in parts) == pytest.approx(1.0)
    for group in passes:
        assert sum(len(e) for share in group for e in share.examples) <= 60
        assert len({share.name for share in group}) == len(group)
    seen = []
    fleet.model.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    train_pass(fleet.base, passes[0], mix_seed("base", 0))
    assert all(share.error is None for share in passes[0])
    assert seen == [(1, sum(len(e) for share in passes[0] for e in share.examples))]


def test_real_weights_with_dropout_evaluation_and_patience_go_through(shared, tmp_path):
    model, tokenizer = stories(shared)
    data = {"path": str(shared / "data" / "tinyshakespeare.txt"), "split": "[:400]"}
    common = {"data": data, "hold_out": 0.2, "eval_every": 2, "steps": 8, "max_length": 48, "batch_size": 3}
    asked = [
        {"name": "one", "method": "lora", "dropout": 0.1, "learning_rate": 1e-3, **common},
        {"name": "two", "method": "lora", "learning_rate": 0.5, "patience": 1, "keep_best": True, **common},
    ]
    result = train(model, tokenizer, asked, tmp_path, planner={"planner": "lorafusion", "capacity": 96})
    assert result.ok, result.report
    assert result["one"]["steps"] == 8 and result["one"]["status"] == "done"
    assert result["two"]["steps"] < 8 and result["two"]["status"] == "stopped early"
    lines = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 2, 4, 6, 8]


def test_what_cannot_be_planned_is_refused_and_the_model_left_as_it_was(tmp_path):
    def refused(model, job, message, plan=PLAN):
        with pytest.raises(OptionError, match=message):
            Fleet(model, None, [job], tmp_path / "out", planner=plan)
        assert not adapters(model)

    rows = token_rows(12, (5, 50), 1)
    low = {"planner": "lorafusion", "capacity": 20}
    refused(tiny_llama(), Job("a", rows, "lora"), r"'a' has \d+ tokens.*capacity is 20. Set capacity to at least", low)
    classes = Job("b", class_rows(12, 2, 1), "lora", objective="classification", labels=("x", "y"))
    refused(tiny_bert(), classes, "'b' cannot be planned.*'classification' works on whole rows.*'joined'")
    refused(tiny_llama(), Job("c", rows, "lora", task_ids=0), "'c' cannot be planned.*task ids")
    near = tiny_llama()
    near.config.sliding_window = 16
    refused(near, Job("d", rows, "lora"), "'d' cannot be planned.*fewer tokens back than")


def test_planners_are_found_by_name_with_their_options():
    assert {"joined", "lorafusion"} <= set(PLANNERS)
    assert planner_from(None, 3.0, 70).max_pad_ratio == 3.0
    assert planner_from({"planner": "joined", "max_tokens": 9}, 3.0, 70).max_tokens == 9
    assert planner_from("lorafusion").capacity == 4096
    with pytest.raises(OptionError, match="no planner 'lorafuse'.*'lorafusion'"):
        planner_from("lorafuse")
    with pytest.raises(OptionError, match="capacity.*at least 1"):
        planner_from({"planner": "lorafusion", "capacity": 0})


def test_a_planner_of_ones_own_takes_part(planned, tmp_path):
    class Reversed(PassPlanner):
        name = "reversed"

        def passes(self, shares):
            return [[], *([share] for share in reversed(shares))]

    own = train(base(), None, jobs(), tmp_path, planner=Reversed())
    for job in jobs():
        assert difference(tensors(planned, job.name), tensors(own, job.name)) < 1e-9
