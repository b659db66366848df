"""What a job learns, as the training engine sees it: a task makes examples of data and a loss for each of them.

The engine (fleet, joint passes, checkpoints) knows nothing of tokens, pictures or noise. Jobs whose tasks are of one
family go through the base in one pass, whatever else differs between them; jobs of other families share the base and
take passes of their own.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Generic, Literal, Protocol, Self, TypeVar

import torch
from torch import Generator, Tensor, nn

from lorry.core.registry import Registry

from .data import Record, held_out_indices
from .data_errors import DataError

E = TypeVar("E")
S = TypeVar("S")


@dataclass(frozen=True)
class Setting:
    """Where a task works.

    Attributes
    ----------
    model
        The base with its adapters.
    processor
        What makes tensors of data: a tokenizer, an image processor, or a processor that holds both; None if all
        jobs bring examples that are tensors already.
    kept
        What tasks work out once for the setting; see `once`.
    """

    model: nn.Module
    processor: Any = None
    kept: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter lies."""
        return next(self.model.parameters()).device

    def once(self, key: str, make: Callable[[], S]) -> S:
        """Return what `make` gives, worked out at the first call under this key and kept."""
        if key not in self.kept:
            self.kept[key] = make()
        found: S = self.kept[key]
        return found


@dataclass(frozen=True)
class Batch:
    """The rows of a pass, of one job or of several.

    Attributes
    ----------
    inputs
        What the model is called with.
    targets
        What the loss compares its outputs with: a tensor, or a mapping or tuple of tensors, whose first dimension
        counts rows; None if there is nothing to compare.
    facts
        What `lorry.context` tells methods of these rows (``padding_mask``, ``timestep``, ``token_kinds``).
    lengths
        Tokens of each row where all lie one after another in one ``(1, tokens)``; None where rows come first.
    """

    inputs: Mapping[str, Any]
    targets: Any = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] | None = None


class Report(Protocol):
    """How the examples of a data set came about."""

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        ...


@dataclass(frozen=True)
class PlainReport:
    """The report of a data set of which nothing was left out."""

    records: int
    examples: int

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return dict(vars(self))

    def __str__(self) -> str:
        """Return the counts as a sentence."""
        return f"{self.examples} examples of {self.records} records"


