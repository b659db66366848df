"""From a job to examples that its base can take: read, encoded, held out, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .data import Record, load_records, require_column
from .data_errors import DataError, suggest
from .jobs import Job
from .task import Examples, Prepared, Setting, Task


def prepare(job: Job, setting: Setting) -> Prepared:
    """Read a job's data, make examples of it, and check them against the model.

    Raises
    ------
    DataError
        Data that cannot be read, encoded, or used with this model.
    """
    task = job.make_objective()
    task.check_model(setting)
    labels = job.labels
    train, labels = _examples(job.data, task, setting, labels, job.task_ids)
    evaluation = None
    if job.eval_data is not None:
        evaluation, _ = _examples(job.eval_data, task, setting, labels, job.task_ids)
    elif job.hold_out:
        train, evaluation = train.hold_out(job.hold_out, task.held_out_seed(job.seed))
    classes = task.classes(setting, train, labels)
    for name, found in (("data", train), ("eval_data", evaluation)):
        if found is not None:
            task.check(setting, found, name)
    return Prepared(task, train, evaluation, labels, classes)


def _examples(
    data: Any, task: Task, setting: Setting, labels: tuple[str, ...] | None, task_ids: Any
) -> tuple[Examples[Any], tuple[str, ...] | None]:
    if isinstance(data, Examples):
        if isinstance(task_ids, int):
            data = type(data)(data.examples, data.report, (task_ids,) * len(data))
        elif task_ids is not None:
            raise DataError("Examples in memory have no columns: give task_ids as a number, or Examples with task_ids.")
        return data, labels
    records = load_records(data)
    if labels is None:
        labels = task.labels_of(records)
    if task_ids is None:
        return task.examples(setting, records, labels), labels
    groups: dict[int, list[Record]] = {}
    for record, tag in zip(records, record_tasks(records, task_ids), strict=True):
        groups.setdefault(tag, []).append(record)
    # the tasks are encoded apart, so that examples that hold several records hold those of one task
    sets = {tag: task.examples(setting, groups[tag], labels) for tag in sorted(groups)}
    return _joined(sets), labels


def record_tasks(records: Sequence[Record], task_ids: Any) -> list[int]:
    """Return the task of each record.

    Parameters
    ----------
    records
        The data.
    task_ids
        A number for all, the name of a column that holds numbers, or ``{column: NAME, names: [...]}`` for a column
        that holds names, which are numbered in this order.

    Raises
    ------
    DataError
        No such column, or a value that is neither a number from 0 nor one of the names.
    """
    if isinstance(task_ids, int):
        return [task_ids] * len(records)
    column, names = (task_ids, None) if isinstance(task_ids, str) else (task_ids["column"], task_ids.get("names"))
    require_column(records, column, "task_ids")
    found = []
    for index, record in enumerate(records):
        value = record.get(column)
        if names is not None:
            if value not in names:
                raise DataError(
                    f"Record {index}: unknown task {value!r} in column {column!r}; {suggest(str(value), names)}"
                )
            found.append(list(names).index(value))
            continue
        text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
        if isinstance(value, bool) or not text.isdigit():
            raise DataError(
                f"record {index}: column {column!r} holds {value!r}, expected the number of a task from 0; for names "
                "write task_ids: {column: " + column + ", names: [...]}"
            )
        found.append(int(text))
    return found


def _joined(sets: Mapping[int, Examples[Any]]) -> Examples[Any]:
    """Return the examples of several tasks as one set that knows the task of each."""
    parts = list(sets.values())
    examples = tuple(e for part in parts for e in part.examples)
    tags = tuple(tag for tag, part in sets.items() for _ in part.examples)
    report = parts[0].report if len(parts) == 1 else parts[0].joined_report(parts)
    return type(parts[0])(examples, report, tags)
