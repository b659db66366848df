"""``/tokenize``, ``/detokenize``, ``/tokenizer_info``: the base's tokens, as vLLM serves them."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter

from lorry.core.errors import OptionError
from lorry.serving.http.bodies import DetokenizeBody, TokenizeBody
from lorry.serving.http.state import GUARDED, Serving, Shared

router = APIRouter(dependencies=GUARDED, tags=["tokens"])
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, serving: Shared) -> dict[str, Any]:
    """Turn a text or a conversation into tokens."""
    tokens = await asyncio.to_thread(_tokens, body, serving)
    names = serving.prompts.tokenizer.convert_ids_to_tokens(list(tokens)) if body.return_token_strs else None
    return {"tokens": list(tokens), "count": len(tokens), "max_model_len": serving.context, "token_strs": names}


def _tokens(body: TokenizeBody, serving: Serving) -> tuple[int, ...]:
    if (body.prompt is None) == (body.messages is None):
        raise OptionError("Give either prompt, a text, or messages, a conversation.")
    if body.prompt is not None:
        return serving.prompts.encode(body.prompt, body.add_special_tokens is not False)
    return serving.prompts.chat(
        [message.model_dump(exclude_none=True) for message in body.messages or ()],
        [tool.model_dump(exclude_none=True) for tool in body.tools or ()],
        generate=body.add_generation_prompt,
        carry_on=body.continue_final_message,
        extra=body.chat_template_kwargs,
        special=bool(body.add_special_tokens),
    )


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, serving: Shared) -> dict[str, Any]:
    """Turn tokens into text."""
    size = len(serving.prompts.tokenizer)
    beyond = next((token for token in body.tokens if token >= size), None)
    if beyond is not None:
        raise OptionError(f"There is no token {beyond}; this base has {size}.")
    return {"prompt": serving.prompts.decode(body.tokens)}


@router.get("/tokenizer_info")
async def tokenizer_info(serving: Shared) -> dict[str, Any]:
    """Describe the tokenizer, for programs that use the two others in its place."""
    tokenizer = serving.prompts.tokenizer
    named = {name: getattr(tokenizer, name, None) for name in _NAMED}
    template = serving.prompts.template
    kind = type(tokenizer).__name__
    return {"tokenizer_class": kind, **named, "model_max_length": serving.context, "chat_template": template}
