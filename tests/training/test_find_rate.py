"""A sweep of learning rates: chosen by held-out loss, the same at every call, and without a trace on the model."""

import json
import math

import pytest
import torch
from training.tiny_bases import tiny_llama, token_rows

import lorry
from lorry.core.errors import LorryError, OptionError
from lorry.training.find_rate import HELD_OUT, find_rate
from lorry.training.fleet import Fleet

JOB = {
    "name": "one", "data": token_rows(40, (6, 12), 1), "eval_data": token_rows(12, (6, 12), 2), "batch_size": 4,
    "method": {"method": "lora", "rank": 4}, "warmup": 100, "epochs": 3,
}  # fmt: skip


def sweep(model, job=JOB, output=None, **options):
    return find_rate(model, None, job, output, **{"rates": (1e-5, 1e-3, 2e-2), "steps": 12, "widen": 0, **options})


def test_each_rate_has_the_loss_that_it_has_alone(tmp_path):
    model = tiny_llama()
    advice = sweep(model)
    for trial in advice.trials:
        alone = {**JOB, "steps": 12, "epochs": None, "warmup": 1, "learning_rate": trial.rate}
        fleet = Fleet(tiny_llama(), None, [alone], tmp_path / f"{trial.rate}", progress=False)
        assert trial.loss == pytest.approx(fleet.train()["one"]["eval"]["end"]["loss"], rel=1e-5)
    assert advice.rate == min(advice.trials, key=lambda t: t.loss).rate and len(advice.trials) == 3
    assert max(t.loss for t in advice.trials) > min(t.loss for t in advice.trials)


def test_nothing_stays_and_every_call_gives_the_same(tmp_path):
    model = tiny_llama()
    held = lorry.attach(model, "lora", name="mine")
    before = {n: p.clone() for n, p in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    torch.nn.init.normal_(dict(held.named_parameters())["model.layers.0.self_attn.q_proj.B"])
    ids = torch.arange(8)[None]
    own, shown = [p.clone() for p in held.parameters()], model(ids).logits
    random = torch.random.get_rng_state()
    first = sweep(model, output=tmp_path)
    assert list(lorry.adapters(model)) == ["mine"]
    assert torch.equal(model(ids).logits, shown)  # what was active is
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(held.parameters(), own, strict=True))
    assert [m.training for m in model.modules()] == flags and torch.equal(torch.random.get_rng_state(), random)
    assert sweep(model, output=tmp_path) == first
    assert json.loads((tmp_path / "rates.json").read_text())["rate"] == first.rate
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in tmp_path.iterdir()} == {"rates.json", "rates.png"}


def test_the_grid_grows_where_the_best_is_at_its_edge():
    narrow = sweep(tiny_llama(), rates=(1e-6, 1e-5))
    assert narrow.at_edge and narrow.rate == 1e-5 and "edge" in str(narrow)
    wider = sweep(tiny_llama(), rates=(1e-6, 1e-5), widen=1)
    assert [t.rate for t in wider.trials] == [1e-6, 1e-5, 1e-4, 1e-3] and wider.rate > narrow.rate


def test_a_rate_that_breaks_training_is_never_chosen():
    advice = sweep(tiny_llama(), rates=(1e-3, 1e38), steps=6)
    worst = advice.trials[-1]
    assert advice.rate == 1e-3 and (worst.loss is None or not math.isfinite(worst.loss) or worst.loss > 10)


def test_data_are_held_out_where_the_job_holds_out_none():
    job = {k: v for k, v in JOB.items() if k != "eval_data"}
    assert all(t.loss is not None for t in sweep(tiny_llama(), job).trials) and 0 < HELD_OUT < 1


def test_misuse_is_refused():
    for rates in ((1e-3,), (0.0, 1e-3)):
        with pytest.raises(OptionError, match="two positive rates"):
            sweep(tiny_llama(), rates=rates)
    with pytest.raises(LorryError):
        sweep(tiny_llama(), {**JOB, "data": "nowhere.jsonl"})
