"""Routing statistics are recorded, tabled and plotted; draws train a router."""

import json

import pytest
import torch
from core.tiny import llama, off_zero, tokens

import lorry
from lorry.training.routing import RoutingLog, policy_loss, repeated


def recorded(steps=3, **methods):
    model, log = llama(), RoutingLog()
    for name, method in methods.items():
        off_zero(lorry.attach(model, method, targets="all-linear", name=name))
    for step in range(steps):
        for name in methods:
            lorry.activate(model, name)
            with lorry.context(model, recording=True) as context, torch.no_grad():
                model(tokens(seed=step))
            log.add(step, context)
    return log


def test_log_holds_every_layer_and_step(tmp_path):
    log = recorded(a={"method": "mixlora", "rank": 2, "experts": 4})
    assert len(log.rows) == 3 * 2 and log.adapters() == ["a"]
    loads = log.loads(last=3)
    assert set(loads) == {"model.layers.0.mlp", "model.layers.1.mlp"}
    assert all(float(load.sum()) == pytest.approx(2) for load in loads.values())
    summary = log.summary()
    assert [row["step"] for row in summary] == [0, 1, 2]
    assert all(1 <= row["effective"] <= 2 and row["entropy"] > 0 for row in summary)
    log.save(tmp_path / "routing.jsonl")
    assert RoutingLog.read(tmp_path / "routing.jsonl").rows == log.rows
    assert json.loads((tmp_path / "routing.jsonl").read_text().splitlines()[0])["adapter"] == "a"


def test_imbalance_is_within_layers():
    """Two layers collapsed onto different experts are not balanced, though their mean is."""
    log = RoutingLog(
        [{"step": 0, "adapter": "a", "site": s, "load": load} for s, load in (("x", [1.0, 0.0]), ("y", [0.0, 1.0]))]
    )
    assert log.summary()[0]["imbalance"] == pytest.approx(1)


@pytest.mark.parametrize("slug", ["flylora", "smora", "lora-mixer", "remix", "comol", "ept", "mixlora"])
def test_every_routed_method_is_plotted(slug, tmp_path):
    log = recorded(steps=2, a={"method": slug, "rank": 16})
    path = log.plot(tmp_path / "routing.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_what_was_not_recorded_is_an_error():
    with pytest.raises(lorry.LorryError, match="recorded: none"):
        RoutingLog().summary()
    log = recorded(steps=1, a="comol", b="comol")
    with pytest.raises(lorry.LorryError, match="'a', 'b'"):
        log.loads()
    assert log.loads("b")


def test_repeated_rows_train_a_router():
    model = llama()
    adapter = off_zero(lorry.attach(model, "remix", targets="attention"), std=0.2)
    ids = tokens(2)
    batch = repeated({"input_ids": ids}, adapter.row_draws)
    assert torch.equal(batch["input_ids"], torch.cat([ids, ids]))
    model.train()
    torch.manual_seed(0)
    logits = model(**batch).logits
    target = batch["input_ids"][:, 1:]
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].mT, target, reduction="none").mean(1)
    assert not torch.allclose(losses[:2], losses[2:])
    loss = policy_loss(model, "default", losses, 2)
    assert float(loss.detach()) != pytest.approx(float(losses.detach().mean()))
    loss.backward()
    assert all(p.grad.any() for n, p in adapter.named_parameters() if n.endswith("router"))
