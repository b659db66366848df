"""Gradients by factors against autograd in float64, the figures of each head, and attention by factors in a model."""

import math

import pytest
import torch
from attention.tiny import MODELS, causal_model, gpt2, padded, tokens
from core.tiny import off_zero

import lorry
from lorry.attention import (
    Approximation,
    AttentionError,
    exact_gradients,
    factor_gradients,
    fast,
    fast_attention,
    fast_gradients,
    head_limits,
    report,
)
from lorry.attention.factored import Factors, probability_factors
from lorry.attention.polynomial import coefficients, feature_count, features, predicted_degree


def drawn(*shape, seed=0, most=None):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values if most is None else values * (most / values.abs().max())


def adapted_head(rank, queries=9, keys=9, seed=0):
    """Inputs, frozen weights and factors of Q, K and V of one head, and what its output is compared with."""
    width, head, values = 7, 4, 5
    x = {"q": drawn(queries, width, seed=seed), "k": drawn(keys, width, seed=seed + (queries != keys))}
    x["v"] = x["k"]
    sizes = {"q": head, "k": head, "v": values}
    w = {n: drawn(o, width, seed=seed + 2) * 0.3 for n, o in sizes.items()}
    a = {n: (drawn(rank, width, seed=seed + 3) * 0.3).requires_grad_() for n in sizes}
    b = {n: (drawn(o, rank, seed=seed + 4) * 0.3).requires_grad_() for n, o in sizes.items()}
    return x, w, a, b, drawn(queries, values, seed=seed + 5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_closed_form_is_autograd(rank, causal):
    for queries, keys in ((9, 9), (6, 11)):
        if causal and queries != keys:
            continue
        x, w, a, b, target = adapted_head(rank, queries, keys)
        scale, beta = 2.0 / rank, 0.7
        q, k, v = (x[n] @ (w[n] + scale * b[n] @ a[n]).T for n in "qkv")
        logits = beta * q @ k.T
        if causal:
            logits = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -math.inf)
        out = logits.softmax(-1) @ v
        (0.5 * (out - target).square().sum()).backward()
        with torch.no_grad():
            found = exact_gradients(q, k, v, out - target, scaling=beta, causal=causal)
            for n, gradient in zip("qkv", found, strict=True):
                da, db = factor_gradients(x[n], a[n], b[n], scale, gradient)
                assert (da - a[n].grad).abs().max() < 1e-12 and (db - b[n].grad).abs().max() < 1e-12


@pytest.mark.parametrize("basis", ["taylor", "chebyshev"])
def test_features_multiply_to_the_polynomial_which_comes_near_exp(basis):
    x, y = drawn(7, 3, most=1.0), drawn(5, 3, seed=1, most=1.0)
    products = x @ y.T
    apart = []
    for degree in (0, 1, 3, 6, 10):
        powers = coefficients(degree, basis, 3.0)
        found = features(x, powers, signed=True) @ features(y, powers).T
        series = sum(c * products**t for t, c in enumerate(powers))
        assert features(x, powers).shape[-1] == feature_count(3, degree)
        assert (found - series).abs().max() < 1e-12 * series.abs().max().clamp_min(1)
        apart.append(float((found - products.exp()).abs().max()))
    assert apart[0] > 1 and apart[-1] < (1e-3 if basis == "taylor" else 1e-5)


