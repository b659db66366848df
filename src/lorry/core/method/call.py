"""One call of one layer, as a method sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorry.core.errors import AdapterError
from lorry.core.method.context import Context, at_positions
from lorry.core.method.layout import BatchLayout, Pass
from lorry.core.sites.site import Site
from lorry.kernels.dropout import dropout


def recomputing() -> bool:
    """Whether this forward is the recomputation of a checkpointed one, inside a backward pass."""
    return not torch.compiler.is_compiling() and bool(torch._C._current_graph_task_id() != -1)


@dataclass
class Call:
    """One call of one layer with one adapter.

    Attributes
    ----------
    site
        Where.
    x
        The layer's input, restricted to the rows that use the adapter.
    output
        The frozen layer's output for these rows.
    adapter
        The adapter's name.
    rows
        Indices of what is in `x` among the layer's entries (or tokens); None if that is all.
    training
        Whether the layer is in training mode (dropout, noise, load counts).
    seed
        Source of this call's randomness; the same in a recomputation of a checkpointed segment.
    context
        The forward pass around the call.
    batch
        Number of the layer's entries, or of its tokens, of which `x` may be some.
    tokens
        Whether `rows` are tokens, ``x`` being ``(tokens, in)``, and not entries of the first dimension.
    layout
        How the batch lies, where rows have compositions of their own.
    seen
        What the root was given in this pass, where the pass went through the root.
    update_of
        Gives the update of another adapter of the model for the same input, by name.
    """

    site: Site
    x: Tensor
    output: Tensor
    adapter: str
    rows: Tensor | None
    training: bool
    seed: Callable[[], int]
    context: Context
    batch: int = 0
    tokens: bool = False
    layout: BatchLayout | None = None
    seen: Pass | None = None
    update_of: Callable[[str], Tensor] | None = None
    owed: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def dropout(self, p: float) -> Tensor:
        """Return the input with a fraction `p` of its elements dropped, in training only.

        Rows that are draws of one row (draw after draw; ``draws`` in the context's values) drop the same elements.
        """
        if not (p > 0 and self.training and self.x.is_floating_point()):
            return self.x
        return dropout(self.x, p, self.seed(), self.context.values.get("draws", {}).get(self.adapter, 1))

    def project(self, weight: Tensor, *, detach: bool = False) -> Tensor:
        """Return the layer's input under a projection of its own, a router ``(experts, in)``, as logits
        ``(..., experts)`` in float32 or better.

        With `detach`, no gradient reaches the input.
        """
        x = self.x.detach() if detach else self.x
        logits = self.site.kind.down(self.site, x, weight.to(x.dtype if x.is_floating_point() else self.output.dtype))
        # choices made in half precision are often ties
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def of_rows(self, values: Tensor | None) -> Tensor | None:
        """Return values given for each row ``(rows, ...)`` for what is in `x`; layers may see each row several times.

        Raises
        ------
        AdapterError
            The layer's batch cannot be made of as many rows, or the layout of their copies was not stated.
        """
        if values is None:
            return None
        spread = self._spread(values.to(self.output.device), self.batch)
        if spread is None:
            raise AdapterError(
                f"'{self.site.path}' sees a batch of {self.batch}, but lorry.context was given values for "
                f"{len(values)} rows. Give one for each row of the batch; where rows are seen several times, state the "
                "layout with lorry.rows(..., repeat=... or tile=...)."
            )
        return self._chosen(spread)

    def of_tokens(self, values: Tensor | None) -> Tensor | None:
        """Return values given for each position ``(rows, positions, ...)`` for the tokens in `x`, in its layout.

        Returns None where the layer does not see these tokens (another length: a vision tower; a convolution).
        """
        if values is None or not self.site.kind.positionwise:
            return None
        values = at_positions(values.to(self.output.device), self.seen)
        length = values.shape[1]
        if self.tokens or (self.x.ndim == 2 and self.x.is_floating_point()):
            entries, rest = divmod(self.batch, length)
            spread = None if rest else self._spread(values, entries)
            return None if spread is None else self._chosen(spread.flatten(0, 1))
        if self.x.ndim < 2 or self.x.shape[1] != length:
            return None
        spread = self._spread(values, self.batch)
        return None if spread is None else self._chosen(spread)

    def _chosen(self, values: Tensor) -> Tensor:
        return values if self.rows is None else values[self.rows]

    def _spread(self, values: Tensor, entries: int) -> Tensor | None:
        """Return values of each row for the entries of the layer's batch, or None if that is not one way only."""
        given, layout = len(values), self.layout
        if given == entries:
            return values
        if layout is not None and given == layout.rows:
            if layout.lengths is not None and entries == layout.entries:
                return values.repeat_interleave(torch.tensor(layout.lengths, device=values.device), 0)
            per, rest = divmod(entries, layout.entries)
            return None if rest or not per else layout.spread_values(values, per)
        per, rest = divmod(entries, given)
        one_way = self.seen is None or self.seen.batch == given
        return values.repeat_interleave(per, 0) if per and not rest and one_way else None

    def add_loss(self, name: str, value: Tensor, at: str | None = None) -> None:
        """Leave an auxiliary loss for the training engine.

        Parameters
        ----------
        name
            What it is.
        value
            A scalar, weighted.
        at
            What several sites share (a router, the whole model); the last one of them that leaves the loss
            counts. The site itself if not given.
        """
        self._keep(self.context.losses, name, value, at)

    def leave(self, name: str, value: Tensor, at: str | None = None) -> None:
        """Leave a tensor with its gradient, of which a loss is made after the pass; see
        `lorry.core.method.base.Method.joint_loss`.
        """
        self._keep(self.context.left, name, value, at)

    def _keep(self, kept: dict[tuple[str, str, str], Tensor], name: str, value: Tensor, at: str | None) -> None:
        """Keep a value of the first computation.

        Reentrant checkpointing computes first without a graph. What is kept then is a leaf; the backward pass
        of the loss fills its gradient before it reaches the segment, and the recomputation hands that
        gradient on (`settle`).
        """
        key = (self.adapter, at or self.site.path, name)
        if not recomputing():
            hidden = self.training and not torch.is_grad_enabled()
            kept[key] = value.detach().requires_grad_() if hidden else value
            self.context.makers[key] = self.site.path
        elif self.context.makers.get(key) == self.site.path and value.requires_grad:
            first = kept.get(key)
            if first is not None and first.is_leaf and first.grad is not None:
                self.owed.append((value, first.grad))

    def settle(self, output: Tensor) -> Tensor:
        """Return `output` with what recomputed losses are owed tied to its backward pass."""
        for value, gradient in self.owed:
            output = _Owed.apply(output, value, gradient)  # type: ignore[no-untyped-call]
        self.owed.clear()
        return output

    def record(self, name: str, value: Callable[[], Tensor], always: bool = False) -> None:
        """Leave a statistic; it is computed only if somebody records, or `always` (state outside the
        gradient).
        """
        if (always or self.context.recording) and not recomputing():
            with torch.no_grad():
                self.context.records[self.adapter, self.site.path, name] = value()

    def route(self, name: str, draw: Callable[[], Tensor]) -> Tensor:
        """Draw a discrete route, or replay it when the call is recomputed in a backward pass."""
        key = (self.adapter, self.site.path, name)
        if recomputing() and key in self.context.routes:
            return self.context.routes[key]
        self.context.routes[key] = drawn = draw()
        return drawn


class _Owed(torch.autograd.Function):
    """The first argument unchanged; in the backward pass the second one receives a gradient known before."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], ctx.gradient, None
