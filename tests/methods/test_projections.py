"""Uni-LoRA's dense projections against the matrices that they are by definition."""

import math

import pytest
import torch
from methods.small import batch, copies, stack, train

import lorry
from lorry.methods.parts.projections import hadamard

DENSE = ["gaussian", "fastfood"]


def sylvester(width):
    """The orthonormal Hadamard matrix."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < width:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix / math.sqrt(width)


def matrix_of(adapter):
    """P as a dense matrix ``(D, d)`` in the order of the sites' paths, from the tensors of each site."""
    length, parts = len(adapter.shared.tensors()["theta"]), []
    for path in sorted(adapter.entries):
        own = {n: t.double() for n, t in adapter.entries[path].home.tensors().items()}
        if "projection" in own:
            parts.append(own["projection"])
            continue
        h, blocks = sylvester(own["signs"].shape[-1]), []
        for signs, order, gauss, lengths in zip(own["signs"], own["order"], own["gauss"], own["lengths"], strict=True):
            permutation = torch.eye(len(h), dtype=torch.float64)[order.long()]
            blocks.append(lengths.diag() @ h @ gauss.diag() @ permutation @ h @ signs.diag())
        site = adapter.entries[path].site
        parts.append(torch.cat(blocks)[: adapter.method.rank * (site.in_features + site.out_features), :length])
    return torch.cat(parts)


def built(adapter):
    """All entries of all matrices, in the same order."""
    parts = []
    for path in sorted(adapter.entries):
        entry = adapter.entries[path]
        parts += [f.flatten() for f in entry.method.factors(entry.tensors(), entry.site)]
    return torch.cat(parts)


@pytest.mark.parametrize("width", [1, 2, 8, 64])
def test_the_transform_is_the_matrix(width):
    x = torch.randn(3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(hadamard(x), x @ sylvester(width).T, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("projection", DENSE)
@pytest.mark.parametrize("size", [40, 64])
def test_matrices_and_gradients_are_those_of_the_dense_projection(projection, size):
    adapter = lorry.attach(stack(), lorry.UniLoRA(rank=3, size=size, projection=projection))
    p, theta = matrix_of(adapter), adapter.parameters()[0]
    found = built(adapter)
    torch.testing.assert_close(found.double(), p @ theta.double(), atol=1e-6, rtol=1e-5)
    weights = torch.randn(len(found), generator=torch.Generator().manual_seed(1))
    (found * weights).sum().backward()
    torch.testing.assert_close(theta.grad.double(), p.T @ weights.double(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("projection", DENSE)
def test_distances_are_kept_in_expectation(projection):
    mean, length = 0.0, 24
    for seed in range(24):
        method = lorry.UniLoRA(rank=4, size=length, projection=projection, projection_seed=seed)
        p = matrix_of(lorry.attach(stack(), method))
        mean = mean + p.T @ p / 24
        u = torch.randn(length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert 0.75 < float((p @ u).norm() / u.norm()) < 1.25
    # 640 rows and 24 draws: entries of the mean deviate by about 1/sqrt(640 * 24)
    torch.testing.assert_close(mean, torch.eye(length, dtype=torch.float64), atol=0.06, rtol=0)


@pytest.mark.parametrize("projection", DENSE)
def test_it_is_drawn_from_the_projection_seed_alone_and_again_when_loading(projection, tmp_path):
    def drawn(seed, projection_seed):
        method = lorry.UniLoRA(rank=2, projection=projection, projection_seed=projection_seed)
        return matrix_of(lorry.attach(stack(), method, seed=seed))

    assert torch.equal(drawn(0, 42), drawn(1, 42)) and not torch.equal(drawn(0, 42), drawn(0, 43))
    x, model = batch(), stack()
    adapter = lorry.attach(model, lorry.UniLoRA(rank=4, size=60, projection=projection))
    losses = train(model, adapter, 30)
    assert losses[-1] < losses[0] and adapter.count() == 60
    adapter.save(tmp_path / "a")
    other = stack()
    loaded = lorry.load(other, tmp_path / "a")
    assert all(torch.equal(v, copies(loaded)[k]) for k, v in copies(adapter).items())
    assert torch.equal(model(x), other(x))
    assert (tmp_path / "a" / "adapter_model.safetensors").stat().st_size < 60 * 4 + 2000
    unfused = model(x).detach()
    adapter.fuse()
    torch.testing.assert_close(model(x), unfused, atol=1e-5, rtol=1e-4)
