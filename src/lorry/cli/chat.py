"""``lorry chat``: a conversation in the terminal, with adapters that can be changed between turns."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from lorry.cli.arguments import BaseArgument, CheckBase, Dtype, adapter_references
from lorry.cli.generate import Composition, label, parse_composition
from lorry.cli.output import failure, note
from lorry.cli.sampling import (
    MaxNewTokens,
    MinP,
    RepetitionPenalty,
    Sampling,
    Seed,
    Stop,
    Temperature,
    Template,
    TopK,
    TopP,
    chat_tokens,
    conversation,
    template_of,
)
from lorry.core.errors import LorryError, OptionError

HELP = "/adapter NAME[:W][+NAME[:W]] or none: what applies from now on; /adapters; /system TEXT; /reset; /quit"


def chat(
    base: BaseArgument,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter", "-a", metavar="[NAME=]DIR[:WEIGHT]", help="Adapter to load; the first applies; repeatable."
        ),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="What the system message says.")] = None,
    template: Template = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Stop = None,
    seed: Seed = 0,
    check_base: CheckBase = True,
    dtype: Dtype = "auto",
) -> None:
    """Talk with a base and its adapters; answers appear as they are made. /help lists the commands."""
    import torch

    import lorry
    from lorry.cli.bases import load_base, load_tokenizer

    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, tuple(stop or ()))
    references = adapter_references(adapter)
    tokenizer = load_tokenizer(base)
    rules = template_of(tokenizer, template)
    model: Any = load_base(base, dtype)
    for name, (path, _) in references.items():
        note(str(lorry.load(model, path, name=name, check_base=check_base).receipt))
    loaded = {name: weight for name, (_, weight) in references.items()}
    first = dict(list(loaded.items())[:1])
    talk = Conversation(model, tokenizer, rules, sampling, loaded, first, system)
    torch.manual_seed(seed)
    note(f"{base}, {label(first)}; {HELP}")
    for line in lines():
        try:
            if not talk.hear(line):
                break
        except LorryError as error:
            failure(str(error))


def lines() -> Iterator[str]:
    """Yield what is typed, until it ends; a prompt shows on a terminal alone."""
    shown = "> " if sys.stdin.isatty() else ""
    if shown:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  its import lets lines be edited and called up again
    while True:
        try:
            yield input(shown)
        except (EOFError, KeyboardInterrupt):
            return


class Conversation:
    """A conversation with a model whose adapters may change between turns.

    Parameters
    ----------
    model, tokenizer
        The base with its adapters.
    template
        Jinja text.
    sampling
        How tokens are chosen.
    loaded
        Adapter -> its weight.
    first
        What applies at the start.
    system
        What the system message says.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        template: str,
        sampling: Sampling,
        loaded: dict[str, float],
        first: Composition,
        system: str | None = None,
    ) -> None:
        self.model, self.tokenizer, self.template, self.sampling = model, tokenizer, template, sampling
        self.loaded, self.system = loaded, system
        self.messages: list[dict[str, str]] = []
        self.use(first)

    def use(self, composition: Composition) -> None:
        """Let adapters apply from now on; none for the bare base."""
        from lorry.cli.measure import apply_only

        apply_only(self.model, composition)

    def hear(self, line: str) -> bool:
        """Act on a line: a command, or what the user says; returns whether the conversation goes on."""
        word, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if not word:
            return True
        if word in ("/quit", "/exit"):
            return False
        if word == "/reset":
            self.messages.clear()
            note("the conversation begins anew")
        elif word == "/adapter":
            composition = parse_composition(rest, self.loaded, "/adapter")
            self.use(composition)
            note(f"from now on: {label(composition)}")
        elif word == "/adapters":
            note(", ".join(self.loaded) or "no adapter is loaded")
        elif word == "/system":
            self.system = rest or None
            note("the system message is changed" if rest else "no system message any more")
        elif word == "/help":
            note(HELP)
        elif word.startswith("/"):
            raise OptionError(f"There is no command {word}; there are: {HELP}.")
        else:
            self.answer(line.strip())
        return True

    def answer(self, text: str) -> str:
        """Write the answer to what the user says, word by word, and return it; Ctrl-C ends it early."""
        import torch
        from transformers import TextStreamer

        said: list[str] = []

        class Written(TextStreamer):  # type: ignore[misc]
            """Writes what is finished, and keeps it."""

            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                said.append(text)
                print(text, end="\n" if stream_end else "", flush=True)

        turns = conversation(text, self.system, self.messages)
        ids = torch.tensor([chat_tokens(self.tokenizer, turns, self.template)], device=self.model.device)
        streamer = Written(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        options = {"pad_token_id": self.tokenizer.pad_token_id, **self.sampling.options(self.tokenizer)}
        try:
            with torch.no_grad():
                self.model.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer, **options)
        except KeyboardInterrupt:
            streamer.end()
        answer = self.sampling.cut("".join(said))
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return answer
