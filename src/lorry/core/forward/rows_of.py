"""Rows of a batch apart and together again, through whatever a module takes and returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.errors import AdapterError
from lorry.core.sites.site import Site


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the first tensor among the arguments of a module."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise AdapterError("An adapted block was called without any tensor.")


def batch_dim(site: Site) -> int:
    """Return the dimension that counts rows: attention modules may have the length first."""
    if isinstance(site.owner, nn.MultiheadAttention):
        return 0 if site.owner.batch_first else 1
    return 0


def select(values: Any, rows: Tensor, dim: int, total: int) -> Any:
    """Restrict every tensor that has `total` entries in its batch dimension to `rows`; others pass as they are."""
    if isinstance(values, Tensor):
        if values.ndim > 2 and values.shape[dim] == total:
            return values.index_select(dim, rows)
        if values.ndim and values.shape[0] == total:
            return values.index_select(0, rows)
        return values
    if isinstance(values, tuple | list):
        return type(values)(select(v, rows, dim, total) for v in values)
    if isinstance(values, dict):
        return {k: select(v, rows, dim, total) for k, v in values.items()}
    return values


def select_attention(
    owner: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Tensor, dim: int, total: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Restrict the inputs of an attention module to `rows`; a mask ``(length, length)`` has no rows even if its size
    is `total`.
    """
    names = (
        "query",
        "key",
        "value",
        "key_padding_mask",
        "need_weights",
        "attn_mask",
        "average_attn_weights",
        "is_causal",
    )
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    for name in ("query", "key", "value"):
        given[name] = given[name].index_select(dim, rows)
    if given.get("key_padding_mask") is not None:
        given["key_padding_mask"] = given["key_padding_mask"].index_select(0, rows)
    mask = given.get("attn_mask")
    if mask is not None and mask.ndim == 3:
        heads = mask.view(total, owner.num_heads, *mask.shape[1:])
        given["attn_mask"] = heads.index_select(0, rows).flatten(0, 1)
    return (), given


def join(outputs: list[Any], back: Tensor, dim: int) -> Any:
    """Put the outputs of groups of rows together in the order of the batch."""
    first = outputs[0]
    if isinstance(first, Tensor):
        along = dim if first.ndim > 2 else 0
        return torch.cat(outputs, dim=along).index_select(along, back)
    if isinstance(first, tuple | list):
        # the second result of an attention module is (rows, ...) whatever the layout of the first
        return type(first)(
            join(list(group), back, dim if i == 0 else 0) for i, group in enumerate(zip(*outputs, strict=True))
        )
    if isinstance(first, dict):  # model outputs are ordered dictionaries
        return type(first)(**{key: join([o[key] for o in outputs], back, dim) for key in first})
    if first is None:
        return None
    raise AdapterError(
        f"A module whose rows use different adapters returned a {type(first).__name__}, which cannot be put together "
        "from groups of rows. Use one adapter for the whole batch there."
    )


def blend(base: Any, result: Any, weight: float | Tensor) -> Any:
    """Return ``base + weight · (result - base)``, through whatever a module returns."""
    if isinstance(result, Tensor):
        return base + weight * (result - base)
    if isinstance(result, tuple):
        return tuple(blend(b, r, weight) for b, r in zip(base, result, strict=True))
    if isinstance(result, dict):
        return type(result)(**{key: blend(base[key], result[key], weight) for key in result})
    return result
