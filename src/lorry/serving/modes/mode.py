"""A mode: adapter, direction of attention, output head and cache of a model, which are switched together or not at all.

The four belong to the passes inside of a context and never to the weights: the adapter is at work or not, the mask is
built one way or the other, and the head of a mode lies beside the model's own, which nothing replaces. So what a mode
leaves behind is the model as it was, bit for bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lorry.core.errors import OptionError
from lorry.serving.composed import composed
from lorry.serving.modes.direction import Direction, attention_direction


@dataclass(frozen=True)
class Mode:
    """How a model computes.

    Attributes
    ----------
    name
        Of the mode.
    adapter
        The adapter that is at work, or several with their weights; None for the bare base.
    attention
        Whether a token sees those before it, or all.
    head
        What makes token vectors of the last states ``(..., hidden)``; None for the model's own output head.
    cache
        Whether keys and values may be kept from pass to pass.

    Raises
    ------
    OptionError
        A cache with bidirectional attention, whose states change with every token that comes.
    """

    name: str
    adapter: str | Mapping[str, float] | None = None
    attention: Direction = "causal"
    head: nn.Module | None = None
    cache: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.cache and self.attention == "bidirectional":
            raise OptionError(
                f"Mode '{self.name}' attends both ways, so what it kept would be wrong with the next token; give "
                "cache=False."
            )

    @property
    def composition(self) -> dict[str, float]:
        """The adapters with their weights."""
        return {self.adapter: 1.0} if isinstance(self.adapter, str) else dict(self.adapter or {})


#: The untouched base, as it generates.
GENERATION = Mode("generation")

_CURRENT: ContextVar[Mode | None] = ContextVar("lorry_mode", default=None)
#: In which mode a cache was made.
_made_in: WeakKeyDictionary[Any, tuple[str, tuple[tuple[str, float], ...]]] = WeakKeyDictionary()


class ModePass:
    """Passes of a model in a mode.

    Parameters
    ----------
    model, mode
        Which.
    """

    def __init__(self, model: nn.Module, mode: Mode) -> None:
        self.model, self.mode = model, mode

    def states(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the states after the last layer.

        Parameters
        ----------
        tokens
            ``(rows, tokens)``.
        mask
            Where there is a token, of the same shape; None for everywhere.

        Returns
        -------
        Tensor
            ``(rows, tokens, hidden)``.
        """
        return last_states(self.model, tokens, torch.ones_like(tokens) if mask is None else mask)

    def vectors(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return a vector of length 1 for each token, and zeros where there is none: ``m_t Pi h_t / ||Pi h_t||``.

        Parameters
        ----------
        tokens, mask
            As for `states`.

        Returns
        -------
        Tensor
            ``(rows, tokens, width of the head)``.

        Raises
        ------
        OptionError
            The mode has no head of its own.
        """
        head = self.mode.head
        if head is None:
            raise OptionError(
                f"Mode '{self.mode.name}' has no head that makes vectors of tokens; give the mode one (head=), or take "
                "states."
            )
        states = self.states(tokens, mask)
        kind = next((parameter.dtype for parameter in head.parameters()), states.dtype)
        found: Tensor = nn.functional.normalize(head(states.to(kind)), dim=-1)
        return found if mask is None else found * mask[..., None]

    def __call__(self, tokens: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
        """Return what the mode puts out: vectors by its own head, or else what the model returns."""
        if self.mode.head is not None:
            return self.vectors(tokens, mask)
        return self.model(tokens, attention_mask=mask, **options)


def last_states(model: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    """Return the states after the last layer, ``(rows, tokens, hidden)``, of a pass that keeps nothing."""
    fewer = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(type(model).forward).parameters else {}
    found: Tensor = model(
        tokens, attention_mask=mask, output_hidden_states=True, use_cache=False, **fewer
    ).hidden_states[-1]
    return found


@contextmanager
def switched(model: nn.Module, mode: Mode, applied: AbstractContextManager[object] | None = None) -> Iterator[ModePass]:
    """Switch a model to a mode for this thread; at the end, also through an exception, all four are as before.

    Modes may lie in each other. A cache that another mode has made is refused, and a mode without a cache makes none.

    Parameters
    ----------
    model
        A causal language model of transformers.
    mode
        Which.
    applied
        In which its adapters apply, where they do not lie on the model under the mode's names for them.

    Raises
    ------
    AdapterError
        An adapter that the model does not have.
    OptionError
        The model's attention cannot be turned.
    """
    with ExitStack() as scope:
        scope.enter_context(applied if applied is not None else composed(model, mode.composition))
        scope.enter_context(attention_direction(model, mode.attention))
        token = _CURRENT.set(mode)
        scope.callback(_CURRENT.reset, token)
        scope.callback(model.register_forward_pre_hook(_before, with_kwargs=True).remove)
        scope.callback(model.register_forward_hook(_after).remove)
        yield ModePass(model, mode)


def _before(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Refuse a cache of another mode, and let none be made where there is to be none."""
    mode = _CURRENT.get()
    if mode is None:  # another thread's pass
        return None
    given = kwargs.get("past_key_values")
    if not mode.cache:
        if given is not None:
            raise OptionError(
                f"Mode '{mode.name}' computes without a cache, but was given one; leave past_key_values out."
            )
        return args, {**kwargs, "use_cache": False}
    if given is not None:
        made = _made_in.get(given)
        if made is not None and made != _kind(mode):
            raise OptionError(
                f"The cache that was given was made in mode '{made[0]}', and its keys and values are not those of mode "
                f"'{mode.name}'. Compute the prompt again in this mode."
            )
    return None


def _after(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Note in which mode a cache was made."""
    mode, cache = _CURRENT.get(), getattr(output, "past_key_values", None)
    if mode is not None and mode.cache and cache is not None and cache not in _made_in:
        _made_in[cache] = _kind(mode)


def _kind(mode: Mode) -> tuple[str, tuple[tuple[str, float], ...]]:
    return mode.name, tuple(sorted(mode.composition.items()))
