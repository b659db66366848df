"""Attention of a decoder that looks both ways, for as long as a context lasts.

A flag on modules does nothing where the model passes a mask of its own, so that both are exchanged: the mask that is
built, and the function that attends, which kernels without a mask read the direction from. What another thread runs
meanwhile keeps its direction.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lorry.core.errors import OptionError

#: Which tokens a token sees: those before it, or all.
Direction = Literal["causal", "bidirectional"]

#: Before the name of the implementation that is in use otherwise.
_PREFIX = "lorry_direction_"
_DIRECTION: ContextVar[Direction] = ContextVar("lorry_direction", default="causal")
_lock = threading.Lock()
#: How many contexts hold the exchanged implementation of a model's configs, and which it was before.
_held: WeakKeyDictionary[nn.Module, tuple[int, list[tuple[Any, str]]]] = WeakKeyDictionary()


@contextmanager
def attention_direction(model: nn.Module, direction: Direction) -> Iterator[None]:
    """Let passes of this thread attend in a direction; at the end, also through an exception, all is as before.

    Layers with a sliding window keep its width, to both sides. Layers that are recurrent stay as they are.

    Parameters
    ----------
    model
        A decoder of transformers whose attention goes through its attention and mask interfaces.
    direction
        ``causal`` or ``bidirectional``.

    Raises
    ------
    OptionError
        Another direction, or a model without such an interface.
    """
    if direction not in get_args(Direction):
        raise OptionError(f"Attention is {' or '.join(get_args(Direction))}, found {direction!r}.")
    token = _DIRECTION.set(direction)
    try:
        if direction == "causal":  # as the model's own is, also inside of a context that is not
            yield
            return
        _exchange(model)
        try:
            yield
        finally:
            _restore(model)
    finally:
        _DIRECTION.reset(token)


@torch.no_grad()
def check_direction(model: nn.Module) -> None:
    """Raise `OptionError` unless bidirectional attention reaches the output: changes of the last token of two must
    be seen in the states of the first.
    """
    device = next(model.parameters()).device
    mask = torch.ones(2, 2, dtype=torch.long, device=device)
    pair = torch.tensor([[0, 0], [0, 1]], device=device)
    with attention_direction(model, "bidirectional"):
        found = model(pair, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states[-1][:, 0]
    if torch.equal(found[0], found[1]):
        raise OptionError(
            f"{type(model).__name__} attends causally whatever mask is asked for; expected a decoder whose attention "
            "goes through transformers' mask interface. Use a mode with causal attention."
        )


def _exchange(model: nn.Module) -> None:
    with _lock:
        count, before = _held.get(model, (0, []))
        if not count:
            configs = {id(c): c for c in (getattr(m, "config", None) for m in model.modules()) if c is not None}
            before = [(c, c._attn_implementation_internal) for c in configs.values() if _attends(c)]
            if not before:
                raise OptionError(
                    f"{type(model).__name__} has no attention implementation to exchange; expected a model of "
                    "transformers."
                )
            for config, name in before:
                _register(name)
                config._attn_implementation_internal = _PREFIX + name
        _held[model] = (count + 1, before)


def _restore(model: nn.Module) -> None:
    with _lock:
        count, before = _held[model]
        if count > 1:
            _held[model] = (count - 1, before)
            return
        del _held[model]
        for config, name in before:
            config._attn_implementation_internal = name


def _attends(config: Any) -> bool:
    return isinstance(getattr(config, "_attn_implementation_internal", None), str)


def _register(name: str) -> None:
    """Let transformers know an implementation that follows the direction of the thread, around one that it knows."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if _PREFIX + name in ALL_ATTENTION_FUNCTIONS and _PREFIX + name in ALL_MASK_ATTENTION_FUNCTIONS:
        return
    if name not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise OptionError(
            f"There is no mask for the attention implementation '{name}'; load the model with attn_implementation="
            "'sdpa' or 'eager'."
        )
    attend = None if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
    AttentionInterface.register(_PREFIX + name, _attention(attend))
    AttentionMaskInterface.register(_PREFIX + name, _mask(ALL_MASK_ATTENTION_FUNCTIONS[name]))


def _attention(own: Callable[..., Any] | None) -> Callable[..., Any]:
    """Return attention in the direction of the thread; `own` is None for each model's own eager function."""

    def attend(module: nn.Module, *args: Any, **options: Any) -> Any:
        function = own if own is not None else _eager(module)
        if _DIRECTION.get() == "bidirectional" and own is not None:
            options["is_causal"] = False
        return function(module, *args, **options)

    return attend


def _eager(module: nn.Module) -> Callable[..., Any]:
    for cls in type(module).__mro__:
        found: Callable[..., Any] | None = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    raise OptionError(
        f"{type(module).__name__} has no eager attention; load the model with attn_implementation='sdpa'."
    )


def _mask(own: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    def build(*args: Any, **options: Any) -> Tensor | None:
        if _DIRECTION.get() == "causal":
            return own(*args, **options)
        from transformers.masking_utils import bidirectional_mask_function, sliding_window_bidirectional_mask_function

        window = options.get("local_size")
        options["mask_function"] = (
            bidirectional_mask_function if window is None else sliding_window_bidirectional_mask_function(window)
        )
        return own(*args, **{**options, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": True})

    return build
