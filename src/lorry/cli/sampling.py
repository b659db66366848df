"""How tokens are chosen, and how conversations become prompts: what `generate` and `chat` share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from lorry.core.errors import OptionError

Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy: always the likeliest token.")]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Draw among this many likeliest tokens; 0 for all.")]
TopP = Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="Draw among the likeliest with this sum.")]
MinP = Annotated[
    float,
    typer.Option("--min-p", min=0.0, max=1.0, help="Leave out what is less likely than this part of the likeliest."),
]
RepetitionPenalty = Annotated[
    float,
    typer.Option("--repetition-penalty", min=0.01, help="Above 1, tokens that are there already become less likely."),
]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="Text at which to stop; repeatable. It is left out.")]
Seed = Annotated[int, typer.Option(help="Of the sampling.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest continuation.")]
Template = Annotated[
    Path | None, typer.Option("--template", help="File with a Jinja chat template in place of the tokenizer's.")
]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when to stop.

    Raises
    ------
    OptionError
        A choice among several tokens without a temperature, or an empty stop text.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse options that would do nothing."""
        drawn = {"--top-k": self.top_k > 0, "--top-p": self.top_p < 1, "--min-p": self.min_p > 0}
        idle = [flag for flag, given in drawn.items() if given]
        if idle and not self.temperature:
            raise OptionError(f"{idle[0]} has no meaning without sampling; give --temperature above 0, e.g. 0.7.")
        if "" in self.stop:
            raise OptionError("--stop expects a text, found an empty one.")

    def options(self, tokenizer: Any) -> dict[str, Any]:
        """Return the options of transformers' ``generate``; each is given, so that no file of the base decides."""
        chosen: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        chosen["repetition_penalty"] = self.repetition_penalty
        if self.temperature > 0:
            chosen |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
            chosen["min_p"] = self.min_p or None
        if self.stop:
            chosen |= {"stop_strings": list(self.stop), "tokenizer": tokenizer}
        return chosen

    def cut(self, text: str) -> str:
        """Return a continuation up to the first stop text."""
        ends = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        return text[: min(ends)] if ends else text


def template_of(tokenizer: Any, file: Path | None) -> str:
    """Return the chat template to use: that of a file, or the tokenizer's.

    Raises
    ------
    OptionError
        There is none, or the file cannot be read.
    """
    if file is not None:
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"Cannot read the chat template {file}: {error}.") from error
    if not getattr(tokenizer, "chat_template", None):
        raise OptionError(
            "This base's tokenizer has no chat template; give one with --template FILE (Jinja), or continue plain text "
            "with `lorry generate BASE -p TEXT`."
        )
    return str(tokenizer.get_chat_template())


def chat_tokens(tokenizer: Any, messages: Sequence[Mapping[str, str]], template: str) -> list[int]:
    """Return the tokens of a conversation up to where the assistant speaks, encoded as in training.

    Raises
    ------
    OptionError
        The template refuses the conversation.
    """
    try:
        text = tokenizer.apply_chat_template(
            list(messages), chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template is a program of its own, and may raise anything
        raise OptionError(f"The chat template refuses the conversation: {error}") from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def conversation(text: str, system: str | None, before: Sequence[Mapping[str, str]] = ()) -> list[Mapping[str, str]]:
    """Return a conversation up to what a user says now, `before` being the turns that went ahead."""
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *before, {"role": "user", "content": text}]
