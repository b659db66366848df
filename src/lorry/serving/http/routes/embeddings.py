"""``/v1/embeddings``: the meaning of texts as vectors."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter

from lorry.core.errors import AdapterError, OptionError
from lorry.serving.embedding import batches, embed
from lorry.serving.http.bodies import EmbeddingBody
from lorry.serving.http.errors import ApiError
from lorry.serving.http.state import WORKING, Caller, Serving, Shared

router = APIRouter(dependencies=WORKING, tags=["embeddings"])
#: Tokens that go through the model together: requests that generate wait for no longer.
TOKENS_AT_ONCE = 2048


@router.post("/v1/embeddings")
async def embeddings(body: EmbeddingBody, serving: Shared, caller: Caller) -> dict[str, Any]:
    """Return a vector for each text: its states after the last layer, as a mean or of the last token alone."""
    if body.dimensions is not None:
        raise OptionError("Vectors of this base cannot be shortened; leave out dimensions.")
    composition = serving.composition(body.model, caller)
    prompts = await asyncio.to_thread(_prompts, serving, body)
    count = sum(map(len, prompts))
    grant = caller.take(1, count)
    grant.used = count
    vectors: dict[int, list[float]] = {}
    try:
        for places in batches(prompts, TOKENS_AT_ONCE):
            chosen = [prompts[place] for place in places]

            def work(chosen: Sequence[Sequence[int]] = chosen) -> Any:
                how: Any = {"pooling": body.pooling, "normalize": body.normalize}
                return embed(serving.engine, chosen, composition, **how).tolist()

            vectors.update(zip(places, await serving.service.call(work), strict=True))
    except AdapterError as error:
        raise serving.unknown(body.model, caller) from error
    finally:
        grant.end()
    data = [
        {"object": "embedding", "index": place, "embedding": _written(vectors[place], body.encoding_format)}
        for place in range(len(prompts))
    ]
    usage = {"prompt_tokens": count, "total_tokens": count}
    return {"object": "list", "data": data, "model": body.model or serving.base, "pooling": body.pooling,
            "usage": usage}  # fmt: skip


def _prompts(serving: Serving, body: EmbeddingBody) -> list[tuple[int, ...]]:
    given = body.input
    several: Sequence[Any] = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    encode = serving.prompts.encode
    found = [encode(one, body.add_special_tokens) if isinstance(one, str) else tuple(one) for one in several]
    for tokens in found:
        if not tokens:
            raise OptionError("An input must have at least one token.")
        if len(tokens) > serving.context:
            message = f"An input has {len(tokens)} tokens; this model sees {serving.context} at most. Shorten it."
            raise ApiError(400, message, code="context_length_exceeded", param="input")
        beyond = next((token for token in tokens if token >= serving.vocabulary), None)
        if beyond is not None:
            raise OptionError(f"There is no token {beyond}; this base has {serving.vocabulary}.")
    return found


def _written(vector: list[float], how: str | None) -> list[float] | str:
    if how != "base64":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")
