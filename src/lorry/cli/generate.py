"""``lorry generate``: several prompts in one batch, each row with its own adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from lorry.cli.arguments import Dtype, Json, adapter_references
from lorry.cli.output import note, out, print_json, table
from lorry.core.errors import OptionError, near_misses

Composition = dict[str, float]


@dataclass(frozen=True)
class Prompt:
    """A text and the adapters that apply to its row; empty for the bare base."""

    text: str
    adapters: Composition


def generate(
    base: Annotated[str, typer.Argument(help="'pocket', or a local Hugging Face model folder.")],
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
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest continuation.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus, with a temperature.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts in one batch.")] = 32,
    check_base: Annotated[
        bool, typer.Option("--check-base/--any-base", help="Refuse adapters that were made for another base.")
    ] = True,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Continue prompts; every prompt may use adapters of its own, in one batch."""
    import lorry
    from lorry.cli.bases import load_base, load_tokenizer

    references = adapter_references(adapter)
    wanted = read_prompts(prompt, prompts, {name: weight for name, (_, weight) in references.items()})
    tokenizer = load_tokenizer(base)
    model = load_base(base, dtype)
    receipts = []
    for name, (path, _) in references.items():
        loaded = lorry.load(model, path, name=name, check_base=check_base)
        receipts.append(loaded.receipt.to_dict())
        note(str(loaded.receipt))
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        options.update(temperature=temperature, top_p=top_p)
    texts = continue_all(model, tokenizer, wanted, options, batch_size, seed)
    rows = [{"prompt": p.text, "adapters": p.adapters, "text": t} for p, t in zip(wanted, texts, strict=True)]
    if as_json:
        print_json({"rows": rows, "receipts": receipts})
        return
    shown = [(i, _label(p.adapters), p.text, t) for i, (p, t) in enumerate(zip(wanted, texts, strict=True))]
    out().print(table("", ("row", "adapters", "prompt", "continuation"), shown, right=("row",)))


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
    if head == "none" and "none" not in loaded:
        return Prompt(rest, {})
    composition: Composition = {}
    for part in head.split("+"):
        name, weighted, weight = part.strip().partition(":")
        try:
            composition[name] = float(weight) if weighted else loaded.get(name, 1.0)
        except ValueError:
            raise OptionError(f"--prompt {text!r}: {weight!r} is no weight; expected NAME:0.7.") from None
    return Prompt(rest, _checked(composition, loaded, f"--prompt {text!r}"))


def _checked(composition: Mapping[str, Any], loaded: Mapping[str, float], where: str) -> Composition:
    if not isinstance(composition, Mapping):
        raise OptionError(f"{where}: 'adapter' must be a name, {{name: weight}} or null, found {composition!r}.")
    for name in composition:
        if name not in loaded:
            there = ", ".join(loaded) or "none"
            raise OptionError(
                f"{where}: no adapter '{name}' is given (given: {there}).{near_misses(str(name), loaded)} For a text "
                "that contains '::', begin it with '::'."
            )
    return {str(k): float(v) for k, v in composition.items()}


def continue_all(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    options: Mapping[str, Any],
    batch_size: int,
    seed: int,
) -> list[str]:
    """Return the continuation of each prompt, in left-padded batches."""
    import torch

    import lorry
    from lorry.cli.measure import decode

    torch.manual_seed(seed)
    texts: list[str] = []
    for start in range(0, len(prompts), batch_size):
        chunk = prompts[start : start + batch_size]
        plain = [p.text for p in chunk]
        if any(p.adapters for p in chunk):
            with lorry.rows(model, [p.adapters or None for p in chunk]):
                texts += decode(model, tokenizer, plain, options)
        else:
            lorry.activate(model, None)
            texts += decode(model, tokenizer, plain, options)
    return texts


def _label(adapters: Composition) -> str:
    if not adapters:
        return "(base)"
    return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in adapters.items())
