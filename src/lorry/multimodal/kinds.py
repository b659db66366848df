"""Which tokens of a vision-language model are pictures, told to the adapters for a pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.errors import LorryError
from lorry.core.life import api
from lorry.core.method.context import Context

#: Kinds of tokens: everything that is no picture, padding too, is text.
TEXT, VISION = 0, 1
#: Where configurations of transformers keep the ids of placeholders.
_PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id")


def token_kinds(model: nn.Module, tokens: Tensor, more: int = 0) -> Tensor:
    """Return the kind of each token: 1 where a picture stands, 0 elsewhere.

    Parameters
    ----------
    model
        A vision-language model of transformers, whose configuration names its placeholders.
    tokens
        ``(rows, tokens)``, with a placeholder for each token of a picture, padded on either side.
    more
        Vision tokens that are put in front of each row beside them (a ladder's).

    Returns
    -------
    Tensor
        int64 ``(rows, more + tokens)``.

    Raises
    ------
    LorryError
        The configuration names no placeholder.
    """
    config: Any = getattr(model, "config", None)
    ids = [getattr(config, name) for name in _PLACEHOLDERS if getattr(config, name, None) is not None]
    if not ids:
        raise LorryError(
            f"The configuration of {type(model).__name__} names no placeholder of pictures "
            f"({', '.join(_PLACEHOLDERS)}): tell the kinds yourself with lorry.context(model, token_kinds=...)."
        )
    found = torch.isin(tokens, torch.tensor(ids, device=tokens.device)).long()
    return torch.cat([found.new_full((len(found), more), VISION), found], 1) if more else found


@contextmanager
def seeing(model: nn.Module, tokens: Tensor, **facts: Any) -> Iterator[Context]:
    """Tell adapters of a model, while the context lasts, which tokens of its passes are pictures.

    Tokens that are generated later are text. Parameters as for `token_kinds`; `facts` go to `lorry.context`.
    """
    with api.context(model, token_kinds=token_kinds(model, tokens), **facts) as told:
        yield told
