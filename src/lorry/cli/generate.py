"""``lorry generate``: several prompts in one batch, each row with its own adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from lorry.cli.arguments import BaseArgument, CheckBase, Dtype, Json, adapter_references
from lorry.cli.output import note, out, print_json, table
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
from lorry.core.errors import OptionError, near_misses

Composition = dict[str, float]


@dataclass(frozen=True)
class Prompt:
    """A text and the adapters that apply to its row; empty for the bare base."""

    text: str
    adapters: Composition


def generate(
    base: BaseArgument,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", metavar="[NAME=]DIR[:WEIGHT]", help="Adapter to load; repeatable."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="[NAME[:W][+NAME[:W]]::]TEXT",
            help="Prompt; repeatable. `math::2+2=` uses one adapter, `math:0.7+story:0.3::text` a mixture, "
            "`none::text` the bare base, and plain text all given adapters. `::text` keeps any `::` in the text.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help='JSONL file with {"prompt": text, "adapter": name, {name: weight} or null} on each line.'),
    ] = None,
    as_chat: Annotated[
        bool, typer.Option("--chat", help="Each prompt is what a user says, in the chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option("--system", help="What the system message says, with --chat.")] = None,
    template: Template = None,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Stop = None,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts in one batch.")] = 32,
    check_base: CheckBase = True,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Continue prompts; every prompt may use adapters of its own, in one batch."""
    import lorry
    from lorry.cli.bases import load_base, load_tokenizer

    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, tuple(stop or ()))
    references = adapter_references(adapter)
    wanted = read_prompts(prompt, prompts, {name: weight for name, (_, weight) in references.items()})
    tokenizer = load_tokenizer(base)
    coded = _coded(tokenizer, wanted, as_chat, system, template)
    model = load_base(base, dtype)
    receipts = [lorry.load(model, path, name=n, check_base=check_base).receipt for n, (path, _) in references.items()]
    for receipt in receipts:
        note(str(receipt))
    texts = continue_all(model, tokenizer, coded, [p.adapters for p in wanted], sampling, batch_size, seed)
    if as_json:
        rows = [{"prompt": p.text, "adapters": p.adapters, "text": t} for p, t in zip(wanted, texts, strict=True)]
        print_json({"rows": rows, "receipts": [receipt.to_dict() for receipt in receipts]})
        return
    shown = [(i, label(p.adapters), p.text, text) for i, (p, text) in enumerate(zip(wanted, texts, strict=True))]
    out().print(table("", ("row", "adapters", "prompt", "continuation"), shown, right=("row",)))


def _coded(
    tokenizer: Any, prompts: Sequence[Prompt], as_chat: bool, system: str | None, template: Path | None
) -> list[str | list[int]]:
    """Return the prompts' texts, or the tokens of the conversations that they begin."""
    if as_chat:
        rules = template_of(tokenizer, template)
        return [chat_tokens(tokenizer, conversation(p.text, system), rules) for p in prompts]
    if system or template:
        raise OptionError("--system and --template are for conversations; give --chat, too.")
    return [p.text for p in prompts]


def read_prompts(texts: Sequence[str] | None, file: Path | None, loaded: Mapping[str, float]) -> list[Prompt]:
    """Return all prompts of the command line and of a file, each with its composition."""
    found = [parse_prompt(text, loaded) for text in texts or ()]
    if file is not None:
        from lorry.training.data import load_records

        for index, record in enumerate(load_records(file)):
            unknown = record.keys() - {"prompt", "adapter"}
            if not isinstance(record.get("prompt"), str) or unknown:
                raise OptionError(
                    f"{file}: record {index} has the keys {sorted(record)}; expected 'prompt' (text) and 'adapter'."
                )
            given = record.get("adapter", dict(loaded))
            given = {} if given is None else {given: loaded.get(given, 1.0)} if isinstance(given, str) else given
            found.append(Prompt(record["prompt"], _checked(given, loaded, f"{file}: record {index}")))
    if not found:
        raise OptionError("There is nothing to continue: give --prompt TEXT or --prompts FILE.")
    return found


def parse_prompt(text: str, loaded: Mapping[str, float]) -> Prompt:
    """Return the prompt that ``[COMPOSITION::]TEXT`` means.

    Raises
    ------
    OptionError
        The text before ``::`` names an adapter that is not loaded.
    """
    head, found, rest = text.partition("::")
    if not found or not head:
        return Prompt(rest if found else text, dict(loaded))
    hint = " For a text that contains '::', begin it with '::'."
    return Prompt(rest, parse_composition(head, loaded, f"--prompt {text!r}", hint))


def parse_composition(text: str, loaded: Mapping[str, float], where: str, hint: str = "") -> Composition:
    """Return the adapters that ``NAME[:WEIGHT][+NAME[:WEIGHT]]`` means; none for ``none``.

    Raises
    ------
    OptionError
        A name that is not loaded, or a weight that is no number; `where` and `hint` begin and end the message.
    """
    if text == "none" and "none" not in loaded:
        return {}
    composition: Composition = {}
    for part in text.split("+"):
        name, weighted, weight = part.strip().partition(":")
        try:
            composition[name] = float(weight) if weighted else loaded.get(name, 1.0)
        except ValueError:
            raise OptionError(f"{where}: {weight!r} is no weight; expected NAME:0.7.") from None
    return _checked(composition, loaded, where, hint)


def _checked(composition: Mapping[str, Any], loaded: Mapping[str, float], where: str, hint: str = "") -> Composition:
    if not isinstance(composition, Mapping):
        raise OptionError(f"{where}: 'adapter' must be a name, {{name: weight}} or null, found {composition!r}.")
    for name in composition:
        if name not in loaded:
            there = ", ".join(loaded) or "none"
            raise OptionError(
                f"{where}: no adapter '{name}' is given (given: {there}).{near_misses(str(name), loaded)}{hint}"
            )
    return {str(k): float(v) for k, v in composition.items()}


def continue_all(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | list[int]],
    adapters: Sequence[Composition],
    sampling: Sampling,
    batch_size: int,
    seed: int,
) -> list[str]:
    """Return the continuation of each prompt (a text or its tokens) with its adapters, in left-padded batches."""
    import torch

    import lorry
    from lorry.cli.measure import decode

    torch.manual_seed(seed)
    options = sampling.options(tokenizer)
    texts: list[str] = []
    for start in range(0, len(prompts), batch_size):
        chunk, chosen = prompts[start : start + batch_size], adapters[start : start + batch_size]
        if any(chosen):
            with lorry.rows(model, [composition or None for composition in chosen]):
                texts += decode(model, tokenizer, chunk, options)
        else:
            lorry.activate(model, None)
            texts += decode(model, tokenizer, chunk, options)
    return [sampling.cut(text) for text in texts]


def label(adapters: Composition) -> str:
    """Return a composition for people."""
    if not adapters:
        return "(base)"
    return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in adapters.items())
