"""``/v1/chat/completions``: conversations continued, with calls of functions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from lorry.core.errors import OptionError
from lorry.serving.http import tools
from lorry.serving.http.bodies import ChatBody
from lorry.serving.http.events import streamed
from lorry.serving.http.generation import Generation, unless_gone
from lorry.serving.http.keys import Holder
from lorry.serving.http.logprobs import of_chat, of_prompt
from lorry.serving.http.state import WORKING, Caller, Serving, Shared
from lorry.serving.http.wishes import grammar_of, length_of, sampling_of
from lorry.serving.request import Output
from lorry.serving.results import Completed

router = APIRouter(dependencies=WORKING, tags=["generation"])


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatBody, serving: Shared, caller: Caller, request: Request) -> Response:
    """Continue a conversation."""
    prompt = await asyncio.to_thread(_prompt, serving, body)
    answer = _Answer(body, _generation(body, serving, caller, prompt))
    if body.stream:
        return await unless_gone(request, streamed(answer.pieces()))
    return JSONResponse(await unless_gone(request, answer.whole()))


def _prompt(serving: Serving, body: ChatBody) -> tuple[int, ...]:
    tokens = serving.prompts.chat(
        [message.model_dump(exclude_none=True) for message in body.messages],
        tools.tools_of(body),
        generate=body.add_generation_prompt,
        carry_on=body.continue_final_message,
        extra=body.chat_template_kwargs,
    )
    if not tokens:
        raise OptionError("The chat template made nothing of this conversation; there is nothing to continue.")
    return tokens


def _generation(body: ChatBody, serving: Serving, caller: Holder, prompt: tuple[int, ...]) -> Generation:
    if body.top_logprobs is not None and not body.logprobs:
        raise OptionError("top_logprobs is of use with logprobs: true only.")
    length = length_of(body, len(prompt), serving.context, caller, None)
    if length < 1:
        raise OptionError("A chat's answer must have one token at least; max_tokens is 0.")
    sampling = sampling_of(
        body,
        max_tokens=length,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
        grammar=grammar_of(body, tools.grammar_of(body)),
    )
    return Generation(serving, caller, body, "chatcmpl", [prompt], [sampling], body.n or 1)


class _Answer:
    """What the client gets of a generation."""

    def __init__(self, body: ChatBody, generation: Generation) -> None:
        self.body, self.generation = body, generation
        self.prompts = generation.serving.prompts

    async def whole(self) -> dict[str, Any]:
        """Return the answer in one piece."""
        answers = await self.generation.completed()
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        found = {**self._head("chat.completion"), "choices": choices, "usage": self.generation.used()}
        if self.body.prompt_logprobs is not None:
            found["prompt_logprobs"] = of_prompt(self.prompts, answers[0].prompt_logprobs)
        if self.body.return_token_ids:
            found["prompt_token_ids"] = list(self.generation.prompts[0])
        return found

    async def pieces(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the answer as it comes."""
        options = self.body.stream_options
        usage = {"usage": None} if options is not None and options.include_usage else {}
        head = self._head("chat.completion.chunk")
        readers: dict[int, tools.Reader] = {}
        async with aclosing(self.generation.outputs()) as outputs:
            async for index, output in outputs:
                if index not in readers:
                    readers[index] = self._reader()
                    opening = _piece(index, {"role": "assistant", "content": ""})
                    yield {**head, "choices": [opening], **usage}
                for choice in self._changes(index, output, readers[index]):
                    yield {**head, "choices": [choice], **usage}
        if usage:
            yield {**head, "choices": [], "usage": self.generation.used()}

    def _reader(self) -> tools.Reader:
        body = self.body
        callable_ = [] if body.tool_choice == "none" else [tool.function.name for tool in body.tools or ()]
        return tools.Reader(callable_, several=body.parallel_tool_calls is not False)

    def _changes(self, index: int, output: Output, reader: tools.Reader) -> list[dict[str, Any]]:
        """Return the pieces of a choice that an output brings."""
        found = []
        for part in reader.feed(output.text, output.finish is not None):
            if isinstance(part, tools.Call):
                delta: dict[str, Any] = {"tool_calls": [{"index": len(reader.calls) - 1, **part.to_dict()}]}
            else:
                delta = {"content": part}
            found.append(_piece(index, delta))
        if output.finish is not None or (not found and (output.logprobs or self.body.return_token_ids)):
            found.append(_piece(index, {}))
        if not found:
            return []
        if self.body.logprobs:
            found[0]["logprobs"] = of_chat(self.prompts, output.logprobs, self.body.top_logprobs or 0)
        if self.body.return_token_ids:
            found[0]["token_ids"] = list(output.tokens)
        if output.finish is not None:
            found[-1] |= {"finish_reason": _reason(output, reader), "stop_reason": output.stop}
        return found

    def _head(self, kind: str) -> dict[str, Any]:
        made = self.generation
        return {"id": made.id, "object": kind, "created": made.created, "model": made.model}

    def _choice(self, index: int, answer: Completed) -> dict[str, Any]:
        reader = self._reader()
        said = "".join(part for part in reader.feed(answer.text, True) if isinstance(part, str))
        message: dict[str, Any] = {"role": "assistant", "content": said or None if reader.calls else said}
        if reader.calls:
            message["tool_calls"] = [call.to_dict() for call in reader.calls]
        logprobs = of_chat(self.prompts, answer.logprobs, self.body.top_logprobs or 0) if self.body.logprobs else None
        choice = {
            "index": index,
            "message": {**message, "refusal": None},
            "logprobs": logprobs,
            "finish_reason": _reason(answer, reader),
            "stop_reason": answer.stop,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = list(answer.tokens)
        return choice


def _piece(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _reason(answer: Completed | Output, reader: tools.Reader) -> str | None:
    return "tool_calls" if reader.calls and answer.finish == "stop" else answer.finish
