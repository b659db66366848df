"""``lorry chat``: a conversation in the terminal, with adapters that can be changed between turns."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from lorry.cli.arguments import BASE_HELP, CheckBase, Dtype, adapter_references
from lorry.cli.generate import Composition, label, parse_composition
from lorry.cli.output import failure, note
from lorry.cli.sampling import (
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
from lorry.cli.talk import HELP, Talk
from lorry.core.errors import LorryError, OptionError

#: Tokens of an answer, where nothing else is said.
LONGEST = 512


def chat(
    base: Annotated[str, typer.Argument(help=f"{BASE_HELP} Or the address of a server, as http://127.0.0.1:8000.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter", "-a", metavar="[NAME=]DIR[:WEIGHT]", help="Adapter to load; the first applies; repeatable."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="What a server's answers come from: an adapter, or base+a:0.7+b:0.3."),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="LORRY_API_KEY", show_envvar=True, help="For a server.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="What the system message says.")] = None,
    template: Template = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help=f"Longest answer; {LONGEST} here, on a server as long as there is room.")
    ] = None,
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
    """Talk with a base and its adapters, here or on a server; answers appear as they are made. /help lists commands."""
    longest = max_new_tokens or LONGEST
    sampling = Sampling(longest, temperature, top_k, top_p, min_p, repetition_penalty, tuple(stop or ()))
    if base.startswith(("http://", "https://")):
        here = {"--adapter": adapter, "--template": template, "--any-base": not check_base, "--dtype": dtype != "auto"}
        useless = [flag for flag, given in here.items() if given]
        if useless:
            raise OptionError(
                f"{useless[0]} is for a model in this process; {base} has its own. Name one with --model."
            )
        from lorry.cli.chat_server import ServerTalk

        with ServerTalk(base, model, sampling, max_new_tokens, seed, system, api_key) as talk:
            note(f"{base}, {talk.model}; {HELP}")
            _converse(talk)
        return
    if model is not None:
        raise OptionError("--model is for a server; load an adapter with --adapter DIR.")
    _converse(_here(base, adapter_references(adapter), template, sampling, system, seed, check_base, dtype))


def _here(
    base: str,
    references: dict[str, tuple[Path, float]],
    template: Path | None,
    sampling: Sampling,
    system: str | None,
    seed: int,
    check_base: bool,
    dtype: str,
) -> Talk:
    """Return the conversation with a model that is loaded into this process."""
    import torch

    import lorry
    from lorry.cli.bases import load_base, load_tokenizer

    tokenizer = load_tokenizer(base)
    rules = template_of(tokenizer, template)
    loaded_base: Any = load_base(base, dtype)
    for name, (path, _) in references.items():
        note(str(lorry.load(loaded_base, path, name=name, check_base=check_base).receipt))
    loaded = {name: weight for name, (_, weight) in references.items()}
    first = dict(list(loaded.items())[:1])
    talk = Conversation(loaded_base, tokenizer, rules, sampling, loaded, first, system)
    torch.manual_seed(seed)
    note(f"{base}, {label(first)}; {HELP}")
    return talk


def _converse(talk: Talk) -> None:
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


class Conversation(Talk):
    """A conversation with a model in this process.

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
        super().__init__(system)
        self.model, self.tokenizer, self.template, self.sampling = model, tokenizer, template, sampling
        self.loaded = loaded
        self.use(first)

    def use(self, composition: Composition) -> None:
        """Let adapters apply from now on; none for the bare base."""
        from lorry.cli.measure import apply_only

        apply_only(self.model, composition)

    def switch(self, text: str) -> str:
        """Let the adapters that a text names apply from now on."""
        composition = parse_composition(text, self.loaded, "/adapter")
        self.use(composition)
        return label(composition)

    def names(self) -> Iterable[str]:
        """Return the adapters that are loaded."""
        return self.loaded

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
        return self.sampling.cut("".join(said))
