"""Decoding one sequence with one adapter, against the bare base, a floor written by hand, and PEFT."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorry
from lorry.bench._measure import interleaved, llama, machine, ratio_table, ratios, threads
from lorry.bench._registry import register


def run(
    rounds: int = 9,
    layers: int = 4,
    hidden: int = 512,
    inner: int = 1408,
    steps: int = 32,
    rank: int = 8,
    dtypes: str = "float32,bfloat16",
    peer: bool = True,
) -> dict[str, Any]:
    """Measure `steps` tokens of greedy decoding of one sequence with a key-value cache.

    The *floor* is the least that an adapter beside the layer can cost: every layer is its own product and two thin
    ones, with factors in the layer's type and nothing around them; the *dora floor* has a product with a gain more.
    """
    result: dict[str, Any] = {"machine": machine("cpu"), "steps": steps, "dtypes": {}}
    for dtype in dtypes.split(","):
        models = _models(layers, hidden, inner, rank, getattr(torch, dtype), peer)
        token = torch.zeros(1, 1, dtype=torch.long)
        with threads(1), torch.no_grad():
            seconds = interleaved({n: partial(_decode, m, token, steps) for n, m in models.items()}, rounds)
        found = {"base": ratios(seconds, "base")}
        for floor, names in {"floor": ("lora", "peft lora"), "dora floor": ("dora", "peft dora")}.items():
            found[floor] = {n: r for n, r in ratios(seconds, floor).items() if n in names}
        result["dtypes"][dtype] = found
    return result


class _ByHand(nn.Module):
    """A layer and its update with nothing around them."""

    def __init__(self, layer: nn.Linear, rank: int, gained: bool) -> None:
        super().__init__()
        weight, bias = layer.weight, layer.bias
        self.weight, self.bias = weight, bias
        self.a, self.b = weight.new_full((rank, weight.shape[1]), 0.02), weight.new_full((weight.shape[0], rank), 0.02)
        self.gain = weight.new_ones(weight.shape[0]) if gained else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias).add_(F.linear(F.linear(x, self.a), self.b))
        return y if self.gain is None else y * self.gain


def _by_hand(model: nn.Module, rank: int, gained: bool = False) -> nn.Module:
    """Put layers with updates written by hand in the place of all but the output head's."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child is not head:
                setattr(parent, name, _ByHand(child, rank, gained))
    return model


def _models(layers: int, hidden: int, inner: int, rank: int, kind: torch.dtype, peer: bool) -> dict[str, nn.Module]:
    def base() -> nn.Module:
        return llama(layers, hidden, inner).to(kind).eval()

    models = {"base": base(), "floor": _by_hand(base(), rank), "dora floor": _by_hand(base(), rank, gained=True)}
    for method in ("lora", "dora"):
        models[method] = base()
        adapter = lorry.attach(models[method], {"method": method, "rank": rank}, targets="all-linear")
        _off_zero({n: p for n, p in adapter.named_parameters() if n.endswith(".B")})
        adapter.train(False)
    if peer:
        from peft import LoraConfig, get_peft_model

        for name, dora in (("peft lora", False), ("peft dora", True)):
            config = LoraConfig(r=rank, target_modules="all-linear", use_dora=dora)
            models[name] = get_peft_model(base(), config).eval()
            _off_zero({n: p for n, p in models[name].named_parameters() if "lora_B" in n})
    return models


def _off_zero(factors: dict[str, nn.Parameter]) -> None:
    """Give factors values: a product with zeros may be faster than another."""
    generator = torch.Generator().manual_seed(0)
    for parameter in factors.values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def _decode(model: Callable[..., Any], token: Tensor, steps: int) -> None:
    from transformers import DynamicCache

    cache = DynamicCache()
    for _ in range(steps):
        token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)


def table(result: dict[str, Any]) -> Any:
    """Return the ratios to the base and to the floors as rich tables."""
    from rich.console import Group

    tables = []
    for dtype, found in result["dtypes"].items():
        title = f"Decoding one sequence, {dtype}, {result['machine']}"
        tables += [ratio_table(title, rows, f"the {against}") for against, rows in found.items()]
    return Group(*tables)


register("decode", run, table, help=__doc__)
