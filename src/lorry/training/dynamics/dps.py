"""Dynamic parameter scaling: stages of fresh low-rank updates, and solved tasks that cost no more.

Of ScaleZero (arXiv 2509.07945).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorry.core.errors import OptionError, SiteError
from lorry.core.forward.entry import Entry
from lorry.core.method.start import fresh, mix_seed
from lorry.core.options import option
from lorry.methods.curriculum_lora import CurriculumLoRA
from lorry.training.hooks import Dynamic, Moment, register_dynamic

#: Stages of a job, in the order in which they begin at a switch.
FREEZE, GROW = "freeze", "grow"
#: Remembers which stage was frozen, until the next one grows.
_LEFT = "left"
_PAIRS = "it acts on one pair of factors at each site, and a curriculum has several"
_TRAINED = "both say when a tensor is trained"


@dataclass
class Controller:
    """When the next stage begins.

    Attributes
    ----------
    stages
        Number of stages S, with the base stage 0.
    min_stage0, max_stage
        Steps that stage 0 lasts at least, and that any stage lasts at most.
    stage, last_switch, last_solved
        The stage now, the step of the last switch, and the tasks that were solved then.
    """

    stages: int
    min_stage0: int
    max_stage: int
    stage: int = 0
    last_switch: int = 0
    last_solved: int = 0

    def due(self, solved: int, unsolved: int, step: int) -> bool:
        """Return whether the next stage begins, and count it.

        It does where stage 0 had its least, and either as many tasks were solved since the last switch as there are
        unsolved ones for each stage that is left (one at least), or the stage has lasted long enough.

        Parameters
        ----------
        solved, unsolved
            Tasks of the whole job.
        step
            Optimizer steps done.
        """
        left = self.stages - 1 - self.stage
        if left <= 0 or (self.stage == 0 and step < self.min_stage0):
            return False
        enough = max(1, math.ceil(unsolved / left))
        if self.last_solved + enough > solved and step - self.last_switch < self.max_stage:
            return False
        self.stage, self.last_solved, self.last_switch = self.stage + 1, solved, step
        return True


@register_dynamic("dps")
@dataclass(frozen=True)
class DPS(Dynamic):
    """Freezes what was learned and adds a fresh low-rank update where tasks are solved or time is up; solved tasks are
    drawn no more.

    A plain LoRA becomes the first update of a `lorry.methods.curriculum_lora.CurriculumLoRA`, so that a run begins at
    stage 1 with the base as stage 0; a curriculum with a dense update begins with that. At stage s the update s is
    trained, and the scales of all before it; its own scale is not, since A and B have it. Solved tasks are neither
    protected nor trained: they are evaluated to the end, and reported.

    Public code, at the first switch, freezes the base's scale and thaws all later updates; this is the class rule.
    """

    neutral: ClassVar = {"stages": 1}
    apart: ClassVar = {
        "relora": _PAIRS,
        "plora": _PAIRS,
        "delta-lora": _PAIRS,
        "allora": _PAIRS,
        "lora-ggpo": _PAIRS,
        "lora-mgpo": _PAIRS,
        "lora-pro": _PAIRS,
        "dp-sgd": _PAIRS,
        "lora-fa": _TRAINED,
        "freezing": _TRAINED,
    }

    stages: int = option(5, "Number of stages, with the base stage 0; 1 adds none.", at_least=1)
    target: Any = option(None, "What a task's metric must reach to be solved: a number, or task -> number.")
    metric: str = option("loss", "Metric of the evaluation that is held against the target.")
    better: str = option("lower", "Which way it is better.", choices=("lower", "higher"))
    min_stage0: int = option(10_000, "Steps that stage 0 lasts at least.", at_least=0)
    max_stage: int = option(20_000, "Steps after which the next stage begins in any case.", at_least=1)
    drop: bool = option(True, "Draw no more examples of solved tasks.")
    scale_base: bool = option(True, "Train the scale of the base from stage 1 on.")
    freeze: tuple[str, ...] = option(
        (), "Shell patterns on PATH.TENSOR of what else (norms in modules_to_save) the first switch freezes."
    )

    def check(self) -> None:
        """Refuse targets that are no numbers, and let tasks be named by text."""
        if isinstance(self.target, Mapping):
            object.__setattr__(self, "target", {str(k): v for k, v in self.target.items()})
        values = self.target.values() if isinstance(self.target, Mapping) else [self.target]
        for value in values if self.target is not None else ():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise OptionError(f"DPS: target is a number, or a mapping of tasks to numbers; found {self.target!r}.")

    @property
    def by_task(self) -> bool:
        """Whether there is a target to hold evaluations against."""
        return self.target is not None

    # -- moments

    def begin(self, at: Moment) -> None:
        """Make plain LoRA a curriculum, and let the table of stage 0 or 1 hold."""
        self._check_tasks(at)
        if self.stages == 1:
            return
        converted = {path: _as_curriculum(entry) for path, entry in at.adapter.entries.items()}
        if not any(converted.values()):
            raise SiteError(f"DPS: adapter '{at.adapter.name}' has no site that could grow; train LoRA at some layers.")
        for path, method in converted.items():
            if method is not None and method != at.adapter.entries[path].method:
                _convert(at, path, method)
        stages = {entry.method.updates for _, entry in _places(at)}  # type: ignore[attr-defined]
        if len(stages) > 1 or max(stages) > 1:
            raise SiteError(f"DPS begins where all sites are at stage 0 or all at stage 1, found {sorted(stages)}.")
        controller = self._controller(at)
        controller.stage = stages.pop()
        self._remember(at, controller)
        for path, entry in _places(at):
            names = [name for name in entry.home.tensors() if name.startswith("l")]
            if "weight_decay" in at.groups.optimizer.defaults:
                at.groups.move([f"{path}.{name}" for name in names], weight_decay=0.0)
        if controller.stage:
            self._freeze_base(at)
            self._freeze_named(at)
        else:
            at.groups.freeze([f"{path}.l0" for path, _ in _places(at)])

    def at_stage(self, at: Moment, stage: str) -> None:
        """Freeze what was trained, or put the next update in place."""
        if self.stages == 1 or stage not in (FREEZE, GROW):
            return
        now = _stage_of(at)
        if now + 1 >= self.stages:
            raise OptionError(
                f"DPS: a stage after {now} is to begin, and stages={self.stages} has none; give more, or fewer steps "
                "in the job's stages."
            )
        if stage == FREEZE:
            self._leave(at, now)
            return
        if _LEFT not in at.state:  # the job's own stages may name growth alone
            self._leave(at, now)
        del at.state[_LEFT]
        self._grow(at, now + 1)
        controller = self._controller(at)
        if controller.stage <= now:  # by the job's stages, and not by the controller
            controller.stage, controller.last_switch = now + 1, at.step
            self._remember(at, controller)

    def after_step(self, at: Moment) -> None:
        """Ask the controller."""
        self._ask(at, at.step + 1)

    def after_evaluation(self, at: Moment, metrics: Mapping[str, float]) -> None:
        """Note the tasks that are solved, which they stay, and ask the controller."""
        if self.target is None:
            return
        solved = self._solved(at)
        for number, name in enumerate(at.tasks):
            found = metrics.get(f"{self.metric}/{name}")
            if found is None:
                raise OptionError(
                    f"DPS: the evaluation has no {self.metric} of task '{name}'; hold out examples of every task, and "
                    f"name one of its metrics ({', '.join(k for k in metrics if '/' not in k)})."
                )
            goal = self.target[name] if isinstance(self.target, Mapping) else self.target
            if found <= goal if self.better == "lower" else found >= goal:
                solved[number] = True
                if self.drop and number not in at.dropped:
                    at.dropped.append(number)
        self._ask(at, at.step)

    # -- inside

    def _check_tasks(self, at: Moment) -> None:
        if self.target is None:
            return
        if not at.tasks:
            raise OptionError("DPS: target judges tasks, and the job's examples have none; give its task_ids.")
        if isinstance(self.target, Mapping) and set(self.target) != set(at.tasks):
            raise OptionError(f"DPS: target names {sorted(self.target)}, and the tasks are {sorted(at.tasks)}.")
        if self.metric == "" or "/" in self.metric:
            raise OptionError(f"DPS: metric is a name such as loss or accuracy, found '{self.metric}'.")

    def _ask(self, at: Moment, step: int) -> None:
        if self.stages == 1 or GROW in at.raised:
            return
        controller, solved = self._controller(at), self._solved(at)
        if controller.due(int(solved.sum()), int((~solved).sum()), step):
            self._remember(at, controller)
            at.raise_stage(FREEZE)
            at.raise_stage(GROW)

    def _solved(self, at: Moment) -> Tensor:
        found = at.state.get("solved")
        if found is None:
            found = at.state["solved"] = torch.zeros(len(at.tasks), dtype=torch.bool)
        return found

    def _controller(self, at: Moment) -> Controller:
        kept = at.state.get("controller")
        return Controller(self.stages, self.min_stage0, self.max_stage, *([] if kept is None else kept.tolist()))

    def _remember(self, at: Moment, controller: Controller) -> None:
        now = (controller.stage, controller.last_switch, controller.last_solved)
        at.state["controller"] = torch.tensor(now)

    def _leave(self, at: Moment, stage: int) -> None:
        """Freeze what a stage trained and later ones do not."""
        at.state[_LEFT] = torch.tensor(stage)
        if stage:
            _retire(at, [f"{path}.{key}{stage}" for path, _ in _places(at) for key in "AB"])
            return
        trained = set(at.groups.names())
        dense = [f"{path}.{key}" for path, _ in _places(at) for key in ("D", "bias")]
        _retire(at, [name for name in dense if name in trained])
        self._freeze_named(at)

    def _freeze_named(self, at: Moment) -> None:
        for pattern in self.freeze:
            names = at.groups.names(pattern)
            if not names:
                raise OptionError(f"DPS: freeze '{pattern}' matches no trained tensor of '{at.adapter.name}'.")
            _retire(at, names)

    def _freeze_base(self, at: Moment) -> None:
        """Freeze what stage 1 does not train: its own scale and, if so wished, that of the base."""
        for path, _ in _places(at):
            at.groups.freeze([f"{path}.l1", *([] if self.scale_base else [f"{path}.l0"])])

    def _grow(self, at: Moment, stage: int) -> None:
        """Put a fresh update at every site, and train the scales of those before it."""
        for path, entry in list(_places(at)):
            old = entry.method
            assert isinstance(old, CurriculumLoRA)
            method = dataclasses.replace(old, updates=stage)
            like = entry.home.tensors()["l0"]
            tensors = dict(entry.home.tensors())
            for name, spec in method.of_stage(entry.site, stage).items():
                tensors[name] = fresh(spec, mix_seed(at.seed, at.name, path, name), like.dtype).to(like.device)
            factors = {key: _factor(at, f"{path}.{key}{stage - 1}") for key in "AB"} if stage > 1 else {}
            at.groups.replace(path, method, tensors)
            for key, factor in factors.items():
                at.groups.move([f"{path}.{key}{stage}"], factor=factor)
            if "weight_decay" in at.groups.optimizer.defaults:
                at.groups.move([f"{path}.l{stage}"], weight_decay=0.0)
            at.groups.freeze([f"{path}.l{stage}"])
            before = f"{path}.l{stage - 1}"
            if before in at.groups.resting and (stage > 1 or self.scale_base):
                at.groups.thaw([before])


def _places(at: Moment) -> Iterator[tuple[str, Entry]]:
    """Yield the sites that grow."""
    for path, entry in at.adapter.entries.items():
        if isinstance(entry.method, CurriculumLoRA):
            yield path, entry


def _retire(at: Moment, names: list[str]) -> None:
    """Freeze parameters for good: nobody will ask for what the optimizer knows of them."""
    at.groups.freeze(names)
    for name in names:
        at.groups.resting[name] = ({}, at.groups.resting[name][1])


def _stage_of(at: Moment) -> int:
    """Return the stage that the adapter is at."""
    return max(entry.method.updates for _, entry in _places(at))  # type: ignore[attr-defined]


def _factor(at: Moment, name: str) -> float:
    """Return the factor of a parameter's learning rate, frozen or not."""
    options = at.groups.resting[name][1] if name in at.groups.resting else at.groups.options(name)
    return float(options["factor"])


