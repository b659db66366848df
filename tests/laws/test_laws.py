"""The laws that every registered method keeps; a new method is tested by existing.

Generated over method x kind of site from the registry.
"""

from __future__ import annotations

import copy
import dataclasses
from functools import lru_cache, partial

import pytest
import torch
from core.tiny import clear, off_zero, same_bytes, snapshot, unchanged
from torch import Tensor, nn

import lorry
from lorry.core.life.api import log_probability
from lorry.core.life.state import state_of
from lorry.core.method.context import Context

KINDS = ("linear", "conv", "embedding", "qkv", "experts", "router", "block")
LENGTH, ROWS = 5, 4


class TinyExperts(nn.Module):
    """A bank as transformers keeps it: ``(experts, out, in)``; every token goes through all experts."""

    def __init__(self, experts: int, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(experts, 2 * width, width) * 0.4)
        self.down_proj = nn.Parameter(torch.randn(experts, width, 2 * width) * 0.4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        hidden = torch.einsum("eoi,ti->teo", self.up_proj, tokens).tanh()
        return torch.einsum("eoi,tei->to", self.down_proj, hidden).view_as(x)


class TinyRouter(nn.Module):
    """A softmax over experts, each of which is a vector."""

    def __init__(self, experts: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, width) * 0.4)
        self.values = nn.Parameter(torch.randn(experts, width) * 0.4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight).softmax(-1) @ self.values


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (
            nn.Linear(width, 2 * width, bias=False),
            nn.Linear(width, 2 * width, bias=False),
        )
        self.down_proj = nn.Linear(2 * width, width, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Tiny(nn.Module):
    """A network around the layers of one kind, of shapes drawn from a seed."""

    def __init__(self, kind: str, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.kind = kind
        width = 8 * int(torch.randint(2, 4, ()))
        other = 4 * int(torch.randint(3, 7, ()))
        self.embedding = nn.Embedding(32, width)
        if kind == "conv":
            self.conv = nn.Conv1d(width, width, 3, padding=1)
            self.grouped_conv = nn.Conv1d(width, width, 3, padding=1, groups=2, bias=False)
        elif kind == "qkv":
            self.qkv = nn.MultiheadAttention(width, 2, batch_first=True)
        elif kind == "experts":
            self.experts = TinyExperts(3, width)
        elif kind == "router":
            self.router = TinyRouter(12, width)
        elif kind == "block":
            self.block = nn.Module()
            self.block.mlp = FeedForward(width)
        self.linear = nn.Linear(width, other)
        self.linear_out = nn.Linear(other, width, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 1:
                nn.init.normal_(parameter, 0, 0.3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        if self.kind == "conv":
            x = x + self.grouped_conv(self.conv(x.transpose(1, 2)).tanh()).transpose(1, 2)
        elif self.kind == "qkv":
            x = x + self.qkv(x, x, x, need_weights=False)[0]
        elif self.kind == "experts":
            x = x + self.experts(x)
        elif self.kind == "router":
            x = x + self.router(x)
        elif self.kind == "block":
            x = x + self.block.mlp(x)
        return self.linear_out(self.linear(x).tanh())


TARGETS = {
    "linear": ["linear", "linear_out"],
    "conv": ["conv", "grouped_conv"],
    "embedding": ["embedding"],
    "qkv": "kind:qkv",
    "experts": "experts",
    "router": "routers",
    "block": ["block.mlp"],
}
CASES = [
    pytest.param(slug, kind, id=f"{slug}-{kind}")
    for slug, info in lorry.methods().items()
    for kind in KINDS
    if kind in info.kinds
]
#: Compiling takes a second: each method on the first kind it sits on, and plain LoRA on all.
COMPILED = [
    pytest.param(slug, kind, id=f"{slug}-{kind}")
    for slug, info in lorry.methods().items()
    for kind in (info.kinds if slug == "lora" else info.kinds[:1])
]
over_methods_and_kinds = pytest.mark.parametrize("slug, kind", CASES)


def ids(rows: int = ROWS) -> Tensor:
    return torch.randint(0, 32, (rows, LENGTH), generator=torch.Generator().manual_seed(7))


def small(slug: str) -> lorry.core.method.base.Method:
    """The method with its defaults, narrow enough for tiny layers."""
    fields = {f.name: f for f in dataclasses.fields(lorry.methods()[slug].cls)}
    rank = {"rank": 2} if "rank" in fields and isinstance(fields["rank"].default, int) else {}
    rank |= {"tokens": tuple(range(16))} if "tokens" in fields else {}
    for values in ({**rank, "dropout": 0.0} if "dropout" in fields else rank, rank, {}):
        try:
            return lorry.method_from({"method": slug, **values})
        except lorry.OptionError:
            continue
    raise AssertionError(f"{slug} needs options: give every option a default")


@lru_cache
def fitting(slug: str, kind: str) -> list[str]:
    """The sites of the kind that the method takes: token gates do not sit on a grouped convolution."""
    chosen, reasons = [], []
    model = Tiny(kind)
    targets = TARGETS[kind]
    names = (
        list(targets) if not isinstance(targets, str) else [s.path for s in lorry.plan(model, "lora", targets).sites]
    )
    for name in names:
        try:
            lorry.plan(model, small(slug), name)
            chosen.append(name)
        except lorry.SiteError as reason:
            reasons.append(str(reason))
    assert chosen, reasons
    return chosen


def attached(
    slug: str,
    kind: str,
    *,
    name="one",
    model=None,
    moved=True,
    seed=0,
    dtype=torch.float32,
    base=torch.float32,
):
    model = Tiny(kind).to(base).eval() if model is None else model
    adapter = lorry.attach(model, small(slug), targets=fitting(slug, kind), name=name, seed=seed, dtype=dtype)
    return model, off_zero(adapter, seed + 1, 0.1) if moved else adapter


def run(model, x=None):
    with torch.no_grad():
        return model(ids() if x is None else x)


def close(a, b, factor=1.0):
    torch.testing.assert_close(a, b, atol=2e-5 * factor, rtol=1e-4 * factor)


def grads(adapter):
    return {n: p.grad for n, p in adapter.named_parameters()}


@over_methods_and_kinds
def test_identity_at_the_start_or_declared_otherwise(slug, kind):
    model = Tiny(kind).eval()
    before, bare = snapshot(model), run(model)
    attached(slug, kind, model=model, moved=False)
    found = run(model)
    if lorry.methods()[slug].identity_at_start:
        close(found, bare)
    else:
        assert torch.isfinite(found).all()
    assert unchanged(model, before)


@over_methods_and_kinds
def test_every_trained_tensor_gets_a_gradient_and_the_base_none(slug, kind):
    model, adapter = attached(slug, kind)
    model.train()
    torch.manual_seed(0)
    both_kinds = torch.arange(ids().numel()).view_as(ids()) % 2
    with lorry.context(model, task_ids=torch.arange(ROWS), token_kinds=both_kinds):
        loss = model(ids()).square().mean()
        for extra in (lorry.auxiliary_loss(model), log_probability(model, "one")):
            loss = loss if extra is None else loss + extra.sum()
    loss.backward()
    for name, gradient in grads(adapter).items():
        assert gradient is not None and torch.isfinite(gradient).all(), name
        assert gradient.abs().sum() > 0, f"{name} has a gradient of zeros"
    own = {id(p) for p in adapter.parameters()}
    assert own and all(p.grad is None for p in model.parameters() if id(p) not in own)
    count = sum(p.numel() for p in adapter.parameters())
    assert count == adapter.count() == lorry.plan(Tiny(kind), small(slug), fitting(slug, kind)).trained


@over_methods_and_kinds
def test_weight_k_gives_k_times_the_update_or_it_is_declared_otherwise(slug, kind):
    """At one layer alone: what lies behind it is not linear."""
    if kind in ("experts", "router"):
        pytest.skip("what owns the weight is a network of its own")
    model, adapter = attached(slug, kind)
    site = adapter.sites[0]
    owner, x = site.owner, ids() if kind == "embedding" else None
    if kind == "conv":
        x = torch.randn(ROWS, owner.in_channels, LENGTH)
    elif kind in ("linear", "block"):
        x = torch.randn(ROWS, LENGTH, owner.in_features if kind == "linear" else owner.up_proj.in_features)
    elif kind == "qkv":
        pytest.skip("attention is not linear in its weights")
    results = []
    for composition in (None, "one", {"one": 2.5}, {"one": -1.0}):
        lorry.activate(model, composition)
        results.append(run(owner, x))
    bare, one, more, less = results
    assert (one - bare).abs().max() > 1e-4
    if lorry.methods()[slug].linear_in_scale:
        close(more - bare, 2.5 * (one - bare), 5)
        close(less - bare, -(one - bare), 5)


@over_methods_and_kinds
def test_merged_equals_unmerged_and_unmerge_and_detach_restore_every_byte(slug, kind):
    model = Tiny(kind).eval()
    before, bare = snapshot(model), run(model)
    types = {n: type(m) for n, m in model.named_modules()}
    model, adapter = attached(slug, kind, model=model)
    adapted = run(model)
    assert (adapted - bare).abs().max() > 1e-5, "the adapter does nothing"
    merges = {entry.method.info.fuse for entry in adapter.entries.values()}
    if "never" in merges:
        with pytest.raises(lorry.AdapterError):
            adapter.fuse()
    else:
        receipt = adapter.fuse()
        assert receipt.sites == len(adapter.sites) and receipt.max_error < 1e-6
        if merges == {"exact"}:
            close(run(model), adapted, 5)
        adapter.unfuse()
    assert unchanged(model, before)
    close(run(model), adapted)
    adapter.detach()
    assert unchanged(model, before) and torch.equal(run(model), bare)
    assert {n: type(m) for n, m in model.named_modules()} == types
    assert not any("lorry" in k for m in model.modules() for k in (*m.__dict__, *m._parameters))


@over_methods_and_kinds
def test_a_batch_of_mixed_rows_equals_each_row_alone(slug, kind):
    model, one = attached(slug, kind)
    _, two = attached(slug, kind, name="two", model=model, seed=3)
    batch = ["two", None, "one", "two"]
    with lorry.rows(model, batch):
        mixed = model(ids())
    mixed.square().sum().backward()
    found = {n: g for a in (one, two) for n, g in ((f"{a.name}.{k}", v) for k, v in grads(a).items())}
    clear(model)
    for row, composition in enumerate(batch):
        lorry.activate(model, composition)
        alone = model(ids()[row : row + 1])
        close(mixed[row : row + 1], alone, 5)
        if alone.requires_grad:
            alone.square().sum().backward()
    for adapter in (one, two):
        for name, gradient in grads(adapter).items():
            have = found[f"{adapter.name}.{name}"]
            torch.testing.assert_close(have, gradient, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("slug, kind", COMPILED)
def test_eager_equals_compiled(slug, kind):
    model, adapter = attached(slug, kind)
    outputs, gradients = [], []
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for forward in (model, compiled):
        clear(model)
        lorry.activate(forward, "one")
        out = forward(ids())
        out.square().mean().backward()
        outputs.append(out.detach())
        gradients.append(grads(adapter))
    close(outputs[1], outputs[0], 5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-3)
    torch._dynamo.reset()


@over_methods_and_kinds
def test_a_bfloat16_base_keeps_its_dtype_and_no_float32_copy_of_its_input(slug, kind):
    for dtype in (torch.float32, torch.bfloat16):
        model, adapter = attached(slug, kind, dtype=dtype, base=torch.bfloat16)
        inputs: dict[str, Tensor] = {}
        for site in adapter.sites:
            site.owner.register_forward_pre_hook(partial(note, inputs, site.path))
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(partial(keep, kept), lambda t: t):
            out = model(ids())
        assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()
        for path, x in inputs.items():
            assert not [t for t in kept if is_float32_copy(t, x)], path
        out.float().square().mean().backward()
        declared = {n: spec.dtype or dtype for n, _, spec in adapter.named_tensors()}
        assert all(g is None or g.dtype == declared[n] for n, g in grads(adapter).items())


def note(inputs: dict[str, Tensor], path: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    inputs[path] = args[0]


def keep(kept: list[Tensor], tensor: Tensor) -> Tensor:
    kept.append(tensor)
    return tensor


def is_float32_copy(kept: Tensor, x: Tensor) -> bool:
    same_kind = x.is_floating_point() and kept.dtype == torch.float32 and kept.numel() == x.numel()
    return same_kind and torch.equal(kept.detach().flatten(), x.detach().float().flatten())


@over_methods_and_kinds
def test_checkpointed_equals_plain(slug, kind):
    model, adapter = attached(slug, kind)
    results = []
    for checkpointed in (False, True):
        clear(model)
        state_of(model).context = Context()
        if checkpointed:
            out = torch.utils.checkpoint.checkpoint(model, ids(), use_reentrant=False)
        else:
            out = model(ids())
        out.square().mean().backward()
        results.append((out.detach(), grads(adapter)))
    close(results[1][0], results[0][0])
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, atol=1e-6, rtol=1e-4)


@over_methods_and_kinds
def test_a_copy_is_equal_and_independent(slug, kind):
    model, _ = attached(slug, kind)
    wanted = run(model)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin), wanted)
    off_zero(lorry.adapters(twin)["one"], 9, 0.5)
    assert torch.equal(run(model), wanted)


@over_methods_and_kinds
def test_saved_and_loaded_is_the_same(slug, kind, tmp_path):
    model, adapter = attached(slug, kind)
    wanted = run(model)
    adapter.save(tmp_path / "adapter")
    fresh = Tiny(kind).eval()
    again = lorry.load(fresh, tmp_path / "adapter", name="one")
    lorry.activate(fresh, "one")
    close(run(fresh), wanted)
    assert again.method == adapter.method and again.method.to_dict() == adapter.method.to_dict()
    assert again.receipt.fingerprint == ("match" if adapter.fingerprint.sites else "unknown")
    assert again.receipt.tensors_applied == again.receipt.tensors_total > 0
    values = {n: t for n, t, _ in adapter.named_tensors()}
    assert all(same_bytes(t.detach(), values[n].detach()) for n, t, _ in again.named_tensors())
    assert values.keys() == {n for n, _, _ in again.named_tensors()}
    if not adapter.fingerprint.sites:
        return  # whole modules have no fingerprint
    with pytest.raises(lorry.FingerprintError):
        lorry.load(other_base(kind), tmp_path / "adapter", name="one")


def other_base(kind):
    """The same shapes with other weights."""
    model = Tiny(kind).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.5)
    return model


@over_methods_and_kinds
def test_tensors_that_do_not_fit_are_refused_and_nothing_is_changed(slug, kind, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    _, adapter = attached(slug, kind)
    adapter.save(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    whole, fresh = load_file(path), Tiny(kind).eval()
    name, before = sorted(whole)[0], snapshot(fresh)
    floating = next(n for n in sorted(whole) if whole[n].is_floating_point())
    damaged = {
        "missing": {n: t for n, t in whole.items() if n != name},
        "surplus": {**whole, name.replace(".", ".surplus_", 1): torch.zeros(2, 2)},
        "misshapen": {**whole, name: torch.zeros(*whole[name].shape, 2)},
        "not finite": {**whole, floating: torch.full_like(whole[floating], float("nan"))},
    }
    for damage, tensors in damaged.items():
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(lorry.CheckpointError):
            lorry.load(fresh, tmp_path, name="one")
        assert not lorry.adapters(fresh) and unchanged(fresh, before), damage
    assert all(p.requires_grad for p in fresh.parameters())
