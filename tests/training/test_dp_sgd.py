"""DP-SGD: each example's gradient is clipped over exactly what is trained, and the noise is that of the seed."""

import pytest
import torch
from training.results import difference, tensors
from training.tiny_bases import class_rows, encoded, tiny_bert, tiny_llama, token_rows

from lorry.core.errors import OptionError, SiteError
from lorry.training import Fleet, Job, train
from lorry.training.dynamics.dp_sgd import DPSGD
from lorry.training.joint import Share, train_pass

LORA = {"method": "lora", "rank": 4}


def one_by_one(made):
    """Return the gradient of each example's own mean loss in the step under way, from a backward pass of each."""
    run, found = made.runs[0], []
    with made.base.mode(training=True):
        run.open_step()
        for batch in run.progress.pending:
            for example in (run.prepared.train[i] for i in batch):
                for p in run.adapter.parameters():
                    p.grad = None
                weight = 1 / run.prepared.task.count(example)
                train_pass(made.base, [Share("job", run.prepared, [example], weight=weight)], 0)
                found.append({n: p.grad.clone() for n, p in run.adapter.named_parameters() if p.requires_grad})
    for p in run.adapter.parameters():
        p.grad = None
    return found


def stepped(made):
    """Return the gradient that the dynamics leave to the optimizer."""
    run, kept = made.runs[0], {}
    optimizer = run.optimizer
    optimizer.register_step_pre_hook(
        lambda *_: kept.update({n: p.grad.clone() for n, p in run.groups.parameters().items()})
    )
    with made.base.mode(training=True):
        while not kept:
            made._tick()
    return kept


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bound", [0.3, 1e6])
def test_examples_are_clipped_one_by_one_over_what_is_trained(bound, frozen, tmp_path):
    dynamics = [DPSGD(max_norm=bound, noise=0.0), *(["lora-fa"] if frozen else [])]
    data = token_rows(20, (4, 16), 1)  # of many lengths: no example may weigh in another's
    job = Job("job", data, LORA, dynamics=dynamics, batch_size=3, gradient_accumulation_steps=2, steps=2, seed=1,
              max_grad_norm=None)  # fmt: skip
    made = Fleet(tiny_llama(), None, [job], tmp_path)
    with torch.no_grad():
        for p in made.runs[0].adapter.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
    each = one_by_one(made)
    assert len(each) == 6
    found = stepped(made)
    names = [n for n in each[0] if not frozen or n.endswith(".B")]
    assert sorted(found) == sorted(names)
    norms = [torch.stack([g[n].norm() for n in names]).norm() for g in each]
    factors = [min(1.0, bound / float(norm)) for norm in norms]
    assert (max(factors) < 1) == (bound < 1)
    for name in names:
        expected = sum(f * g[name] for f, g in zip(factors, each, strict=True)) / 6
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)


def test_no_example_moves_the_gradient_by_more_than_the_bound(tmp_path):
    data = token_rows(6, (4, 16), 1)
    other = encoded([*token_rows(1, (16, 16), 9).rows, *data.rows[1:]])
    common = {"dynamics": [DPSGD(max_norm=0.2, noise=0.0)], "batch_size": 6, "steps": 1, "max_grad_norm": None}
    made = []
    for i, rows in enumerate((data, other)):
        model = Fleet(tiny_llama(), None, [Job("job", rows, LORA, **common)], tmp_path / str(i))
        made.append(stepped(model))
    moved = torch.stack([(made[0][n] - made[1][n]).norm() for n in made[0]]).norm()
    assert 0 < moved <= 2 * 0.2 / 6 * 1.001


def test_the_noise_has_its_size_and_comes_from_the_seed(tmp_path):
    def noise(seed, folder, sigma=3.0):
        common = {"batch_size": 4, "steps": 1, "seed": 1, "max_grad_norm": None, "method": LORA, "optimizer": "sgd"}
        data = token_rows(4, (9, 9), 1)
        job = Job("job", data, dynamics=[DPSGD(max_norm=0.5, noise=sigma)], **{**common, "seed": seed})
        return stepped(Fleet(tiny_llama(), None, [job], tmp_path / folder))

    clean, first, again, other = (noise(1, "a", 0.0), noise(1, "b"), noise(1, "c"), noise(2, "d"))
    assert difference(first, again) == 0 and difference(first, other) > 0.1
    drawn = torch.cat([(first[n] - clean[n]).flatten() for n in clean])
    assert drawn.std().item() == pytest.approx(3.0 * 0.5 / 4, rel=0.05) and abs(drawn.mean().item()) < 0.02


def test_what_has_no_gradient_by_row_is_refused(tmp_path):
    with pytest.raises(OptionError, match="units of max_norm"):
        DPSGD(max_norm=None, noise=1.0)
    job = Job("job", class_rows(8, 2, 1), LORA, dynamics=["dp-sgd"], objective="classification", steps=1,
              modules_to_save=["classifier"], labels=("a", "b"))  # fmt: skip
    with pytest.raises(SiteError, match="'classifier'"):
        train(tiny_bert(), None, job, tmp_path)


def test_two_equal_examples_weigh_as_one(tmp_path):
    row = token_rows(1, (9, 9), 1)
    twice = encoded([*row.rows, *row.rows])
    found = []
    for i, data in enumerate((row, twice)):
        job = Job("job", data, LORA, dynamics=[DPSGD(max_norm=0.1, noise=0.0)], batch_size=2, steps=1, optimizer="sgd")
        found.append(tensors(train(tiny_llama(), None, job, tmp_path / str(i)), "job"))
    assert difference(*found) < 1e-7
