"""One forward of one attention site while somebody watches: from the layer's product to the readers and back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from lorry.attention.call import AttentionCall, AttentionError, Product, edited, expanded
from lorry.attention.sites import AttentionSite

#: The forwards of watched modules that this thread or task is inside of, outermost first.
_OPEN: ContextVar[tuple[Frame, ...]] = ContextVar("lorry_attention_frames", default=())


class Listener(Protocol):
    """What a frame asks of a watch (`lorry.attention.watching.Watch`)."""

    want: frozenset[str]
    closed: bool
    replacing: set[str]
    counts: dict[str, int]

    def edit(self, call: AttentionCall) -> Any:
        """Return what stands in place of the layer's own inputs, or None."""

    def read(self, call: AttentionCall) -> Tensor | None:
        """Return what stands in place of the output, or None."""


class Frame:
    """One forward of one watched module, in one thread or task."""

    def __init__(
        self, module: nn.Module, site: AttentionSite | None, listeners: tuple[Listener, ...], again: bool
    ) -> None:
        self.module = module
        self.site = site
        self.listeners = listeners
        self.again = again
        self.parts = 0
        self._mode: TorchFunctionMode | None = None

    def open(self, mode: TorchFunctionMode | None) -> None:
        """Make this the frame of this thread or task, and let `mode` see torch's functions."""
        _OPEN.set((*_OPEN.get(), self))
        if mode is not None:
            mode.__enter__()
            self._mode = mode

    def close(self) -> None:
        """Leave; what an interrupted forward left open inside is left, too."""
        frames = _OPEN.get()
        if self not in frames:
            return
        position = frames.index(self)
        for frame in reversed(frames[position:]):
            if frame._mode is not None:
                frame._mode.__exit__(None, None, None)
                frame._mode = None
        _OPEN.set(frames[:position])

    def perform(
        self,
        product: Product,
        compute: Callable[[Product], Tensor],
        lift: Callable[[Tensor], Tensor],
        lower: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Product]:
        """Run one product with editors before it and readers after it.

        Parameters
        ----------
        product
            What the layer gave.
        compute
            Computes the product as the layer does, and in its layout.
        lift, lower
            From the layer's layout to ``(batch, heads, length, width)``, and back.

        Returns
        -------
        The output in the layer's layout (the layer's own tensor if nobody changed anything), and the product that
        was computed.
        """
        site = self.site
        assert site is not None
        part, self.parts = self.parts, self.parts + 1
        given = product
        for listener in self.listeners:
            changes = listener.edit(self._call(listener, given, part))
            if changes is not None:
                given = edited(given, changes, site.path)
        native: Tensor | None = None
        if given.output is None and given.replaced is not None:
            given.output = given.replaced.to(given.v.dtype) @ expanded(given.v, given.q.shape[1])
        elif given.output is None:
            native = compute(given)
            given.output = lift(native)
        calls, output = self._read(given, part)
        if native is None or output is not given.output:
            native = lower(output)
        self._hook(native, calls, lift, changed=given is not product or output is not given.output)
        return native, given

    def _call(self, listener: Listener, product: Product, part: int, output: Tensor | None = None) -> AttentionCall:
        assert self.site is not None
        return AttentionCall(
            self.site,
            product,
            listener.want,
            part=part,
            recomputation=self.again,
            training=self.module.training,
            output=output,
        )

    def _read(self, product: Product, part: int) -> tuple[list[tuple[Listener, AttentionCall]], Tensor]:
        """Call the readers; return their calls, and the output as the last of them left it."""
        assert self.site is not None and product.output is not None
        calls = []
        output = product.output
        for listener in self.listeners:
            call = self._call(listener, product, part, output)
            calls.append((listener, call))
            if not self.again:
                listener.counts[self.site.path] += 1
            with own_graph():
                answer = listener.read(call)
            if answer is None:
                continue
            if not isinstance(answer, Tensor) or answer.shape != output.shape:
                found = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
                raise AttentionError(
                    f"A reader returns None or an output of shape {tuple(output.shape)}, but the one at "
                    f"'{self.site.path}' returned {found}."
                )
            listener.replacing.add(self.site.path)
            # readers after this one see the new output; what earlier ones keep stays as they saw it
            output = answer
        return calls, output

    def _hook(
        self,
        output: Tensor,
        calls: list[tuple[Listener, AttentionCall]],
        lift: Callable[[Tensor], Tensor],
        *,
        changed: bool,
    ) -> None:
        """Let the gradient of the output reach those who want it, and guard changes in checkpointed segments."""
        if not output.requires_grad:
            return
        for listener, call in calls:
            if "gradient" in listener.want:
                output.register_hook(_keeper(call, lift))
        if changed and not self.again and _in_checkpoint():
            assert self.site is not None
            output.register_hook(_guard(self.listeners, self.site.path))


def own_graph() -> AbstractContextManager[object]:
    """Keep what is computed here out of a checkpointed segment around it.

    The segment is computed again without the readers; tensors that they save would be missing there.
    """
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def current_frame() -> Frame | None:
    """Return the innermost frame of this thread or task; None outside of every watched module."""
    frames = _OPEN.get()
    return frames[-1] if frames else None


def close_frames(listener: Listener) -> None:
    """Leave the frames that a forward ended by KeyboardInterrupt, which no hook sees, left open."""
    for frame in _OPEN.get():
        if listener in frame.listeners:
            frame.close()
            return


def _keeper(call: AttentionCall, lift: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    def keep(gradient: Tensor) -> None:
        call.receive(lift(gradient))

    return keep


def _guard(listeners: tuple[Listener, ...], path: str) -> Callable[[Tensor], None]:
    def refuse(_: Tensor) -> None:
        if any(listener.closed for listener in listeners):
            raise AttentionError(
                f"The attention at '{path}' was edited inside a checkpointed segment, which the backward pass computes "
                "again: run the backward pass before the watch is closed, or train without gradient checkpointing."
            )

    return refuse


def _in_checkpoint() -> bool:
    """Whether a segment runs here that torch.utils.checkpoint (not reentrant) computes again in the backward pass."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"
