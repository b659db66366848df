"""Small models and comparisons for the tests of methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lorry


class Stack(nn.Module):
    """Blocks of two linear layers of unequal widths."""

    def __init__(self, layers: int = 2, width: int = 16, inner: int = 24) -> None:
        super().__init__()
        blocks = [
            nn.ModuleDict({"up": nn.Linear(width, inner), "down": nn.Linear(inner, width)}) for _ in range(layers)
        ]
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = x + block["down"](torch.tanh(block["up"](x)))
        return x


def stack(layers: int = 2, width: int = 16, inner: int = 24, seed: int = 0) -> Stack:
    torch.manual_seed(seed)
    return Stack(layers, width, inner).eval()


def batch(rows: int = 5, width: int = 16, seed: int = 3) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def scatter_trained(adapter: lorry.Adapter, std: float = 0.3, seed: int = 7) -> lorry.Adapter:
    """Set every trained tensor to random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, tensor, spec in adapter.named_tensors():
            if spec.trained:
                tensor.copy_(torch.empty(tensor.shape).normal_(0, std, generator=generator))
    return adapter


def train(
    model: nn.Module,
    adapter: lorry.Adapter,
    steps: int,
    *,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = lambda p: torch.optim.Adam(p, lr=1e-2),
    after: Callable[[int], None] | None = None,
) -> list[float]:
    """Train towards a fixed target and return the losses."""
    x, target = batch(16), batch(16, seed=9)
    chosen = optimizer(adapter.parameters())
    losses = []
    for step in range(1, steps + 1):
        loss = (model(x) - target).square().mean()
        extra = lorry.auxiliary_loss(model, adapter.name)
        (loss if extra is None else loss + extra).backward()
        chosen.step()
        if after is not None:
            after(step)
        chosen.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def copies(adapter: lorry.Adapter) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor, _ in adapter.named_tensors()}


def set_tensors(adapter: lorry.Adapter, values: dict[str, Tensor]) -> None:
    """Copy values in by full name; an unknown name is an error."""
    tensors = {name: tensor for name, tensor, _ in adapter.named_tensors()}
    with torch.no_grad():
        for name, value in values.items():
            tensors[name].copy_(value)


def peft_model(model: nn.Module, config: Any, seed: int = 11) -> Any:
    """Return a real peft model around `model` whose trained tensors are random."""
    import peft

    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.3, generator=generator))
    return wrapped


def round_trip(adapter: lorry.Adapter, fresh: nn.Module, path: Any) -> lorry.Adapter:
    """Save and load into another model of the same base."""
    adapter.save(path)
    loaded = lorry.load(fresh, path)
    return loaded
