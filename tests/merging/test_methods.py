"""What the methods' sheets say of each, checked on its own."""

import dataclasses
import math

import pytest
import torch
from merging.tiny_adapters import base, distance, filled, replaced

from lorry.merging import Factors, SiteInput, merge
from lorry.merging.factors import decompose, decompose_dense, gram, stack
from lorry.merging.methods import do_merging, lora_lego, lorahub, slerp, sparse
from lorry.merging.registry import merge_method_named


def draw(rank, out=7, inner=5, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Factors(normal(rank, inner), normal(out, rank))


def site(*factors, weights=None):
    weights = tuple(weights or [1 / len(factors)] * len(factors))
    return SiteInput("x", factors[0].shape, tuple("abcdefgh"[: len(factors)]), tuple(factors), weights)


def call(slug, given, **options):
    method = merge_method_named(slug)
    return method.function(given, **method.parse(options))


def close(x, y, tolerance=1e-10):
    x, y = (v.dense() if isinstance(v, Factors) else v for v in (x, y))
    return float((x - y).norm()) <= tolerance * float(y.norm())


# --- exact sums ---


def test_svd_at_full_rank_is_the_sum_and_cut_it_loses_the_dropped_singular_values():
    given = site(draw(2, seed=1), draw(3, seed=2), weights=[0.7, -0.4])
    exact = 0.7 * given.factors[0].dense() - 0.4 * given.factors[1].dense()
    assert close(call("cat", given), exact)
    assert close(call("task-arithmetic", given), exact)
    assert close(call("svd", given, rank=5), exact)
    values = torch.linalg.svdvals(exact)
    lost = float((call("svd", given, rank=2).dense() - exact).norm())
    assert lost == pytest.approx(float(values[2:].square().sum().sqrt()))


def test_randomised_decomposition_finds_the_leading_part():
    f = draw(12, 900, 800, seed=3)
    noise = torch.randn(900, 800, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 1e-3
    found = decompose_dense(f.dense() + noise, 12, seed=0)
    exact = torch.linalg.svdvals(f.dense() + noise)[:12]
    assert torch.allclose(found.s, exact, rtol=1e-8)


def test_linear_has_exactly_the_cross_terms():
    f, g = draw(3, seed=1), draw(3, seed=2)
    square = call("linear", site(f, g, weights=[1.0, 1.0]), form="square").dense()
    assert close(square - f.dense() - g.dense(), f.b @ g.a + g.b @ f.a)
    shared = Factors(f.a, g.b)
    weights = [0.3, -0.9]
    assert close(call("linear", site(f, shared, weights=weights)), 0.3 * f.dense() - 0.9 * shared.dense())


# --- sparse ---


def test_ties_toy():
    rows = torch.tensor([[3.0, -1.0], [2.0, 4.0], [-6.0, 1.0]], dtype=torch.float64)
    found = sparse.agreed([r[None] for r in rows], [1 / 3] * 3, "total")
    assert torch.allclose(found, torch.tensor([[-6.0, 2.5]], dtype=torch.float64))
    frequency = sparse.agreed([r[None] for r in rows], [1 / 3] * 3, "frequency")
    assert torch.allclose(frequency, torch.tensor([[2.5, 2.5]], dtype=torch.float64))


def test_dare_keeps_the_mean():
    f = draw(2, 3, 3)
    total = (
        sum(call("dare", site(f, weights=[1.0]), density=0.5, seed=seed, rank=3).dense() for seed in range(2000)) / 2000
    )
    deviation = f.dense().abs() / math.sqrt(2000)
    assert bool(((total - f.dense()).abs() < 4 * deviation).all())


def test_della_keeps_the_mean_and_prefers_large_entries():
    values = torch.linspace(0.1, 1, 10, dtype=torch.float64)[None]
    chance = sparse.by_rank(values, 0.5, 0.4)
    assert torch.allclose(chance.mean(), torch.tensor(0.5, dtype=torch.float64))
    assert float(chance[0, -1]) == pytest.approx(0.7) and float(chance[0, 0]) == pytest.approx(0.3)
    row = next(r for r in sparse.TABLE if r.slug == "della")
    options = {"density": 0.5, "spread": 0.4, "rescale": "density"}
    generator = torch.Generator().manual_seed(0)
    mean = sum(sparse.sparsified(values, row, options, generator) for _ in range(3000)) / 3000
    assert torch.allclose(mean, values, rtol=0.12)


def test_breadcrumbs_drops_outliers_and_small_entries():
    values = torch.arange(1.0, 101.0, dtype=torch.float64)
    kept = sparse.middle(values, 0.5, 0.1)
    assert kept.sum() == 50
    assert not kept[90:].any() and kept[40:90].all() and not kept[:40].any()


def test_magnitude_pruning_keeps_the_largest():
    f = draw(2)
    found = call("magnitude-prune", site(f, weights=[1.0]), density=0.25, rank=5).dense()
    count = int(0.25 * f.dense().numel())
    mask = sparse.largest(f.dense(), count)
    assert int(mask.sum()) == count
    assert close(found, f.dense() * mask)


def test_knots_with_a_plain_sum_is_task_arithmetic_and_equals_its_dense_form():
    parts = [draw(2, seed=1), draw(3, seed=2)]
    given = site(*parts, weights=[0.6, 0.5])
    assert close(call("knots-magnitude-prune", given, density=1.0), call("cat", given))
    joint = torch.cat([p.dense() for p in parts], dim=1)
    u, s, vt = torch.linalg.svd(joint, full_matrices=False)
    keep = s > 1e-9
    u, z = u[:, keep], (s[keep, None] * vt[keep]).split(5, dim=1)
    trimmed = [v * sparse.largest(v, max(int(0.4 * v.numel()), 1)) for v in z]
    dense = u @ sparse.agreed(trimmed, [0.6, 0.5], "total")
    assert close(call("knots-ties", given, density=0.4), dense)


def test_random_masks_belong_to_names_not_places():
    f, g = draw(2, seed=1), draw(2, seed=2)
    one = SiteInput("x", f.shape, ("a", "b"), (f, g), (1.0, 1.0))
    alone = SiteInput("x", f.shape, ("b",), (g,), (1.0,))
    first = SiteInput("x", f.shape, ("a",), (f,), (1.0,))
    both = call("dare", one, rank=5).dense()
    assert close(both, call("dare", alone, rank=5).dense() + call("dare", first, rank=5).dense())


# --- slerp and model stock ---


def test_slerp_of_two_is_the_formula_and_more_agree_with_it():
    f, g = draw(2, seed=1), draw(2, seed=2)
    g = g.times(f.norm() / g.norm())
    t = 0.3
    angle = math.acos(float((f.dense() * g.dense()).sum()) / (f.norm() * g.norm()))
    expected = (math.sin((1 - t) * angle) * f.dense() + math.sin(t * angle) * g.dense()) / math.sin(angle)
    assert close(call("slerp", site(f, g, weights=[1 - t, t])), expected)
    # equal lengths stay on the sphere, and the fixed point for many vectors gives the same for two
    assert call("slerp", site(f, g, weights=[1 - t, t])).norm() == pytest.approx(f.norm())
    cosine = torch.tensor([[1.0, math.cos(angle)], [math.cos(angle), 1.0]], dtype=torch.float64)
    found = slerp.spherical_mean(cosine, torch.tensor([1 - t, t], dtype=torch.float64), 200)
    assert float(found[0]) == pytest.approx(math.sin((1 - t) * angle) / math.sin(angle), rel=1e-6)
    doubled = slerp.spherical_mean(
        gram([f, f, g]) / f.norm() ** 2, torch.tensor([(1 - t) / 2, (1 - t) / 2, t], dtype=torch.float64), 200
    )
    assert float(doubled[0] + doubled[1]) == pytest.approx(float(found[0]), rel=1e-6)


def test_opposite_updates_have_no_spherical_mean():
    f = draw(2)
    given = site(f, f.times(-1))
    assert call("slerp", given).norm() == pytest.approx(0.0, abs=1e-10)
    assert given.facts["opposite"]


def test_model_stock_ratio():
    f, g = draw(2, seed=1), draw(2, seed=1)
    g = Factors(g.a, g.b + 0.5 * draw(2, seed=3).b)
    given = site(f, g)
    cosine = float((f.dense() * g.dense()).sum()) / (f.norm() * g.norm())
    assert close(call("model-stock", given), 2 * cosine / (1 + cosine) * (f.dense() + g.dense()) / 2)
    assert call("model-stock", site(f, f.times(-1), weights=[0.8, 0.2])).norm() == 0.0


# --- LoRA-LEGO ---


def test_lego_with_a_cluster_for_each_unit_is_the_sum():
    given = site(draw(2, seed=1), draw(4, seed=2))
    total = given.factors[0].dense() + given.factors[1].dense()
    plain = call("lora-lego", given, rank=6, unit_norm="none", output_norm=False)
    assert close(plain, total)
    equal = site(draw(3, seed=1), draw(3, seed=2))
    total = equal.factors[0].dense() + equal.factors[1].dense()
    assert close(call("lora-lego", equal, rank=6), total / math.sqrt(2))


def test_lego_does_not_depend_on_the_order_of_units():
    f, g = draw(4, seed=1), draw(4, seed=2)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = Factors(f.a[order], f.b[:, order])
    for k in (2, 4, 5):
        assert close(call("lora-lego", site(f, g), rank=k), call("lora-lego", site(shuffled, g), rank=k), 1e-8)


def test_lego_keeps_the_norms_of_units_and_any_rank():
    parts = [draw(r, 20, 20, seed=r) for r in (2, 4, 8)]
    for k in range(1, 15):
        found = call("lora-lego", site(*parts), rank=k)
        assert found.a.shape == (k, 20) and found.b.shape == (20, k)
    given = site(*parts)
    units, shares = lora_lego._units(given, "norm")
    members = units[:5]
    centre = lora_lego._centroid(members, torch.ones(5, dtype=torch.float64), 20, "l2", given)
    assert float(centre.norm()) == pytest.approx(float(members.norm(dim=1).mean()))
    assert float(members.mean(0).norm()) < float(centre.norm())


def test_lego_in_the_singular_gauge_depends_on_the_update_alone():
    f, g = draw(3, seed=1), draw(3, seed=2)
    mix = draw(3, 3, 3, seed=4).a[:3, :3]
    other = Factors(torch.linalg.solve(mix, f.a), f.b @ mix)
    options = {"rank": 3, "gauge": "svd"}
    assert close(call("lora-lego", site(f, g), **options), call("lora-lego", site(other, g), **options), 1e-8)
    options = {"rank": 3, "gauge": "none"}
    assert not close(call("lora-lego", site(f, g), **options), call("lora-lego", site(other, g), **options), 1e-2)


def test_lego_clusters_the_units_as_given_by_default():
    """The paper's units are rows of A and columns of B as they are; a better split has to be asked for."""
    f, g = draw(3, seed=1), draw(3, seed=2)
    unequal = site(Factors(f.a * 5, f.b), Factors(g.a, g.b * 4))
    units = torch.cat([torch.cat([x.a, x.b.mT], 1) for x in unequal.factors])
    labels, _ = lora_lego.k_means(units, 3, 100, None)
    given = call("lora-lego", unequal, unit_norm="none", output_norm=False)
    centres = torch.stack([units[labels == j].mean(0) for j in range(3)])
    assert close(given, centres[:, 5:].mT @ centres[:, :5])
    asked = call("lora-lego", unequal, unit_norm="none", output_norm=False, gauge="norm")
    assert float((asked.dense() - given.dense()).norm() / given.norm()) > 0.3


def test_clusters_that_cancel_are_not_blown_up():
    f = draw(1)
    given = site(f, Factors(-f.a, -f.b))
    found = call("lora-lego", given, rank=1)
    assert given.facts["cancelled_clusters"] == 1
    assert found.norm() < 1e-10


# --- DO-Merging ---


def test_do_merging_with_equal_column_lengths_is_the_average():
    f, g = draw(2, seed=1), draw(3, seed=2)
    ratio = do_merging.lengths(f, "column") / do_merging.lengths(g, "column")
    g = do_merging.scaled(g, ratio, "column")
    assert close(call("do-merging", site(f, g), steps=0), (f.dense() + g.dense()) / 2)


@pytest.mark.parametrize("axis", ["column", "row", "matrix"])
def test_do_merging_low_rank_form_is_the_dense_one(axis):
    parts = [draw(2, seed=1), draw(3, seed=2), draw(1, seed=3)]
    dims = {"column": 0, "row": 1, "matrix": (0, 1)}[axis]
    dense = [p.dense() for p in parts]
    norms = [d.norm(dim=dims, keepdim=True) for d in dense]
    expected = sum(d / n for d, n in zip(dense, norms, strict=True)) * sum(norms) / 9
    assert close(call("do-merging", site(*parts), steps=0, axis=axis), expected)


def test_do_merging_column_directions_do_not_feel_one_adapters_scale():
    f, g = draw(2, seed=1), draw(3, seed=2)
    one = call("do-merging", site(f, g), steps=0).dense()
    other = call("do-merging", site(f.times(9.0), g), steps=0).dense()
    cosine = (one * other).sum(0) / (one.norm(dim=0) * other.norm(dim=0))
    assert torch.allclose(cosine, torch.ones_like(cosine))
    sums = [call("cat", site(x, g)).dense() for x in (f, f.times(9.0))]
    assert float(((sums[0] * sums[1]).sum(0) / (sums[0].norm(dim=0) * sums[1].norm(dim=0))).min()) < 0.999


@pytest.mark.parametrize(("count", "rank", "inner"), [(3, 2, 40), (4, 4, 128), (8, 16, 300)])
@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_do_merging_leaves_no_overlap_by_default(count, rank, inner, size):
    """The sheet's setting leaves 0.01 % of it; factors of another size are no reason for another result."""
    parts = [draw(rank, inner + 8, inner, seed=s).times(size) for s in range(count)]
    given = site(*parts)
    call("do-merging", given)
    for facts in (given.facts["overlap_a"], given.facts["overlap_b"]):
        assert facts["after"] <= 1e-4 * facts["before"]
        assert 0.05 < facts["displacement"] < 0.4


def test_do_merging_default_moves_factors_as_its_facts_say():
    """What the facts call overlap is worked out anew, from the factors that the merge goes on with."""
    parts = [decompose(draw(3, 30, 20, seed=s)).truncated(3) for s in range(3)]
    default = {f.name: f.default for f in dataclasses.fields(merge_method_named("do-merging").options)}
    moved, facts = do_merging.orthogonalised([p.a for p in parts], default["gamma"], default["steps"], default["cap"])

    def overlap(rows):
        pairs = [(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j]
        return sum(float((x @ y.mT).square().sum()) for x, y in pairs)

    left = overlap(moved) / overlap([p.a for p in parts])
    assert left <= 1e-4 and left == pytest.approx(facts["after"] / facts["before"])
    change = torch.cat(moved) - torch.cat([p.a for p in parts])
    assert float(change.norm() / torch.cat([p.a for p in parts]).norm()) == pytest.approx(facts["displacement"])


def test_do_merging_orthogonalisation_follows_its_weight_and_cap():
    rows = [draw(2, 7, 40, seed=s).a for s in range(3)]
    still, _ = do_merging.orthogonalised(rows, 1e9, 50, None)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(still, rows, strict=True))
    capped, facts = do_merging.orthogonalised(rows, 1e-3, 200, 0.01)
    assert facts["displacement"] == pytest.approx(0.01)
    eye = torch.eye(6, dtype=torch.float64)
    fixed, facts = do_merging.orthogonalised([eye[:2], eye[3:]], 1.0, 50, None)
    assert facts["displacement"] == 0.0 and torch.equal(fixed[0], eye[:2])


def test_do_merging_leaves_dead_columns_alone():
    f, g = draw(2, seed=1), draw(2, seed=2)
    f.a[:, 0] = 0
    found = call("do-merging", site(f, g), steps=0).dense()
    assert torch.isfinite(found).all()
    assert close(found[:, 0], g.dense()[:, 0] / 4)


# --- after LiON-LoRA ---


def test_norm_consistency_equalises_and_is_idempotent():
    model = base()
    strong, weak = (
        filled(model, "strong", seed=1),
        replaced(model, filled(model, "w", seed=2), "weak", lambda a, b: (a, b * 0.05)),
    )
    merged = merge([strong, weak], weights=[1.0, 1.0], method="norm-consistent", dtype="float64")
    for record in merged.receipt.sites:
        ratios = record.facts["ratios"]
        sizes = [float(x.entries[record.path].delta().norm()) * ratios[x.name] for x in (strong, weak)]
        assert sizes[0] == pytest.approx(sizes[1])
    assert (
        merge([strong, weak], method="norm-consistent", options={"across": "adapter"}).receipt.facts["ratios"]["weak"]
        > 1
    )


def test_orthogonality_check():
    eye = torch.eye(6, dtype=torch.float64)
    one, other = Factors(eye[:1], 2 * eye[:, :1]), Factors(eye[1:2], eye[:, 1:2])
    apart = site(one, other)
    assert close(call("orthogonality-checked", apart), call("cat", apart))
    assert "not_orthogonal" not in apart.facts
    against = Factors(eye[:1], -eye[:, :1])
    given = site(one, against, other, weights=[0.5, 0.3, 0.2])
    assert close(call("orthogonality-checked", given), 0.8 * one.dense() + 0.2 * other.dense())
    assert given.facts["not_orthogonal"] == ["b"]


# --- LoraHub ---


@pytest.mark.parametrize("optimizer", ["evolution", "random", "nelder-mead", "powell", "differential-evolution"])
def test_lorahub_finds_weights_within_its_budget(optimizer):
    model = base()
    a, b = filled(model, "a", seed=1), filled(model, "b", seed=2)
    goal = {p: 0.8 * a.entries[p].delta() - 0.5 * b.entries[p].delta() for p in a.entries}
    calls = []

    def objective(candidate):
        calls.append(1)
        return float(sum((candidate[p].dense() - goal[p]).square().sum() for p in goal))

    options = {"evaluations": 60, "optimizer": optimizer, "form": "delta", "penalty": 0.0, "seed": 3}
    merged = merge([a, b], method="lorahub", options=options, objective=objective)
    facts = merged.receipt.facts
    assert len(calls) <= 60
    assert facts["loss"] == min(facts["history"]) < facts["history"][0]
    again = merge({"b": b, "a": a}, method="lorahub", options=options, objective=objective)
    assert distance(again, merged) == 0.0
    if optimizer == "evolution":
        assert facts["weights"]["a"] == pytest.approx(0.8, abs=0.1) and facts["weights"]["b"] == pytest.approx(
            -0.5, abs=0.1
        )


def test_lorahub_scores_a_live_model_and_leaves_it_as_it_was():
    model = base()
    a, b = filled(model, "a", seed=1, dtype=torch.float32), filled(model, "b", seed=2, dtype=torch.float32)
    ids = torch.tensor([[1, 2, 3, 4]])
    before = model(ids).logits

    def objective(carrier):
        return float(carrier(ids, labels=ids).loss)

    merged = merge([a, b], method="lorahub", options={"evaluations": 8}, objective=objective, model=model)
    assert torch.equal(model(ids).logits, before)
    found = merged.attach(model, "found")
    loss = float(model(ids, labels=ids).loss)
    found.detach()
    penalty = 0.05 * sum(abs(w) for w in merged.receipt.facts["weights"].values()) / 2
    assert loss + penalty == pytest.approx(merged.receipt.facts["loss"], rel=1e-4)
    assert lorahub._search(lambda v: v[0] ** 2, [1.0], 1.5, 1, 0, "random")[1] == 1.0


def test_decompositions_leave_out_numerical_zeros():
    f = draw(2)
    assert decompose(stack([f, f], [1.0, -1.0])).s.numel() <= 1
    assert decompose(stack([f, f], [1.0, 1.0])).s.numel() == 2
