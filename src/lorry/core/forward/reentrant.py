"""Reentrant checkpointing over a frozen base: a segment hands gradients on only if one of its inputs requires one.

Nothing before the first adapter does where the base is frozen, so the adapters inside would get no gradient. While
such checkpointing is on, what the modules before the segments give begins a graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorry.core.method.call import recomputing

_FLAG, _FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"


class Openings:
    """Hooks by which graphs begin before checkpointed segments.

    Parameters
    ----------
    root
        The model; transformers and diffusers mark its modules.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._marked = [m for m in root.modules() if hasattr(m, _FLAG)]
        self._handles: list[RemovableHandle] = []

    def follow(self) -> None:
        """Put the hooks where reentrant checkpointing is on, and take them away where it no longer is."""
        on = any(_reentrant(module) for module in self._marked)
        if on and not self._handles:
            self._handles = [m.register_forward_hook(_begin) for m in _leaves(self._root)]
        elif not on:
            self.remove()

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _reentrant(module: nn.Module) -> bool:
    if not getattr(module, _FLAG, False):
        return False
    options = getattr(getattr(module, _FUNCTION, None), "keywords", None)
    # a function that is no partial is one of the library's own, which is not reentrant
    return options is not None and options.get("use_reentrant", True) is not False


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules without children that lie before or between segments; layers that are segments say so in their
    class.
    """
    children = list(module.children())
    if not children:
        yield module
    for child in children:
        if not hasattr(type(child), _FLAG):
            yield from _leaves(child)


def _begin(module: nn.Module, args: Any, output: Any) -> Any:
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.requires_grad:
        return None
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or recomputing():
        return None
    return _Begun.apply(torch.empty(0, requires_grad=True), output)  # type: ignore[no-untyped-call]


class _Begun(torch.autograd.Function):
    """The second argument as it is, as the result of an operation; a leaf could not be changed in place later."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, output: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None
