"""``--set KEY=VALUE``: values of a run's YAML replaced from the command line, nested ones too."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import yaml

from lorry.cli.arguments import number
from lorry.core.errors import OptionError, near_misses

#: Parts of a job that are a name, or a mapping with the name and options.
_NAMED = ("method", "objective", "start")


def override(
    values: Mapping[str, Any], texts: Sequence[str], top: Collection[str], *, job: str | None = None
) -> dict[str, Any]:
    """Return a run's values with some replaced.

    ``base=DIR`` and ``defaults.method.rank=4`` name a place in the file; ``jobs.1.seed=3`` or ``jobs.NAME.seed=3`` one
    job; anything else, such as ``learning_rate=1e-3`` or ``rank=4``, is set in every job. Mappings on the way are made.

    Parameters
    ----------
    values
        Of the file; stays as it is.
    texts
        Read as YAML behind the first ``=``, in this order.
    top
        The names of options of the run itself.
    job
        Where the file's only job stands; None where there is a list of ``jobs``.

    Raises
    ------
    OptionError
        A text without ``=``, no such job, or a way that leads through something that is no mapping.
    """
    changed = copy.deepcopy(dict(values))
    for text in texts:
        way, found, raw = text.partition("=")
        if not found or not way.strip(".- "):
            raise OptionError(f"--set expects KEY=VALUE, found {text!r}.")
        try:
            value = number(yaml.safe_load(raw))
        except yaml.YAMLError as error:
            raise OptionError(f"--set {way}: cannot read {raw!r} as a value.") from error
        first, _, rest = way.partition(".")
        if first == "jobs" and rest and job is None:
            _put(*_job_of(changed, rest), value, way)
        elif first in top:
            _put(changed, way.split("."), value, way)
        elif job is not None:
            _put(changed, [job, *way.split(".")], value, way)
        else:
            for each in _jobs(changed):
                inside = each.get("method")
                if isinstance(inside, dict) and way in inside and way != "method":  # rank=4 where the file nests it
                    _put(inside, [way], value, way)
                else:
                    _put(each, way.split("."), value, way)
    return changed


def _jobs(values: dict[str, Any]) -> list[dict[str, Any]]:
    jobs = values.get("jobs")
    found = [jobs] if isinstance(jobs, dict) else list(jobs) if isinstance(jobs, list | tuple) else []
    return [job for job in found if isinstance(job, dict)]


def _job_of(values: dict[str, Any], way: str) -> tuple[dict[str, Any], list[str]]:
    """Return the job that the beginning of a way names, by number or by its name, which may have dots in it."""
    jobs = _jobs(values)
    named = {str(job.get("name", f"job-{i}")): job for i, job in enumerate(jobs)}
    for name in sorted(named, key=len, reverse=True):
        if way.startswith(f"{name}."):
            return named[name], way[len(name) + 1 :].split(".")
    index, _, rest = way.partition(".")
    if index.isdigit() and int(index) < len(jobs) and rest:
        return jobs[int(index)], rest.split(".")
    raise OptionError(
        f"--set jobs.{way}: there is no such job.{near_misses(index, named)} Write jobs.NAME.KEY with a name of: "
        f"{', '.join(named)}; or jobs.N.KEY with a number from 0."
    )


def _put(values: dict[str, Any], keys: Sequence[str], value: Any, way: str) -> None:
    *parents, last = (key.replace("-", "_") for key in keys)
    for key in parents:
        inner = values.get(key)
        if isinstance(inner, str) and key in _NAMED:  # a name alone, such as `method: lora`
            inner = {key: inner}
        if inner is not None and not isinstance(inner, dict):
            raise OptionError(f"--set {way}: '{key}' is {inner!r} in the file, and nothing can be set inside of it.")
        values[key] = inner = {} if inner is None else inner
        values = inner
    values[last] = value
