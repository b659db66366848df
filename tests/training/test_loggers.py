"""Metrics go where they are asked to go: TensorBoard's event files, Weights & Biases offline, a logger of one's own."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest
from training.tiny_bases import tiny_llama, token_rows

from lorry.core.errors import OptionError
from lorry.training import Fleet
from lorry.training.loggers import Log, Logger, loggers_from
from lorry.training.report import read_metrics


def jobs(steps=3):
    return [
        {
            "name": name,
            "data": token_rows(16, (4, 8), seed),
            "eval_data": token_rows(4, (4, 8), 9),
            "steps": steps,
            "targets": ["q_proj"],
        }
        for seed, name in enumerate(("one", "two"))
    ]


def fleet(path, loggers, steps=3, **options):
    return Fleet(tiny_llama(), None, jobs(steps), path, loggers=loggers, progress=False, **options)


def test_a_logger_of_ones_own_sees_every_row(tmp_path):
    seen, closed = {}, []

    @dataclass
    class Kept(Log):
        job: str

        def write(self, step, values):
            seen.setdefault(self.job, []).append({"step": step, **values})

        def close(self):
            closed.append(self.job)

    @dataclass(frozen=True)
    class Keeper(Logger):
        name = "keeper"

        def open(self, folder, job, options, step):
            assert folder == tmp_path / job and options["steps"] == 3 and step == 0
            return Kept(job)

    fleet(tmp_path, Keeper()).train()
    assert closed == ["one", "two"]
    for job in closed:
        assert seen[job] == read_metrics(tmp_path / job / "metrics.jsonl")


def test_tensorboard_shows_the_curves_of_each_job_and_drops_what_a_resumed_run_does_again(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fleet(tmp_path, "tensorboard", steps=2).train()
    fleet(tmp_path, ["tensorboard"], steps=4, resume=True).train()
    for job in ("one", "two"):
        rows = read_metrics(tmp_path / job / "metrics.jsonl")
        events = EventAccumulator(str(tmp_path / job / "tensorboard")).Reload()
        for tag, key in (("train/loss", "loss"), ("train/rate", "rate"), ("eval/loss", "eval_loss")):
            drawn = {e.step: e.value for e in events.Scalars(tag)}
            assert drawn == pytest.approx({r["step"]: r[key] for r in rows if key in r}), tag


def test_weights_and_biases_keeps_runs_offline(tmp_path):
    pytest.importorskip("wandb")
    fleet(tmp_path, {"logger": "wandb", "mode": "offline", "project": "trial"}).train()
    for job in ("one", "two"):
        (file,) = (tmp_path / job / "wandb").glob("offline-run-*/*.wandb")
        assert b"grad_norm" in file.read_bytes() and b"eval_loss" in file.read_bytes()


def test_unknown_loggers_and_options_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(OptionError, match="'tensorboard'"):
        fleet(tmp_path / "out", "tensorbord")
    with pytest.raises(OptionError, match="'project'"):
        loggers_from({"logger": "wandb", "projct": "x"})
    with pytest.raises(OptionError, match="online"):
        loggers_from([{"logger": "wandb", "mode": "of"}])
    assert not (tmp_path / "out").exists()
    assert loggers_from(None) == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, name):
    for module in (name, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    model = tiny_llama()
    before = set(map(type, model.modules()))
    with pytest.raises(OptionError, match=f"lorry.{name}."):
        Fleet(model, None, jobs(), tmp_path, loggers=name, progress=False)
    assert set(map(type, model.modules())) == before  # no adapter is left on it
