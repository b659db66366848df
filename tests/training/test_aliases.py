"""Options of the first edition are read under their earlier names, from Python, YAML, flags and checkpoints."""

import json
import warnings

import pytest
import torch
from training.tiny_bases import tiny_llama, token_rows

from lorry.cli.job_flags import job_values, parameters
from lorry.cli.run_file import RunFile, schema
from lorry.core.errors import OptionError
from lorry.training import Fleet, Job, train
from lorry.training.report import read_metrics

EARLIER = {"rate": 3e-3, "clip": 0.5, "accumulation": 2, "train_also": ["lm_head"]}
NOW = {"learning_rate": 3e-3, "max_grad_norm": 0.5, "gradient_accumulation_steps": 2, "modules_to_save": ["lm_head"]}


def test_earlier_names_mean_the_same_and_say_so():
    with pytest.warns(DeprecationWarning, match="'rate' is called 'learning_rate'"):
        old = Job("job", "x.jsonl", **EARLIER)
    assert old == Job("job", "x.jsonl", **NOW)
    with pytest.warns(DeprecationWarning):
        assert Job.from_dict({"name": "job", "data": "x.jsonl", **EARLIER}).to_dict() == old.to_dict()
    with pytest.warns(DeprecationWarning, match="max_grad_norm"):
        assert old.clip == 0.5
    assert not set(EARLIER) & set(old.to_dict())


def test_present_and_foreign_names_give_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        job = Job("job", "x.jsonl", **NOW, per_device_train_batch_size=4, lr_scheduler_type="linear")
    assert (job.batch_size, job.schedule) == (4, "linear")


def test_two_names_of_one_option_are_refused():
    with pytest.raises(OptionError, match="'rate' and 'learning_rate'"):
        Job("job", "x.jsonl", rate=1e-3, learning_rate=1e-3)


def test_flags_and_files_take_both():
    flags = {p.name for p in parameters()}
    assert set(EARLIER) | set(NOW) <= flags
    assert job_values({"rate": 1e-3, "learning_rate": None, "train_also": ["score,head"]}) == {
        "learning_rate": 1e-3,
        "modules_to_save": ["score", "head"],
    }
    given = {"path": "x.jsonl"}
    run = RunFile(
        "pocket", "out", [{"data": given, "rate": 1e-3}, {"data": given}], {"learning_rate": 2e-3, "clip": 2.0}
    )
    assert [(j.learning_rate, j.max_grad_norm) for j in run.job_list()] == [(1e-3, 2.0), (2e-3, 2.0)]
    properties = schema()["$defs"]["job"]["properties"]
    assert properties["rate"]["deprecated"] and properties["rate"]["type"] == properties["learning_rate"]["type"]


def test_a_checkpoint_of_the_first_edition_is_taken_up(tmp_path):
    def job():
        return Job(
            "job", token_rows(20, (5, 12), 1), {"method": "lora", "rank": 4}, steps=6, **{**NOW, "modules_to_save": ()}
        )

    whole = train(tiny_llama(), None, job(), tmp_path / "whole")
    first = Fleet(tiny_llama(), None, [job()], tmp_path / "part")
    with first.base.mode(training=True):
        for _ in range(5):
            first._tick()
    path = first.save_checkpoint() / "state.json"
    state = json.loads(path.read_text())
    saved = state["jobs"]["job"]
    names = dict(zip(NOW, EARLIER, strict=True))
    younger = ("task_ids", "dynamics", "stages", "start", "schedule_options")
    saved["job"] = {names.get(k, k): v for k, v in saved["job"].items() if k not in younger}
    saved["progress"] = {{"size_seen": "tokens"}.get(k, k): v for k, v in saved["progress"].items() if k != "examples"}
    del saved["methods"], saved["groups"]
    path.write_text(json.dumps(state))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = train(tiny_llama(), None, job(), tmp_path / "part", resume=True)
    for (_, a, _), (_, b, _) in zip(
        whole.adapters["job"].named_tensors(), second.adapters["job"].named_tensors(), strict=True
    ):
        assert torch.equal(a, b)
    rows = [read_metrics(tmp_path / folder / "job" / "metrics.jsonl") for folder in ("whole", "part")]
    assert [r["tokens"] for r in rows[0]] == [r["tokens"] for r in rows[1]]
