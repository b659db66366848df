"""Small live adapters for the merging tests."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lorry


def base(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
    )
    return LlamaForCausalLM(config)


def filled(
    model: nn.Module,
    name: str,
    rank: int = 2,
    seed: int = 1,
    targets=("q_proj", "up_proj"),
    dtype=torch.float64,
    **options,
):
    """An adapter whose factors are all random, in float64 so that laws can be checked closely."""
    adapter = lorry.attach(
        model,
        {"method": "lora", "rank": rank, **options},
        targets=list(targets),
        name=name,
        activate=False,
        dtype=dtype,
    ).train(False)
    generator = torch.Generator().manual_seed(seed)
    for entry in adapter.entries.values():
        for key, value in entry.tensors().items():
            entry.home.replace(key, torch.randn(value.shape, generator=generator, dtype=torch.float64).to(dtype) * 0.3)
    return adapter


def replaced(model: nn.Module, adapter, name: str, change, rank: int | None = None, **options):
    """A copy of an adapter with its factors changed by ``change(A, B) -> (A, B)`` and other options."""
    copy = lorry.attach(
        model,
        adapter.method.with_options(**options),
        targets=list(adapter.entries),
        name=name,
        activate=False,
        dtype=torch.float64,
    ).train(False)
    for path, entry in copy.entries.items():
        own = adapter.entries[path].tensors()
        a, b = change(own["A"], own["B"])
        entry.home.replace("A", a)
        entry.home.replace("B", b)
    return copy


def delta(adapter, path: str) -> torch.Tensor:
    return adapter.entries[path].delta().double()


def distance(merged, other) -> float:
    """Relative distance between two merge results, or a result and a live adapter."""
    total = size = 0.0
    for path in merged.sites:
        mine = merged.delta(path)
        theirs = other.delta(path) if hasattr(other, "tensors") else delta(other, path)
        total += float((mine - theirs).square().sum())
        size += float(theirs.square().sum())
    return (total / size) ** 0.5
