"""What a client wants of an answer, as the engine takes it."""

from __future__ import annotations

import json
from typing import Any

from lorry.core.errors import OptionError
from lorry.serving.http.bodies import ChatBody, Generating
from lorry.serving.http.errors import ApiError
from lorry.serving.http.keys import Holder
from lorry.serving.request import Grammar, Sampling

#: What is taken for a top_p of 0: the likeliest token alone.
LEAST_TOP_P = 1e-9


def sampling_of(
    body: Generating, *, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None, grammar: Grammar | None
) -> Sampling:
    """Return the sampling of a request; the temperature is OpenAI's 1 where none is given."""
    return Sampling(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=max(0, body.top_k or 0),
        top_p=1.0 if body.top_p is None else max(body.top_p, LEAST_TOP_P),
        min_p=body.min_p or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        bias=_bias(body),
        stop=_stops(body),
        stop_tokens=tuple(body.stop_token_ids or ()),
        ignore_end=body.ignore_eos,
        min_tokens=body.min_tokens,
        seed=body.seed,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=grammar,
    )


def length_of(body: Generating, prompt: int, context: int, holder: Holder, default: int | None) -> int:
    """Return how many tokens an answer may have.

    Parameters
    ----------
    prompt, context
        Tokens of the prompt, and of prompt and answer together at most.
    holder
        Whose limit applies.
    default
        Where the client says nothing; None for as many as there is room for.

    Raises
    ------
    ApiError
        400 if that cannot be.
    """
    room, most = context - prompt, holder.max_tokens
    wanted = body.max_tokens
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        wanted = body.max_completion_tokens
    if room < 1 or (wanted or 0) > room:
        raise ApiError(
            400,
            f"This model's context has {context} tokens; the prompt has {prompt} and {wanted or 1} are to be "
            "generated. Shorten the prompt or ask for fewer.",
            code="context_length_exceeded",
        )
    if wanted is None:
        rate = holder.tokens_per_minute
        left = room if rate is None else max(1, rate - prompt)  # more could never be had
        return min(limit for limit in (room, default, most, left) if limit is not None)
    if most is not None and wanted > most:
        raise ApiError(400, f"This key may ask for {most} tokens at most, found {wanted}.", param="max_tokens")
    return wanted


def grammar_of(body: Generating, forced: Grammar | None = None) -> Grammar | None:
    """Return what the answer must keep to, `forced` being what the choice of a tool demands.

    Raises
    ------
    OptionError
        Two things at once, or something that is no schema.
    """
    more = body.structured_outputs
    found = [
        forced,
        _format(body),
        _schema(body.guided_json, "guided_json"),
        _text("regex", body.guided_regex),
        _choice(body.guided_choice),
        _text("ebnf", body.guided_grammar),
    ]
    if more is not None:
        found += [
            _schema(more.json_, "structured_outputs.json"),
            _text("regex", more.regex),
            _choice(more.choice),
            _text("ebnf", more.grammar),
            Grammar("json") if more.json_object else None,
        ]
    given = [grammar for grammar in found if grammar is not None]
    if len(given) > 1:
        raise OptionError(
            "An answer can keep to one thing only; give one of response_format, guided_json, guided_regex, "
            "guided_choice, guided_grammar and a forced tool_choice."
        )
    return given[0] if given else None


def _format(body: Generating) -> Grammar | None:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return Grammar("json")
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise OptionError("The response_format json_schema needs json_schema with a schema.")
    return _schema(wanted.json_schema.schema_, "response_format")


def _schema(value: Any, where: str) -> Grammar | None:
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise OptionError(f"{where} is no JSON schema: its text is no valid JSON.") from None
    if not isinstance(value, dict | bool):
        raise OptionError(f"{where} is no JSON schema: expected an object.")
    return Grammar("json_schema", json.dumps(value, ensure_ascii=False))


def _text(kind: Any, value: str | None) -> Grammar | None:
    return None if value is None else Grammar(kind, value)


def _choice(choices: list[str] | None) -> Grammar | None:
    if choices is None:
        return None
    if not choices or "" in choices:
        raise OptionError("A choice needs at least one text, and none that is empty.")
    return Grammar("ebnf", "root ::= " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices))


def _bias(body: Generating) -> dict[int, float]:
    try:
        bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    except ValueError:
        raise OptionError("The logit_bias must have token numbers for keys.") from None
    if any(token < 0 for token in bias):
        raise OptionError("The logit_bias must have token numbers for keys, which are not negative.")
    return bias


def _stops(body: Generating) -> tuple[str, ...]:
    stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if "" in stops:
        raise OptionError("A stop text must not be empty.")
    return stops