@dataclass(frozen=True, eq=False)
class Examples(Generic[E]):
    """The examples of one data set.

    Attributes
    ----------
    examples
        Whatever the task makes of a record; only the task looks inside.
    report
        How they came about.
    task_ids
        The task that each example belongs to, for methods that route by task; None where they have none.
    """

    examples: tuple[E, ...]
    report: Report
    task_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse task ids of another number."""
        if self.task_ids is not None and len(self.task_ids) != len(self.examples):
            raise DataError(f"{len(self.examples)} examples have {len(self.task_ids)} task ids; give one for each.")

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.examples)

    def __getitem__(self, index: int) -> E:
        """Return one example."""
        return self.examples[index]

    def take(self, indices: Sequence[int]) -> list[E]:
        """Return the examples at these positions."""
        return [self.examples[i] for i in indices]

    def ids(self, indices: Sequence[int]) -> tuple[int, ...] | None:
        """Return the task ids of the examples at these positions; None where they have none."""
        return None if self.task_ids is None else tuple(self.task_ids[i] for i in indices)

    def part(self, indices: Sequence[int]) -> Self:
        """Return a set of some of the examples, in the order of `indices`."""
        chosen = tuple(self.take(indices))
        return type(self)(chosen, self.report_of(chosen), self.ids(indices))

    def report_of(self, examples: Sequence[E]) -> Report:
        """Return the report of examples taken out of a set: they are the records now."""
        return PlainReport(len(examples), len(examples))

    def joined_report(self, sets: Sequence[Examples[E]]) -> Report:
        """Return the report of several sets as one."""
        return PlainReport(sum(s.report.as_dict().get("records", len(s)) for s in sets), sum(map(len, sets)))

    def hold_out(self, fraction: float, seed: int | None = None) -> tuple[Self, Self]:
        """Hold out a part of the examples.

        Parameters
        ----------
        fraction
            Share to hold out, between 0 and 1, rounded to whole examples.
        seed
            Which are drawn; None takes the last ones, as wanted for one long text, of each task if there are several.

        Returns
        -------
        tuple
            The rest, and what is held out.

        Raises
        ------
        DataError
            A fraction outside (0, 1), or fewer than two examples.
        """
        groups: dict[int, list[int]] = {}
        for index in range(len(self)):
            tag = 0 if seed is not None or self.task_ids is None else self.task_ids[index]
            groups.setdefault(tag, []).append(index)
        held = {g[i] for g in groups.values() for i in held_out_indices(len(g), fraction, seed)}
        rest = [i for i in range(len(self)) if i not in held]
        return self.part(rest), self.part(sorted(held))


class Tally(Protocol):
    """Sums of an evaluation; tallies of batches add up to that of all."""

    def __add__(self, other: Any, /) -> Any:
        """Return both together."""
        ...

    def metrics(self) -> dict[str, float]:
        """Return what the sums mean, ``loss`` and ``count`` among it."""
        ...


@dataclass(frozen=True)
class MeanTally:
    """The sum of a loss and the number of predictions."""

    loss: float = 0.0
    count: float = 0

    def __add__(self, other: MeanTally) -> MeanTally:
        """Return both together."""
        return MeanTally(self.loss + other.loss, self.count + other.count)

    def metrics(self) -> dict[str, float]:
        """Return ``loss`` for each prediction, NaN where there was none, and ``count``."""
        return {"loss": self.loss / self.count if self.count else math.nan, "count": self.count}


class Task(ABC):
    """What a job learns. Subclasses are frozen dataclasses whose fields are the user's options.

    An *example* is what a task makes of a record; a *row* is an entry of a batch. An example is one row unless
    `rows_of` says otherwise (a pair to compare is two).
    """

    name: ClassVar[str]
    #: The head of the base that it needs, by its name in `lorry.training.heads.HEADS`; None for any.
    task: ClassVar[str | None] = None
    #: How many outputs that head has, where they are no classes of the data.
    outputs: ClassVar[int | None] = None
    #: The metric by which evaluations are compared, and which way is better.
    best: ClassVar[tuple[str, Literal["min", "max"]]] = ("loss", "min")
    #: Whether the loss of an example is the same whatever else is in its micro-batch.
    by_example: ClassVar[bool] = True
    #: What `cost` counts, for reports.
    unit: ClassVar[str] = "examples"

    @property
    def family(self) -> str:
        """Tasks of one family collate and run alike, so that their rows may share a pass."""
        return self.name

    @abstractmethod
    def examples(
        self, setting: Setting, records: Sequence[Record], labels: Sequence[str] | None = None
    ) -> Examples[Any]:
        """Return the examples of records; `labels` are the names of classes in the order of the head."""

    @abstractmethod
    def collate(self, setting: Setting, examples: Sequence[Any]) -> Batch:
        """Return the rows of examples, which may be of several jobs, on the model's device."""

    def padding_needed(self, setting: Setting, examples: Sequence[Any]) -> str | None:
        """Return why rows of these examples cannot lie one after another in one ``(1, tokens)``; None if they can."""
        return f"objective '{self.name}' works on whole rows"

    def collate_in_one(self, setting: Setting, examples: Sequence[Any]) -> Batch:
        """Return the rows of examples one after another, with their `Batch.lengths`; see `padding_needed`."""
        raise DataError(f"Objective '{self.name}' cannot do without padding; use the planner 'joined'.")

    @abstractmethod
    def forward(self, setting: Setting, batch: Batch) -> Any:
        """Run the model; return what the loss needs, with rows first: a tensor, a mapping or a tuple of tensors."""

    @abstractmethod
    def losses(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Return the loss of each example, summed over its predictions, and how many they are: two ``(examples,)``."""

    def loss(self, outputs: Any, targets: Any) -> tuple[Tensor, int]:
        """Return the summed loss of one job's rows, and the number of predictions; override to save memory."""
        losses, counts = self.losses(outputs, targets)
        return losses.sum(), int(counts.sum())

    def tally(self, outputs: Any, targets: Any) -> Tally:
        """Return the evaluation sums of one job's rows."""
        losses, counts = self.losses(outputs, targets)
        return MeanTally(float(losses.double().sum()), float(counts.sum()))

    def check_model(self, setting: Setting) -> None:
        """Raise `DataError` if the model cannot learn this task."""
        return

    def check(self, setting: Setting, examples: Examples[Any], name: str) -> None:
        """Raise `DataError` if the model cannot take these examples; `name` says whose they are."""
        return

    def labels_of(self, records: Sequence[Record]) -> tuple[str, ...] | None:
        """Return the names of the classes of the training records; None for a task without classes."""
        return None

    def classes(self, setting: Setting, train: Examples[Any], labels: Sequence[str] | None) -> int | None:
        """Return how many of the head's outputs are the job's own; None for all."""
        return None

    def held_out_seed(self, seed: int) -> int | None:
        """Return the seed by which held-out examples are drawn; None takes the last ones."""
        return seed

    def draw(self, examples: Sequence[Any], generator: Generator, setting: Setting, adapter: str) -> Sequence[Any]:
        """Return the examples as a pass sees them: with noise, crops or drawn times of this step, or continued.

        Parameters
        ----------
        examples
            Of one job.
        generator
            Source of randomness; the same for the same job, step and micro-batch.
        setting
            Where the model is, for tasks that learn from what it says.
        adapter
            The job's adapter; none applies unless the task lets it (`lorry.rows`).
        """
        return examples

    def rows_of(self, example: Any) -> int:
        """Return how many rows of the batch an example becomes."""
        return 1

    def count(self, example: Any) -> int:
        """Return the number of predictions that the loss is averaged over."""
        return 1

    def cost(self, example: Any) -> int:
        """Return the size of a row of the example in `unit`; rows of a pass are padded to the largest."""
        return 1

    def kin(self, example: Any) -> Hashable:
        """Return what the examples of a batch must have in common, such as the size of pictures; None for nothing."""
        return None

    def fingerprint(self, examples: Sequence[Any]) -> str:
        """Return a hash of examples: a run may go on only with the data that it began with."""
        return digest(examples)


@dataclass(frozen=True)
class Prepared:
    """A job's task and data, ready for its model.

    Attributes
    ----------
    task
        What is learned.
    train, evaluation
        Examples to learn from, and held-out ones if there are any.
    labels
        Names of the classes in the order of the head, where there are classes.
    classes
        How many of the head's outputs are the job's own; None for all.
    """

    task: Task
    train: Examples[Any]
    evaluation: Examples[Any] | None = None
    labels: tuple[str, ...] | None = None
    classes: int | None = None

    def own(self, outputs: Any) -> Any:
        """Return the job's own part of the head's outputs."""
        return outputs[..., : self.classes] if self.classes else outputs

    def fingerprint(self) -> str:
        """Return a hash of the training examples and of their tasks."""
        found = self.task.fingerprint(self.train.examples)
        return found if self.train.task_ids is None else f"{found}-{digest(self.train.task_ids)}"


#: Task classes by name; a new one is a file that registers its class.
TASKS: Registry[type[Any]] = Registry("objective", error=DataError)
T = TypeVar("T", bound=type[Task])


def register_task(cls: T) -> T:
    """Register a task class under its name; a decorator."""
    TASKS.add(cls.name, cls)
    return cls


def digest(value: Any) -> str:
    """Return a hash of tensors, dataclasses, mappings, sequences and plain values, the same on every machine."""
    state = hashlib.blake2b(digest_size=8)
    _feed(state, value)
    return state.hexdigest()


def _feed(state: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        state.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        state.update(plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    elif is_dataclass(value) and not isinstance(value, type):
        for f in fields(value):
            _feed(state, getattr(value, f.name))
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            _feed(state, (str(key), value[key]))
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes):
        state.update(b"[")
        for item in value:
            _feed(state, item)
        state.update(b"]")
    else:
        state.update(f"{type(value).__name__}:{value!r};".encode())


def split(values: Any, sizes: Sequence[int]) -> list[Any]:
    """Return a tree of tensors cut along the first dimension into parts of these sizes.

    Cut by `Tensor.split` and not by slices: its backward pass writes the gradient once instead of once for each part.
    """
    if values is None:
        return [None] * len(sizes)
    if isinstance(values, Tensor):
        return list(values.split(list(sizes)))
    if isinstance(values, Mapping):
        parts = {key: split(value, sizes) for key, value in values.items()}
        return [{key: part[i] for key, part in parts.items()} for i in range(len(sizes))]
    columns = [split(value, sizes) for value in values]
    return [tuple(column[i] for column in columns) for i in range(len(sizes))]
