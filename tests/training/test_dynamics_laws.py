"""What every registered dynamic must keep, alone and with others, in the engine and in Hugging Face's Trainer."""

import json
from pathlib import Path

import pytest
import torch
from training.results import difference, tensors
from training.test_huggingface import adapter_tensors, options
from training.tiny_bases import tiny_llama, token_rows

from lorry.core.errors import OptionError
from lorry.core.life.api import attach
from lorry.training import Fleet, Job, train
from lorry.training.hooks import DYNAMICS
from lorry.training.huggingface import with_adapters
from lorry.training.report import read_metrics

LORA = {"method": "lora", "rank": 4}
#: Options under which each does something within a few steps, where its defaults do not.
ACTIVE = {
    "rate-factors": {"factors": {"*.B": 4}},
    "freezing": {"until": "never"},
    "galore": {"rank": 2, "every": 3},
    "relora": {"every": 3, "warmup": 1},
    "delta-lora": {"start": 2},
    "lora-plus": {"ratio": 4.0},
    "lora-fa": {"until": 3},
    "lora-ggpo": {"sigma": 0.5, "beta": 10.0, "smoothing": 0.5},
    "dps": {"stages": 3, "max_stage": 2},
    "dp-sgd": {"max_norm": 0.5, "noise": 0.1},
}
STAGES = {"freezing": {"freeze": 3}}
#: Combinations that are published or asked for.
TOGETHER = {
    "allora+lora-plus": ["allora", "lora-plus:ratio=4"],
    "allora (update)+lora-ggpo": [{"dynamics": "allora", "where": "update"}, {"dynamics": "lora-ggpo", "sigma": 0.3}],
    "dp-sgd+lora-fa": [{"dynamics": "dp-sgd", "noise": 0.1}, "lora-fa"],
}
CASES = {name: [{"dynamics": name, **ACTIVE.get(name, {})}] for name in sorted(DYNAMICS)} | TOGETHER


def job(dynamics=(), name="job", stages=None, steps=8):
    options = {"learning_rate": 5e-3, "batch_size": 3, "gradient_accumulation_steps": 2, "seed": 1}
    return Job(name, token_rows(20, (5, 14), 1), LORA, steps=steps, dynamics=dynamics, stages=stages, **options)


def of_case(case):
    return job(CASES[case], stages=STAGES.get(case))


def company():
    return Job("beside", token_rows(20, (9, 20), 2), {"method": "dora", "rank": 2}, steps=8, seed=2)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tensors(train(tiny_llama(), None, job(), tmp_path_factory.mktemp("plain")), "job")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    made = {}

    def run(case):
        if case not in made:
            folder = tmp_path_factory.mktemp("whole")
            made[case] = train(tiny_llama(), None, of_case(case), folder), folder
            assert made[case][0].ok, made[case][0].report["jobs"][0]["status"]
        return made[case]

    return run


def curve(folder):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(folder / "job" / "metrics.jsonl")]


@pytest.mark.parametrize("name", sorted(DYNAMICS))
def test_neutral_options_are_plain_training_to_the_last_bit(name, plain, tmp_path):
    dynamics = [{"dynamics": name, **DYNAMICS[name].neutral}]
    assert difference(tensors(train(tiny_llama(), None, job(dynamics), tmp_path), "job"), plain) == 0


@pytest.mark.parametrize("case", CASES)
def test_alone_is_as_in_a_fleet_and_leaves_the_base(case, whole, plain, tmp_path):
    alone = tensors(whole(case)[0], "job")
    model = tiny_llama()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    together = train(model, None, [company(), of_case(case)], tmp_path)
    assert together.ok, together.report
    assert difference(tensors(together, "job"), alone) < 1e-5
    assert any(n not in plain or alone[n].shape != plain[n].shape or not torch.equal(alone[n], plain[n]) for n in alone)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    bare = train(tiny_llama(), None, company(), tmp_path / "bare")
    assert difference(tensors(together, "beside"), tensors(bare, "beside")) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_exact(case, whole, tmp_path):
    first = Fleet(tiny_llama(), None, [of_case(case)], tmp_path)
    with first.base.mode(training=True):
        for _ in range(11):  # amid a step
            first._tick()
    first.save_checkpoint()
    second = train(tiny_llama(), None, of_case(case), tmp_path, resume=True)
    assert curve(tmp_path) == curve(whole(case)[1])
    assert difference(tensors(second, "job"), tensors(whole(case)[0], "job")) == 0


