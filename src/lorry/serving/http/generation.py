"""From prompts to requests, and from the engine's outputs to an answer."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from fastapi import Request as HttpRequest

from lorry.core.errors import AdapterError
from lorry.serving.http.bodies import MOST_SEQUENCES, Generating
from lorry.serving.http.errors import RETRY_AFTER, ApiError
from lorry.serving.http.keys import Holder
from lorry.serving.http.state import Serving
from lorry.serving.request import Output, Request, Sampling, Usage
from lorry.serving.results import Completed
from lorry.serving.sampling.choose import DEAD_END

T = TypeVar("T")


@dataclass
class Generation:
    """The sequences that one HTTP request makes: of each prompt as many as are drawn.

    Attributes
    ----------
    prefix
        Of the answer's id.
    prompts, samplings
        One for each prompt.
    each
        Sequences of a prompt.
    usage
        Sequence -> tokens so far.
    """

    serving: Serving
    holder: Holder
    body: Generating
    prefix: str
    prompts: Sequence[tuple[int, ...]]
    samplings: Sequence[Sampling]
    each: int = 1
    usage: dict[int, Usage] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make the id and see that it is not too much."""
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        self.model = self.body.model or self.serving.base
        if len(self.prompts) * self.each > MOST_SEQUENCES:
            raise ApiError(
                400,
                f"The request has {len(self.prompts)} prompts with {self.each} answers each; {MOST_SEQUENCES} "
                "sequences are taken at once. Send several requests.",
            )

    def requests(self, composition: Mapping[str, float]) -> list[Request]:
        """Return the engine's requests, sequence by sequence: each answer of a prompt with a seed of its own."""
        now = time.monotonic()
        found = []
        for place, (prompt, sampling) in enumerate(zip(self.prompts, self.samplings, strict=True)):
            for turn in range(self.each):
                seed = None if sampling.seed is None else sampling.seed + turn
                index = place * self.each + turn
                found.append(
                    Request(
                        f"{self.id}-{index}",
                        prompt,
                        composition,
                        replace(sampling, seed=seed),
                        key=self.holder.name,
                        arrival=now,
                        deadline=self.body.deadline,
                    )
                )
        return found

    async def outputs(self) -> AsyncGenerator[tuple[int, Output], None]:
        """Yield the outputs with the number of their sequence; raise `ApiError` if a sequence fails."""
        composition = self.serving.generating(self.body.model, self.holder)
        requests = self.requests(composition)
        places = {request.id: place for place, request in enumerate(requests)}
        reserved = sum(len(request.prompt) + request.sampling.max_tokens for request in requests)
        grant, watch = self.holder.take(len(requests), reserved), self.serving.metrics.watch()
        try:
            async with aclosing(self.serving.service.stream(*requests)) as found:
                async for output in found:
                    watch.saw(output)
                    place = places[output.id]
                    self.usage[place] = output.usage
                    check_output(output)
                    yield place, output
        except AdapterError as error:
            raise self.serving.unknown(self.body.model, self.holder) from error
        finally:
            grant.used = sum(usage.prompt + usage.completion for usage in self.usage.values())
            grant.end()

    async def completed(self) -> list[Completed]:
        """Return what each sequence came to."""
        found: dict[int, list[Output]] = {}
        async with aclosing(self.outputs()) as outputs:
            async for place, output in outputs:
                found.setdefault(place, []).append(output)
        return [Completed.of(found[place]) for place in sorted(found)]

    def used(self) -> dict[str, Any]:
        """Return the tokens so far in OpenAI's shape; a prompt counts once, however many answers it has."""
        firsts = [self.usage.get(place * self.each, Usage(0, 0, 0)) for place in range(len(self.prompts))]
        prompt, completion = sum(map(len, self.prompts)), sum(usage.completion for usage in self.usage.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(usage.cached for usage in firsts)},
        }


def check_output(output: Output) -> None:
    """Raise `ApiError` if a sequence was given up."""
    if output.finish == "dropped":
        message = output.error or "The request would have come too late for its deadline; try again."
        raise ApiError(503, message, code="dropped", retry_after=RETRY_AFTER)
    if output.error == DEAD_END:
        raise ApiError(400, DEAD_END, code="grammar")
    if output.finish in ("error", "cancelled"):
        raise ApiError(500, output.error or "The server gave this request up; try again.", code=output.finish)


def best(answers: Sequence[Completed], each: int, wanted: int) -> list[tuple[int, Completed]]:
    """Return of each prompt's answers the wanted number, the likeliest by token first; with the prompt's number."""
    found: list[tuple[int, Completed]] = []
    for start in range(0, len(answers), each):
        of_prompt: Iterable[Completed] = answers[start : start + each]
        if wanted < each:
            of_prompt = sorted(of_prompt, key=_likelihood, reverse=True)[:wanted]
        found += [(start // each, answer) for answer in of_prompt]
    return found


def _likelihood(answer: Completed) -> float:
    values = [each.logprob for each in answer.logprobs]
    return sum(values) / len(values) if values else float("-inf")


async def unless_gone(request: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """Return what is worked out; give it up when the client goes away."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(400, "The client went away.", code="gone")
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