@pytest.mark.parametrize("basis", ["taylor", "chebyshev"])
def test_the_predicted_degree_keeps_its_promise_and_not_by_far(basis):
    for radius in (0.1, 1.0, 4.0):
        degree = predicted_degree(radius, 1e-3, basis)
        grid = torch.linspace(-radius, radius, 201, dtype=torch.float64)

        def error(g, grid=grid, radius=radius):
            powers = coefficients(g, basis, radius)
            return float((sum(c * grid**t for t, c in enumerate(powers)) / grid.exp() - 1).abs().max())

        assert error(degree) <= 1e-3
        assert degree < 4 or error(degree // 2) > 1e-3
    assert predicted_degree(0.0) == 0
    with pytest.raises(AttentionError, match="degree above 400"):
        predicted_degree(500.0)
    with pytest.raises(AttentionError, match="finite radius"):
        predicted_degree(math.nan)


@pytest.mark.parametrize("causal", [False, True])
def test_products_with_factors_are_those_with_the_matrices(causal):
    length = 300 if causal else 40  # more than one chunk
    q, k = drawn(2, length, 3, most=0.8), drawn(2, length, 3, seed=1, most=0.8)
    f = probability_factors(q, k, causal=causal)
    whole = f.u @ f.v.mT
    whole = whole.tril() if causal else whole
    torch.testing.assert_close(whole.sum(-1), torch.ones_like(whole[..., 0]), rtol=0, atol=1e-12)
    left, right, m, n = (drawn(2, length, 4, seed=s) for s in (2, 3, 4, 5))
    product = whole * (left @ right.mT)
    if not causal:
        rows = [torch.einsum("nlk,nlb->nlkb", a, b).flatten(-2) for a, b in ((f.u, left), (f.v, right))]
        torch.testing.assert_close(rows[0] @ rows[1].mT, product)
    torch.testing.assert_close(f.times(m), whole @ m)
    torch.testing.assert_close(f.transposed_times(m), whole.mT @ m)
    torch.testing.assert_close(f.weighted_times(left, right, m), product @ m)
    torch.testing.assert_close(f.weighted_transposed_times(left, right, m), product.mT @ m)
    there = (n * f.weighted_times(left, right, m)).sum()
    torch.testing.assert_close((f.weighted_transposed_times(left, right, n) * m).sum(), there)
    assert isinstance(f, Factors)


@pytest.mark.parametrize("causal", [False, True])
def test_fast_gradients_are_the_exact_ones_to_the_tolerance(causal):
    q, k, v, d = (drawn(2, 2, 140, 3, seed=s) * 0.3 for s in range(4))
    seen = torch.ones(2, 1, 140, dtype=torch.bool)
    seen[0, :, -7:] = False
    exact = exact_gradients(q, k, v, d, causal=causal, seen=seen)
    for tolerance in (1e-3, 1e-6):
        for how in ({}, {"basis": "chebyshev"}, {"center_keys": False, "balance": False}):
            found = fast_gradients(
                q, k, v, d, causal=causal, seen=seen, how=Approximation(tolerance=tolerance, max_features=10**5, **how)
            )
            for ours, true in zip(found, exact, strict=True):
                assert (ours - true).norm() < 10 * tolerance * true.norm()
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out = fast_attention(*leaves, causal=causal, seen=seen, how=Approximation(tolerance=1e-6))
    out.backward(d)
    for leaf, true in zip(leaves, exact, strict=True):
        assert (leaf.grad - true).norm() < 1e-5 * true.norm()


def errors(gamma, degrees=(1, 2, 4, 8)):
    q, k = drawn(64, 4, most=gamma), drawn(64, 4, seed=1, most=gamma)
    v, d = drawn(64, 4, seed=2), drawn(64, 4, seed=3)
    exact = exact_gradients(q, k, v, d, scaling=1.0)
    how = {"center_keys": False, "balance": False}
    found = [fast_gradients(q, k, v, d, scaling=1.0, how=Approximation(degree=g, **how)) for g in degrees]
    return [float((one.q - exact.q).norm() / exact.q.norm()) for one in found]


def test_the_error_at_a_degree_rises_steeply_with_the_norms():
    at = {gamma: errors(gamma, (4, 8)) for gamma in (0.25, 0.5, 1.0, 1.5, 2.0)}
    for number, decades in ((0, 6), (1, 9)):
        course = [values[number] for values in at.values()]
        assert course == sorted(course)
        assert math.log10(course[-1] / course[0]) > decades
    assert at[0.25][0] < 1e-7 and at[2.0][0] > 1e-1


def test_a_regression_learns_the_same_by_factors_until_the_queries_are_too_large():
    def learn(gradients, larger):
        x, w, a, b, target = adapted_head(2, 24, 24)
        trained = {n: (a[n].detach() * 0.1, b[n].detach() * 0.0) for n in "qv"}
        wide = {**w, "q": w["q"] * larger}
        for _ in range(60):
            q = x["q"] @ (wide["q"] + trained["q"][1] @ trained["q"][0]).T
            k, v = x["k"] @ w["k"].T, x["v"] @ (w["v"] + trained["v"][1] @ trained["v"][0]).T
            apart = (q @ k.T).softmax(-1) @ v - target
            found = gradients(q, k, v, apart, scaling=1.0)
            for n, gradient in (("q", found.q), ("v", found.v)):
                steps = factor_gradients(x[n], *trained[n], 1.0, gradient)
                trained[n] = tuple(t - 0.01 * s for t, s in zip(trained[n], steps, strict=True))
        return float(apart.square().sum())

    exact, ours = learn(exact_gradients, 0.3), learn(fast_gradients, 0.3)
    assert abs(ours / exact - 1) < 0.01 and exact < 0.99 * learn(exact_gradients, 0.3) + exact
    with pytest.raises(AttentionError, match="max_features=4,096"):
        learn(fast_gradients, 8.0)


def test_what_cannot_be_is_refused_with_what_to_do():
    q = drawn(20, 4) * 2
    with pytest.raises(AttentionError, match="exact attention here, or give a larger tolerance"):
        fast_attention(q, q, q)
    with pytest.raises(AttentionError, match="of degree 1 is negative"):
        fast_attention(q, q, q, how=Approximation(degree=1, center_keys=False))
    with pytest.raises(AttentionError, match="as many queries as keys"):
        fast_attention(q[:3], q, q, causal=True)
    with pytest.raises(lorry.OptionError, match="tolerance"):
        Approximation(tolerance=0.0)


# -- each head of a model


def small_llama(by=0.3, implementation="sdpa"):
    model = causal_model("llama", implementation, hidden_size=16, head_dim=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(by)
    return model


def test_the_figures_of_heads_are_those_of_the_report_and_count_features():
    model = causal_model("llama")
    heads = head_limits(model, [{"input_ids": tokens(1)}])
    sites = {site.path: site for site in report(model, tokens(1)).sites}
    assert [(h.path, h.head) for h in heads] == [(p, h) for p in sites for h in range(4)]
    for path, site in sites.items():
        own = [h for h in heads if h.path == path]
        assert max(h.ratio for h in own) == pytest.approx(site.ratio, rel=1e-5)
        assert max(h.radius for h in own) == pytest.approx(site.logit_max, rel=1e-4)
        for h in own:
            assert h.radius <= 8 * h.gamma**2 and h.gamma == max(h.q_max, h.k_max)
            assert h.degree == predicted_degree(min(h.radius, h.centered))
            assert h.features == feature_count(8, h.degree)
            assert h.feasible == (h.features * 8 < h.length)
            assert h.query_update == 0
    (one,) = {h.feasible for h in heads}
    assert not one
    flat = head_limits(small_llama(1e-3), [{"input_ids": tokens(1, 61)}])
    assert all(h.feasible and h.features == feature_count(4, h.degree) <= 15 and h.length == 61 for h in flat)


def test_norms_of_projections_apart_are_those_of_plain_products():
    model = causal_model("llama")
    adapter = off_zero(lorry.attach(model, {"method": "lora", "alpha": 3.0}, targets="attention", name="a"), 1, 0.2)
    seen = {}
    attention = model.model.layers[0].self_attn
    handle = attention.q_proj.register_forward_hook(lambda m, args, out: seen.update(x=args[0], q=out))
    heads = head_limits(model, [{"input_ids": tokens(1)}])[:4]
    handle.remove()
    half, x, q = 8**-0.25, seen["x"].double(), seen["q"].double()
    deltas = {site.path.rpartition(".")[2]: delta.double() for site, delta in adapter.deltas() if ".0." in site.path}
    base_key = x @ attention.k_proj.weight.double().T
    key_weight = attention.k_proj.weight.double() + deltas["k_proj"]
    for h in heads:
        own, shared = slice(8 * h.head, 8 * h.head + 8), slice(8 * (h.head // 2), 8 * (h.head // 2) + 8)
        expected = {
            "x_max": x.abs().max(),
            "base_key": half * base_key[..., shared].abs().max(),
            "query_update": half * (x @ deltas["q_proj"].T)[..., own].abs().max(),
            "mixed": half**2 * (q[..., own] @ key_weight[shared]).abs().max(),
        }
        for name, value in expected.items():
            assert getattr(h, name) == pytest.approx(float(value), rel=1e-4), name


def test_figures_do_not_depend_on_the_factorisation_and_grow_with_alpha_and_input():
    row = [{"input_ids": tokens(1)}]

    def measured(alpha, turn=None, by=1.0):
        model = causal_model("llama")
        with torch.no_grad():
            model.model.layers[0].input_layernorm.weight.mul_(by)
        method = {"method": "lora", "rank": 2, "alpha": alpha}
        adapter = off_zero(lorry.attach(model, method, targets=["q_proj"], name="a"), 1, 0.3)
        if turn is not None:
            with torch.no_grad():
                for entry in adapter.entries.values():
                    t = entry.tensors()
                    t["A"].copy_(torch.linalg.inv(turn) @ t["A"])
                    t["B"].copy_(t["B"] @ turn)
        return head_limits(model, row)[:4]

    turn = torch.tensor([[2.0, 1.0], [0.5, 3.0]])
    first = measured(1.0)
    for a, b in zip(first, measured(1.0, turn), strict=True):
        assert a.gamma == pytest.approx(b.gamma, rel=1e-4)
        assert a.query_update == pytest.approx(b.query_update, rel=1e-4)
    for a, b in zip(first, measured(4.0), strict=True):
        assert b.query_update == pytest.approx(4 * a.query_update, rel=1e-4)
    for a, b in zip(first, measured(1.0, by=3.0), strict=True):
        assert (b.q_max, b.k_max) == pytest.approx((3 * a.q_max, 3 * a.k_max), rel=1e-3)
        assert b.query_update == pytest.approx(3 * a.query_update, rel=1e-3)
    # a norm in front bounds it, whatever goes in
    model = causal_model("llama")
    before = head_limits(model, row)[0]
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(100)
    assert head_limits(model, row)[0].gamma == pytest.approx(before.gamma, rel=0.05)


def test_projections_together_leave_their_figures_out_and_no_rows_are_an_error():
    heads = head_limits(gpt2(), [{"input_ids": tokens(1)}])
    assert heads[0].mixed is heads[0].query_update is None and heads[0].gamma > 0
    with pytest.raises(AttentionError, match="no rows"):
        head_limits(gpt2(), [])


# -- attention by factors in a model


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_model_attends_by_factors_and_trains_an_adapter_by_them(implementation):
    model = small_llama(implementation=implementation)
    adapter = off_zero(lorry.attach(model, "lora", targets="attention", name="a"), 1, 0.1)
    for mask in (None, padded(), padded().flip(1)):
        real = torch.ones(2, 9, dtype=torch.bool) if mask is None else mask.bool()
        results = []
        for how in (None, Approximation(tolerance=1e-7, max_features=10**5)):
            model.zero_grad()
            if how is None:
                out = model(tokens(), attention_mask=mask).logits
                out[real].square().mean().backward()
            else:
                with fast(model, how):
                    out = model(tokens(), attention_mask=mask).logits
                    out[real].square().mean().backward()
            results.append((out[real].detach(), {n: p.grad.clone() for n, p in adapter.named_parameters()}))
        torch.testing.assert_close(results[1][0], results[0][0], atol=1e-5, rtol=1e-4)
        for name, gradient in results[0][1].items():
            torch.testing.assert_close(results[1][1][name], gradient, atol=1e-6, rtol=1e-3)


def test_attention_that_factors_cannot_follow_is_refused_where_it_is():
    with pytest.raises(AttentionError, match=r"At 'model.layers.0.self_attn': Logits up to"), fast(small_llama(20)):
        small_llama_output = small_llama(20)
        with fast(small_llama_output):
            small_llama_output(tokens())
    for name, says in (("mistral", "neither causal nor padding"), ("gemma2", "softcap"), ("gpt_oss", "sinks")):
        make, call = MODELS[name]
        model = make().eval()
        with pytest.raises(AttentionError, match=says), fast(model):
            call(model)
