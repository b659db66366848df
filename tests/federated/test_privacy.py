"""Differential privacy of clients: gradients clipped row by row, noise of the promised size, and what it costs."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from federated.digit_clients import clients_of, examples, federation, network, server_of

from lorry.core.errors import OptionError
from lorry.federated import Client, Privacy, PrivacyError, wire
from lorry.federated.privacy import Ledger, noised, poisson, private_sum, secret_generator
from lorry.training import Setting

pytest.importorskip("opacus", reason="the extra federated is not installed")


class EveryExample(Client):
    """A client whose batches hold all of its data, so that what comes out can be worked out by hand."""

    @property
    def sample_rate(self) -> float:
        return 1.0


def by_hand(examples_, a, b, steps, rate, largest):
    """DP-SGD without noise in plain float64, the gradient of each example by a loop."""
    model = network(dtype=torch.float64)
    a, b = a.double(), b.double().clone()
    norms = []
    for _ in range(steps):
        total = torch.zeros_like(b)
        for x, y in examples_:
            held = b.clone().requires_grad_()
            out = model[2](torch.tanh(model[0](x.double()) + 2.0 * x.double() @ a.T @ held.T))
            gradient = torch.autograd.grad(F.cross_entropy(out, torch.tensor(y)), held)[0]
            norms.append(float(gradient.norm()))
            total += gradient * min(1.0, largest / norms[-1])
        b -= rate * total / len(examples_)
    return b, norms


@pytest.mark.parametrize("largest", [1e9, 0.05])
def test_private_steps_without_noise_are_clipped_sgd_worked_out_example_by_example(tmp_path, largest):
    data = examples(12)
    privacy = {"noise_multiplier": 0.0, "max_grad_norm": largest}
    options = federation(
        tmp_path, clients={"a": {"data": data}}, privacy=privacy, job={"batch_size": 12}, local_steps=3, rounds=1
    )
    server = server_of(options)
    client = EveryExample(options, "a", Setting(network()))
    a, b = server.state.pairs["0"]
    found = wire.unpack(client.answer(server._message("a", 0)))[0]["0.B"]
    wanted, norms = by_hand(data.examples, a, b, 3, 0.1, largest)
    assert torch.allclose(found.double(), wanted, atol=1e-6)
    assert (max(norms) > largest) == (largest < 1)


def test_no_example_counts_more_than_the_bound_over_all_tensors_together():
    generator = torch.Generator().manual_seed(0)
    rows = {"x": 3 * torch.randn(5, 4, 2, generator=generator), "y": torch.randn(5, 3, generator=generator)}
    for index in range(5):
        one = private_sum({n: g[index : index + 1] for n, g in rows.items()}, 0.7)
        assert math.sqrt(sum(float(g.square().sum()) for g in one.values())) == pytest.approx(0.7, rel=1e-5)
    small = {n: g * 1e-3 for n, g in rows.items()}
    assert all(torch.allclose(g, small[n].sum(0)) for n, g in private_sum(small, 0.7).items())
    rows["x"][2, 0, 0] = float("inf")  # one that is not finite counts nothing
    rest = {n: g[[0, 1, 3, 4]] for n, g in rows.items()}
    assert all(torch.allclose(g, private_sum(rest, 0.7)[n]) for n, g in private_sum(rows, 0.7).items())


def test_the_noise_of_a_sum_has_the_promised_deviation():
    found = noised({"x": torch.zeros(200, 100)}, 1.5 * 0.7, torch.Generator().manual_seed(0))["x"]
    assert float(found.std()) == pytest.approx(1.5 * 0.7, rel=0.02)
    assert abs(float(found.mean())) < 0.03


def test_noise_reaches_the_trained_factor_alone_and_has_the_promised_size(tmp_path):
    """One step at rate 1 with a gradient clipped to almost nothing: what is sent is noise σC/b."""
    privacy = {"noise_multiplier": 1e6, "max_grad_norm": 1e-5}
    options = federation(tmp_path, privacy=privacy, local_steps=1, rounds=1, job={"learning_rate": 1.0})
    server = server_of(options)
    before = server.state.pairs["0"]
    answers = [server.transport.answers[n](server._message(n, 0)) for n in options.names()]
    sent = [wire.unpack(a)[0] for a in answers]
    assert all(set(tensors) == {"0.B"} for tensors in sent)
    values = torch.cat([t["0.B"].flatten() for t in sent])
    assert float(values.std()) == pytest.approx(10 / 8, rel=0.15)  # σ C = 10, batches of 8
    server.run()
    assert torch.equal(server.state.pairs["0"][0], before[0])


def test_poisson_batches_take_each_example_by_itself():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([float(len(poisson(200, 0.1, generator))) for _ in range(500)])
    assert float(sizes.mean()) == pytest.approx(20, rel=0.05)
    assert float(sizes.var()) == pytest.approx(18, rel=0.25)  # n q (1 - q)


def test_noise_cannot_be_repeated_unless_a_test_asks_for_it():
    assert secret_generator().initial_seed() != secret_generator().initial_seed()


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_the_budget_is_that_of_all_rounds_and_the_receipt_says_it(tmp_path, accountant):
    from opacus.accountants import create_accountant

    privacy = {"epsilon": 4.0, "delta": 1e-3, "accountant": accountant}
    options = federation(tmp_path, privacy=privacy, rounds=2, local_steps=3)
    made = server_of(options).run()
    spent = made.report["privacy"]["client-0"]
    assert spent["steps"] == 6
    peer = create_accountant(accountant)
    for _ in range(6):
        peer.step(noise_multiplier=spent["noise_multiplier"], sample_rate=8 / 32)
    assert spent["epsilon"] == pytest.approx(peer.get_epsilon(delta=1e-3), rel=1e-6)
    assert 3.5 < spent["epsilon"] <= 4.0
    first = made.report["rounds"][0]["privacy"]["client-0"]["epsilon"]
    assert first < spent["epsilon"]  # it grows over the rounds, and is not begun anew
    assert any("epsilon" in note and "all rounds" in note for note in made.receipt.notes)
    saved = json.loads((tmp_path / "adapter" / "lorry.json").read_text())
    assert saved["metadata"]["federated"]["privacy"]["client-0"]["epsilon"] == spent["epsilon"]


def test_a_client_keeps_its_own_account_and_stops_at_its_budget(tmp_path):
    options = federation(tmp_path / "out", privacy={"epsilon": 2.0, "delta": 1e-3}, rounds=2)
    server = server_of(options)
    message = server._message("client-0", 0)
    for number in range(3):  # a server that asks for more rounds than were agreed on, from a client begun anew
        client = Client(options, "client-0", Setting(network()), folder=tmp_path / "kept")
        tensors, facts = wire.unpack(client.answer(message))
        assert ("error" in facts) == (number == 2)
    assert "takes no part any more" in facts["error"] and not tensors


def test_the_account_of_a_step_is_written_before_it_is_taken(tmp_path):
    ledger = Ledger.open(Privacy(epsilon=1.0, delta=1e-3), tmp_path / "privacy.json")
    with pytest.raises(PrivacyError, match="would spend epsilon"):
        ledger.spend(0.3, 0.5, 100)
    assert not (tmp_path / "privacy.json").exists() and ledger.history == []
    spent = ledger.spend(4.0, 0.05, 5)
    again = Ledger.open(ledger.privacy, tmp_path / "privacy.json")
    assert again.facts()["epsilon"] == spent > 0
    (tmp_path / "privacy.json").write_text("{}")
    with pytest.raises(OptionError, match="Restore it from a copy"):
        Ledger.open(ledger.privacy, tmp_path / "privacy.json")


def test_a_private_client_sends_neither_its_loss_nor_its_size(tmp_path):
    options = federation(tmp_path, privacy={"noise_multiplier": 1.0, "delta": 1e-3})
    client = clients_of(options, network())["client-0"]
    facts = wire.unpack(client.answer(server_of(options)._message("client-0", 0)))[1]
    assert set(facts) == {"client", "round", "anchor", "privacy"}
    assert options.weighting() == "equal" and federation(tmp_path).weighting() == "examples"


@pytest.mark.parametrize(
    "privacy, job, says",
    [
        ({"epsilon": 0.001, "delta": 1e-3}, {}, "cannot be met in 6 steps.*Allow a larger epsilon"),
        ({"epsilon": 1.0, "delta": 0.1}, {}, "use less than"),
        ({"epsilon": 1.0, "delta": 1e-3}, {"batch_size": 64}, "use a batch_size of at most 32"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused_with_what_to_do(tmp_path, privacy, job, says):
    with pytest.raises(OptionError, match=says):
        server_of(federation(tmp_path, privacy=privacy, job=job))


def test_dropout_and_whole_modules_have_no_gradients_of_single_rows(tmp_path):
    privacy = {"noise_multiplier": 1.0, "delta": 1e-3}
    for job in ({"method": {"method": "lora", "rank": 4, "dropout": 0.1}}, {"modules_to_save": ["2"]}):
        options = federation(tmp_path, privacy=privacy, job=job)
        answer = clients_of(options, network())["client-0"].answer(server_of(options)._message("client-0", 0))
        assert "gradients of single rows cannot be had" in wire.unpack(answer)[1]["error"]


def test_freezing_a_leaves_the_whole_bound_to_b(tmp_path):
    """A frozen factor takes no part of the norm: clipping over B alone is not clipping over both."""
    found = {}
    for freeze in ("A", "none"):
        options = federation(
            tmp_path / freeze,
            clients={"a": {"data": examples(12)}},
            freeze=freeze,
            privacy={"noise_multiplier": 0.0, "max_grad_norm": 0.05},
            job={"batch_size": 12},
            rounds=2,
        )
        server = server_of(options)
        server.transport.answers["a"] = EveryExample(options, "a", Setting(network())).answer
        server.run()
        found[freeze] = server.state.pairs["0"]
    wanted, _ = by_hand(examples(12).examples, found["A"][0], torch.zeros(16, 4), 6, 0.1, 0.05)
    assert torch.allclose(found["A"][1].double(), wanted, atol=1e-6)
    assert not torch.allclose(found["none"][1].double(), wanted, atol=1e-6)
