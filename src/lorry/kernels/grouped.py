"""Grouped kernels for batches of several adapters on a GPU: whether they carry a batch, and how its tokens lie."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorry.kernels.dropout import kept_scale, windows
from lorry.kernels.segments import LowRankPair, Segment

if TYPE_CHECKING:
    from lorry.kernels.triton_rows import GroupedRows, RowPlan


@cache
def _triton() -> bool:
    return find_spec("triton") is not None


def has_kernels(x: Tensor) -> bool:
    """Whether Triton's kernels run where x lies: on a GPU, or on the CPU in Triton's interpreter."""
    return (x.is_cuda or (x.is_cpu and os.environ.get("TRITON_INTERPRET") == "1")) and _triton()


def groupable(x: Tensor, segments: Sequence[Segment], factors: Sequence[LowRankPair]) -> bool:
    """Whether the grouped kernels carry these segments: on a GPU (or in Triton's interpreter), no gains, one type, one
    dropout.
    """
    if not has_kernels(x):
        return False
    kinds = {(f.a.dtype, f.b.dtype) for f in factors}
    return (
        len(kinds) == 1
        and len({*kinds.pop()}) == 1
        and all(f.gain is None and f.a.shape[0] <= 128 for f in factors)
        and len({s.p for s in segments}) == 1
    )


def batch_plan(x: Tensor, segments: Sequence[Segment], plans: dict[Any, Any]) -> RowPlan | None:
    """Return the layout of the batch's tokens, which layers of one batch share; None if a row is in several segments.

    Blocks of different segments run at the same time, so they must not add to the same rows.
    """
    from lorry.kernels.triton_rows import plan_rows

    tokens = x[0].numel() // x.shape[-1]
    # weights and indices of rows belong to the composition of the batch, so every layer has the same tensors
    places = tuple((s.rows.start, s.rows.stop) if isinstance(s.rows, slice) else id(s.rows) for s in segments)
    key = (len(x), tokens, x.device, places, tuple((s.scale, id(s.weights)) for s in segments))
    if key not in plans:
        every = torch.arange(len(x))
        rows = [every if s.rows is None else every[s.rows] if isinstance(s.rows, slice) else s.rows for s in segments]
        together = torch.cat([r.cpu() for r in rows])
        disjoint = len(together.unique()) == len(together)
        plan = plan_rows(rows, [s.factor(torch.float32) for s in segments], tokens, x.device) if disjoint else None
        # the segments are kept too, so that no other tensor takes the place of one of theirs under the same id
        plans[key] = (plan, tuple(segments))
    found: RowPlan | None = plans[key][0]
    return found


def grouped_rows(plan: RowPlan, x: Tensor, segments: Sequence[Segment], flat: Sequence[Tensor | None]) -> GroupedRows:
    """Return the products of all segments at one layer, given A, B and None (no gain) of each in a row."""
    from lorry.kernels.triton_rows import GroupedRows, Windows

    a, b = ([t.detach().contiguous() for t in flat[i::3] if t is not None] for i in (0, 1))
    p = segments[0].p
    if p == 0:
        return GroupedRows(plan, a, b)
    pool, offsets = windows(x.shape, p, [(s.rows, s.seed) for s in segments], x.device)
    return GroupedRows(plan, a, b, Windows(pool, offsets, kept_scale(p)))
