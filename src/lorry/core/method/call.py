"""One call of one layer, as a method sees it, and the context of the forward pass around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorry.core.sites.site import Site
from lorry.kernels.dropout import dropout


@dataclass
class Context:
    """What a forward pass knows besides its input, and where layers leave what they want to tell.

    Attributes
    ----------
    padding_mask
        Boolean ``(batch, length)``, True at real tokens; None if all are real.
    token_kinds
        Integers ``(batch, length)``: the modality or role of each token.
    task_ids
        Integers ``(batch,)``.
    timestep
        Diffusion time of each row, ``(batch,)`` or a scalar.
    values
        Anything else that a method reads, by name.
    losses
        Auxiliary losses left by layers in this pass: ``(adapter, place, name) -> scalar tensor``, the place
        being a site path or what several sites share.
    left
        Other tensors with a gradient that a loss is made of after the pass (log-probabilities, pooled loads),
        keyed likewise.
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
    timestep: Tensor | None = None
    values: dict[str, Any] = field(default_factory=dict)
    losses: dict[tuple[str, str, str], Tensor] = field(default_factory=dict)
    left: dict[tuple[str, str, str], Tensor] = field(default_factory=dict)
    makers: dict[tuple[str, str, str], str] = field(default_factory=dict)
    records: dict[tuple[str, str, str], Tensor] = field(default_factory=dict)
    routes: dict[tuple[str, str, str], Tensor] = field(default_factory=dict)
    recording: bool = False

    def clear(self) -> None:
        """Forget what layers left behind; the inputs stay."""
        self.losses.clear()
        self.left.clear()
        self.makers.clear()
        self.records.clear()
        self.routes.clear()


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
        Indices into the batch of the rows in `x`; None if these are all rows.
    training
        Whether the layer is in training mode (dropout, noise, load counts).
    seed
        Source of this call's randomness; the same in a recomputation of a checkpointed segment.
    context
        The forward pass around the call.
    batch
        Length of the layer's whole batch, of which `x` may be some rows.
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
        """Restrict a per-row tensor of the context to the rows of this call; layers may see each row several
        times (beams).
        """
        if values is None:
            return None
        values = values.to(self.output.device)
        if self.batch > len(values) and self.batch % len(values) == 0:
            values = values.repeat_interleave(self.batch // len(values), 0)
        return values if self.rows is None else values[self.rows]

    def of_tokens(self, values: Tensor | None) -> Tensor | None:
        """Restrict a per-token tensor ``(batch, length, ...)`` of the context to the tokens of this call, in
        the layout of its input.

        Returns None where the layer does not see these tokens (another length: a vision tower, a cached step;
        a convolution).
        """
        if values is None or self.site.kind.name == "conv":
            return None
        if self.x.ndim == 2 and self.x.is_floating_point() and self.batch == values.shape[0] * values.shape[1]:
            return self.of_rows(values.flatten(0, 1))
        fits = self.x.ndim >= 2 and self.x.shape[1] == values.shape[1] and self.batch % len(values) == 0
        return self.of_rows(values) if fits else None

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
