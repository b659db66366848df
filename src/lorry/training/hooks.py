"""Dynamics: what acts on the training itself, around a pass, between backward and step, after a step, at a stage.

A dynamic is a frozen dataclass in a file of its own, which registers itself; a job names those it wants. It keeps no
state in itself: what it has to remember lies in `Moment.state`, which goes into checkpoints, and what it draws comes
from `Moment.generator`, so that a resumed run is the same to the last bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Generator, Tensor

from lorry.core.errors import OptionError
from lorry.core.life.adapter import Adapter
from lorry.core.method.start import mix_seed
from lorry.core.options import check_options, from_options
from lorry.core.registry import Registry

from . import dynamics
from .groups import ParameterGroups


@dataclass
class Moment:
    """A point of a job's training, as a dynamic sees it.

    Attributes
    ----------
    adapter
        What is trained.
    groups
        Its parameters in their optimizer; see `ParameterGroups` for what may be changed.
    step, total
        Optimizer steps done, and of the whole run.
    micro
        Micro-batches of the step under way that are done.
    rate
        Learning rate of the step under way.
    seed
        Of the job.
    name
        Of the dynamic.
    state
        What the dynamic remembers: tensors by name, kept in checkpoints.
    examples
        Examples of the step under way, in all of its micro-batches.
    rows
        Around a pass: first and last (exclusive) row of the job in the batch, and the rows of the whole batch.
    weight
        Around and after a pass: factor of the summed loss of the job's rows in what is differentiated.
    heights, counts
        Around and after a pass: rows of each example of the micro-batch, and the predictions that each is scored on.
    tasks
        Names of the job's tasks, by their numbers; empty where its examples have none.
    raised
        Stages that begin before the next step because a dynamic said so (`raise_stage`).
    dropped
        Numbers of the tasks whose examples are drawn no more; a dynamic adds to them.
    """

    adapter: Adapter
    groups: ParameterGroups
    step: int
    total: int
    micro: int
    rate: float
    seed: int
    name: str
    state: dict[str, Tensor]
    examples: int = 0
    rows: tuple[int, int, int] | None = None
    weight: float = 1.0
    heights: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    tasks: tuple[str, ...] = ()
    raised: list[str] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)

    def raise_stage(self, stage: str) -> None:
        """Let a stage begin before the next step, for every dynamic of the job (`Dynamic.at_stage`)."""
        self.raised.append(stage)

    def generator(self, *parts: object) -> Generator:
        """Return a source of randomness for this dynamic at this step, and for whatever `parts` name."""
        return torch.Generator().manual_seed(mix_seed(self.seed, self.name, self.step, *parts))


class Dynamic:
    """What acts on the training of a job. Subclasses are frozen dataclasses; each method does nothing by itself."""

    name: ClassVar[str]
    #: Whether `after_pass` is to be given the gradient of each row.
    row_gradients: ClassVar[bool] = False
    #: Whether it reads the weights of the base between passes.
    reads_base: ClassVar[bool] = False
    #: Options under which training is plain to the last bit; of every dynamic there are some.
    neutral: ClassVar[Mapping[str, Any]] = {}
    #: Dynamics that it cannot act beside, each with the reason.
    apart: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        """Check every option against its declared range, then the rules between options."""
        check_options(self)
        self.check()

    def check(self) -> None:
        """Check rules between options; raise `OptionError` with the rule and the values."""
        return

    @property
    def by_task(self) -> bool:
        """Whether it wants evaluations to be told apart by task, and may drop tasks."""
        return False

    def begin(self, at: Moment) -> None:
        """Act once before the first step of a run."""
        return

    def at_stage(self, at: Moment, stage: str) -> None:
        """Act when a stage of the job begins, before the step at which it does.

        Stages begin where the job says so (`Job.stages`), or where a dynamic does (`Moment.raise_stage`).
        """
        return

    def after_evaluation(self, at: Moment, metrics: Mapping[str, float]) -> None:
        """Act after an evaluation of the job, other than the one before its first step.

        With `by_task` the metrics of each task stand among the others as ``METRIC/TASK``.
        """
        return

    def around_pass(self, at: Moment) -> AbstractContextManager[Any]:
        """Return a context for forward and backward of a micro-batch.

        What it changes must be the job's own (its adapter's tensors), since other jobs share the pass.
        """
        return nullcontext()

    def after_pass(self, at: Moment, rows: Mapping[str, Tensor]) -> None:
        """Act after the backward pass of a micro-batch.

        Parameters
        ----------
        at
            The moment.
        rows
            With `row_gradients`, the gradient of each row's part of the loss by parameter, ``(rows, *shape)``: their
            sum over all micro-batches is the gradient of the step, auxiliary losses left out. Else nothing.
        """
        return

    def before_step(self, at: Moment) -> None:
        """Act between the last backward pass of a step and the optimizer, before gradients are clipped."""
        return

    def after_clipping(self, at: Moment) -> None:
        """Act just before the optimizer's step, on gradients that are clipped already."""
        return

    def after_step(self, at: Moment) -> None:
        """Act after the optimizer's step, while its gradients are still there."""
        return


