"""Matrix products that choose their arithmetic by what the processor has."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def _native_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def emulated(x: Tensor) -> bool:
    """Whether products of x's type run without hardware support (bfloat16 on older processors), far slower than
    float32.
    """
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not _native_bfloat16()


def autocasts(x: Tensor) -> bool:
    """Whether autocast acts on x; it knows nothing of the meta device."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left right``, in float32 and rounded once where the type is emulated."""
    if emulated(left):
        return (left.float() @ right.float()).to(left.dtype)
    return left @ right


def add_product(y: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    """Add ``alpha · left right`` to y in place, in float32 where the type is emulated."""
    if emulated(y):
        y.add_(left.float() @ right.float(), alpha=alpha)
    else:
        y.addmm_(left, right, alpha=alpha)
