"""Retrieval beside generation on one engine: token vectors in a mode of its model, and documents ordered by them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from lorry.core.errors import OptionError
from lorry.serving.embedding import padded
from lorry.serving.engine import Engine
from lorry.serving.modes.direction import check_direction
from lorry.serving.modes.folder import load_mode
from lorry.serving.modes.maxsim import maxsim
from lorry.serving.modes.mode import Mode, switched


def serve_mode(engine: Engine, name: str, path: Path) -> Mode:
    """Load a retriever's adapter under a name, and return its mode, ready for the engine's model.

    Raises
    ------
    CheckpointError, FingerprintError, AdapterError, SiteError
        As for `lorry.load`, or the folder holds no head; nothing is served under the name then.
    OptionError
        The head is of another width than the model, or the model's attention cannot be turned.
    """
    mode = load_mode(path, name)
    assert mode.head is not None
    engine.load(name, path)
    try:
        with engine.applied(mode.composition) as model:
            hidden, wanted = model.config.get_text_config().hidden_size, mode.head.in_features  # type: ignore[operator, union-attr]
            if hidden != wanted:
                raise OptionError(f"The head of '{name}' takes states of {wanted} numbers, the base has {hidden}.")
            if mode.attention == "bidirectional":
                check_direction(model)
            mode.head.to(next(model.parameters()).device)
    except BaseException:
        engine.unload(name)
        raise
    return mode


@torch.no_grad()
def token_vectors(engine: Engine, prompts: Sequence[Sequence[int]], mode: Mode) -> tuple[Tensor, Tensor]:
    """Return a vector of length 1 for each token of each prompt; steps of the engine wait meanwhile.

    Parameters
    ----------
    engine
        Whose model is switched to the mode.
    prompts
        Tokens, at least one in each.
    mode
        With a head.

    Returns
    -------
    tuple
        Vectors ``(prompts, tokens, width)`` in float32, zero beyond a prompt's end, and the mask ``(prompts, tokens)``.

    Raises
    ------
    AdapterError
        The mode's adapter is not served.
    """
    with engine.applied(mode.composition) as model, switched(model, mode, nullcontext()) as found:
        tokens, mask = padded(prompts, next(model.parameters()).device)
        return found.vectors(tokens, mask).float(), mask


@torch.no_grad()
def relevance(engine: Engine, query: Tensor, documents: Sequence[Sequence[int]], mode: Mode) -> list[float]:
    """Return how well documents answer a query: the mean over its tokens of the greatest cosine, within [-1, 1].

    Parameters
    ----------
    engine, mode
        As for `token_vectors`.
    query
        Vectors ``(1, tokens, width)``.
    documents
        Tokens, at least one in each.
    """
    vectors, mask = token_vectors(engine, documents, mode)
    scores: list[float] = (maxsim(query, vectors, None, mask)[0] / query.shape[1]).tolist()
    return scores
