"""Requests for samples as the engine takes them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from lorry.serving.engine import Engine
from lorry.serving.request import Output, Request, Sampling
from lorry.serving.results import Completed
from lorry.serving.service import Service
from lorry.serving.training.errors import Refused
from lorry.serving.training.wire import sample_response

#: Samples of one prompt at once, and alternatives to a token, at most.
MOST_SAMPLES, MOST_TOP = 1024, 100


@dataclass(frozen=True)
class Wish:
    """What a client wants sampled.

    Attributes
    ----------
    prompt
        Tokens.
    samples
        How many answers.
    max_tokens, seed, stop, temperature, top_k, top_p
        As the client has them: no limit is the context's, `top_k` -1 is all; no `stop` is the model's own end, and an
        empty list is none at all.
    prompt_logprobs, top_prompt, top
        Whether the log-probabilities of the prompt are wanted, and how many alternatives to its tokens and to those of
        the answers.
    """

    prompt: tuple[int, ...]
    samples: int = 1
    max_tokens: int | None = None
    seed: int | None = None
    stop: str | Sequence[str] | Sequence[int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    prompt_logprobs: bool = False
    top_prompt: int = 0
    top: int = 0

    def sampling(self, context: int) -> Sampling:
        """Return what the engine is told, which sees `context` tokens at most.

        Raises
        ------
        Refused
            A number out of its range.
        """
        if not 1 <= self.samples <= MOST_SAMPLES:
            raise Refused(f"num_samples must be between 1 and {MOST_SAMPLES}, found {self.samples}.")
        if self.top_k == 0 or self.top_k < -1:
            raise Refused(f"top_k must be -1, for all tokens, or at least 1, found {self.top_k}.")
        if not 0 <= max(self.top_prompt, self.top) <= MOST_TOP or min(self.top_prompt, self.top) < 0:
            raise Refused(f"Alternatives to a token are 0 to {MOST_TOP}, found {self.top_prompt} and {self.top}.")
        room = context - len(self.prompt)
        if room < 1:
            raise Refused(f"The prompt has {len(self.prompt)} tokens, but prompt and answer may have {context}.")
        stop: list[str | int] = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        wanted = self.prompt_logprobs or self.top_prompt
        return Sampling(
            max_tokens=room if self.max_tokens is None else self.max_tokens,
            temperature=self.temperature,
            top_k=max(0, self.top_k),
            top_p=self.top_p,
            stop=tuple(each for each in stop if isinstance(each, str)),
            stop_tokens=tuple(each for each in stop if isinstance(each, int)),
            ignore_end=self.stop is not None and not stop,
            seed=self.seed,
            logprobs=self.top,
            prompt_logprobs=self.top_prompt if wanted else None,
        )


async def sampled(
    service: Service[Engine], wish: Wish, sampling: Sampling, composition: Mapping[str, float], id: str, key: str
) -> bytes:
    """Return the answer to a request for samples.

    Raises
    ------
    LorryError
        The engine refuses it, or a sample failed.
    """
    requests = []
    for turn in range(wish.samples):
        seed = None if sampling.seed is None else sampling.seed + turn
        # one answer tells the prompt's log-probabilities
        changed = {"seed": seed, "prompt_logprobs": sampling.prompt_logprobs if turn == 0 else None}
        how = Sampling(**{**vars(sampling), **changed})
        requests.append(Request(f"{id}-{turn}", wish.prompt, composition, how, key=key, arrival=time.monotonic()))
    outputs: dict[str, list[Output]] = {request.id: [] for request in requests}
    async with aclosing(service.stream(*requests)) as found:
        async for output in found:
            outputs[output.id].append(output)
    answers = [Completed.of(outputs[request.id]) for request in requests]
    for answer in answers:
        if answer.finish not in ("stop", "length"):
            raise RuntimeError(answer.error or f"A sample ended as '{answer.finish}'.")
    return sample_response(answers, prompt=wish.prompt_logprobs, top_prompt=wish.top_prompt, top=wish.top)
