"""What the mathematics of federated LoRA promises: aggregation, invariances, and equality with plain training."""

import pytest
import torch
import torch.nn.functional as F
from federated.digit_clients import clients_of, examples, federation, network, server_of

from lorry.federated import AGGREGATIONS, Server, Update, wire
from lorry.federated.aggregate import State, aggregate, error
from lorry.training import Setting

SKEWED = {"split": "dominant", "share": 0.9}


def product(server) -> torch.Tensor:
    """s B A of the state at the one site."""
    return server.whole()["0"].dense()


def test_averaging_is_exact_with_a_frozen_and_not_without(tmp_path):
    errors = {}
    for freeze in ("A", "none"):
        for steps, rate in ((1, 0.05), (6, 0.05), (6, 0.4)):
            job = {"learning_rate": rate}
            made = server_of(
                federation(
                    tmp_path / f"{freeze}{steps}{rate}",
                    freeze=freeze,
                    local_steps=steps,
                    rounds=2,
                    split=SKEWED,
                    job=job,
                )
            ).run()
            errors[freeze, steps, rate] = made.report["rounds"][-1]["aggregation_error"]
    frozen = [value for (freeze, *_), value in errors.items() if freeze == "A"]
    assert max(frozen) < 1e-6
    assert 1e-5 < errors["none", 6, 0.05] < errors["none", 6, 0.4]


@pytest.mark.parametrize("freeze", ["A", "B"])
def test_the_frozen_factor_never_moves_and_the_start_is_the_base(tmp_path, freeze):
    model, inputs = network(), torch.randn(5, 16)
    server = server_of(federation(tmp_path, freeze=freeze, rounds=3), model)
    before, index = server.state.pairs["0"], "AB".index(freeze)
    with server.adapter() as adapter, torch.no_grad():
        bare = model(inputs)
        import lorry

        lorry.activate(model, adapter.name)
        assert torch.equal(model(inputs), bare)
        lorry.activate(model, None)
    server.run()
    after = server.state.pairs["0"]
    assert torch.equal(after[index], before[index])
    assert not torch.equal(after[1 - index], before[1 - index])


def test_half_the_bytes_go_up_at_a_square_layer(tmp_path):
    sent = {}
    for freeze in ("A", "none"):
        made = server_of(federation(tmp_path / freeze, freeze=freeze)).run()
        sent[freeze] = made.report["tensor_bytes_up"]
        assert made.report["bytes_up"] > made.report["tensor_bytes_up"]  # headers are counted, too
    assert sent["none"] == 2 * sent["A"]
    assert sent["A"] == 2 * 3 * 16 * 4 * 4  # rounds, clients, out x rank, bytes of a float32


def test_alpha_and_rate_trade_exactly_with_sgd_and_not_with_both_factors_trained(tmp_path):
    def trained(freeze: str, alpha: float, rate: float) -> torch.Tensor:
        job = {"method": {"method": "lora", "rank": 4, "alpha": alpha}, "learning_rate": rate}
        server = server_of(federation(tmp_path / f"{freeze}{alpha}", freeze=freeze, local_steps=8, job=job))
        server.run()
        return product(server)

    def apart(freeze: str) -> float:
        one, other = trained(freeze, 4, 0.4), trained(freeze, 16, 0.4 / 16)
        return float((one - other).norm() / one.norm())

    assert apart("A") < 1e-5
    assert apart("none") > 1e-2


@pytest.mark.parametrize("freeze", ["A", "none"])
def test_one_step_of_all_clients_is_a_step_on_the_union_of_their_batches(tmp_path, freeze):
    """Whole parts as batches and equal parts: the mean of one-step results is one step on the mean gradient."""

    def run(steps: int):
        job = {"batch_size": 32}
        options = federation(tmp_path / f"{freeze}{steps}", freeze=freeze, local_steps=steps, rounds=3, job=job)
        server = server_of(options)
        first = server.state.pairs["0"]
        server.run()
        return first, server.state.pairs["0"]

    def central(a: torch.Tensor, b: torch.Tensor, steps: int):
        model, data = network(dtype=torch.float64), examples(96).examples
        x, y = torch.stack([x for x, _ in data]).double(), torch.tensor([y for _, y in data])
        a, b = (t.double().clone().requires_grad_() for t in (a, b))
        for _ in range(steps):
            hidden = model[0](x) + 2.0 * x @ a.T @ b.T
            gradients = torch.autograd.grad(F.cross_entropy(model[2](torch.tanh(hidden)), y), [a, b])
            with torch.no_grad():
                b -= 0.1 * gradients[1]
                if freeze == "none":
                    a -= 0.1 * gradients[0]
        return a.detach(), b.detach()

    first, found = run(1)
    for one, other in zip(found, central(*first, steps=3), strict=True):
        assert torch.allclose(one.double(), other, atol=1e-6)
    _, more = run(3)
    assert not torch.allclose(more[1].double(), central(*first, steps=9)[1], atol=1e-5)


