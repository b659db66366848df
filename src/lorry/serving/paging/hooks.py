"""Where a model of transformers meets the pages: its attention interface and its cache."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.errors import OptionError
from lorry.serving.attention import attending, configs_of, register
from lorry.serving.paging.batch import Batch
from lorry.serving.paging.kernels import Attention, Scratch, attend
from lorry.serving.paging.shape import CacheShape, LayerShape
from lorry.serving.paging.store import Store

#: The name of the attention over pages in transformers' interface.
NAME = "lorry_paged"


class _Running(threading.local):
    """The pass that this thread runs, if it does."""

    cache: Any = None


_RUNNING = _Running()


class PagedCache:
    """What a model takes for its cache in one pass: it puts keys and values on their pages.

    Attributes
    ----------
    batch
        Where they belong.
    layer
        The layer that gave its keys and values last, whose attention comes next.
    """

    def __init__(self, store: Store, batch: Batch, scratch: Scratch | None = None) -> None:
        self.store = store
        self.batch = batch
        self._scratch = scratch
        self.layer: int | None = None

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the keys and values of the batch's tokens, and return them."""
        self.store.write(layer, keys, values, self.batch.pages, self.batch.offsets)
        self.layer = layer
        return keys, values

    def attend(self, q: Tensor, k: Tensor, v: Tensor, how: Attention) -> Tensor:
        """Return the attention's output of the layer that was updated last."""
        layer, self.layer = self.layer, None
        if layer is None:
            raise OptionError("A layer attends to keys and values that it did not put into the cache; see Engine.")
        keys, values = self.store.keys[layer], self.store.values[layer]
        return attend(q, k, v, keys, values, self.batch, how, self._scratch, self.store.listed)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: the tokens of a batch lie behind different numbers of others, and positions are given."""
        return 0


class _Recorder:
    """Takes the place of the cache in one small pass, and notes what each layer keeps of a token."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerShape] = {}
        self.kinds: set[tuple[torch.dtype, torch.device]] = set()
        self.attended = 0

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.layers[layer] = LayerShape(keys.shape[1], keys.shape[-1], values.shape[-1])
        self.kinds.add((keys.dtype, keys.device))
        return keys, values

    def attend(self, q: Tensor, k: Tensor, v: Tensor, how: Attention) -> Tensor:
        self.attended += 1
        return q.new_zeros(1, q.shape[2], q.shape[1], v.shape[-1])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend over pages in a pass of an engine; elsewhere as torch does."""
    if _RUNNING.cache is None:  # another thread runs the model meanwhile
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        rest = {**options, "sliding_window": sliding_window}
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **rest
        )
        return found
    how = Attention(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux)
    return _RUNNING.cache.attend(query, key, value, how), None


@cache
def _register() -> None:
    """Let transformers know the attention over pages."""
    from transformers.masking_utils import sdpa_mask

    register(NAME, _attention, sdpa_mask)


class PagedModel:
    """A model of transformers that runs over pages.

    Parameters
    ----------
    model
        A causal language model whose attention goes through transformers' interface.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._configs = configs_of(model)
        # a mask that is complete already is taken as it is, so that none is worked out
        self._mask = torch.zeros(1, 1, 1, 1, device=next(model.parameters()).device)

    def shape(self) -> CacheShape:
        """Return what the model keeps of a token, by one pass over one token.

        Raises
        ------
        OptionError
            Its attention does not go through the interface, or it keeps something else than keys and values.
        """
        seen = _Recorder()
        token = torch.zeros(1, 1, dtype=torch.long, device=self._mask.device)
        try:
            with torch.no_grad():
                self(seen, input_ids=token, position_ids=token)
        except AttributeError as error:
            raise self._refusal(f"its cache is asked for more ({error})") from error
        if not seen.layers or seen.attended != len(seen.layers):
            raise self._refusal(f"{len(seen.layers)} layers keep keys and values, {seen.attended} attend through it")
        if len(seen.kinds) > 1:
            raise self._refusal("its layers keep keys and values of several types or on several devices")
        return CacheShape(seen.layers, *next(iter(seen.kinds)))

    def __call__(self, cache: Any, **inputs: Any) -> Any:
        """Return what the model returns, with `cache` in the place of its cache and its attention."""
        with self._paged(cache):
            return self.model(**inputs, attention_mask=self._mask, past_key_values=cache, use_cache=True)

    @contextmanager
    def _paged(self, cache: Any) -> Iterator[None]:
        _register()
        with attending(self._configs, NAME):
            _RUNNING.cache = cache
            try:
                yield
            finally:
                _RUNNING.cache = None

    def _refusal(self, why: str) -> OptionError:
        return OptionError(
            f"{type(self.model).__name__} cannot be served over pages: expected a causal language model whose "
            f"attention goes through transformers' attention interface and cache, but {why}. Use another model, or "
            "model.generate."
        )
