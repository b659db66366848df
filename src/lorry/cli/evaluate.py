"""``lorry eval``: a base with and without adapters on held-out data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lorry.cli.arguments import BaseArgument, CheckBase, Dtype, Json, adapter_references, key_values
from lorry.cli.output import note, out, print_json, progress, table
from lorry.core.errors import OptionError

Columns = dict[str, dict[str, float]]


def evaluate(
    base: BaseArgument,
    data: Annotated[str, typer.Option("--data", help="Held-out data: a file or a folder.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", metavar="[NAME=]DIR[:WEIGHT]", help="Adapter to measure; repeatable."),
    ] = None,
    together: Annotated[
        bool,
        typer.Option("--together", help="Also measure all adapters as one composition, with their weights."),
    ] = False,
    objective: Annotated[
        str | None,
        typer.Option(
            help="causal, completion, chat or classification; what the first adapter was trained with if not given."
        ),
    ] = None,
    objective_option: Annotated[
        list[str] | None,
        typer.Option("--objective-option", metavar="KEY=VALUE", help="An option of the objective; repeatable."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split or slice of the data, e.g. test or [90%:].")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many records.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a batch.")] = 16,
    exact: Annotated[
        bool, typer.Option("--exact/--no-exact", help="Also generate, and count exact answers (completion).")
    ] = True,
    check_base: CheckBase = True,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure loss, accuracy of a classifier, or exact match of completions, before and after."""
    from lorry.cli.objective import chosen_objective, training_facts
    from lorry.training.data import load_records

    references = adapter_references(adapter)
    facts = [training_facts(path) for path, _ in references.values()]
    goal = chosen_objective(objective, key_values(objective_option, "--objective-option"), facts)
    records = load_records(data, split=split, limit=limit)
    labels = _labels(goal, records, facts)
    model, tokenizer = _loaded(base, dtype, references, goal.task, labels, check_base)
    encoded = goal.encode(tokenizer, records, labels=labels)
    compositions = _compositions(references, together, with_base=not (labels and references))
    pairs = _pairs(goal, records) if exact and goal.name == "completion" else None
    many = len(labels) if labels else None
    measured = _measure(model, tokenizer, goal, encoded.rows, compositions, many, pairs, batch_size)
    if as_json:
        report = encoded.report.as_dict()
        print_json({"base": base, "objective": goal.name, "data": report, "results": measured})
    else:
        _print(f"{goal.name}: {encoded.report}", measured)


def _print(title: str, measured: Columns) -> None:
    names = list(dict.fromkeys(k for m in measured.values() for k in m))
    rows = [(label, *(_shown(k, m.get(k)) for k in names)) for label, m in measured.items()]
    out().print(table(title, ("", *names), rows, right=names))


def _compositions(
    references: Mapping[str, tuple[Path, float]], together: bool, *, with_base: bool
) -> dict[str, Mapping[str, float]]:
    """Return what to measure: the bare base (unless its head is new), each adapter, all of them together."""
    chosen: dict[str, Mapping[str, float]] = {"base": {}} if with_base else {}
    chosen |= {name: {name: weight} for name, (_, weight) in references.items()}
    if together and len(references) > 1:
        chosen["together"] = {name: weight for name, (_, weight) in references.items()}
    return chosen


def _labels(goal: Any, records: Sequence[Any], facts: Sequence[Mapping[str, Any]]) -> tuple[str, ...] | None:
    """Return a classifier's classes in the order of its head: the adapters', or those of the data."""
    if goal.task != "sequence-classification":
        return None
    known = {tuple(f["labels"]) for f in facts if f.get("labels")}
    if len(known) > 1:
        found = " and ".join(", ".join(names) for names in sorted(known))
        raise OptionError(f"The adapters were trained for different classes ({found}); measure them one by one.")
    return known.pop() if known else tuple(goal.label_names(records))


def _loaded(
    base: str,
    dtype: str,
    references: Mapping[str, tuple[Path, float]],
    task: str,
    labels: Sequence[str] | None,
    check_base: bool,
) -> tuple[Any, Any]:
    """Return the base with all adapters, and its tokenizer."""
    import lorry
    from lorry.cli.bases import load_base, load_tokenizer
    from lorry.cli.new_heads import load_for_training

    tokenizer = load_tokenizer(base)
    if labels:
        model: Any = load_for_training(base, dtype, task, len(labels))[0]
    else:
        model = load_base(base, dtype)
    for name, (path, _) in references.items():
        note(str(lorry.load(model, path, name=name, check_base=check_base).receipt))
    return model, tokenizer


def _measure(
    model: Any,
    tokenizer: Any,
    goal: Any,
    rows: Sequence[Any],
    compositions: Mapping[str, Mapping[str, float]],
    classes: int | None,
    pairs: Sequence[tuple[str, str]] | None,
    batch_size: int,
) -> Columns:
    """Return the metrics of every composition."""
    from lorry.cli.measure import apply_only, exact_match, held_out

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    measured: Columns = {}
    batches = -(-len(rows) // batch_size) + (-(-len(pairs) // batch_size) if pairs else 0)
    with progress() as bars:
        for label, composition in compositions.items():
            task = bars.add_task(label, total=batches)

            def tick(task: Any = task) -> None:
                bars.advance(task)

            apply_only(model, composition)
            measured[label] = held_out(model, goal, rows, pad, classes, batch_size, tick)
            if pairs:
                measured[label]["exact_match"] = exact_match(model, tokenizer, pairs, batch_size, tick)
    return measured


def _pairs(goal: Any, records: Sequence[Any]) -> list[tuple[str, str]]:
    from lorry.training.data import guess_column
    from lorry.training.objectives import COMPLETION_COLUMNS

    column = goal.completion_column or guess_column(records, COMPLETION_COLUMNS, "completion", "completion_column")
    return [(goal.prompt(r), str(r[column])) for r in records if r.get(column) not in (None, "")]


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if name in ("accuracy", "token_accuracy", "exact_match", "macro_f1"):
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
