"""Counting what a step does: floating-point operations, bytes kept for the backward pass, bytes at the peak."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, addmm_flop, baddbmm_flop, sdpa_backward_flop, sdpa_flop

from lorry.training.live import Live, dense_tensors

_aten = torch.ops.aten


def flops(step: Callable[[], object]) -> int:
    """Return the floating-point operations of the products in a step, forward and backward.

    Operations inside autograd functions are counted like any other. Elementwise passes, gathers, sorts and random
    numbers count as nothing: they are bounded by memory. A compressed sparse matrix counts by its stored entries.
    """
    with FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:
        step()
    return int(counter.get_total_flops())


def _formulas() -> dict[Any, Any]:
    """Return formulas for what PyTorch's counter leaves out (in-place products, attention on the CPU) or takes for
    dense.
    """
    return {
        _aten.mm: _raw(lambda a, b, **_: _product(a, b)),
        _aten.addmm: _raw(lambda c, a, b, **_: _product(a, b)),
        _aten.addmm_: _raw(addmm_flop),
        _aten.baddbmm_: _raw(baddbmm_flop),
        _aten.sparse_sampled_addmm: _raw(lambda c, a, b, **_: 2 * c._nnz() * a.shape[1]),
        _aten._scaled_dot_product_flash_attention_for_cpu: _raw(sdpa_flop),
        _aten._scaled_dot_product_flash_attention_for_cpu_backward: _raw(sdpa_backward_flop),
    }


def _raw(formula: Callable[..., int]) -> Callable[..., int]:
    """Mark a formula that looks at the tensors and not just at their shapes."""

    def counted(*args: Any, out_val: Any = None, **keywords: Any) -> int:
        return formula(*args, **keywords)

    counted._get_raw = True  # type: ignore[attr-defined]
    return counted


def _product(a: Tensor, b: Tensor) -> int:
    if a.layout is not torch.strided:
        return 2 * int(a._nnz()) * b.shape[1]
    if b.layout is not torch.strided:
        return 2 * int(b._nnz()) * a.shape[0]
    return 2 * a.shape[0] * a.shape[1] * b.shape[1]


def kept(model: nn.Module, step: Callable[[], object]) -> int:
    """Return the bytes of distinct storages that the graph of a step saves, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        for storage in (part.untyped_storage() for part in dense_tensors(tensor)):
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step()
    return sum(seen.values())


def peak(step: Callable[[], object]) -> int:
    """Return by how much a step raises the bytes of live tensors, at most, over its start.

    What an operation allocates for itself and frees before it returns is not seen.
    """
    with Live() as live:
        step()
    return int(live.most)


def training_memory(model: nn.Module, step: Callable[[], object]) -> dict[str, int]:
    """Return what training with AdamW takes beside the frozen base, in bytes: counted, for one step.

    ``parameters``, ``gradients`` and ``optimizer`` are the adapter's; ``kept`` is what the graph saves, ``peak`` the
    most that was allocated at once in forward, backward and optimizer step, all of the former included.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)

    def whole() -> None:
        step()
        optimizer.step()

    whole()
    gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
    optimizer.zero_grad()
    state = sum(v.nbytes for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor))
    parameters = sum(p.nbytes for p in trained)
    graph = kept(model, step)
    optimizer.zero_grad()
    highest = peak(whole) + parameters + state
    optimizer.zero_grad()
    return {
        "trained": sum(p.numel() for p in trained),
        "parameters": parameters,
        "gradients": gradients,
        "optimizer": state,
        "kept": graph,
        "peak": highest,
    }
