"""What variants of LoRA have in common: limits in which they are LoRA, ranks of updates, and that all of them learn."""

from __future__ import annotations

import warnings

import pytest
import torch
from laws.fitting import small
from methods.small import batch, copies, scatter_trained, set_tensors, stack, train

import lorry
from lorry.core.life.api import log_probability
from lorry.core.life.calibrate import finish_step

WIDTHS = {"layers.0.up": (24, 16), "layers.0.down": (16, 24), "layers.1.up": (24, 16), "layers.1.down": (16, 24)}

#: Method -> what its A and B are called; with these options nothing else is trained, and training is LoRA's.
TRAINED_ALIKE = {
    "melora": ({"blocks": 1}, lambda t: t.unsqueeze(0), "A", "B"),
    "ralora": ({}, lambda t: t.unsqueeze(0), "A", "B"),
    "rasa": ({"shared_rank": 0}, None, "A", "B"),
    "prolora": ({"repeats": 1, "unshared": 0}, None, "chunk_A", "chunk_B"),
    "loran": ({"amplitude": 0.0}, None, "A", "B"),
    "loramoe": ({"experts": 1, "top_k": 1}, None, "A", "B"),
    "mola": ({"experts": 1, "top_k": 1, "shape": "rectangle"}, None, "A", "B"),
    "lora-dash": ({"launch": 99}, None, "A", "B"),
    "rslora": ({"alpha": 4.0}, None, "A", "B"),
}


@pytest.mark.parametrize("slug", TRAINED_ALIKE)
def test_training_is_that_of_lora_in_the_limit(slug):
    options, shaped, a, b = TRAINED_ALIKE[slug]
    models = stack(), stack()
    method = lorry.method_from({"method": slug, "rank": 4, "alpha": 8.0, **options})
    one = lorry.attach(models[0], method)
    two = lorry.attach(models[1], lorry.LoRA(rank=4, alpha=8.0), seed=3)
    values = {}
    for path in two.entries:
        for name, own in (("A", a), ("B", b)):
            value = copies(two)[f"{path}.{name}"]
            values[f"{path}.{own}"] = value if shaped is None else shaped(value)
    set_tensors(one, values)
    found = train(models[0], one, 5, after=lambda step: finish_step(one, step, 9))
    assert found == pytest.approx(train(models[1], two, 5), rel=1e-5)


def pair(rank=3):
    draw = torch.Generator().manual_seed(2)
    return {
        n: (torch.randn(rank, w, generator=draw), torch.randn(o, rank, generator=draw)) for n, (o, w) in WIDTHS.items()
    }


#: Method -> its tensors for a LoRA's A and B in a layer of weight W, such that ``ΔW = B A``.
SAME_UPDATE = {
    "mos-lora": ({}, lambda a, b, w: {"A": a, "B": b, "mixer": torch.eye(3)}),
    "tied-lora": ({}, lambda a, b, w: {"*A": a, "*B": b, "u": torch.ones(len(b)), "v": torch.ones(3)}),
    "share-lora": ({}, lambda a, b, w: {"*A": a, "B": b}),
    "salora": ({}, lambda a, b, w: {"A": a, "B": b, "gate": torch.full((3,), 20.0)}),
    "increlora": (
        {"rank": None, "initial_rank": 3, "target_rank": 3, "most_rank": 3},
        lambda a, b, w: {"A": a, "B": b, "E": torch.ones(3)},
    ),
    "loha": ({"rank": 3}, lambda a, b, w: {"A2": a, "B2": b, "A1": ones(a) / 3, "B1": ones(b)}),
    "sinelora": ({"rank": 3, "frequency": 1e-3}, lambda a, b, w: {"A": a, "B": b * 1e3 * len(b) ** 0.5}),
    "hira": ({"rank": 3}, lambda a, b, w: {"A": a, "B": b}),
    "ridgelora": ({"rank": 3}, lambda a, b, w: {"A": a, "B": torch.linalg.pinv(w) @ b}),
    "bslora": ({"rank": 3}, lambda a, b, w: {"A": a, "B": b}),
    "nora": ({"inner_rank": 3}, lambda a, b, w: {"inner_A": torch.eye(3), "inner_B": torch.eye(3), "A": a, "B": b}),
    "rasa": ({"rank": 4}, lambda a, b, w: {"A": a, "B": b, "e": torch.ones(4)}),
    "vera": ({}, None),
    "delora": ({}, None),
}


def ones(like):
    return torch.ones_like(like)


