"""``/v1/embeddings``: the meaning of texts as vectors."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter

from lorry.core.errors import AdapterError, OptionError
from lorry.serving.embedding import batches, embed, pooled
from lorry.serving.http.bodies import EmbeddingBody
from lorry.serving.http.errors import ApiError
from lorry.serving.http.keys import Holder
from lorry.serving.http.state import WORKING, Caller, Serving, Shared
from lorry.serving.modes.mode import Mode
from lorry.serving.retrieval import token_vectors

router = APIRouter(dependencies=WORKING, tags=["embeddings"])
#: Tokens that go through the model together: requests that generate wait for no longer.
TOKENS_AT_ONCE = 2048


@router.post("/v1/embeddings")
async def embeddings(body: EmbeddingBody, serving: Shared, caller: Caller) -> dict[str, Any]:
    """Return a vector for each text: its states after the last layer, as a mean or of the last token alone."""
    if body.dimensions is not None:
        raise OptionError("Vectors of this base cannot be shortened; leave out dimensions.")
    mode = _mode(body, serving, caller)
    composition = serving.generating(body.model, caller) if mode is None else {}
    prompts = await asyncio.to_thread(_prompts, serving, body)
    count = sum(map(len, prompts))
    grant = caller.take(1, count)
    grant.used = count
    vectors: dict[int, Any] = {}
    try:
        for places in batches(prompts, TOKENS_AT_ONCE):
            chosen = [prompts[place] for place in places]

            def work(chosen: Sequence[Sequence[int]] = chosen) -> Any:
                how: Any = {"pooling": body.pooling, "normalize": body.normalize}
                if mode is None:
                    return embed(serving.engine, chosen, composition, **how).tolist()
                found, mask = token_vectors(serving.engine, chosen, mode)
                if body.return_multivector:
                    return [row[: len(each)].tolist() for row, each in zip(found, chosen, strict=True)]
                return pooled(found, mask, **how).tolist()

            vectors.update(zip(places, await serving.service.call(work), strict=True))
    except AdapterError as error:
        raise serving.unknown(body.model, caller) from error
    finally:
        grant.end()
    data = [{"object": "embedding", "index": place, **_entry(vectors[place], body)} for place in range(len(prompts))]
    usage = {"prompt_tokens": count, "total_tokens": count}
    return {"object": "list", "data": data, "model": body.model or serving.base, "pooling": body.pooling,
            "usage": usage}  # fmt: skip


def _mode(body: EmbeddingBody, serving: Serving, caller: Holder) -> Mode | None:
    """Return the mode that a request names, if it is one's name."""
    mode = serving.modes.get(body.model or "")
    if mode is not None:
        caller.check_model([mode.name])
    elif body.return_multivector:
        message = "Only a retriever (--mode of the server) has a vector for each token; leave out return_multivector."
        raise ApiError(400, message, param="return_multivector")
    return mode


def _prompts(serving: Serving, body: EmbeddingBody) -> list[tuple[int, ...]]:
    given = body.input
    several: Sequence[Any] = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    encode = serving.prompts.encode
    found = [encode(one, body.add_special_tokens) if isinstance(one, str) else tuple(one) for one in several]
    return checked(serving, found, "An input")


def checked(serving: Serving, found: list[tuple[int, ...]], what: str) -> list[tuple[int, ...]]:
    """Return prompts that go through the model as they are; raise for one that is empty, too long or unknown to it."""
    for tokens in found:
        if not tokens:
            raise OptionError(f"{what} must have at least one token.")
        if len(tokens) > serving.context:
            message = f"{what} has {len(tokens)} tokens; this model sees {serving.context} at most. Shorten it."
            raise ApiError(400, message, code="context_length_exceeded", param="input")
        beyond = next((token for token in tokens if token >= serving.vocabulary), None)
        if beyond is not None:
            raise OptionError(f"There is no token {beyond}; this base has {serving.vocabulary}.")
    return found


def _entry(vector: Any, body: EmbeddingBody) -> dict[str, Any]:
    """Return a text's vector, or its tokens' vectors under Jina's name for them."""
    if body.return_multivector:
        return {"embeddings": [_written(each, body.encoding_format) for each in vector]}
    return {"embedding": _written(vector, body.encoding_format)}


def _written(vector: list[float], how: str | None) -> list[float] | str:
    if how != "base64":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")
