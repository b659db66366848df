"""How fast a machine computes and moves bytes: given as figures, or measured in less than a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Machine:
    """Rates of a device.

    Attributes
    ----------
    flops
        Floating-point operations of a product in a second, of the type that is used.
    bandwidth
        Bytes read and written in a second.
    overhead
        Seconds that every operation takes besides.
    """

    flops: float
    bandwidth: float
    overhead: float = 0.0

    def seconds(self, flops: int, moved: int) -> float:
        """Return the time of one operation: as long as its products or its bytes take, whichever is more."""
        return max(flops / self.flops, moved / self.bandwidth) + self.overhead


def calibrate(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, size: int = 1024) -> Machine:
    """Measure this machine: a product of square matrices, a copy, and an operation on one number.

    Parameters
    ----------
    device, dtype
        What is measured.
    size
        Rows of the matrices; the copy is of 64 MiB.
    """
    place = torch.device(device)
    a, b = (torch.ones(size, size, dtype=dtype, device=place) for _ in range(2))
    source = torch.ones(1 << 26, dtype=torch.uint8, device=place)
    goal = torch.empty_like(source)
    one = torch.ones(1, dtype=dtype, device=place)
    out = torch.empty_like(a)
    product = _fastest(lambda: torch.mm(a, b, out=out), place)
    copy = _fastest(lambda: goal.copy_(source), place)
    small = _fastest(lambda: [one + one for _ in range(200)], place) / 200
    return Machine(2 * size**3 / product, 2 * len(source) / copy, small)


def _fastest(action: Callable[[], object], place: torch.device, times: int = 5) -> float:
    """Return the shortest of a few runs: what disturbs a run only makes it longer."""
    best = float("inf")
    for _ in range(times + 1):  # the first warms up
        begun = time.perf_counter()
        action()
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        best = min(best, time.perf_counter() - begun)
    return best
