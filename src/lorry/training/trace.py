"""What a pass would allocate and compute, worked out on the meta device: the real modules run, without any data.

A model on the meta device runs its own forward and backward code on tensors that have shapes and no memory. Watching
the operations gives the bytes that are alive at the worst moment, and for each operation its floating-point operations
and the bytes that it reads and writes, whatever the architecture and the method.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental import _config
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from lorry.training.live import Live

_aten = torch.ops.aten
_FLASH = _aten._scaled_dot_product_flash_attention_for_cpu
#: In-place products, by the operation whose formula holds for them.
_LIKE = {_aten.addmm_: _aten.addmm, _aten.baddbmm_: _aten.baddbmm}


class Trace(Live):
    """Adds up what operations allocate, compute and move while it is entered.

    Values that code asks of tensors without data are answered: a condition on a mask is that of padded rows or of full
    ones, a number is 1, and every place is taken for non-zero.

    Parameters
    ----------
    padded
        Whether rows are of different lengths, so that the attention mask cannot be left out.

    Attributes
    ----------
    work
        (floating-point operations, bytes read and written) of one operation -> how many of these there were.
    """

    def __init__(self, padded: bool = True) -> None:
        super().__init__()
        self.padded = padded
        self.work: Counter[tuple[int, int]] = Counter()

    @property
    def flops(self) -> int:
        """Floating-point operations of all products."""
        return sum(flops * count for (flops, _), count in self.work.items())

    def restart(self) -> None:
        """Forget the highest point and the work so far; what is alive stays counted."""
        self.most = self.live
        self.work.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, on the meta device where its first tensor is."""
        kwargs = kwargs or {}
        if _on_meta(args):
            args, kwargs = tree_map_only(Tensor, _moved, (args, kwargs))
            if func is _aten._local_scalar_dense.default:
                return not self.padded if args[0].dtype == torch.bool else 1
            if func is _aten.bincount.default:
                size = kwargs.get("minlength", args[2] if len(args) > 2 else 0)
                return args[0].new_empty(max(size, 1), dtype=torch.long)
        result, given, made = self.watched(func, args, kwargs)
        if not func.is_view:
            self._count(func, args, kwargs, given, result, made)
        return result

    def _count(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], result: Any, made: list[Tensor]) -> None:
        moved = sum(_size(t) for t in given) + sum(_size(t) for t in made)
        self.work[_flops(func, args, kwargs, result), moved] += 1


def _on_meta(args: Any) -> bool:
    """Whether the first tensor is on the meta device."""
    first = next((a for a in tree_leaves(args) if isinstance(a, Tensor)), None)
    return first is not None and first.device.type == "meta"


def _moved(tensor: Tensor) -> Tensor:
    """Return a tensor on the meta device: for a model on the CPU, indices that it makes there lie where it is."""
    return tensor.to("meta") if tensor.dim() and tensor.device.type == "cpu" else tensor


def _size(tensor: Tensor) -> int:
    """Return the bytes that a tensor spans; what is expanded is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes() or 0)


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    packet: Any = getattr(func, "_overloadpacket", None)
    if packet is _FLASH:
        return sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape)
    if packet is _aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return sdpa_backward_flop_count(*(args[i].shape for i in range(4)))
    formula: Callable[..., int] | None = flop_registry.get(_LIKE.get(packet, packet))
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


class FusedAttention(TorchFunctionMode):
    """Lets attention on the meta device take the fused path as elsewhere; it would build all scores otherwise."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args and args[0].device.type == "meta":
            found = _fused(*args, **kwargs)
            if found is not None:
                return found
        return func(*args, **kwargs)


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Return what the fused attention would, or None where it cannot be taken."""
    learned = attn_mask is not None and attn_mask.requires_grad
    if q.dim() != 4 or learned or q.shape[-1] != v.shape[-1] or q.shape[-1] != k.shape[-1] or dropout_p:
        return None
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype)  # it is made into what is added to the scores
    result: Tensor = _FLASH(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return result


@contextmanager
def traced(padded: bool = True) -> Iterator[Trace]:
    """Trace what runs inside; attention takes the fused path."""
    everything = _config.patch(meta_nonzero_assume_all_nonzero=True)  # type: ignore[attr-defined]
    with everything, FusedAttention(), Trace(padded) as trace:
        yield trace


def on_meta(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a copy of a model without any data, which takes no memory; the model stays as it is.

    Parameters
    ----------
    model
        On any device, without adapters.
    dtype
        Of its floating-point tensors; as they are if not given.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        bare = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(bare, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    bare_model = copy.deepcopy(model, memo)
    return bare_model if dtype is None else bare_model.to(dtype)
