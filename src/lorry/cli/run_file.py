"""The YAML of ``lorry train``: base, output folder, jobs; read strictly and described by a JSON schema."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from lorry.cli.overrides import override
from lorry.cli.yaml_text import yaml_mapping
from lorry.core.errors import OptionError
from lorry.core.options import check_options, from_options, option
from lorry.training.aliases import EARLIER, FOREIGN, renamed
from lorry.training.heads import HEADS
from lorry.training.jobs import Job, jobs_from
from lorry.training.pass_planner import planner_from
from lorry.training.short_forms import OTHER_NAMES, PARTS, called_here, method_options, spelled_out


@dataclass(frozen=True)
class RunFile:
    """Everything that one call of ``lorry train`` does."""

    base: str = option(
        MISSING, "'pocket', a local Hugging Face model folder, or a name on the hub (OWNER/NAME@REVISION)."
    )
    out: str = option(MISSING, "Folder for adapters, checkpoints, metrics and the report.")
    jobs: Any = option(MISSING, "Jobs that are trained at once on the base, each a mapping of job options.")
    defaults: Any = option(None, "Job options that hold for every job which does not set them itself.")
    dtype: str = option("auto", "Dtype of the base in memory.", choices=("auto", "float32", "bfloat16", "float16"))
    task: str = option(
        "auto",
        "Head of the base; auto takes what the jobs' objectives need.",
        choices=("auto", *HEADS),
    )
    checkpoint_every: int = option(
        0, "Steps between checkpoints, from which --resume goes on; 0 writes one at the end.", at_least=0
    )
    keep_checkpoints: int = option(2, "How many checkpoints stay.", at_least=1)
    max_pad_ratio: float | None = option(
        2.0,
        "Most tokens of a joint pass, padding included, as a multiple of what the jobs have alone; null joins all.",
        at_least=1,
    )
    max_tokens: int | None = option(None, "Most tokens of a joint pass, padding included, to bound memory.", at_least=1)
    planner: Any = option(
        "joined",
        "How examples are put into passes: joined, lorafusion, or {planner: name, **options} such as capacity.",
    )
    max_memory: str | None = option(
        None, "Memory that training may take, weights included, e.g. 24GiB; passes are made small enough."
    )
    loggers: Any = option(
        None, "Where metrics go besides metrics.jsonl: tensorboard, wandb, or {logger: name, **options}; one or a list."
    )
    pipeline: Any = option(
        None, "{stages: N} cuts the base into stages, one for each of N processes; planner lorafusion fills them."
    )
    shard: bool = option(
        True, "On several processes, spread the base's weights over them (FSDP2); false keeps them whole in each."
    )
    base_dropout: bool = option(False, "Let the base's own dropout be on; a job's result then depends on its company.")

    def __post_init__(self) -> None:
        """Check every option."""
        check_options(self)
        planner_from(self.planner)

    def job_list(self) -> list[Job]:
        """Return the jobs with the defaults filled in, checked."""
        defaults = self.defaults or {}
        if not isinstance(defaults, Mapping):
            raise OptionError(f"'defaults' must be a mapping of job options, found {defaults!r}.")
        jobs = self.jobs if isinstance(self.jobs, list | tuple) else [self.jobs]
        filled = []
        for index, job in enumerate(jobs):
            if not isinstance(job, Mapping):
                raise OptionError(f"Job {index} must be a mapping of options, found {job!r}.")
            filled.append({"name": f"job-{index}", **spelled_out(job, defaults, known=JOB_OPTIONS)})
        return jobs_from(filled)


#: The names of a run's options, and of a job's.
RUN_OPTIONS = frozenset(f.name for f in dataclasses.fields(RunFile))
JOB_OPTIONS = frozenset(f.name for f in dataclasses.fields(Job))
#: Names of the first edition, which go with the next release.
_EARLIER = {"output": "out"}


def read_run_file(path: Path, overrides: Sequence[str] = ()) -> RunFile:
    """Read and check a YAML file.

    Parameters
    ----------
    path
        Of the file.
    overrides
        Texts ``KEY=VALUE`` that replace values of the file; see `override`.

    Raises
    ------
    OptionError
        Not there, not YAML, a doubled or unknown key (with near misses), or a bad value.
    """
    values = yaml_mapping(path, "base, out and jobs")
    try:
        return run_from(override(values, overrides, RUN_OPTIONS))
    except OptionError as error:
        raise OptionError(f"{path}: {error}") from None


def run_from(values: Mapping[str, Any]) -> RunFile:
    """Build a run from parsed YAML, and check its names.

    Raises
    ------
    OptionError
        An unknown or missing key, with where it belongs or what it is called here.
    """
    values = renamed(values, names=_EARLIER, what="run option")
    known = RUN_OPTIONS
    jobs = {*JOB_OPTIONS, *EARLIER, *FOREIGN, *(f"{part}_options" for part in PARTS), *method_options()}
    stray = next((k for k in values if k not in known), None)
    if stray is not None:
        said = called_here(stray) or ""
        name = OTHER_NAMES[stray][0] if said else stray
        if name in jobs and name not in known:
            raise OptionError(f"{said or f'{stray!r} is a job option.'} Put it under jobs or defaults.")
        if said:
            raise OptionError(said)
    return from_options(RunFile, {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()})


def schema() -> dict[str, Any]:
    """Return the JSON schema of the YAML, derived from the option declarations."""
    job = _object(Job)
    job["required"] = ["data"]  # a name is given to a job without one
    for other, now in {**EARLIER, **FOREIGN}.items():
        job["properties"][other] = {**job["properties"][now], "description": f"Another name of {now}."}
        job["properties"][other] |= {"deprecated": True} if other in EARLIER else {}
    for part in PARTS:
        text = f"Options of the {part}, beside its name or in place of a mapping."
        job["properties"][f"{part}_options"] = {"description": text, "type": "object"}
    for short in sorted(method_options() - job["properties"].keys()):
        job["properties"][short] = {"description": "An option of the method, in short."}
    properties = _object(RunFile)
    properties["properties"]["output"] = {**properties["properties"]["out"], "deprecated": True}
    properties["properties"]["jobs"] |= {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/job"}}
    defaults = {k: v for k, v in job.items() if k != "required"}
    properties["properties"]["defaults"] |= {k: v for k, v in defaults.items() if k != "description"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lorry train",
        **properties,
        "$defs": {"job": job},
    }


_TYPES = {
    "int": "integer",
    "float": "number",
    "str": "string",
    "bool": "boolean",
    "Mapping": "object",
    "tuple": "array",
}


def _object(cls: type) -> dict[str, Any]:
    fields = dataclasses.fields(cls)
    return {
        "type": "object",
        "description": (cls.__doc__ or "").partition("\n")[0],
        "additionalProperties": False,
        "required": [f.name for f in fields if f.default is MISSING and f.default_factory is MISSING],
        "properties": {f.name: _property(f) for f in fields},
    }


def _property(field: dataclasses.Field[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"description": field.metadata.get("help", "")}
    declared = str(field.type)
    first = re.split(r"[\[|\s]", declared, maxsplit=1)[0]
    if first in _TYPES:
        kind = _TYPES[first]
        found["type"] = [kind, "null"] if "None" in declared else kind
    names = {
        "at_least": "minimum",
        "above": "exclusiveMinimum",
        "at_most": "maximum",
        "below": "exclusiveMaximum",
    }
    found |= {names[rule]: field.metadata[rule] for rule in names if rule in field.metadata}
    if "choices" in field.metadata:
        found["enum"] = list(field.metadata["choices"])
    if field.default is not MISSING:
        found["default"] = list(field.default) if isinstance(field.default, tuple) else field.default
    return found
