"""What a step of an engine costs on this machine, for the simulation of deployments."""

from __future__ import annotations

import time

from lorry.core.errors import OptionError
from lorry.serving.engine import Engine
from lorry.serving.request import Request, Sampling

#: Requests of the smaller and the larger batch, and tokens of the shorter and the longer prompt.
_BATCHES, _PROMPTS = (1, 16), (16, 112)
_STEPS, _REPEATS = 16, 4


def measured(engine: Engine) -> dict[str, float]:
    """Return the costs of a `Deployment` as an engine that has nothing else to do shows them.

    A step's costs are taken for a line: what a batch of 16 takes beyond one of 1 is that of 15 more requests, and what
    a prompt of 112 tokens takes beyond one of 16 is that of 96 more tokens. Of some steps the
    quickest counts, which was disturbed least. The prompts are base requests; what adapters add is the business of
    `lorry bench`.

    Returns
    -------
    ``step_seconds``, ``decode_seconds`` and ``prompt_seconds``.

    Raises
    ------
    OptionError
        The engine is too small: it takes fewer requests at once, or shorter prompts.
    """
    if engine.options.max_running < max(_BATCHES) or engine.options.max_batch_tokens < max(_PROMPTS):
        raise OptionError(
            f"Measuring takes {max(_BATCHES)} requests at once and {max(_PROMPTS)} tokens in a pass, but the engine "
            f"takes {engine.options.max_running} and {engine.options.max_batch_tokens}; raise max_running and "
            "max_batch_tokens."
        )
    few, many = (_decoding(engine, count) for count in _BATCHES)
    short, long = (_reading(engine, length) for length in _PROMPTS)
    each = max(0.0, (many - few) / (_BATCHES[1] - _BATCHES[0]))
    return {
        "step_seconds": max(few - each, 1e-9),
        "decode_seconds": each,
        "prompt_seconds": max(0.0, (long - short) / (_PROMPTS[1] - _PROMPTS[0])),
    }


def _decoding(engine: Engine, count: int) -> float:
    """Return the seconds of a step that decodes so many requests."""
    found: list[float] = []
    for request in range(count):
        # each begins with a token of its own, so that no two share pages
        prompt = (request % engine.vocabulary, *(0,) * 7)
        engine.submit(Request(f"decode-{request}", prompt, {}, Sampling(max_tokens=_STEPS, ignore_end=True)))
    engine.step()  # reads all prompts, which are short
    while not engine.idle:
        found.append(_step(engine))
    return min(found)


def _reading(engine: Engine, length: int) -> float:
    """Return the seconds of a step that reads a prompt of so many tokens."""
    found = []
    for repeat in range(_REPEATS):
        prompt = ((repeat + length) % engine.vocabulary, *(1 % engine.vocabulary,) * (length - 1))
        engine.submit(Request(f"read-{length}-{repeat}", prompt, {}, Sampling(max_tokens=1)))
        found.append(_step(engine))
        while not engine.idle:
            engine.step()
    return min(found)


def _step(engine: Engine) -> float:
    """Return the seconds of a step."""
    began = time.perf_counter()
    engine.step()
    return time.perf_counter() - began
