"""A context around every call of a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def around_calls(
    module: nn.Module, enter: Callable[[tuple[Any, ...], dict[str, Any]], AbstractContextManager[Any]]
) -> Iterator[None]:
    """Let every call of a module run inside of a context of its own, outside of the hooks that the module has.

    Parameters
    ----------
    module
        Called by anybody while the context lasts.
    enter
        Arguments of a call, and those that are named -> its context; what it raises, the call raises.
    """
    open_calls: list[ExitStack] = []

    def before(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        call = ExitStack()
        call.enter_context(enter(args, options))
        open_calls.append(call)

    def after(*_: Any) -> None:
        if open_calls:
            open_calls.pop().close()

    handles = (
        module.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
        module.register_forward_hook(after, always_call=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        while open_calls:
            after()
