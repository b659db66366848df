"""The miniature of growth: its tasks, what it counts, and the record."""

import math

import pytest
import torch

from lorry.claims import compare, read_records
from lorry.claims.studies import scalezero_dps as study
from lorry.claims.verdicts import together


def test_tasks_are_waves_of_rising_frequency_and_parts_differ():
    train, held = study.waves(0, 5, 1), study.waves(0, 5, 2)
    assert train.task_ids == tuple(t for t in range(6) for _ in range(5))
    x, value = train[7]
    assert x[2:].tolist() == [0, 1, 0, 0, 0, 0] and abs(float(value)) <= 1
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(train.examples, held.examples, strict=True))


def test_draws_are_counted_until_the_last_task_was_solved_once():
    def evaluation(step, *losses):
        return {"step": step, "eval_loss": 1.0, **{f"eval_loss/{i}": value for i, value in enumerate(losses)}}

    rows = [
        evaluation(0, *[0.0] * 6),  # before the first step nothing counts
        {"step": 1, "loss": 1.0, "examples": 48},
        evaluation(1, 0.01, 0.01, 0.01, 0.01, 0.01, 0.5),
        {"step": 2, "loss": 1.0, "examples": 60},
        evaluation(2, 0.06, 0.03, 0.03, 0.5, 0.5, 0.03),
        {"step": 3, "loss": 1.0, "examples": 70},
    ]
    found = study.measured(rows)
    assert found["draws"] == 60 and found["solved"] == 6
    assert found["kept"] == pytest.approx(-math.log(2) / 3)
    part = study.measured(rows[:3])
    assert part["draws"] == 48 and part["solved"] == 5 and part["validation"] < found["validation"]


def test_every_contender_runs_and_only_joint_training_draws_all():
    found = {name: study.run(name, 1e-2, 0, 30) for name in study.GROWTH}
    assert found[study.JOINT]["draws"] == 30 * study.BATCH
    assert all(one["draws"] <= 30 * study.BATCH and 0 <= one["solved"] < 6 for one in found.values())


def test_the_recorded_verdict_follows_from_the_figures():
    (record,) = [r for r in read_records() if r.slug == "scalezero-dps"]
    needed, kept = (panel.series for panel in record.finding.panels)
    pairs = zip(needed[study.DPS][0], needed[study.JOINT][0], strict=True)
    saved = [1 - ours / joint for ours, joint in pairs]
    less = [a - b for a, b in zip(kept[study.DPS][0], kept[study.DROPPED][0], strict=True)]
    assert record.finding.verdict == together([compare(saved, study.FEWER), compare(less, study.LESS)])