def test_noise_stays_linear_with_a_frozen():
    """Variance of the product's noise: s²σ² diag(AᵀA) with A frozen, and a term in σ⁴ where both are noisy."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((4, 6), (5, 4)))

    def variance(sigma: float, both: bool) -> torch.Tensor:
        noise_b = sigma * torch.randn(20000, 5, 4, generator=generator, dtype=torch.float64)
        noise_a = sigma * torch.randn(20000, 4, 6, generator=generator, dtype=torch.float64) * both
        return ((b + noise_b) @ (a + noise_a) - b @ a).var(dim=0)

    linear = (a.mT @ a).diagonal()
    for sigma in (0.1, 0.2):
        found = variance(sigma, both=False).mean(0)
        assert torch.allclose(found, sigma**2 * linear, rtol=0.05)

    def excess(sigma: float) -> float:
        expected = sigma**2 * (linear + (b @ b.mT).diagonal().unsqueeze(1))
        return float((variance(sigma, both=True) - expected).mean())

    assert excess(2.0) == pytest.approx(4 * 2.0**4, rel=0.2)  # rank σ⁴
    assert excess(2.0) / excess(1.0) == pytest.approx(16, rel=0.3)


# -- aggregations


def updates(ranks=(3, 3, 3), weights=(0.5, 0.3, 0.2), scale=2.0, common_a=False):
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(ranks[0], 7, generator=generator)
    found = []
    for rank, weight in zip(ranks, weights, strict=True):
        a = common if common_a else torch.randn(rank, 7, generator=generator)
        found.append(Update({"x": (a, torch.randn(9, rank, generator=generator))}, {"x": scale}, weight))
    return found


def dense(state: State, scale: float) -> torch.Tensor:
    total = state.offset["x"].dense() if "x" in state.offset else torch.zeros(9, 7, dtype=torch.float64)
    if state.pairs is not None:
        a, b = (t.double() for t in state.pairs["x"])
        total = total + b @ a * (1.0 if state.folded else scale)
    return total


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_an_aggregation_is_as_exact_as_it_says(name):
    found = updates()
    before = State({"x": found[0].pairs["x"]})
    state = aggregate(name, before, found, frozenset("AB"))
    wanted = sum(u.weight * 2.0 * u.pairs["x"][1].double() @ u.pairs["x"][0].double() for u in found)
    missed = float((dense(state, 2.0) - wanted).norm() / wanted.norm())
    assert error(state, before, found) == pytest.approx(missed, abs=1e-7)
    assert (missed < 1e-6) == AGGREGATIONS[name].exact
    # a second round adds to the first
    again = aggregate(name, state, found, frozenset("AB"))
    kept = dense(State(None, state.offset), 2.0)
    assert error(again, state, found) == pytest.approx(
        float((dense(again, 2.0) - kept - wanted).norm() / wanted.norm()), abs=1e-7
    )


def test_what_averaging_misses_is_the_covariance_of_the_factors():
    found = updates()
    state = aggregate("average", State({"x": found[0].pairs["x"]}), found, frozenset("AB"))
    a_mean, b_mean = (t.double() for t in state.pairs["x"])
    covariance = sum(
        u.weight * (u.pairs["x"][1].double() - b_mean) @ (u.pairs["x"][0].double() - a_mean) for u in found
    )
    wanted = sum(u.weight * u.pairs["x"][1].double() @ u.pairs["x"][0].double() for u in found)
    assert torch.allclose(b_mean @ a_mean, wanted - covariance, atol=1e-5)


def test_svd_is_the_best_of_its_rank_and_takes_several():
    found = updates(ranks=(2, 4, 3))
    state = aggregate("svd", State({"x": found[1].pairs["x"]}), found, frozenset("AB"))
    wanted = sum(u.weight * 2.0 * u.pairs["x"][1].double() @ u.pairs["x"][0].double() for u in found)
    assert state.pairs["x"][0].shape == (4, 7)
    rest = torch.linalg.svdvals(wanted)[4:].norm()
    assert torch.allclose((dense(state, 2.0) - wanted).norm(), rest, atol=1e-5)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_the_saved_adapter_is_the_state(tmp_path, name):
    import lorry

    ranks = {"a": {"rank": 2}, "b": {"rank": 4}} if not AGGREGATIONS[name].equal_ranks else {"a": {}, "b": {}}
    clients = {n: {**own, "data": examples(40, seed=i)} for i, (n, own) in enumerate(ranks.items())}
    model = network()
    options = federation(tmp_path, clients=clients, aggregation=name, freeze="none", rounds=3)
    server = server_of(options, model)
    path = server.run().path
    fresh = network()
    adapter = lorry.load(fresh, path)
    deltas = {site.path: delta for site, delta in adapter.deltas()}
    assert torch.allclose(deltas["0"].double(), product(server), atol=1e-6)
    assert adapter.metadata["federated"]["rounds"] == 3
    assert list(lorry.adapters(model)) == []


def test_a_fresh_client_answers_as_one_that_was_there_from_the_start(tmp_path):
    options = federation(tmp_path, freeze="none", aggregation="exact", rounds=3)
    model = network()
    server = server_of(options, model)
    server.round()
    server.round()
    message = server._message("client-1", 2)
    one = clients_of(options, network())["client-1"].answer(message)
    other = server.transport.answers["client-1"](message)
    assert wire.unpack(one)[1] == wire.unpack(other)[1]
    assert all(torch.equal(t, wire.unpack(other)[0][n]) for n, t in wire.unpack(one)[0].items())


def test_the_server_needs_no_data_but_its_base(tmp_path):
    options = federation(tmp_path, clients={"a": {"data": examples(16)}}, job={"data": []})
    model = network()
    found = {n: c.answer for n, c in clients_of(options, network()).items()}
    from lorry.federated import InProcess

    assert Server(options, Setting(model), InProcess(found)).run().report["rounds"][0]["clients"] == ["a"]
