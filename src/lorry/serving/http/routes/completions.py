"""``/v1/completions``: texts continued."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from lorry.core.errors import OptionError
from lorry.serving.http.bodies import CompletionBody
from lorry.serving.http.events import streamed
from lorry.serving.http.generation import Generation, best, unless_gone
from lorry.serving.http.keys import Holder
from lorry.serving.http.logprobs import of_completion, of_prompt
from lorry.serving.http.state import WORKING, Caller, Serving, Shared
from lorry.serving.http.wishes import grammar_of, length_of, sampling_of
from lorry.serving.request import Output, TokenLogprob
from lorry.serving.results import Completed

router = APIRouter(dependencies=WORKING, tags=["generation"])
#: Tokens of an answer where the client says nothing, as OpenAI has it.
DEFAULT_TOKENS = 16


@router.post("/v1/completions")
async def completions(body: CompletionBody, serving: Shared, caller: Caller, request: Request) -> Response:
    """Continue one prompt or several."""
    texts, prompts = await asyncio.to_thread(prompts_of, serving, body)
    generation = _generation(body, serving, caller, prompts)
    answer = _Answer(body, generation, texts)
    if body.stream:
        if generation.each != answer.wanted:
            raise OptionError("A stream cannot choose the best of several; give best_of without stream.")
        return await unless_gone(request, streamed(answer.pieces()))
    return JSONResponse(await unless_gone(request, answer.whole()))


def prompts_of(serving: Serving, body: CompletionBody) -> tuple[list[str], list[tuple[int, ...]]]:
    """Return the text (if it is to be repeated) and the tokens of each prompt."""
    given = body.prompt
    several: Sequence[Any] = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    encode = serving.prompts.encode
    tokens = [encode(one, body.add_special_tokens) if isinstance(one, str) else tuple(one) for one in several]
    if not all(tokens):
        raise OptionError("A prompt must have at least one token; this base puts none before an empty text.")
    texts = [(one if isinstance(one, str) else serving.prompts.decode(one)) if body.echo else "" for one in several]
    return texts, tokens


def _generation(
    body: CompletionBody, serving: Serving, caller: Holder, prompts: Sequence[tuple[int, ...]]
) -> Generation:
    wanted = body.n or 1
    each = body.best_of or wanted
    if each < wanted:
        raise OptionError(f"best_of must be n at least, found {each} and {wanted}.")
    grammar = grammar_of(body)
    ranked = 0 if each > wanted else None
    samplings = [
        sampling_of(
            body,
            max_tokens=max(1, length_of(body, len(prompt), serving.context, caller, DEFAULT_TOKENS)),
            logprobs=ranked if body.logprobs is None else body.logprobs,
            prompt_logprobs=body.logprobs if body.echo and body.prompt_logprobs is None else body.prompt_logprobs,
            grammar=grammar,
        )
        for prompt in prompts
    ]
    return Generation(serving, caller, body, "cmpl", prompts, samplings, each)


class _Answer:
    """What the client gets of a generation."""

    def __init__(self, body: CompletionBody, generation: Generation, texts: Sequence[str]) -> None:
        self.body, self.generation, self.texts = body, generation, texts
        self.wanted = body.n or 1
        #: No token was asked for: the engine makes one, which nobody sees.
        self.nothing = body.max_tokens == 0

    async def whole(self) -> dict[str, Any]:
        """Return the answer in one piece."""
        answers = best(await self.generation.completed(), self.generation.each, self.wanted)
        choices = [self._choice(index, place, answer) for index, (place, answer) in enumerate(answers)]
        return {**self._head(), "choices": choices, "usage": self._used()}

    async def pieces(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the answer as it comes."""
        options = self.body.stream_options
        usage = {"usage": None} if options is not None and options.include_usage else {}
        lengths: dict[int, int] = {}
        async with aclosing(self.generation.outputs()) as outputs:
            async for index, output in outputs:
                first = index not in lengths
                place = index // self.generation.each
                if output.tokens or output.text or output.finish or first:
                    choice = self._choice(index, place, output, lengths.get(index, 0), first)
                    lengths[index] = lengths.get(index, 0) + len(choice["text"])
                    yield {**self._head(), "choices": [choice], **usage}
        if usage:
            yield {**self._head(), "choices": [], "usage": self._used()}

    def _head(self) -> dict[str, Any]:
        made = self.generation
        return {"id": made.id, "object": "text_completion", "created": made.created, "model": made.model}

    def _used(self) -> dict[str, Any]:
        used = self.generation.used()
        if self.nothing:
            used |= {"completion_tokens": 0, "total_tokens": used["prompt_tokens"]}
        return used

    def _choice(
        self, index: int, place: int, answer: Completed | Output, start: int = 0, first: bool = True
    ) -> dict[str, Any]:
        """Return a choice, or the piece of one that an output is."""
        body, prompts = self.body, self.generation.serving.prompts
        echoed = bool(body.echo) and first
        text, tokens = ("", ()) if self.nothing else (answer.text, answer.tokens)
        report = None
        if body.logprobs is not None:
            known: list[TokenLogprob | None] = [] if self.nothing else list(answer.logprobs)
            shown = list(tokens)
            if echoed:
                known = [*(answer.prompt_logprobs or ()), *known]
                shown = [*self.generation.prompts[place], *shown]
            report = of_completion(prompts, shown, known, body.logprobs, start)
        choice = {
            "index": index,
            "text": self.texts[place] + text if echoed else text,
            "logprobs": report,
            "finish_reason": "length" if self.nothing and answer.finish else answer.finish,
            "stop_reason": None if self.nothing else answer.stop,
        }
        if body.prompt_logprobs is not None and first:
            choice["prompt_logprobs"] = of_prompt(prompts, answer.prompt_logprobs)
        if body.return_token_ids:
            choice |= {"token_ids": list(tokens), "prompt_token_ids": list(self.generation.prompts[place])}
        return choice