def trainer(model, folder, dynamics, **more):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": r.input_ids.long(), "labels": r.input_ids.long()} for r in token_rows(32, (12, 12), 1).rows]
    arguments = TrainingArguments(
        **options(folder, gradient_accumulation_steps=2, **{"steps": 4, "save_steps": 2, **more})
    )
    return with_adapters(Trainer, dynamics)(model, arguments, train_dataset=rows)


@pytest.fixture(scope="module")
def plain_trainer(tmp_path_factory):
    model = tiny_llama()
    attach(model, LORA, name="job", seed=1)
    trainer(model, tmp_path_factory.mktemp("trainer"), ()).train()
    return adapter_tensors(model)


@pytest.mark.parametrize("name", sorted(DYNAMICS))
def test_neutral_options_are_plain_training_in_a_trainer(name, plain_trainer, tmp_path):
    model = tiny_llama()
    attach(model, LORA, name="job", seed=1)
    trainer(model, tmp_path, [{"dynamics": name, **DYNAMICS[name].neutral}], save_strategy="no").train()
    assert difference(adapter_tensors(model), plain_trainer) == 0


@pytest.mark.parametrize("case", [c for c in CASES if c not in STAGES])  # stages are for jobs
def test_a_trainer_acts_and_resumes(case, plain_trainer, tmp_path):
    model = tiny_llama()
    attach(model, LORA, name="job", seed=1)
    straight = trainer(model, tmp_path, CASES[case])
    straight.train()
    expected = adapter_tensors(model)
    assert any(n not in plain_trainer or not torch.equal(expected[n], plain_trainer[n]) for n in expected)
    fresh = tiny_llama()
    attach(fresh, LORA, name="job", seed=77)
    trainer(fresh, tmp_path, CASES[case]).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert difference(adapter_tensors(fresh), expected) == 0


def test_what_cannot_act_together_is_refused_with_the_reason():
    found = [(name, other) for name, cls in DYNAMICS.items() for other in cls.apart if other in DYNAMICS]
    assert found
    for name, other in found:
        for pair in ([name, other], [other, name]):
            with pytest.raises(OptionError, match=r"cannot act together: \w+"):
                job(pair)


def test_options_follow_names_in_flags():
    made = job(["lora-plus:ratio=4", "allora:gain=matrix:eta2=1.5"]).make_dynamics()
    assert made[0].ratio == 4 and made[1].gain == "matrix" and made[1].eta2 == 1.5
    with pytest.raises(OptionError, match="NAME:OPTION=VALUE"):
        job(["lora-plus:4"])
    with pytest.raises(OptionError, match="has no option 'rato'"):
        job(["lora-plus:rato=4"])


def test_the_docs_list_every_dynamic_with_what_it_cannot_stand_beside():
    text = (Path(__file__).parents[2] / "docs" / "dynamics.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    listed = {row[0]: (row[3], row[4]) for row in rows[1:]}
    assert sorted(listed) == sorted(DYNAMICS)
    for name, cls in DYNAMICS.items():
        neutral = ", ".join(f"{k}: {json.dumps(v)}" for k, v in cls.neutral.items())
        apart = sorted({*cls.apart, *(other for other, c in DYNAMICS.items() if name in c.apart)})
        assert listed[name] == (f"`{neutral}`" if neutral else "as it is, without options", ", ".join(apart) or "-")


def test_flags_and_files_name_several():
    from lorry.cli.job_flags import job_values

    flags = job_values({"dynamics": ["allora,lora-plus:ratio=4", "lora-ggpo:sigma=0.1"]})
    file = {"dynamics": ["allora", {"dynamics": "lora-plus", "ratio": 4}, {"dynamics": "lora-ggpo", "sigma": 0.1}]}
    common = {"name": "job", "data": "rows.jsonl", "method": "lora"}
    assert Job.from_dict({**common, **flags}).make_dynamics() == Job.from_dict({**common, **file}).make_dynamics()
