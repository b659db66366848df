"""Methods that draw their routes get several draws of each row, and the engine trains what drew them."""

from dataclasses import replace

import pytest
import torch
from training.results import difference, tensors
from training.tiny_bases import encoded, tiny_llama, token_rows

from lorry.core.life.api import context, rows
from lorry.training import Fleet, Job, train
from lorry.training.joint import Base, Share, forward, train_pass
from lorry.training.objectives import Causal
from lorry.training.report import read_metrics
from lorry.training.rows import IGNORE, Encoded
from lorry.training.task import Prepared, Setting

REMIX = {"method": "remix", "experts": 4, "top_k": 2, "rank": 2, "alpha": 8.0, "draws": 3}


def drawn(steps=10, **method):
    return Job(
        "drawn",
        token_rows(30, (4, 20), 1),
        {**REMIX, "dropout": 0.1, **method},
        # proportional steps: at the start all draws are nearly equal, and Adam makes full steps of what little differs
        optimizer="sgd",
        learning_rate=3.0,
        max_grad_norm=None,
        steps=steps,
        batch_size=3,
        gradient_accumulation_steps=2,
        seed=1,
    )


def company(steps=10):
    return [
        Job("wide", token_rows(30, (15, 30), 2), {"method": "dora", "rank": 4, "dropout": 0.1}, steps=steps, seed=2),
        replace(
            drawn(),
            name="twice",
            method={**REMIX, "draws": 2},
            gradient_accumulation_steps=1,
            seed=3,
        ),
        Job("routed", token_rows(30, (5, 9), 4), {"method": "lora-mixer", "experts": 3, "rank": 2}, steps=steps),
    ]


def base():
    """In float64: routes are choices, and what rounding turns round in a near tie is another result altogether."""
    return tiny_llama().double()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return train(base(), None, drawn(), folder), read_metrics(folder / "drawn" / "metrics.jsonl")


@pytest.mark.parametrize("ratio", [None, 1.0])
def test_a_router_is_trained_beside_others_as_alone(alone, ratio, tmp_path):
    first, *others = company()
    fleet = train(base(), None, [first, drawn(), *others], tmp_path, max_pad_ratio=ratio)
    assert fleet.ok, fleet.report
    assert difference(tensors(fleet, "drawn"), tensors(alone[0], "drawn")) < 1e-5
    for name in ("drawn", "twice"):  # routers start at zero
        routers = [t for n, t in tensors(fleet, name).items() if n.endswith("router")]
        assert routers and all(float(t.abs().max()) > 1e-4 for t in routers)
    for job in (first, *others):
        single = train(base(), None, job, tmp_path / job.name)
        assert difference(tensors(fleet, job.name), tensors(single, job.name)) < 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_routes_are_those_that_were_drawn(alone, reentrant, tmp_path):
    model = base()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert difference(tensors(train(model, None, drawn(), tmp_path), "drawn"), tensors(alone[0], "drawn")) < 1e-5


def test_a_run_taken_up_again_draws_what_it_would_have_drawn(alone, tmp_path):
    fleet = Fleet(base(), None, [drawn()], tmp_path)
    with fleet.base.mode(training=True):
        for _ in range(7):  # the seventh pass is the first half of a step
            fleet._tick()
    fleet.save_checkpoint()
    resumed = Fleet(base(), None, [drawn()], tmp_path, resume=True).train()
    assert difference(tensors(resumed, "drawn"), tensors(alone[0], "drawn")) == 0


def share_of(name, data, **more):
    return Share(name, Prepared(Causal(), data), data.examples, **more)


def again(share, base):
    """The same pass once more: logits and labels."""
    with base.mode(training=True), forward(base, [share], {"a": 4}) as outcome:
        return outcome.parts[0]


def shared_pass(seed, draws, method=REMIX):
    """One pass over two rows whose adapter is off its start; returns share, adapter and model."""
    from core.tiny import off_zero

    from lorry.core.life.api import attach

    model = tiny_llama()
    adapter = off_zero(attach(model, method, name="a"), std=0.3)
    share = share_of("a", token_rows(2, (6, 11), 5), seed=seed, draws=draws)
    base = Base(Setting(model))
    with base.mode(training=True):
        train_pass(base, [share], 0)
    assert share.error is None
    return share, adapter, base


def test_the_reported_loss_is_the_mean_over_draws_without_the_policy_term():
    share, adapter, base = shared_pass(4, 3)
    assert all(p.grad.any() for n, p in adapter.named_parameters() if n.endswith("router"))
    # the same pass by hand: rows after rows, with the same seed
    with torch.no_grad():
        logits, labels = again(share, base)
    losses = torch.stack([Causal().loss(x, y)[0] for x, y in zip(logits.split(1), labels.split(1), strict=True)])
    assert float(losses.view(3, 2).std(0).min()) > 0
    assert share.loss == pytest.approx(float(losses.view(3, 2).mean(0).sum()), rel=1e-6)


