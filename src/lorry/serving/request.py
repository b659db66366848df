"""What is asked of an engine and what it answers: plain data that knows neither the model nor HTTP.

A request is one sequence. Several samples of one prompt are several requests; the prefix cache sees to it that their
prompt is computed once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

#: Which adapters apply, with which weights; empty for the bare base.
Composition = Mapping[str, float]

#: Why a request ended: a stop text, stop token or end of sequence; its limit of tokens; cancelled by its client;
#: dropped by the scheduler, which could not meet its deadline; or a failure that is the server's.
Finish = Literal["stop", "length", "cancelled", "dropped", "error"]


@dataclass(frozen=True)
class Grammar:
    """What the text of a request must keep to.

    Attributes
    ----------
    kind
        ``json`` (any JSON value; `text` is empty), ``json_schema``, ``regex`` or ``ebnf``.
    text
        The schema as JSON, the expression, or the grammar.
    """

    kind: Literal["json", "json_schema", "regex", "ebnf"]
    text: str = ""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen and when to stop.

    Attributes
    ----------
    max_tokens
        Most tokens to generate.
    temperature
        0 is greedy.
    top_k, top_p, min_p
        Draw among the k likeliest (0 for all), among the likeliest with this sum, among those with at least this part
        of the likeliest's probability.
    repetition_penalty
        Divides positive and multiplies negative logits of tokens that occur in the prompt or the answer.
    presence_penalty, frequency_penalty
        Subtracted from the logits of tokens of the answer, once, or for each time they occur (OpenAI's definition).
    bias
        Token -> what is added to its logit.
    stop
        Texts at which to end; they are left out of the answer.
    stop_tokens
        Tokens at which to end, beside the model's own end of sequence.
    ignore_end
        Whether the model's end of sequence does not end the answer.
    min_tokens
        Tokens before which nothing ends the answer.
    seed
        With a seed, an answer is the same in whatever company; None draws one.
    logprobs
        How many alternatives to report beside the chosen token's log-probability; None for no report.
    prompt_logprobs
        The same for the tokens of the prompt.
    grammar
        What the answer must keep to.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    ignore_end: bool = False
    min_tokens: int = 0
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None


@dataclass(frozen=True)
class Request:
    """One sequence to continue.

    Attributes
    ----------
    id
        Unique among the requests that are under way.
    prompt
        Its tokens, at least one.
    composition
        Which adapters apply to it.
    sampling
        How it is continued.
    key
        Whose request it is, for fair queues; requests of one key share one turn.
    arrival
        When it arrived, in seconds of ``time.monotonic()``.
    deadline
        Seconds after `arrival` within which its first token is of use; None for ever.
    """

    id: str
    prompt: tuple[int, ...]
    composition: Composition = field(default_factory=dict)
    sampling: Sampling = field(default_factory=Sampling)
    key: str = ""
    arrival: float = 0.0
    deadline: float | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability (natural logarithm, before temperature and filters), and its likeliest alternatives."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens of a request: of its prompt, of those found in the prefix cache, and of its answer so far."""

    prompt: int
    cached: int
    completion: int


@dataclass(frozen=True)
class Output:
    """What one step of the engine adds to one request.

    Attributes
    ----------
    id
        The request's.
    tokens
        New tokens; those of a stop text are among them.
    text
        New text; what may yet become a stop text is held back.
    logprobs
        One for each of `tokens`, where asked for.
    prompt_logprobs
        With the first output, where asked for: one for each token of the prompt, None for the first.
    finish
        Why it ended; None while it goes on.
    stop
        The stop text or token that ended it.
    usage
        Tokens so far.
    error
        With ``finish="error"`` or ``"dropped"``: what happened and what to do.
    """

    id: str
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish: Finish | None = None
    stop: str | int | None = None
    usage: Usage = field(default_factory=lambda: Usage(0, 0, 0))
    error: str | None = None