@pytest.mark.parametrize("slug", SAME_UPDATE)
def test_the_update_is_that_of_lora_in_the_limit(slug):
    """Each layer by itself: what layers share is the layer's own then."""
    options, tensors = SAME_UPDATE[slug]
    for path, (a, b) in pair().items():
        model = stack()
        weight = model.get_submodule(path).weight.detach()
        if slug == "hira":
            weight.fill_(1.0)
        if slug == "sinelora":
            a, b = a * 1e-3, b * 1e-3
        if slug == "ridgelora":
            b = weight @ torch.linalg.pinv(weight) @ b  # what the weight can give
        values = {"method": slug, "rank": 3, **options}
        adapter = lorry.attach(model, {k: v for k, v in values.items() if v is not None}, targets=path)
        (entry,) = adapter.entries.values()
        if slug == "vera":  # of LoRAs whose B and A are multiples of the frozen ones
            shared = copies(adapter)
            a, b = 2.0 * shared["shared.projection_A"], -1.5 * shared["shared.projection_B"]
            set_tensors(
                adapter, {f"{path}.lambda_d": torch.full((3,), 2.0), f"{path}.lambda_b": torch.full((len(b),), -1.5)}
            )
        elif slug == "delora":  # of unit lengths, with columns of unit length
            a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=0)
            set_tensors(adapter, {f"{path}.A": 7 * a, f"{path}.B": 0.3 * b, f"{path}.strength": torch.tensor([3.0])})
            set_tensors(adapter, {f"{path}.columns": torch.ones(a.shape[1])})
        else:
            shared = next((n.rpartition(".")[0] for n in copies(adapter) if n.startswith("shared.")), "")
            named = {
                n.replace("*", f"{shared}.") if "*" in n else f"{path}.{n}": t for n, t in tensors(a, b, weight).items()
            }
            set_tensors(adapter, named)
        wanted = b @ a
        torch.testing.assert_close(entry.delta(), wanted, atol=1e-4 * float(wanted.abs().max()), rtol=1e-4)


def test_a_mixture_in_a_rectangle_is_the_mixture():
    x, found = batch(), []
    for slug in ("mola", "loramoe"):
        model = stack()
        options = {"shape": "rectangle"} if slug == "mola" else {}
        scatter_trained(lorry.attach(model, {"method": slug, "rank": 3, **options}))
        found.append(model(x))
    assert torch.equal(*found)


R = 3
#: Method with options -> rank of each layer's update (up, down), of widths 16 and 24 with two layers of each type.
RANKS = {
    "lora": ({}, R),
    "dora": ({}, 16),
    "melora": ({"rank": 4, "blocks": 2}, 4),
    "loha": ({}, R * R),
    "hira": ({}, 16),
    "randlora": ({}, 16),
    "lokr": ({"factor": 4}, 16),
    "mora": ({}, 10),  # ⌊√(40 · 3)⌋
    "mora rotation": ({"form": "rotation"}, 16),
    "sinelora": ({}, 16),
    "ridgelora": ({}, 16),
    "rasa": ({"shared_rank": 1}, 2 + 2),
    "prolora": ({"rank": 5, "unshared": 1}, 5),
    "bslora": ({"rank": 2, "intra_rank": 3, "inter_rank": 4}, 9),
    "bslora kronecker": ({"rank": 2, "bridge": "kronecker"}, 6),
    "bslora gate": ({"rank": 2, "intra_rank": 3, "inter_rank": 4, "bridge": "gate"}, 4),
    "nora": ({"inner_rank": 2}, 2),
    "tied-lora": ({}, R),
    "share-lora": ({}, R),
    "salora": ({}, R),
    "increlora": ({"rank": None, "initial_rank": 2, "target_rank": 4, "most_rank": 5}, 2),
    "lora-dash": ({"directions": 4}, R + 4),
    "vera": ({}, R),
    "lora-xs": ({}, R),
}


@pytest.mark.parametrize("case", RANKS)
def test_rank_of_the_update(case):
    options, rank = RANKS[case]
    values = {"method": case.split()[0], "rank": R, **options}
    method = {k: v for k, v in values.items() if v is not None}
    adapter = scatter_trained(lorry.attach(stack().double(), method, dtype=torch.float64), std=0.5)
    assert {int(torch.linalg.matrix_rank(d.double())) for _, d in adapter.deltas()} == {rank}


#: Experts that no token chose get no gradient; a sparse update is no product.
CHOOSING = {"remix", "lora-mixer", "loramoe", "mola", "goat", "smora"}


@pytest.mark.parametrize("slug", [slug for slug, info in lorry.methods().items() if "linear" in info.kinds])
def test_after_a_step_every_trained_tensor_has_a_gradient(slug):
    model = stack()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = lorry.attach(model, small(slug), targets="all-linear", seed=1)
    model.train()
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for step in (1, 2):
        optimizer.zero_grad()
        with lorry.context(model, task_ids=torch.arange(16) % 3, token_kinds=torch.arange(16)[:, None] % 2):
            loss = (model(batch(16)) - batch(16, seed=9)).square().mean()
            for extra in (lorry.auxiliary_loss(model), log_probability(model, adapter.name)):
                loss = loss if extra is None else loss + extra.mean()
        loss.backward()
        if step == 1:
            optimizer.step()
            finish_step(adapter, step, 9)
    dead = [name for name, p in adapter.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead or slug in CHOOSING and len(dead) < len(list(adapter.parameters())) / 2
