"""What a forward pass knows besides its input, and where layers leave what they want to tell."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorry.core.method.layout import Pass

Key = tuple[str, str, str]


@dataclass
class Context:
    """What a forward pass knows besides its input, and where layers leave what they want to tell.

    Attributes
    ----------
    padding_mask
        Boolean ``(batch, length)``, True at real tokens; None if all are real. Positions that come later (a cached
        step) are real.
    token_kinds
        Integers ``(batch, length)``: the modality, role or stream of each token. Positions that come later continue
        the last one's kind.
    task_ids
        Integers ``(batch,)``.
    step
        Number of the sampler's step, or any number by which weights of a composition may change.
    timestep
        Diffusion time of each row, ``(batch,)`` or a scalar.
    values
        Anything else that a method reads, by name.
    losses
        Auxiliary losses left by layers in this pass: ``(adapter, place, name) -> scalar tensor``, the place being a
        site path or what several sites share.
    left
        Other tensors with a gradient that a loss is made of after the pass (log-probabilities, pooled loads), keyed
        likewise.
    makers
        Which site left the entry of `losses` or `left` under a key.
    records
        Statistics (routing loads, log-probabilities, drawn routes), keyed likewise; kept only if `recording`.
    recording
        Whether to keep records that nobody needs for the arithmetic.
    """

    padding_mask: Tensor | None = None
    token_kinds: Tensor | None = None
    task_ids: Tensor | None = None
    step: float | None = None
    timestep: Tensor | float | None = None
    values: dict[str, Any] = field(default_factory=dict)
    losses: dict[Key, Tensor] = field(default_factory=dict)
    left: dict[Key, Tensor] = field(default_factory=dict)
    makers: dict[Key, str] = field(default_factory=dict)
    records: dict[Key, Tensor] = field(default_factory=dict)
    routes: dict[Key, Tensor] = field(default_factory=dict)
    recording: bool = False

    def clear(self) -> None:
        """Forget what layers left behind; the inputs stay."""
        self.losses.clear()
        self.left.clear()
        self.makers.clear()
        self.records.clear()
        self.routes.clear()

    def by_row(self) -> bool:
        """Whether anything is given for each row."""
        return self.by_position() or self.task_ids is not None

    def by_position(self) -> bool:
        """Whether anything is given for each position, so that a pass has to know where it stands."""
        return self.padding_mask is not None or self.token_kinds is not None


def at_positions(values: Tensor, seen: Pass | None) -> Tensor:
    """Return what ``(batch, positions, ...)`` says of the positions of one pass.

    Positions beyond those that were given are real tokens of a mask, and continue the last value otherwise.
    """
    if seen is None or seen.length is None:
        return values
    start, stop, known = seen.offset, seen.offset + seen.length, values.shape[1]
    if stop <= known:
        return values[:, start:stop]
    given, last = values[:, start:], values[:, -1:]
    more = torch.ones_like(last) if values.dtype == torch.bool else last
    missing = seen.length - given.shape[1]
    return torch.cat([given, more.expand(-1, missing, *[-1] * (values.ndim - 2))], 1)
