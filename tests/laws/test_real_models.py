"""Every registered method on the pocket language model and on a tiny diffusion U-Net, with their real forward passes.

The models are shared by the tests of this file: each test takes its adapters off again, and looks whether every byte
is what it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from core import tiny
from core.tiny import off_zero, same_bytes, snapshot, tokens, unchanged
from laws.fitting import merges, small, with_dense_updates
from torch import Tensor

import lorry

ROWS = 3
HOSTS = ("pocket", "unet")
#: In float64 what is left are the methods that keep a part of theirs in float32.
TOLERANCE = {"atol": 2e-6, "rtol": 1e-6}


@dataclass
class Host:
    """A model, how it runs on some rows of one batch, and what is adapted."""

    model: Any
    run: Callable[[Any, slice], Tensor]
    targets: tuple[str, ...]
    blocks: tuple[str, ...]


@lru_cache
def host(name: str) -> Host:
    return pocket() if name == "pocket" else unet()


def pocket() -> Host:
    from lorry import pocket

    model, _ = pocket.load()
    ids = tokens(ROWS, 6, vocabulary=model.config.vocab_size)
    return Host(
        model.double(),
        lambda model, rows: model(ids[rows]).logits,
        ("all-linear", "embeddings"),
        ("model.norm", "model.layers.0.mlp"),
    )


def unet() -> Host:
    model = tiny.unet((16, 32), cross=16, head=8)
    draw = torch.Generator().manual_seed(1)
    noise, text = (torch.randn(ROWS, *shape, generator=draw, dtype=torch.float64) for shape in ((4, 8, 8), (5, 16)))
    times = torch.tensor([3, 400, 999])
    return Host(
        model.double(),
        lambda model, rows: model(noise[rows], times[rows], encoder_hidden_states=text[rows]).sample,
        ("all-linear", "convolutions"),
        ("mid_block.resnets.0", "mid_block.attentions.0", "conv_norm_out"),
    )


def run(name: str, model: Any, rows: slice = slice(None)) -> Tensor:
    with torch.no_grad():
        return host(name).run(model, rows)


def placed(name: str, slug: str) -> list[str]:
    """The targets that the method can sit on."""
    info, here = lorry.methods()[slug], host(name)
    if info.kinds == ("block",) and slug == "full":
        return list(here.blocks)
    kinds = {"embeddings": "embedding", "convolutions": "conv"}
    return [t for t in here.targets if kinds.get(t, "linear") in (*info.kinds, *info.cls.gathers)]


def attach(name: str, model: Any, slug: str, called: str = "one", seed: int = 3) -> lorry.Adapter:
    targets = placed(name, slug)
    try:
        return lorry.attach(model, small(slug), targets=targets, name=called, seed=seed, dtype=torch.float64)
    except lorry.SiteError as refusal:
        if lorry.methods()[slug].kinds != ("block",):
            raise
        pytest.skip(f"no such block: {refusal}")


@contextmanager
def restored(name: str) -> Iterator[Any]:
    """The host's model, on which nothing may be left."""
    model = host(name).model
    before, bare = snapshot(model), run(name, model)
    classes = {n: type(m) for n, m in model.named_modules()}
    try:
        yield model
        for adapter in lorry.adapters(model).values():
            adapter.detach()
        assert unchanged(model, before) and torch.equal(run(name, model), bare)
        assert {n: type(m) for n, m in model.named_modules()} == classes
        left = {k for m in model.modules() for k in (*m.__dict__, *m._parameters) if "lorry" in k}
        assert not left and all(p.requires_grad for p in model.parameters())
    except BaseException:
        host.cache_clear()  # the next test begins with a fresh model
        raise


over = pytest.mark.parametrize("name, slug", [(n, s) for n in HOSTS for s in lorry.methods()])


@over
def test_identity_merging_and_detaching(name, slug):
    with restored(name) as model:
        bare = run(name, model)
        plain = copy.deepcopy(model)
        adapter = attach(name, model, slug)
        if lorry.methods()[slug].identity_at_start:
            torch.testing.assert_close(run(name, model), bare, **TOLERANCE)
        off_zero(adapter, 4, 0.1)
        adapted = run(name, model)
        assert torch.isfinite(adapted).all() and (adapted - bare).abs().max() > 1e-4
        if merges(adapter):
            torch.testing.assert_close(adapted, run(name, with_dense_updates(plain, adapter)), **TOLERANCE)
            receipt = adapter.fuse()
            assert receipt.sites == len(adapter.sites)
            torch.testing.assert_close(run(name, model), adapted, **TOLERANCE)
            adapter.unfuse()
        else:
            with pytest.raises(lorry.AdapterError, match="cannot be fused"):
                adapter.fuse()
        assert torch.equal(run(name, model), adapted)
        lorry.activate(model, None)
        assert torch.equal(run(name, model), bare)


@over
def test_rows_equal_each_row_alone_and_are_the_sum_of_their_parts(name, slug):
    with restored(name) as model:
        for called, seed in (("one", 3), ("two", 5)):
            off_zero(attach(name, model, slug, called, seed), seed, 0.1)
        block = lorry.methods()[slug].kinds == ("block",)
        rows = ["two", None, {"one": 0.5} if block else {"one": 0.5, "two": -1.0}]
        for compositions in (rows, ["one"] * ROWS):
            with lorry.rows(model, compositions):
                mixed = run(name, model)
            for row, composition in enumerate(compositions):
                lorry.activate(model, composition)
                alone = run(name, model, slice(row, row + 1))
                torch.testing.assert_close(mixed[row : row + 1], alone, **TOLERANCE)


@over
def test_saved_and_loaded_is_the_same(name, slug, tmp_path):
    with restored(name) as model:
        plain = copy.deepcopy(model)
        adapter = off_zero(attach(name, model, slug), 4, 0.1)
        adapted = run(name, model)
        adapter.save(tmp_path / "saved")
        again = lorry.load(plain, tmp_path / "saved")
        assert again.method == adapter.method and again.receipt.tensors_applied == again.receipt.tensors_total
        values = {n: t.detach() for n, t, _ in adapter.named_tensors()}
        assert values.keys() == {n for n, _, _ in again.named_tensors()}
        assert all(same_bytes(t.detach(), values[n]) for n, t, _ in again.named_tensors())
        torch.testing.assert_close(run(name, plain), adapted, **TOLERANCE)


@over
def test_gradients_reach_every_trained_tensor_and_no_weight_of_the_base(name, slug):
    with restored(name) as model:
        adapter = off_zero(attach(name, model, slug), 4, 0.1)
        model.train()
        try:
            with lorry.context(model, task_ids=torch.arange(ROWS)):
                loss = host(name).run(model, slice(None)).square().mean()
                for extra in (lorry.auxiliary_loss(model), lorry.core.life.api.log_probability(model, "one")):
                    loss = loss if extra is None else loss + extra.sum()
            loss.backward()
        finally:
            model.eval()
        own = {id(p) for p in adapter.parameters()}
        assert all(p.grad is None for p in model.parameters() if id(p) not in own)
        for key, parameter in adapter.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
        reached = [p.grad.any() for p in adapter.parameters()]
        share = 0.5 if slug == "mm-lora" else 0.9  # without pictures every token is text, and has half of its values
        assert sum(reached) >= share * len(reached), "experts that no token chose get none, others do"
