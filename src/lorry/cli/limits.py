"""``lorry limits``: whether attention is where fast gradients can exist, head by head, before and after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorry.cli.arguments import BaseArgument, CheckBase, Dtype, Json, adapter_reference
from lorry.cli.output import note, out, print_json, table
from lorry.core.errors import OptionError

if TYPE_CHECKING:
    from lorry.attention import HeadLimits

#: Heads that are shown one by one; of more, the one of each module with the largest ratio.
MOST_ROWS = 64


def limits(
    base: BaseArgument,
    data: Annotated[str, typer.Option("--data", help="Rows to measure on: a file or a folder.")],
    adapter: Annotated[
        str | None, typer.Option("--adapter", "-a", metavar="[NAME=]DIR[:WEIGHT]", help="Measure with this one, too.")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(help="causal, completion or chat; the adapter's, or what the columns say, if not given."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split or slice of the data, e.g. test or [90%:].")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most this many records.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="At most this many tokens of each row.")] = 512,
    tolerance: Annotated[float, typer.Option(help="Relative error of a probability that the degree is for.")] = 1e-3,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw ratios and radii as maps into this PNG file.")
    ] = None,
    all_heads: Annotated[bool, typer.Option("--all", help="Show every head, however many there are.")] = False,
    check_base: CheckBase = True,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Show how large the queries, keys and logits of each attention head are, and whether low-rank factors could
    compute its gradients in almost linear time.
    """
    if tolerance <= 0:
        raise OptionError(f"--tolerance must be above 0, found {tolerance:g}.")
    reference = None if adapter is None else adapter_reference(adapter)
    model, tokenizer = _loaded(base, dtype)
    rows = _rows(tokenizer, data, split, limit, length, objective, reference)
    found = _measured(model, rows, tolerance, reference, check_base)
    panels = {name: [head.to_dict() for head in heads] for name, heads in found.items()}
    if plot is not None:
        from lorry.cli.pictures import limits_map

        named = f"{base}, {reference[0]}" if reference else base
        limits_map(panels, plot, f"Attention heads of {named}: {len(rows)} rows of up to {max(map(len, rows))} tokens")
        note(f"wrote {plot}")
    if as_json:
        print_json({"base": base, "adapter": adapter, "rows": len(rows), "tolerance": tolerance, **panels})
    else:
        _print(panels, all_heads)


def _loaded(base: str, dtype: str) -> tuple[Any, Any]:
    from lorry.cli.bases import load_base, load_tokenizer

    tokenizer = load_tokenizer(base)
    model: Any = load_base(base, dtype)
    if getattr(model.config, "is_encoder_decoder", False):
        raise OptionError(
            f"{base} is an encoder with a decoder, and rows of text are no whole call of it. Measure it in Python with "
            "lorry.attention.head_limits, which takes the arguments of each call."
        )
    return model, tokenizer


def _rows(
    tokenizer: Any,
    data: str,
    split: str | None,
    limit: int,
    length: int,
    objective: str | None,
    reference: tuple[str, Path, float] | None,
) -> list[Any]:
    """Return the tokens of each row."""
    from lorry.cli.objective import chosen_objective, training_facts
    from lorry.training.data import load_records

    records = load_records(data, split=split, limit=limit)
    facts = [] if reference is None else [training_facts(reference[1])]
    if objective is None and not any(facts):
        columns = set(records[0]) if records else set()
        objective = "completion" if "prompt" in columns else "chat" if "messages" in columns else "causal"
    goal = chosen_objective(objective, {}, facts)
    labels = tuple(goal.label_names(records)) if goal.task == "sequence-classification" else None
    encoded = goal.encode(tokenizer, records, labels=labels)
    return [row.input_ids[:length].long() for row in encoded.examples]


def _measured(
    model: Any, rows: Sequence[Any], tolerance: float, reference: tuple[str, Path, float] | None, check_base: bool
) -> dict[str, list[HeadLimits]]:
    """Return the figures of every head without the adapter and, where there is one, with it."""
    import lorry
    from lorry.attention import head_limits

    calls = [{"input_ids": row[None].to(model.device)} for row in rows]
    found = {"before": head_limits(model, calls, tolerance=tolerance)}
    if reference is not None:
        name, path, weight = reference
        note(str(lorry.load(model, path, name=name, check_base=check_base).receipt))
        lorry.activate(model, {name: weight})
        found["after"] = head_limits(model, calls, tolerance=tolerance)
    return found


def _print(panels: Mapping[str, Sequence[Mapping[str, Any]]], all_heads: bool) -> None:
    first, last = panels["before"], panels.get("after", panels["before"])
    pairs = list(zip(first, last, strict=True))
    whole = len(pairs)
    if whole > MOST_ROWS and not all_heads:
        most: dict[str, Any] = {}
        for pair in pairs:
            path = pair[1]["path"]
            if path not in most or pair[1]["ratio"] > most[path][1]["ratio"]:
                most[path] = pair
        pairs = list(most.values())
    both = len(panels) > 1

    def shown(pair: Any, key: str) -> str:
        texts = ["-" if one[key] is None else f"{one[key]:.3g}" for one in (pair if both else pair[:1])]
        return " > ".join(texts)

    names = {"gamma": "Γ", "ratio": "Γ / √ln L", "radius": "radius R", "degree": "degree"}
    keys = names | ({"query_update": "update of q"} if both else {})
    rows = [
        (
            pair[1]["path"],
            pair[1]["head"],
            *(shown(pair, key) for key in keys),
            _count(pair[1]["features"]),
            "yes" if pair[1]["feasible"] else "no",
        )
        for pair in pairs
    ]
    columns = ("attention", "head", *keys.values(), "features", "fast")
    arrow = ", without > with the adapter" if both else ""
    title = f"{whole} heads, up to {first[0]['length']} tokens{arrow}"
    out().print(table(title, columns, rows, right=columns[1:-1]))
    if len(pairs) < whole:
        note(f"the head of each module with the largest ratio is shown; --all shows all {whole}")
    fast = sum(one["feasible"] for one in last)
    out().print(f"{fast} of {whole} heads could have their gradients from factors smaller than the probabilities.")


def _count(features: int | None) -> str:
    """Return a number of features, of many only the order."""
    return "-" if features is None else f"{features:,}" if features < 10**7 else f"{features:.0e}"