def test_the_draws_of_a_row_drop_the_same_elements():
    from core.tiny import off_zero

    from lorry.core.life.api import attach

    model = tiny_llama()
    adapter = off_zero(attach(model, {**REMIX, "dropout": 0.5, "router_std": 0.0}, name="a", targets=[SITE]), std=0.3)
    with torch.no_grad():  # experts that are all alike: only dropout could make draws differ
        tensors = adapter.entries[SITE].tensors()
        tensors["A"].copy_(tensors["A"][:2].repeat(4, 1))
        tensors["B"].copy_(tensors["B"][:, :2].repeat(1, 4))
    share = share_of("a", token_rows(2, (6, 11), 5), seed=4, draws=3)
    base = Base(Setting(model))
    with base.mode(training=True), forward(base, [share], {"a": 4}) as outcome:
        logits = outcome.parts[0][0].unflatten(0, (3, 2))
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    assert not torch.equal(logits[0, 0, :6], logits[0, 1, :6])
    with base.mode(training=False), forward(base, [share]) as outcome:
        assert not torch.allclose(outcome.parts[0][0].unflatten(0, (3, 2))[0], logits[0])


def test_experts_get_the_gradient_of_the_mean_loss_alone():
    share, adapter, base = shared_pass(4, 3)
    found = {n: p.grad.clone() for n, p in adapter.named_parameters()}
    base.model.zero_grad(set_to_none=True)
    with base.mode(training=True), forward(base, [share], {"a": 4}) as outcome:
        (Causal().loss(*outcome.parts[0])[0] / 3).backward()
    for name, parameter in adapter.named_parameters():
        if name.endswith("router"):
            assert parameter.grad is None and found[name].any()
        else:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_draws_count_towards_the_tokens_of_a_pass_and_not_of_the_data(alone):
    result, metrics = alone
    steps = drawn()
    fed = sum(len(r) for r in steps.data.rows)  # an epoch is five steps of two batches of three
    assert result["drawn"]["tokens"] == 2 * fed and len(metrics) == 10
    share = share_of("a", token_rows(2, (6, 6), 5), draws=4)
    assert len(share.passed) == 8 and share.passed[2] is share.examples[0]


def test_all_experts_active_is_trained_without_draws(tmp_path):
    fleet = Fleet(tiny_llama(), None, [drawn(2, top_k=4)], tmp_path)
    fleet.runs[0].open_step()
    assert fleet.runs[0].share().draws == 1
    assert fleet.train().ok


SITE, EXPERTS, RANK, RIGHT = "model.layers.1.mlp.down_proj", 6, 2, (3, 5)


def sharp_llama():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def experts():
    """A and B of six experts that are given."""
    generator = torch.Generator().manual_seed(8)
    return (torch.randn(s, generator=generator) for s in ((EXPERTS * RANK, 64), (32, EXPERTS * RANK)))


def texts_of_a_pair():
    """Rows whose every next token is the one that a model with two certain experts finds most likely."""
    from lorry.core.life.api import attach

    a, b = experts()
    units = [RANK * e + i for e in RIGHT for i in range(RANK)]
    model = sharp_llama()
    teacher = attach(model, {"method": "lora", "rank": 4, "alpha": 4.0}, targets=[SITE]).entries[SITE].tensors()
    made = []
    with torch.no_grad():
        teacher["A"].copy_(a[units])
        teacher["B"].copy_(b[:, units])
        for row in token_rows(6, (8, 12), 3).rows:
            best = model(row.input_ids[None].long()).logits[0].argmax(-1)
            made.append(Encoded(row.input_ids, torch.cat([torch.tensor([IGNORE]), best[:-1]]).int()))
    return encoded(made)


def learned(folder, data, score):
    """Train the router alone, or nothing; returns the held-out loss and the experts that it picks."""
    method = {"method": "remix", "experts": EXPERTS, "top_k": 2, "rank": RANK, "alpha": 4.0, "draws": 8}
    job = Job(
        "toy",
        data,
        method,
        targets=[SITE],
        learning_rate=0.1,
        steps=60,
        batch_size=6,
        max_grad_norm=None,
        eval_data=data,
    )
    fleet = Fleet(sharp_llama(), None, [job], folder)
    adapter = fleet.runs[0].adapter
    given = adapter.entries[SITE].tensors()
    with torch.no_grad():
        for name, value in zip(("A", "B"), experts(), strict=True):
            given[name].copy_(value)
    for name, parameter in adapter.named_parameters():
        if not (score and name.endswith("router")):
            parameter.register_hook(torch.zeros_like)
    result = fleet.train()
    with context(fleet.model, recording=True) as facts, rows(fleet.model, ["toy"] * 6), torch.no_grad():
        fleet.model.eval()
        task = Causal()
        task.forward(fleet.base.setting, task.collate(fleet.base.setting, data.examples))
    return result["toy"]["eval"]["end"]["loss"], facts.records["toy", SITE, "load"]


def test_the_engine_learns_which_experts_are_right(tmp_path):
    data = texts_of_a_pair()
    untrained, at_first = learned(tmp_path / "off", data, score=False)
    trained, load = learned(tmp_path / "on", data, score=True)
    assert at_first[list(RIGHT)].sum() == 0
    assert load[list(RIGHT)].sum() > 1.5  # of two choices for each row
    assert trained < untrained / 2
