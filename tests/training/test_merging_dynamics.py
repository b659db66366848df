"""ReLoRA, PLoRA and Delta-LoRA against what they say: changing the base's weights, here done by hand."""

import pytest
import torch
from training.tiny_bases import tiny_llama, token_rows

from lorry.formats.load import load
from lorry.training import Fleet, Job, train
from lorry.training.dynamics.delta_lora import DeltaLoRA
from lorry.training.dynamics.plora import PLoRA
from lorry.training.dynamics.relora import ReLoRA
from lorry.training.low_rank import pairs_of
from lorry.training.merged import dense_part

LORA = {"method": "lora", "rank": 4, "alpha": 8.0}


def fleet(folder, dynamics=(), **more):
    options = {"learning_rate": 3e-3, "batch_size": 4, "steps": 12, "seed": 1, **more}
    return Fleet(
        tiny_llama(), None, [Job("job", token_rows(16, (9, 9), 1), LORA, dynamics=dynamics, **options)], folder
    )


def ticks(made, count, between=None):
    run = made.runs[0]
    with made.base.mode(training=True):
        for step in range(count):
            before = {p.path: (p.a.detach().clone(), p.b.detach().clone()) for p in pairs_of(run.adapter, "test")}
            made._tick()
            if between is not None:
                with torch.no_grad():
                    between(run, step, before)


def weights(made):
    """Return what each layer's weight is with its adapter."""
    pairs = pairs_of(made.runs[0].adapter, "test")
    return {p.path: (p.entry.site.matrix() + p.scale * p.b @ p.a).detach() for p in pairs}


def by_hand(dynamic):
    """Return what the dynamic does, written out on the base's own weights."""

    def between(run, step, before):
        for pair in pairs_of(run.adapter, "test"):
            weight, a, b = pair.entry.site.stored, pair.a, pair.b
            if isinstance(dynamic, ReLoRA) and (step + 1) % dynamic.every == 0:
                weight += pair.scale * b @ a
                at = run._moment(dynamic)
                at.step = step
                drawn = torch.rand(a.shape, generator=at.generator(pair.path)) * 2 - 1
                a.copy_(drawn / a.shape[1] ** 0.5)
                b.zero_()
                for p in (a, b):
                    for key in ("exp_avg", "exp_avg_sq"):
                        run.optimizer.state[p][key].zero_()
            if isinstance(dynamic, PLoRA):
                weight += dynamic.mu * pair.scale * b @ a
                for p in (a, b):
                    p.mul_((1 - dynamic.mu) ** (0.5 if dynamic.preserve else 1.0))
            if isinstance(dynamic, DeltaLoRA) and step >= dynamic.start:
                old_a, old_b = before[pair.path]
                weight += dynamic.amount * pair.scale * (b @ a - old_b @ old_a)

    return between


@pytest.mark.parametrize(
    "dynamic",
    [
        ReLoRA(every=3, prune=1.0),
        PLoRA(mu=0.2),
        PLoRA(mu=0.2, preserve=False),
        DeltaLoRA(amount=1.5, start=2),
        DeltaLoRA(amount=1.5, start=0),
    ],
    ids=str,
)
def test_it_is_the_change_of_the_base_written_out(dynamic, tmp_path):
    ours, plain = fleet(tmp_path / "a", [dynamic]), fleet(tmp_path / "b")
    ticks(ours, 8)
    ticks(plain, 8, by_hand(dynamic))
    found, expected, start = weights(ours), weights(plain), weights(fleet(tmp_path / "c"))
    for path, weight in expected.items():
        moved = (weight - start[path]).norm()
        assert (found[path] - weight).norm() < 2e-3 * moved and moved > 0


def test_a_restart_leaves_the_function_and_raises_the_rank(tmp_path):
    made = fleet(tmp_path, [ReLoRA(every=3)])
    ticks(made, 2)
    seen = []
    made.runs[0].optimizer.register_step_post_hook(lambda *_: seen.append(weights(made)))
    ticks(made, 1)
    for path, weight in weights(made).items():  # after the restart that follows the step
        torch.testing.assert_close(weight, seen[0][path])
    pairs = pairs_of(made.runs[0].adapter, "test")
    assert {len(p.a) for p in pairs} == {8} and not any(p.b[:, :4].any() for p in pairs)
    ticks(made, 2)
    assert all(torch.linalg.matrix_rank(p.b @ p.a, rtol=1e-5) > 4 for p in pairs_of(made.runs[0].adapter, "test"))


