"""One pass of one role: what it writes into the store, and attention over values that are kept in two parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.errors import AdapterError
from lorry.kernels.split_attention import split_attention
from lorry.serving.attention import attending, configs_of, register

from .store import Growing, LayerStore

#: The name under which transformers finds `_attend`.
ATTENTION = "lorry_split"


@dataclass(frozen=True)
class LayerPart:
    """One layer's part in a pass whose values are kept in two parts.

    Attributes
    ----------
    low
        Where the low-rank values go; None where the role's adapter does not change values.
    down, up
        The adapter's A ``(rank, in)`` and its B with its scale ``(out, rank)``.
    """

    low: Growing | None
    down: Tensor | None
    up: Tensor | None


#: The layers of the pass under way, by their number.
_CURRENT: ContextVar[Mapping[int, LayerPart] | None] = ContextVar("lorry_split_attention", default=None)


def attention_modules(model: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    """Return the decoder's attention layers by their number, each with its path.

    Raises
    ------
    AdapterError
        The model's attention has no projections q_proj, k_proj and v_proj.
    """
    found = {
        int(module.layer_idx): (path, module)
        for path, module in model.named_modules()
        if all(hasattr(module, name) for name in ("q_proj", "k_proj", "v_proj", "layer_idx"))
    }
    if not found:
        raise AdapterError(
            f"Roles share the cache of a decoder whose attention has q_proj, k_proj and v_proj, and "
            f"{type(model).__name__} has none; a fused projection cannot keep its values in two parts. Take the "
            "scheme 'non-shared' or 'full-shared'."
        )
    return dict(sorted(found.items()))


def cache_for(layers: list[LayerStore], start: int) -> Any:
    """Return a cache for transformers that appends to a store what it has not yet.

    Parameters
    ----------
    layers
        Keys and values of each layer.
    start
        Position of the first token that the pass runs; what the store holds from there on is not written again.
    """
    from transformers.cache_utils import Cache, CacheLayerMixin

    class Layer(CacheLayerMixin):  # type: ignore[misc]
        is_sliding = False

        def __init__(self, store: LayerStore) -> None:
            super().__init__()
            self.store = store
            self.is_initialized = True

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            """Nothing is to be made."""

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            known = self.store.keys.length - start
            if known == key_states.shape[-2]:
                return self.store.keys.value, self.store.values.value
            keys = self.store.keys.append(key_states[..., known:, :])
            return keys, self.store.values.append(value_states[..., known:, :])

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return start + query_length, 0

        def get_seq_length(self) -> int:
            return start

        def get_max_length(self) -> int:
            return -1

    return Cache(layers=[Layer(store) for store in layers])


@contextmanager
def split_values(model: nn.Module, parts: Mapping[int, LayerPart], start: int, known: int) -> Iterator[None]:
    """Let a pass keep the low-rank part of its values apart, and attend with both parts.

    Parameters
    ----------
    model
        A decoder of transformers.
    parts
        What each layer has to do with it.
    start
        Position of the first token of the pass.
    known
        How many of its tokens have keys and values in the store, so that they are not projected again.
    """
    register(ATTENTION, _attend, _mask)
    with ExitStack() as stack:
        stack.callback(_CURRENT.reset, _CURRENT.set(parts))
        for number, (_, module) in attention_modules(model).items():
            for name in ("k_proj", "v_proj"):
                part = parts[number] if name == "v_proj" else None
                _listen(stack, getattr(module, name), part, start, known)
        stack.enter_context(attending(configs_of(model), ATTENTION))
        yield


def _listen(stack: ExitStack, module: nn.Module, part: LayerPart | None, start: int, known: int) -> None:
    """Let a projection see only what is new, and the low-rank part of values be kept beside it."""

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        if part is not None and part.low is not None and part.down is not None:
            new = x[:, part.low.length - start :]
            if new.shape[1]:
                part.low.append(new @ part.down.to(x.dtype).T)
        return (x[:, known:], *args[1:])

    def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        # the cache does not look at what stands in the place of known tokens
        return torch.cat([output.new_zeros(output.shape[0], known, output.shape[2]), output], dim=1)

    stack.callback(module.register_forward_pre_hook(before).remove)
    if known:
        stack.callback(module.register_forward_hook(after).remove)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks for it, with the low-rank values of the pass under way."""
    parts = _CURRENT.get() or {}
    odd = [name for name in ("softcap", "s_aux", "sinks") if more.get(name) is not None]
    if odd:
        raise AdapterError(
            f"{type(module).__name__} attends with {odd[0]}, which attention over values in two parts does not know. "
            "Take the scheme 'non-shared' or 'full-shared'."
        )
    # another thread's pass, while a role's is under way, has no part in two-part values, and masks of its own
    part = parts.get(int(module.layer_idx), LayerPart(None, None, None))  # type: ignore[arg-type]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        attention_mask = torch.where(attention_mask, 0.0, float("-inf")).to(query.dtype)
    if part.low is None or part.up is None:
        low, up = value.new_zeros(1, value.shape[2], 1), value.new_zeros(value.shape[1] * value.shape[3], 1)
    else:
        low, up = part.low.value, part.up.to(value.dtype)
    found = split_attention(query, key, value, low, up, scale, attention_mask)
    return found.transpose(1, 2).contiguous(), None


def _mask(*args: Any, mask_function: Any = None, attention_mask: Tensor | None = None, **more: Any) -> Tensor | None:
    """Give a mask where there is more to it than that a token sees those before it."""
    from transformers.masking_utils import causal_mask_function, eager_mask

    if mask_function in (None, causal_mask_function) and attention_mask is None:
        return None
    chosen = {} if mask_function is None else {"mask_function": mask_function}
    found: Tensor = eager_mask(*args, attention_mask=attention_mask, **chosen, **more)
    return found
