"""``/v1/rerank``: documents in the order in which they answer a query, in the shape of Cohere's, Jina's and vLLM's."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter

from lorry.core.errors import AdapterError
from lorry.serving.embedding import batches
from lorry.serving.http.bodies import RerankBody
from lorry.serving.http.errors import ApiError
from lorry.serving.http.keys import Holder
from lorry.serving.http.routes.embeddings import TOKENS_AT_ONCE, checked
from lorry.serving.http.state import WORKING, Caller, Serving, Shared
from lorry.serving.modes.mode import Mode
from lorry.serving.retrieval import relevance, token_vectors

router = APIRouter(dependencies=WORKING, tags=["embeddings"])


@router.post("/rerank", include_in_schema=False)
@router.post("/v2/rerank", include_in_schema=False)
@router.post("/v1/rerank")
async def rerank(body: RerankBody, serving: Shared, caller: Caller) -> dict[str, Any]:
    """Order documents by late interaction: the mean over the query's tokens of the greatest cosine."""
    mode = _mode(body, serving, caller)
    texts = [each if isinstance(each, str) else each.text for each in body.documents]
    query, documents = await asyncio.to_thread(_prompts, serving, body, texts)
    count = len(query) + sum(map(len, documents))
    grant = caller.take(1, count)
    grant.used = count
    scores: dict[int, float] = {}
    call, engine = serving.service.call, serving.engine
    try:
        asked, _ = await call(lambda: token_vectors(engine, [query], mode))
        for places in batches(documents, TOKENS_AT_ONCE):
            chosen = [documents[place] for place in places]

            def work(chosen: Sequence[Sequence[int]] = chosen) -> list[float]:
                return relevance(engine, asked, chosen, mode)

            scores.update(zip(places, await call(work), strict=True))
    except AdapterError as error:
        raise serving.unknown(mode.name, caller) from error
    finally:
        grant.end()
    order = sorted(range(len(texts)), key=lambda place: (-scores[place], place))[: body.top_n]
    shown = body.return_documents is not False
    results = [
        {"index": place, "relevance_score": scores[place]} | ({"document": {"text": texts[place]}} if shown else {})
        for place in order
    ]
    usage = {"prompt_tokens": count, "total_tokens": count}
    return {"id": f"rerank-{uuid.uuid4().hex}", "object": "list", "model": mode.name, "results": results,
            "usage": usage}  # fmt: skip


def _mode(body: RerankBody, serving: Serving, caller: Holder) -> Mode:
    """Return the mode that a request names; the only one that its key may use if it names none."""
    if not serving.modes:
        message = (
            "This server has no head that orders documents; start it with --mode NAME=FOLDER of a retriever, or "
            "compare the vectors of /v1/embeddings."
        )
        raise ApiError(501, message, code="not_implemented")
    usable = [name for name in serving.modes if caller.may_use(name)]
    name = body.model if body.model is not None or len(usable) != 1 else usable[0]
    if name is None:
        message = "The server has several retrievers, or none for this key; name one as the model."
        raise ApiError(400, message, param="model")
    caller.check_model(serving.composition(name, caller))
    mode = serving.modes.get(name)
    if mode is None:
        message = f"'{name}' orders no documents; the model must be one of: {', '.join(usable)}."
        raise ApiError(404 if name not in serving.names() else 400, message, code="model_not_found", param="model")
    return mode


def _prompts(serving: Serving, body: RerankBody, texts: Sequence[str]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    encode = serving.prompts.encode
    documents = [encode(text, True)[: body.max_tokens_per_doc] for text in texts]
    query, *rest = checked(serving, [encode(body.query, True), *documents], "A query or document")
    return query, rest
