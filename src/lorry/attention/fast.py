"""Attention by factors in a model of small heads, for as long as it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lorry.attention.call import AttentionCall, AttentionError
from lorry.attention.factored import Approximation, fast_attention
from lorry.attention.watching import Watch, watch


def fast(
    model: nn.Module,
    how: Approximation | None = None,
    *,
    targets: str | Sequence[str] | None = None,
    kinds: str | Iterable[str] | None = None,
) -> Watch:
    """Let a model attend by low-rank factors, forward and backward, in time linear in the length.

    ``with fast(model): model(**batch).loss.backward()``. The function is approximated to the tolerance of `how`, and so
    are its gradients; a head whose logits are too large for it is refused, so nothing degrades in silence. It pays in
    heads of width 4 or 8 over thousands of tokens; at usual widths exact kernels are faster.

    Parameters
    ----------
    model
        The model, with whatever adapters are active on it.
    how
        The approximation.
    targets, kinds
        As for `lorry.attention.watch`.

    Returns
    -------
    A context manager.

    Raises
    ------
    SiteError
        Nothing matches.
    AttentionError
        In the forward pass: logits too large, a mask that is neither causal nor padding of keys, a soft cap, sinks, a
        bias of positions, or dropout.
    """

    def attend(call: AttentionCall) -> dict[str, Tensor]:
        causal, seen = _masks(call)
        k, v = call.expand(call.k), call.expand(call.v)
        try:
            found = fast_attention(call.q, k, v, scaling=call.scaling, causal=causal, seen=seen, how=how)
        except AttentionError as error:
            raise AttentionError(f"At '{call.site.path}': {error}") from error
        return {"output": found}

    return watch(model, editor=attend, targets=targets, kinds=kinds, want=("q", "k", "v"))


def _masks(call: AttentionCall) -> tuple[bool, Tensor | None]:
    """Return whether a call is causal, and which keys are no padding, ``(batch, 1, keys)``."""
    if call.extras:
        raise AttentionError(
            f"The attention at '{call.site.path}' has {', '.join(call.extras)}, which factors cannot follow; leave the "
            "site out through targets=, or train without dropout of attention."
        )
    if call.mask is None:
        return call.causal and call.q.shape[-2] > 1, None
    mask = call.mask if call.mask.dtype == torch.bool else call.mask > torch.finfo(call.mask.dtype).min / 2
    length, keys = call.q.shape[-2], call.k.shape[-2]
    mask = mask[..., :keys].expand(*mask.shape[:-2], length, keys)
    # the last query sees every key that is there, causal or not
    seen = mask[..., -1, :]
    below = torch.ones(length, keys, dtype=torch.bool, device=mask.device).tril()
    for causal in (call.causal, True):
        expected = seen.unsqueeze(-2) & below if causal else seen.unsqueeze(-2).expand_as(mask)
        # what padding sees is nobody's business
        rows = seen if length == keys else torch.ones_like(mask[..., 0])
        if bool(((mask == expected) | ~rows.unsqueeze(-1)).all()):
            return causal and length > 1, None if bool(seen.all()) else seen
    raise AttentionError(
        f"The mask at '{call.site.path}' is neither causal nor padding of keys (a window, packed rows), which factors "
        "cannot follow; leave the site out through targets=."
    )
