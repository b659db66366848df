"""Gradient checkpointing of both kinds: the recomputation sees what the forward pass saw."""

import pytest
import torch
from core.tiny import clear, gradients, llama, off_zero, tokens
from torch.utils.checkpoint import checkpoint

import lorry


def trained(dropout=0.0, method=None):
    model = llama().train()
    for number, name in enumerate("ab"):
        off_zero(lorry.attach(model, method or lorry.LoRA(rank=2, dropout=dropout), name=name), number, 0.1)
    lorry.activate(model, "a")
    return model


def step(model, ids, rows=None, seeds=None):
    clear(model)
    torch.manual_seed(3)
    if rows is None:
        loss = model(ids).logits.square().mean()
    else:
        with lorry.rows(model, rows, seeds=seeds):
            loss = model(ids).logits.square().mean()
    loss.backward()
    return {
        n: gradients(a) if any(p.grad is not None for p in a.parameters()) else None
        for n, a in lorry.adapters(model).items()
    }


def same(found, wanted):
    for name in wanted:
        assert (found[name] is None) == (wanted[name] is None), name
        for key in wanted[name] or {}:
            torch.testing.assert_close(found[name][key], wanted[name][key], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_gradients_equal_those_without_checkpointing(reentrant, dropout, method):
    model, ids = (
        trained(method=lorry.method_from({"method": method, "rank": 2, "dropout": dropout})),
        tokens(4),
    )
    rows = ["b", None, {"a": 0.5, "b": 0.5}, "a"]
    plain, mixed = step(model, ids), step(model, ids, rows, {"a": 1, "b": 2})
    assert plain["b"] is None and mixed["b"] is not None
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    same(step(model, ids), plain)
    # the composition of rows is over when the backward pass begins
    same(step(model, ids, rows, {"a": 1, "b": 2}), mixed)


@pytest.mark.parametrize("reentrant", [False, True])
def test_another_pass_before_the_backward_pass_changes_nothing(reentrant):
    """Preference training: the reference runs between the policy's forward and backward pass."""
    model, ids = trained(), tokens(3)
    wanted = step(model, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    clear(model)
    loss = model(ids).logits.square().mean()
    with torch.no_grad():
        for other in (None, "b"):
            lorry.activate(model, other)
            model(ids)
    loss.backward()
    found = {n: gradients(a) if n == "a" else None for n, a in lorry.adapters(model).items()}
    same(found, wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_passes_then_one_backward_pass(reentrant):
    model, ids = trained(), tokens(3)

    def both():
        clear(model)
        losses = []
        for name in "ab":
            lorry.activate(model, name)
            losses.append(model(ids).logits.square().mean())
        sum(losses).backward()
        return {n: gradients(a) for n, a in lorry.adapters(model).items()}

    wanted = both()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    same(both(), wanted)


def test_a_plain_module_under_checkpoint():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh(), torch.nn.Linear(6, 6))
    adapter = off_zero(lorry.attach(model, lorry.LoRA(rank=2)), std=0.5)
    x = torch.randn(3, 6, requires_grad=True)
    results = []
    for run in (
        model,
        lambda x: checkpoint(model, x, use_reentrant=False),
        lambda x: checkpoint(model, x, use_reentrant=True),
    ):
        clear(model)
        run(x).square().sum().backward()
        results.append(gradients(adapter))
    for other in results[1:]:
        for key, value in results[0].items():
            torch.testing.assert_close(other[key], value)