def test_plora_keeps_the_function_and_public_code_does_not(tmp_path):
    for preserve, factor in ((True, 1.0), (False, 1 - 0.2 + 0.04)):
        made = fleet(tmp_path / str(preserve), [PLoRA(mu=0.2, preserve=preserve)])
        seen = []
        made.runs[0].optimizer.register_step_post_hook(lambda *_, made=made, seen=seen: seen.append(weights(made)))
        ticks(made, 1)
        for pair in pairs_of(made.runs[0].adapter, "test"):
            base = pair.entry.site.matrix()
            torch.testing.assert_close(pair.scale * pair.b @ pair.a, (seen[0][pair.path] - base) * factor,
                                       rtol=1e-3, atol=1e-6)  # fmt: skip


def test_moments_are_pruned():
    moments = torch.arange(1.0, 101).view(10, 10)
    kept = ReLoRA(prune=0.9).pruned(moments, torch.Generator())
    assert kept.sum() == sum(range(91, 101))
    other = ReLoRA(prune=0.9, by="random").pruned(moments, torch.Generator().manual_seed(1))
    assert int((other != 0).sum()) == 10 and not torch.equal(other, kept)


def test_the_rate_rises_again_after_a_restart(tmp_path):
    made, rates = fleet(tmp_path, [ReLoRA(every=4, warmup=3)]), []
    made.runs[0].optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"] / 3e-3))
    ticks(made, 9)
    assert rates == pytest.approx([1, 1, 1, 1, 0.25, 0.5, 0.75, 1, 0.25])


def test_decay_does_not_touch_what_is_merged(tmp_path):
    made = fleet(tmp_path, [ReLoRA(every=2)], weight_decay=5.0)
    ticks(made, 2)
    merged = [(p.a[4:].clone(), p.b[:, 4:].clone()) for p in pairs_of(made.runs[0].adapter, "test")]
    ticks(made, 1)
    for (a, b), p in zip(merged, pairs_of(made.runs[0].adapter, "test"), strict=True):
        assert torch.equal(p.a[4:], a) and torch.equal(p.b[:, 4:], b)


@pytest.mark.parametrize("dynamic", [ReLoRA(every=1), PLoRA(), DeltaLoRA(start=1)], ids=lambda d: d.name)
def test_what_was_merged_is_saved_whatever_its_rank(dynamic, tmp_path):
    job = Job("job", token_rows(16, (9, 9), 1), LORA, dynamics=[dynamic], steps=12, learning_rate=3e-3)
    model = tiny_llama()
    result = train(model, None, job, tmp_path)
    loaded = load(tiny_llama(), tmp_path / "job" / "adapter", name="job")
    ours = {n: t for n, t, _ in result.adapters["job"].named_tensors()}
    assert all(torch.equal(t, ours[n]) for n, t, _ in loaded.named_tensors())
    pairs = pairs_of(loaded, "test")
    assert all(len(p.a) <= 4 + min(p.a.shape[1], len(p.b)) or dynamic.name == "delta-lora" for p in pairs)


def test_a_product_of_too_much_rank_becomes_dense():
    generator = torch.Generator().manual_seed(1)
    for rank, width, out, expected in ((3, 5, 7, 3), (9, 5, 7, 5), (9, 7, 5, 5)):
        a, b = torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator)
        more_a, more_b = dense_part(a, b)
        assert len(more_a) == expected
        torch.testing.assert_close(more_b @ more_a, b @ a)


def test_methods_without_such_factors_are_refused(tmp_path):
    job = Job("job", token_rows(8, (9, 9), 1), {"method": "pissa"}, dynamics=["relora"], steps=1)
    result = train(tiny_llama(), None, job, tmp_path)
    assert "'relora' cannot act" in result["job"]["status"]