D = TypeVar("D", bound=type[Dynamic])
DYNAMICS: Registry[type[Dynamic]] = Registry("dynamic")
DYNAMICS.source(dynamics.__name__, dynamics.__path__)


def register_dynamic(name: str) -> Callable[[D], D]:
    """Return a decorator that registers a dynamic under a name."""
    return DYNAMICS.named(name)


def by_name(registry: Registry[Any], key: str, value: Any) -> Any:
    """Return a registered thing from an instance of it, its name, or ``{key: name, **options}``.

    A name may carry options, as flags have them: ``NAME:OPTION=VALUE:OPTION=VALUE``.

    Raises
    ------
    OptionError
        An unknown name or option, with near misses.
    """
    if value is None or not isinstance(value, str | Mapping):
        return value
    options = _spelled_out(key, value) if isinstance(value, str) else dict(value)
    name = options.pop(key, None) or options.pop("name", "")
    return from_options(registry.find(str(name)), options)


def _spelled_out(key: str, text: str) -> dict[str, Any]:
    """Return the mapping that ``NAME:OPTION=VALUE`` is short for; values are numbers, yes or no, or text."""
    name, *given = text.split(":")
    options: dict[str, Any] = {key: name}
    for part in given:
        option, equals, value = part.partition("=")
        if not equals:
            raise OptionError(f"'{text}': options follow a name as NAME:OPTION=VALUE, found '{part}'.")
        try:
            options[option] = json.loads(value)
        except ValueError:
            options[option] = value
    return options


def check_together(chosen: Sequence[Dynamic]) -> None:
    """Refuse dynamics that cannot act on one job.

    Raises
    ------
    OptionError
        Names the two and the reason.
    """
    names = {d.name for d in chosen}
    for dynamic in chosen:
        for other, reason in dynamic.apart.items():
            if other in names:
                raise OptionError(f"The dynamics '{dynamic.name}' and '{other}' cannot act together: {reason}.")


def make_dynamics(given: Any) -> list[Dynamic]:
    """Return dynamics from one or several of them: instances, names, or mappings ``{dynamics: name, **options}``.

    Raises
    ------
    OptionError
        An unknown name or option, one dynamic twice, or two that cannot act together.
    """
    several = [given] if isinstance(given, str | Mapping | Dynamic) else given
    made = [by_name(DYNAMICS, "dynamics", value) for value in several]
    names = [d.name for d in made]
    doubled = [name for name in names if names.count(name) > 1]
    if doubled:
        raise OptionError(f"The dynamic '{doubled[0]}' is named twice; give each once.")
    check_together(made)
    return made


@dataclass
class Acting:
    """The dynamics of a job under way, and what they remember.

    Attributes
    ----------
    dynamics
        In the order in which they act.
    state
        Dynamic -> name -> tensor.
    """

    dynamics: list[Dynamic]
    state: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse dynamics that cannot act together."""
        check_together(self.dynamics)

    @property
    def row_gradients(self) -> bool:
        """Whether one of them wants the gradient of each row."""
        return any(d.row_gradients for d in self.dynamics)

    @property
    def by_task(self) -> bool:
        """Whether one of them wants evaluations by task."""
        return any(d.by_task for d in self.dynamics)

    def remembered(self, name: str) -> dict[str, Tensor]:
        """Return what a dynamic remembers, to be changed in place."""
        return self.state.setdefault(name, {})

    def tensors(self) -> dict[str, Tensor]:
        """Return all that is remembered as ``DYNAMIC/NAME`` -> tensor."""
        return {f"{owner}/{key}": t for owner, kept in self.state.items() for key, t in kept.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Remember what `tensors` returned."""
        self.state.clear()
        for full, tensor in tensors.items():
            owner, _, key = full.partition("/")
            self.remembered(owner)[key] = tensor
