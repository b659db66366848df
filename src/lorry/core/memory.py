"""New memory for many tensors that live as long as each other."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

_CHUNK = 1 << 26
_ALIGNED = 64


class LargePages:
    """Memory on the CPU that the system hands out in large pages where it can.

    A weight that is fused is written beside the old one, to memory that the process never touched, and the system
    then clears page after page. With pages of 4 KiB that costs more than fusing itself. Tensors are cut from
    mappings of 64 MiB or their own size, and a mapping is given back when the last tensor of it is gone.
    """

    def __init__(self) -> None:
        self._mapping: mmap.mmap | None = None
        self._used = 0

    def empty(self, shape: torch.Size, like: Tensor) -> Tensor:
        """Return an uninitialised tensor of `shape` with the type and device of `like`."""
        size = math.prod(shape) * like.dtype.itemsize
        if like.device.type != "cpu" or not size or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(shape, dtype=like.dtype, device=like.device)
        if self._mapping is None or self._used + size > len(self._mapping):
            self._mapping, self._used = mmap.mmap(-1, max(size, _CHUNK), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), 0
            self._mapping.madvise(mmap.MADV_HUGEPAGE)
        flat = torch.frombuffer(self._mapping, dtype=like.dtype, offset=self._used, count=math.prod(shape))
        self._used += -(-size // _ALIGNED) * _ALIGNED
        return flat.view(shape)
