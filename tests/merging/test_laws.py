"""Laws of every registered merge method."""

import pytest
import torch
from merging.tiny_adapters import base, distance, filled, replaced

from lorry.core.errors import AdapterError, CheckpointError, FingerprintError, LorryError
from lorry.merging import merge, merge_methods

METHODS = merge_methods()
#: Methods with options that give an adapter back; the others say in a note why there are none.
PLAIN = [s for s, m in METHODS.items() if m.plain is not None]


@pytest.fixture(scope="module")
def world():
    model = base()
    a = filled(model, "a", rank=2, seed=1, alpha=6)
    b = filled(model, "b", rank=3, seed=2, rank_stabilized=True)
    c = filled(model, "c", rank=2, seed=3, targets=("q_proj", "down_proj"))
    return model, a, b, c


def run(slug, inputs, weights=None, options=None, **more):
    chosen = METHODS[slug].plain if options is None else options
    return merge(inputs, weights=weights, method=slug, options=chosen, dtype=more.pop("dtype", "float64"), **more)


def defaults(slug):
    """The method's own defaults, except that what searches does not search."""
    return METHODS[slug].plain if METHODS[slug].needs else {}


@pytest.mark.parametrize("slug", METHODS)
def test_declarations_are_complete(slug):
    method = METHODS[slug]
    assert method.source and method.help
    assert all(o["help"] for o in method.to_dict()["options"].values())
    if method.plain is None:
        assert method.note
    else:
        method.parse(method.plain)


@pytest.mark.parametrize("slug", PLAIN)
def test_one_adapter_of_weight_one_is_itself(world, slug):
    _, a, *_ = world
    merged = run(slug, [a], [1.0])
    assert distance(merged, a) < 1e-10
    assert merged.receipt.error < 1e-10
    if METHODS[slug].linear:
        assert abs(distance(run(slug, [a], [-0.5]), a) - 1.5) < 1e-9


@pytest.mark.parametrize("slug", PLAIN)
def test_order_does_not_matter(world, slug):
    _, a, b, c = world
    given = {"a": a, "b": b, "c": c}
    weights = {"a": 0.5, "b": -0.3, "c": 0.4}
    first = run(slug, given, weights, defaults(slug))
    second = run(slug, dict(reversed(given.items())), weights, defaults(slug))
    for path in first.sites:
        assert torch.equal(first.tensors[path]["A"], second.tensors[path]["A"])
        assert torch.equal(first.tensors[path]["B"], second.tensors[path]["B"])


@pytest.mark.parametrize("slug", PLAIN)
def test_splits_of_an_update_do_not_matter_outside_factor_space(world, slug):
    model, a, b, _ = world
    mixed, other = (replaced(model, x, f"mixed-{x.name}", _mixed) for x in (a, b))
    try:
        before = run(slug, {"a": a, "b": b}, [0.5, 0.5], defaults(slug))
        after = run(slug, {"a": mixed, "b": other}, [0.5, 0.5], defaults(slug))
    finally:
        mixed.detach()
        other.detach()
    if METHODS[slug].space == "factor":
        assert distance(after, before) > 1e-3
    else:
        assert distance(after, before) < 1e-8


def _mixed(a, b):
    mix = torch.randn(len(a), len(a), generator=torch.Generator().manual_seed(len(a)), dtype=torch.float64)
    return torch.linalg.solve(mix, a), b @ mix


@pytest.mark.parametrize("slug", PLAIN)
def test_equal_inputs_give_the_input(world, slug):
    model, a, *_ = world
    copies = [replaced(model, a, f"copy{i}", lambda x, y: (x, y)) for i in range(2)]
    try:
        assert distance(run(slug, [a, *copies]), a) < 1e-9
    finally:
        for copy in copies:
            copy.detach()


@pytest.mark.parametrize("slug", PLAIN)
def test_the_scale_is_folded(world, slug):
    model, a, b, _ = world
    other = replaced(model, a, "scaled", lambda x, y: (x, y / 4), alpha=a.method.alpha * 4)
    try:
        before = run(slug, {"a": a, "b": b}, [0.5, 0.4], defaults(slug))
        after = run(slug, {"a": other, "b": b}, [0.5, 0.4], defaults(slug))
        assert distance(after, before) < 1e-12
    finally:
        other.detach()


@pytest.mark.parametrize("slug", [s for s in PLAIN if METHODS[s].linear])
def test_strength_is_linear(world, slug):
    _, a, b, c = world
    once = run(slug, [a, b, c], [0.5, 0.3, -0.2], defaults(slug))
    thrice = run(slug, [a, b, c], [1.5, 0.9, -0.6], defaults(slug))
    for path in once.sites:
        expected = 3 * once.delta(path)
        assert torch.allclose(thrice.delta(path), expected, atol=1e-9 * float(expected.norm()))


@pytest.mark.parametrize("slug", PLAIN)
def test_float32_is_within_the_promised_error(world, slug):
    _, a, b, c = world
    exact = run(slug, [a, b, c], [0.5, 0.3, 0.2], defaults(slug))
    rounded = run(slug, [a, b, c], [0.5, 0.3, 0.2], defaults(slug), dtype="float32")
    measured = distance(rounded, exact)
    assert rounded.tensors["model.layers.0.self_attn.q_proj"]["A"].dtype == torch.float32
    assert measured == pytest.approx(rounded.receipt.rounding, rel=1e-3, abs=1e-12)
    assert rounded.receipt.rounding < 1e-6
    assert exact.receipt.rounding < 1e-15


@pytest.mark.parametrize("slug", PLAIN)
def test_bad_input_is_refused_and_nothing_is_written(world, slug, tmp_path):
    model, a, b, _ = world
    out = tmp_path / "out"
    broken = filled(model, "broken", seed=9)
    foreign = filled(base(seed=5), "foreign", seed=4)
    empty = replaced(model, a, "empty", lambda x, y: (x[:0], y[:, :0]))
    next(iter(broken.entries.values())).tensors()["B"][0, 0] = float("nan")
    cases = [
        ([a, broken], CheckpointError, "NaN"),
        ([a, empty], CheckpointError, "empty"),
        ([], AdapterError, "at least one"),
        ([a, foreign], FingerprintError, "different bases"),
    ]
    try:
        for inputs, error, words in cases:
            with pytest.raises(error, match=words):
                run(slug, inputs, None, defaults(slug), out=out)
            assert not list(tmp_path.iterdir())
    finally:
        broken.detach()
        empty.detach()


@pytest.mark.parametrize("slug", PLAIN)
def test_the_receipt_measures_the_distance_to_the_exact_sum(world, slug):
    _, a, b, c = world
    weights = {"a": 0.6, "b": 0.5, "c": -0.4}
    merged = run(slug, [a, b, c], weights, defaults(slug))
    for site in merged.receipt.sites:
        exact = sum(
            w * x.entries[site.path].delta()
            for (n, w), x in zip(weights.items(), (a, b, c), strict=True)
            if site.path in x.entries
        )
        away = float((merged.delta(site.path) - exact).norm() / exact.norm())
        assert away == pytest.approx(site.error, rel=1e-6, abs=1e-10)
        assert site.norm == pytest.approx(float(merged.delta(site.path).norm()), rel=1e-6, abs=1e-10)
    if METHODS[slug].exact:
        assert merged.receipt.error < 1e-12


def test_no_method_takes_unknown_options(world):
    _, a, *_ = world
    for slug in METHODS:
        with pytest.raises(LorryError, match="nonsense"):
            merge([a], method=slug, options={"nonsense": 1})
