"""``lorry eval``: a base with and without adapters on held-out data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lorry.cli.arguments import Dtype, Json, adapter_references, key_values
from lorry.cli.output import note, out, print_json, progress, table
from lorry.core.errors import OptionError

Columns = dict[str, dict[str, float]]


def evaluate(
    base: Annotated[str, typer.Argument(help="'pocket', or a local Hugging Face model folder.")],
    data: Annotated[str, typer.Option("--data", help="Held-out data: a file or a folder.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter", "-a", metavar="[NAME=]DIR[:WEIGHT]", help="Adapter to measure; repeatable."
        ),
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
        typer.Option(
            "--objective-option", metavar="KEY=VALUE", help="An option of the objective; repeatable."
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split or slice of the data, e.g. test or [90%:].")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many records.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a batch.")] = 16,
    exact: Annotated[
        bool, typer.Option("--exact/--no-exact", help="Also generate, and count exact answers (completion).")
    ] = True,
    check_base: Annotated[
        bool, typer.Option("--check-base/--any-base", help="Refuse adapters that were made for another base.")
    ] = True,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure loss and perplexity, accuracy of a classifier, or exact match of completions, before and after."""
    import lorry
    from lorry.cli.bases import load_base, load_for_training, load_tokenizer
    from lorry.training.data import load_records

    references = adapter_references(adapter)
    facts = [training_facts(path) for path, _ in references.values()]
    goal = chosen_objective(objective, key_values(objective_option, "--objective-option"), facts)
    records = load_records(data, split=split, limit=limit)
    labels = next((tuple(f["labels"]) for f in facts if f.get("labels")), None)
    tokenizer = load_tokenizer(base)
    classifies = goal.task == "sequence-classification"
    if classifies:
        labels = labels or goal.label_names(records)
        model: Any = load_for_training(base, dtype, goal.task, len(labels))[0]
    else:
        model = load_base(base, dtype)
    encoded = goal.encode(tokenizer, records, labels=labels)
    for name, (path, _) in references.items():
        receipt = lorry.load(model, path, name=name, check_base=check_base).receipt
        note(str(receipt))
    compositions: dict[str, Mapping[str, float]] = {} if classifies and references else {"base": {}}
    compositions |= {name: {name: weight} for name, (_, weight) in references.items()}
    if together and len(references) > 1:
        compositions["together"] = {name: weight for name, (_, weight) in references.items()}
    classes = len(labels) if classifies and labels else None
    pairs = _pairs(goal, records) if exact and goal.name == "completion" else None
    measured = _measure(model, tokenizer, goal, encoded.rows, compositions, classes, pairs, batch_size)
    if as_json:
        print_json(
            {"base": base, "objective": goal.name, "data": encoded.report.as_dict(), "results": measured}
        )
        return
    names = list(dict.fromkeys(k for m in measured.values() for k in m))
    rows = [(label, *(_shown(k, m.get(k)) for k in names)) for label, m in measured.items()]
    out().print(table(f"{goal.name}: {encoded.report}", ("", *names), rows, right=names))


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


def training_facts(path: Path) -> dict[str, Any]:
    """Return what an adapter's metadata say about its training; nothing for adapters of other tools."""
    manifest = path / "lorry.json"
    if not manifest.is_file():
        return {}
    from lorry.core.files.manifest import read_manifest

    found = read_manifest(manifest).metadata.get("training")
    return dict(found) if isinstance(found, Mapping) else {}


def chosen_objective(name: str | None, options: Mapping[str, Any], facts: Sequence[Mapping[str, Any]]) -> Any:
    """Return the objective that was asked for, or else the one that the first adapter with a known one was trained with."""
    from lorry.training.jobs import Job
    from lorry.training.objectives import OBJECTIVES, make_objective

    if name is not None:
        return make_objective(name, options)
    fields = {f.name for f in dataclasses.fields(Job)}
    for fact in facts:
        job = fact.get("job")
        if not isinstance(job, Mapping):
            continue
        kept = {k: job[k] for k in ("objective", "columns", "max_length") if k in job and k in fields}
        trained = Job.from_dict({"name": "eval", "data": "-", **kept}).make_objective()
        # rows are never packed here: each is measured on its own
        known = {f.name for f in dataclasses.fields(trained)}  # type: ignore[arg-type]
        unknown = sorted(options.keys() - known)
        if unknown:
            raise OptionError(
                f"Objective '{trained.name}' has no option '{unknown[0]}'. It has: {', '.join(sorted(known))}."
            )
        changed = {**({"packing": False} if "packing" in known else {}), **options}
        return dataclasses.replace(trained, **changed)  # type: ignore[type-var]
    raise OptionError(
        f"No adapter says what it was trained for: give --objective (one of {', '.join(OBJECTIVES)})."
    )


def _pairs(goal: Any, records: Sequence[Any]) -> list[tuple[str, str]]:
    from lorry.training.data import guess_column
    from lorry.training.objectives import COMPLETION_COLUMNS

    column = goal.completion_column or guess_column(
        records, COMPLETION_COLUMNS, "completion", "completion_column"
    )
    return [(goal.prompt(r), str(r[column])) for r in records if r.get(column) not in (None, "")]


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if name in ("accuracy", "token_accuracy", "exact_match", "macro_f1"):
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
