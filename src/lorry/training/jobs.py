"""A job: everything that one training run is made of, as plain data."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from lorry.core.errors import OptionError, near_misses
from lorry.core.method.base import Method
from lorry.core.method.registry import method_from
from lorry.core.options import check_options, from_options, option
from lorry.formats.mixture import adopting

from .aliases import with_aliases
from .data import DataSpec
from .drawn_members import DrawnMembers
from .hooks import Dynamic, by_name, make_dynamics
from .objectives import OBJECTIVES, make_objective
from .presets import parts_of
from .scalings import SCALINGS, Scaling
from .schedule import SCHEDULES, Schedule, warmup_steps
from .short_forms import spelled_out
from .starts import STARTS, Start
from .task import Examples, Task

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,127}")  # also the name of a folder and of an adapter
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@with_aliases
@dataclass(frozen=True)
class Job:
    """One training run on a base that it may share with other jobs.

    Raises
    ------
    OptionError
        A value out of its range, a rule between options broken, or an unknown name (with near
        misses).
    """

    name: str = option(MISSING, "Name of the job and of its adapter.")
    data: Any = option(MISSING, "Training data: a file or folder, a mapping {path, format, split, limit}, or records.")
    method: Any = option(None, "Slug of the method, or a mapping {method: slug, **options}.")
    preset: str | None = option(
        None, "Published name of a method with a start, a scaling and dynamics; see `lorry methods --kind preset`."
    )
    targets: Any = option("all-linear", "Which layers get adapters: a preset, a name, a pattern, or a list of these.")
    exclude: Any = option((), "Layers to leave out, in the same syntax.")
    layers: tuple[int, ...] | None = option(None, "Indices of the transformer blocks to adapt; all if not given.")
    site_options: Mapping[str, Any] | None = option(None, "Pattern -> method options at the layers that match.")
    modules_to_save: Any = option((), "Whole modules to train beside the adapter, such as a new head.")
    objective: Any = option(
        "causal", "Name of what is learned (causal, chat, dpo, ...); or {objective: name, **options}."
    )
    columns: Mapping[str, str] | None = option(None, "Role -> column name, e.g. {text: review, label: stars}.")
    max_length: int | None = option(None, "Tokens of a row; the objective's own default if not given.", at_least=2)
    packing: bool = option(False, "Put several examples into a row.")
    labels: tuple[str, ...] | None = option(None, "Classes in the order of the head; read from the data if not given.")
    task_ids: Any = option(
        None, "Task of each example, for methods that route by it: a number, a column, or {column: NAME, names: [...]}."
    )
    eval_data: Any = option(None, "Held-out data, given like the training data.")
    hold_out: float = option(
        0.0, "Fraction of the training rows to hold out where there is no eval_data.", at_least=0, below=1
    )
    epochs: int | None = option(None, "Passes over the data; one if neither epochs nor steps are given.", at_least=1)
    steps: int | None = option(None, "Optimizer steps, in place of epochs.", at_least=1)
    batch_size: int = option(8, "Rows of a micro-batch.", at_least=1)
    gradient_accumulation_steps: int = option(1, "Micro-batches of an optimizer step.", at_least=1)
    bucketing: int = option(0, "Batch rows of like length, sorted within windows of this many batches.", at_least=0)
    learning_rate: float = option(2e-4, "Learning rate at its highest.", above=0)
    schedule: str = option("constant", "Course of the learning rate.", choices=cast(Any, SCHEDULES))
    schedule_options: Mapping[str, Any] | None = option(None, "Options of the schedule, where it has any.")
    warmup: float = option(0.0, "Steps of linear warm-up, or a fraction of the run if below 1.", at_least=0)
    rate_floor: float = option(0.0, "What is left of the rate at the end, as a fraction.", at_least=0, at_most=1)
    optimizer: str = option("adamw", "Name of an optimizer of torch.optim (adamw, sgd, ...) or of one registered.")
    weight_decay: float = option(0.0, "Weight decay of the optimizer.", at_least=0)
    betas: tuple[float, ...] | None = option(None, "Decay rates of the moments, for optimizers that have them.")
    momentum: float = option(0.0, "Momentum, for optimizers that have it.", at_least=0, below=1)
    max_grad_norm: float | None = option(1.0, "Largest norm of the job's gradient; None does not clip.", above=0)
    calibration: int = option(8, "Micro-batches that a method or a start may see before training.", at_least=1)
    built_from: Any = option(
        (),
        "Adapters that the method takes in, as a mixture does its experts: paths, or names of adapters on the model, "
        "as a list or name -> path or {path, weight}. They say which layers get adapters.",
    )
    members: Any = option(
        (),
        "Adapters that the method makes one update of, as a gate does: paths, or names of adapters on the model, as a "
        "list or name -> path. They are loaded beside it, frozen.",
    )
    drawn_members: int = option(
        0, "Members that a row combines, drawn anew in every pass; 0 combines all of them in all rows.", at_least=0
    )
    start: Any = option(
        None, "How the adapter starts, if not in its method's way: a name, or {start: name, **options}."
    )
    scaling: Any = option(
        None, "How alpha and rank scale the update, if not in the method's way: a name, or {scaling: name, **options}."
    )
    dynamics: Any = option((), "What acts on the training itself: names, or mappings {dynamics: name, **options}.")
    stages: Mapping[str, Any] | None = option(
        None,
        "Stage -> step at which it begins (a fraction of the run if below 1), or several, for dynamics that wait for "
        "one.",
    )
    seed: int = option(0, "Start of the adapter, order of the data, dropout.")
    dtype: str = option("float32", "Type of the adapter's tensors.", choices=tuple(DTYPES))
    eval_every: int = option(0, "Steps between evaluations; 0 evaluates at the start and at the end.", at_least=0)
    eval_batch_size: int = option(16, "Rows of a batch in evaluation.", at_least=1)
    patience: int | None = option(None, "Stop after this many evaluations without a better one.", at_least=1)
    keep_best: bool = option(False, "End with the adapter of the best evaluation instead of the last one.")

    def __post_init__(self) -> None:
        """Check options one by one and against each other, before any data is read."""
        if isinstance(self.learning_rate, str):
            raise OptionError(
                f"Job '{self.name}': learning_rate must be a number, found {self.learning_rate!r} (YAML reads "
                "1e-4 as text; write 1.0e-4)."
            )
        check_options(self)
        if not _NAME.fullmatch(self.name):
            raise OptionError(
                "A job's name consists of letters, digits, '_', '-' and '.', beginning with a letter or digit; "
                f"found {self.name!r}."
            )
        if self.epochs is not None and self.steps is not None:
            raise OptionError(
                f"Job '{self.name}': give epochs or steps, not both (found {self.epochs} and {self.steps})."
            )
        if self.data is None:
            raise OptionError(f"Job '{self.name}' needs training data.")
        evaluated = self.eval_data is not None or self.hold_out > 0
        if not evaluated and (self.eval_every or self.patience or self.keep_best):
            raise OptionError(
                f"Job '{self.name}': eval_every, patience and keep_best need something to evaluate on; give "
                "eval_data, or hold_out as a fraction of the training data."
            )
        if self.patience and not self.eval_every:
            raise OptionError(
                f"Job '{self.name}': patience counts evaluations; set eval_every to the steps between them."
            )
        if self.betas is not None and len(self.betas) != 2:
            raise OptionError(f"Job '{self.name}': betas are two numbers, found {self.betas!r}.")
        self._check_task_ids()
        for part, value in parts_of(self).items():
            object.__setattr__(self, part, value)
        self.make_method()
        self.make_objective()
        self.make_schedule()
        self.make_start()
        self.make_dynamics()
        self._check_built_from()
        self._check_members()
        for stage, at in self._stage_steps():
            if isinstance(at, bool) or not isinstance(at, int | float) or at < 0:
                raise OptionError(f"Job '{self.name}': stage '{stage}' must begin at a step from 0, found {at!r}.")
        judging = [dynamic.name for dynamic in self.make_dynamics() if dynamic.by_task]
        if judging and not (evaluated and self.eval_every):
            raise OptionError(
                f"Job '{self.name}': '{judging[0]}' judges tasks by evaluations; set eval_every, and give eval_data or "
                "hold_out."
            )

    def _stage_steps(self) -> list[tuple[str, Any]]:
        """Return each stage with each step at which it begins."""
        given = (self.stages or {}).items()
        return [(stage, at) for stage, several in given for at in (several if _is_list(several) else [several])]

    def stages_at(self, step: int, total: int) -> list[str]:
        """Return the stages that begin before a step, of a run of `total` steps."""
        return [stage for stage, at in self._stage_steps() if warmup_steps(at, total) == step]

    def _check_task_ids(self) -> None:
        value = self.task_ids
        numbered = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        mapped = isinstance(value, Mapping) and "column" in value and not set(value) - {"column", "names"}
        if not (value is None or isinstance(value, str) or numbered or mapped):
            raise OptionError(
                f"Job '{self.name}': task_ids is a number from 0, the name of a column, or {{column: NAME, names: "
                f"[...]}}; found {value!r}."
            )

    def _check_built_from(self) -> None:
        """Refuse adapters for a method that takes none in, and options that would contradict them."""
        if not self.experts():
            return
        method = self.make_method()
        if not method.adopts():
            raise OptionError(
                f"Job '{self.name}': built_from needs a method that takes other adapters in ({', '.join(adopting())}), "
                f"found '{method.info.slug}'."
            )
        plain = {field.name: field.default for field in dataclasses.fields(Job)}
        for name in ("targets", "exclude", "layers", "site_options", "modules_to_save"):
            if getattr(self, name) != plain[name]:
                raise OptionError(
                    f"Job '{self.name}': built_from says which layers get adapters, so {name} has no place beside it."
                )

    def _check_members(self) -> None:
        """Refuse members of a method that combines none, and evaluations where only steps of training draw them."""
        if self.combined() and "combined" not in self.make_method().capabilities:
            raise OptionError(
                f"Job '{self.name}': members are for a method that combines adapters (gated-fusion), found "
                f"'{self.make_method().info.slug}'."
            )
        if self.drawn_members > len(self.combined()):
            raise OptionError(
                f"Job '{self.name}': drawn_members is {self.drawn_members}, but there are {len(self.combined())} "
                "members; name more (members)."
            )
        if self.drawn_members and (self.eval_data is not None or self.hold_out):
            raise OptionError(
                f"Job '{self.name}': drawn_members is for steps of training, and evaluations would combine no members; "
                "leave out eval_data and hold_out."
            )

    def combined(self) -> dict[str, str]:
        """Return the path (or name on the model) of each member by name."""
        given = [self.members] if isinstance(self.members, str | Path) else self.members
        if not isinstance(given, Mapping):
            given = {Path(item).name: item for item in given} if _distinct(given) else dict(enumerate(given))
        for name, path in given.items():
            if not isinstance(path, str | Path) or not isinstance(name, str) or not _NAME.fullmatch(name):
                raise OptionError(
                    f"Job '{self.name}': members are paths that differ in their last parts, or name -> path with names "
                    f"of letters and digits; found {name!r}: {path!r}."
                )
        return {str(name): str(path) for name, path in given.items()}

    def over_members(self, method: Method) -> Method:
        """Return the method over the job's members; where passes draw them, it is bound to none, and so any will do."""
        if self.drawn_members:
            return method
        given: Any = method  # a combiner, whose option says which
        found: Method = dataclasses.replace(given, over=tuple(self.combined()))
        return found

    def experts(self) -> dict[str, tuple[str, float | None]]:
        """Return path (or name on the model) and weight of each adapter that the method is built from, by name."""
        given, found = self.built_from, {}
        if isinstance(given, str | Path):
            given = [given]
        if not isinstance(given, Mapping):
            given = {Path(item).name: item for item in given} if _distinct(given) else dict(enumerate(given))
        for name, value in given.items():
            mapped = value if isinstance(value, Mapping) else {"path": value}
            path, weight = mapped.get("path"), mapped.get("weight")
            number = weight is None or (isinstance(weight, int | float) and not isinstance(weight, bool))
            if not isinstance(path, str | Path) or set(mapped) - {"path", "weight"} or not number:
                raise OptionError(
                    f"Job '{self.name}': built_from expects paths, or name -> path or {{path, weight}}, found "
                    f"{value!r}."
                )
            found[str(name)] = (str(path), None if weight is None else float(weight))
        missing = [name for name, (_, weight) in found.items() if weight is None]
        if missing and len(missing) < len(found):
            raise OptionError(
                f"Job '{self.name}': some adapters of built_from have a weight, {missing} have none. Give all of them "
                "one, or none."
            )
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Job:
        """Build a job from parsed YAML or JSON, in short forms too; unknown keys are errors with near misses."""
        known = [f.name for f in dataclasses.fields(cls)]
        return from_options(cls, spelled_out(values, known=known))

    def make_method(self) -> Method:
        """The method, built from its slug or mapping, with the job's scaling."""
        method = self.method if isinstance(self.method, Method) else method_from(self.method)
        scaling = self.make_scaling()
        return method if scaling is None else scaling.of(method)

    def make_schedule(self) -> Schedule:
        """The course of the learning rate after its warm-up."""
        return from_options(SCHEDULES.find(self.schedule), dict(self.schedule_options or {}))

    def make_start(self) -> Start | None:
        """What sets the adapter's tensors before training; None for the method's own way."""
        found = by_name(STARTS, "start", self.start)
        return found

    def make_scaling(self) -> Scaling | None:
        """What scales the update; None for the method's own way."""
        found = by_name(SCALINGS, "scaling", self.scaling)
        return found

    def make_dynamics(self) -> list[Dynamic]:
        """What acts on the training, in the order in which it acts."""
        try:
            drawn = [DrawnMembers(self.drawn_members)] if self.drawn_members else []
            return [*make_dynamics(self.dynamics), *drawn]
        except OptionError as error:
            raise OptionError(f"Job '{self.name}': {error}") from error

    def make_objective(self) -> Task:
        """The task, with the job's length, packing and columns."""
        if isinstance(self.objective, Task):
            return self.objective
        if not isinstance(self.objective, str | Mapping):
            raise OptionError(
                f"Job '{self.name}': objective is a name, a mapping, or a lorry.training.task.Task; found "
                f"{self.objective!r}."
            )
        values = {"objective": self.objective} if isinstance(self.objective, str) else dict(self.objective)
        name = str(values.pop("objective", values.pop("name", "causal")))
        if self.max_length is not None:
            values.setdefault("max_length", self.max_length)
        if self.packing:
            if name == "classification":
                raise OptionError(f"Job '{self.name}': classification examples cannot be packed; set packing to false.")
            values.setdefault("packing", True)
        roles = _roles(name)
        for role, column in (self.columns or {}).items():
            if roles and role not in roles:
                raise OptionError(
                    f"Job '{self.name}': objective '{name}' has no column '{role}'."
                    f"{near_misses(role, roles)} It has: {', '.join(roles)}."
                )
            values[f"{role}_column"] = column
        return make_objective(name, values)

    def to_dict(self) -> dict[str, Any]:
        """The job as plain data; records in memory are described, not written out."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {k: _described(v) if k in ("data", "eval_data") else _plain(v) for k, v in values.items()}
        plain["method"] = plain["method"] or self.make_method().info.slug
        return plain


def jobs_from(values: Sequence[Job | Mapping[str, Any]]) -> list[Job]:
    """Jobs from jobs or mappings, with names that differ.

    Raises
    ------
    OptionError
        No job, two of one name, or a bad option.
    """
    jobs = [v if isinstance(v, Job) else Job.from_dict(v) for v in values]
    if not jobs:
        raise OptionError("A fleet needs at least one job.")
    names = [job.name for job in jobs]
    for name in names:
        if names.count(name) > 1:
            raise OptionError(f"Two jobs are called '{name}'; each needs a name of its own.")
        if name.lower() in ("checkpoints", "report.json", "losses.png"):
            raise OptionError(f"A job cannot be called '{name}': the output folder has a place of that name.")
    return jobs


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _distinct(paths: Any) -> bool:
    """Whether paths differ in their last parts, which then name them."""
    texts = [item for item in paths if isinstance(item, str | Path)]
    return len(texts) == len(paths) == len({Path(item).name for item in texts})


def _roles(name: str) -> list[str]:
    cls = OBJECTIVES.get(name)
    ending = "_column"
    return [f.name[: -len(ending)] for f in dataclasses.fields(cls) if f.name.endswith(ending)] if cls else []


def _plain(value: Any) -> Any:
    if isinstance(value, Method):
        return value.to_dict()
    if isinstance(value, Task | Start | Scaling | Dynamic):
        return {"name": value.name, **{f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}}  # type: ignore[arg-type]
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def _described(data: Any) -> Any:
    if data is None or isinstance(data, str | Path):
        return None if data is None else str(data)
    if isinstance(data, DataSpec):
        return {k: _plain(v) for k, v in vars(data).items() if v is not None}
    if isinstance(data, Mapping):
        return _plain(data)
    kind = "examples" if isinstance(data, Examples) else "records"
    return f"{len(data)} {kind} in memory"
