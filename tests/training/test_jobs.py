"""Jobs as plain data, schedules, optimizers."""

import pytest
import torch
from training.tiny_bases import tiny_llama, token_rows

from lorry.core.errors import OptionError
from lorry.core.life.api import attach
from lorry.training import DataError, Job, jobs_from
from lorry.training.optim import clip_gradients, load_optimizer, make_optimizer, optimizer_tensors, set_rate
from lorry.training.schedule import rate_factor


def test_a_job_is_built_from_plain_data_and_says_what_it_is():
    plain = {
        "name": "math",
        "data": {"path": "train.jsonl", "limit": 5},
        "method": {"method": "dora", "rank": 4},
        "targets": ["q_proj", "v_proj"],
        "objective": "completion",
        "columns": {"prompt": "q", "completion": "a"},
        "max_length": 64,
        "learning_rate": 1e-3,
    }
    job = Job.from_dict(plain)
    assert {k: job.to_dict()[k] for k in ("name", "data", "targets", "columns")} == {
        k: plain[k] for k in ("name", "data", "targets", "columns")
    }
    assert job.make_method().rank == 4 and job.to_dict()["method"] == {"method": "dora", "rank": 4}
    objective = job.make_objective()
    assert (objective.prompt_column, objective.completion_column, objective.max_length) == ("q", "a", 64)
    assert Job.from_dict(job.to_dict()) == job


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stepz": 3}, "steps"),
        ({"steps": 0}, "at least 1"),
        ({"steps": 3, "epochs": 1}, "not both"),
        ({"schedule": "cosin"}, "cosine"),
        ({"method": "lorra"}, "lora"),
        ({"method": {"method": "lora", "rnk": 3}}, "rank"),
        ({"learning_rate": "1e-4"}, "1.0e-4"),
        ({"learning_rate": -1.0}, "above 0"),
        ({"eval_every": 5}, "eval_data"),
        ({"hold_out": 0.1, "patience": 2}, "eval_every"),
        ({"betas": [0.9]}, "two numbers"),
        ({"data": None}, "data"),
        ({"dtype": "float8"}, "float32"),
        ({"columns": {"txt": "review"}}, "text"),
        ({"objective": "classification", "packing": True}, "packed"),
        ({"name": "a b"}, "letters"),
    ],
)
def test_bad_options_are_refused_with_what_to_do(options, words):
    with pytest.raises(OptionError, match=words):
        Job.from_dict({"name": "job", "data": "x.jsonl", **options})


def test_an_unknown_objective_has_near_misses():
    with pytest.raises(DataError, match="(?i)completion"):
        Job("job", "x.jsonl", objective="completions")


def test_names_differ():
    with pytest.raises(OptionError, match="Two jobs are called 'a'"):
        jobs_from([Job("a", "x.jsonl"), {"name": "a", "data": "y.jsonl"}])
    with pytest.raises(OptionError, match="checkpoints"):
        jobs_from([Job("checkpoints", "x.jsonl")])
    with pytest.raises(OptionError, match="at least one"):
        jobs_from([])


def test_schedules_rise_and_fall():
    linear = [rate_factor("linear", s, 10, warmup=2) for s in range(11)]
    assert linear[:3] == [0.5, 1.0, 1.0] and linear[6] == 0.5 and linear[10] == 0.0
    cosine = [rate_factor("cosine", s, 8, floor=0.1) for s in range(9)]
    assert cosine[0] == 1.0 and cosine[4] == pytest.approx(0.55) and cosine[8] == pytest.approx(0.1)
    assert cosine == sorted(cosine, reverse=True)
    assert [rate_factor("constant", s, 10, warmup=0.2) for s in (0, 1, 2, 99)] == [0.5, 1.0, 1.0, 1.0]


def test_lora_plus_gives_b_its_own_rate():
    model = tiny_llama()
    job = Job("job", token_rows(2, (4, 4), 0), {"method": "lora-plus", "rate_ratio": 16.0}, learning_rate=1e-3)
    adapter = attach(model, job.make_method(), name="job")
    optimizer = make_optimizer(job, adapter)
    set_rate(optimizer, 5e-4)
    names = {id(p): n for n, p in adapter.named_parameters()}
    rates = {names[id(p)][-1]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert rates == {"A": 5e-4, "B": pytest.approx(8e-3)}
    assert len([p for g in optimizer.param_groups for p in g["params"]]) == len(names)


def test_an_optimizer_says_what_it_lacks():
    adapter = attach(tiny_llama(), "lora", name="job")
    rows = token_rows(2, (4, 4), 0)
    with pytest.raises(OptionError, match="adamw"):
        make_optimizer(Job("job", rows, optimizer="adamv"), adapter)
    with pytest.raises(OptionError, match="betas"):
        make_optimizer(Job("job", rows, optimizer="sgd", betas=(0.9, 0.99)), adapter)
    with pytest.raises(OptionError):
        make_optimizer(Job("job", rows, optimizer="LBFGS"), adapter)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adafactor", "rmsprop"])
def test_optimizer_state_goes_through_tensors_and_back(name):
    def step(adapter, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for p in adapter.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()

    job = Job("job", token_rows(2, (4, 4), 0), optimizer=name, learning_rate=1e-2, weight_decay=0.01)
    first = attach(tiny_llama(), "lora", name="job")
    optimizer = make_optimizer(job, first)
    step(first, optimizer, 1)
    second = attach(tiny_llama(), "lora", name="job")
    with torch.no_grad():
        for a, b in zip(first.parameters(), second.parameters(), strict=True):
            b.copy_(a)
    other = make_optimizer(job, second)
    load_optimizer(other, second, optimizer_tensors(optimizer, first))
    for seed in (2, 3):
        step(first, optimizer, seed)
        step(second, other, seed)
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)


def test_clipping_is_torch_s():
    ours = [torch.randn(4, 3), torch.randn(5)]
    theirs = [torch.nn.Parameter(torch.zeros_like(g)) for g in ours]
    for p, g in zip(theirs, ours, strict=True):
        p.grad = g.clone()
    expected = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    assert clip_gradients(ours, 0.5) == pytest.approx(float(expected), rel=1e-6)
    for p, g in zip(theirs, ours, strict=True):
        assert torch.allclose(p.grad, g, rtol=1e-4)
    before = [g.clone() for g in ours]
    clip_gradients(ours, 100.0)
    assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True))