def _as_curriculum(entry: Entry) -> CurriculumLoRA | None:
    """Return the curriculum whose first update an adapter is at a site; None for a whole module.

    Raises
    ------
    SiteError
        The adapter there is no plain LoRA with A and B of its own.
    """
    method = entry.method
    if isinstance(method, CurriculumLoRA):
        return method
    if method.whole:
        return None
    options = method.to_dict()
    own = set(entry.home.tensors()) == {"A", "B"} and {"plain", "stored"} <= method.capabilities
    if not own or "rank" not in options or entry.shared is not None:
        raise SiteError(
            f"DPS grows plain LoRA, and '{entry.site.path}' has {method.info.slug}; use the method lora or "
            "curriculum-lora."
        )
    rank = options["rank"]
    scale = method.scale(entry.site)  # type: ignore[attr-defined]
    return CurriculumLoRA(rank=rank, alpha=scale * rank, dropout=options.get("dropout", 0.0))


def _convert(at: Moment, path: str, method: CurriculumLoRA) -> None:
    """Put a curriculum of one update in the place of a LoRA, with the same rates."""
    entry = at.adapter.entries[path]
    old = dict(entry.home.tensors())
    factors = {key: _factor(at, f"{path}.{key}") for key in "AB"}
    fresh_ones = {
        name: fresh(spec, mix_seed(at.seed, at.name, path, name), old["A"].dtype).to(old["A"].device)
        for name, spec in method.tensors(entry.site).items()
    }
    at.groups.replace(path, method, {**fresh_ones, "A1": old["A"], "B1": old["B"]})
    for key, factor in factors.items():
        at.groups.move([f"{path}.{key}1"], factor=factor)
