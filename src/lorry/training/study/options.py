"""A study as plain data: variants x rates x ranks x batch sizes x seeds over one base and one data set."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, Literal

from lorry.core.errors import OptionError, near_misses
from lorry.core.method.registry import METHODS, presets
from lorry.core.options import check_options, from_options, option
from lorry.training.hooks import DYNAMICS
from lorry.training.jobs import Job
from lorry.training.short_forms import spelled_out
from lorry.training.starts import STARTS

#: A variant's name becomes part of the names of its jobs, which are names of folders.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}")
#: Options of a job that are an axis of the study, with the name of the axis.
AXES = {"learning_rate": "rates", "batch_size": "batch_sizes", "seed": "seeds"}
#: Options of a job that all variants share, since otherwise their scores could not be compared.
SHARED = ("name", "data", "eval_data", "hold_out", "eval_every", "keep_best", "patience")
JOB_OPTIONS = frozenset(f.name for f in dataclasses.fields(Job))
#: Metrics of which less is better, where a score is chosen that the objective does not compare by.
_LESS = ("loss", "perplexity")


@dataclass(frozen=True, order=True)
class Cell:
    """One run of a study.

    Attributes
    ----------
    variant
        Its name.
    rank
        None where the study leaves the ranks to the variants.
    batch_size, rate, seed
        As of its job.
    """

    variant: str
    rank: int | None
    batch_size: int
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its job and of its file."""
        rank = "" if self.rank is None else f"-r{self.rank}"
        return f"{self.variant}{rank}-b{self.batch_size}-lr{self.rate:g}-s{self.seed}".replace("+", "")


@dataclass(frozen=True)
class Study:
    """Variants of training, compared over learning rates, ranks, batch sizes and seeds.

    Raises
    ------
    OptionError
        A value out of its range, an unknown variant, two of one name, or a grid that cannot answer what is asked.
    """

    base: str = option(MISSING, "'pocket', a local Hugging Face model folder, or a name on the hub.")
    out: str = option(MISSING, "Folder for the results of all runs, the report and the picture.")
    job: Any = option(MISSING, "Options that all jobs share: data, objective, steps, targets and so on.")
    variants: Any = option(
        MISSING,
        "Name -> options of a job (method, start, dynamics, ...), or the name of a method, preset, start or dynamic; "
        "or a list of such names.",
    )
    rates: tuple[float, ...] = option(MISSING, "Learning rates, at least two; a decade or more tells the sensitivity.")
    ranks: tuple[int, ...] | None = option(None, "Ranks of all methods; each variant's own if not given.")
    batch_sizes: tuple[int, ...] = option((8,), "Rows of a micro-batch.")
    seeds: tuple[int, ...] = option((0, 1, 2), "Seeds of the adapters' start, order of data and dropout.")
    test: Any = option(
        None, "Data that choose nothing, given like a job's; the report then shows them at the rate that was chosen."
    )
    score: str | None = option(None, "Held-out metric that is compared; the objective's own if not given.")
    better: str | None = option(None, "Which way the score is better.", choices=("min", "max"))
    diverged: float | None = option(
        10.0, "A run is stopped as diverged when its loss is above this multiple of the start's; null lets it go on.",
        above=1,
    )  # fmt: skip
    widen: int = option(
        0, "How many rates are added at most for a variant while its best one lies at an end of the grid.", at_least=0
    )
    fleet: int = option(24, "Most jobs that are trained side by side.", at_least=1)
    checkpoint_every: int = option(50, "Passes between checkpoints of a fleet under way; 0 writes none.", at_least=0)
    timed_steps: int = option(
        4, "Steps for which each variant is trained alone to take its time; 0 leaves it out.", at_least=0
    )
    dtype: str = option("auto", "Dtype of the base in memory.", choices=("auto", "float32", "bfloat16", "float16"))
    max_pad_ratio: float | None = option(
        2.0, "Most tokens of a joint pass, padding included, as a multiple of what the jobs have alone.", at_least=1
    )
    max_tokens: int | None = option(None, "Most tokens of a joint pass, padding included, to bound memory.", at_least=1)
    max_memory: int | None = option(
        None,
        "Bytes that a fleet may take, weights included (24GiB in a file); fleets and passes are made small enough.",
        at_least=1,
    )

    def __post_init__(self) -> None:
        """Check every option, then each job once."""
        check_options(self)
        self._check_grid()
        object.__setattr__(self, "variants", _named(self.variants))
        if not isinstance(self.job, Mapping):
            raise OptionError(f"'job' must be a mapping of job options, found {self.job!r}.")
        for axis in (*AXES, *(("rank",) if self.ranks else ()), "name"):
            if axis in self.job:
                raise OptionError(f"'{axis}' has no place under 'job': give it as '{AXES.get(axis, axis + 's')}'.")
        if self.better is not None and self.score is None:
            raise OptionError("'better' belongs to a score; name it, or leave both to the objective.")
        first: dict[tuple[str, int | None], Cell] = {}
        for cell in self.cells():
            first.setdefault((cell.variant, cell.rank), cell)
        jobs = [self.job_of(cell) for cell in first.values()]
        if jobs[0].eval_data is None and not jobs[0].hold_out:
            raise OptionError(
                "A study compares held-out scores: give hold_out as a fraction of the data, or eval_data, under 'job'."
            )
        if len({job.make_objective().best for job in jobs}) > 1:
            raise OptionError("The variants have objectives with different scores, so they cannot be compared.")

    def _check_grid(self) -> None:
        for axis in ("rates", "ranks", "batch_sizes", "seeds"):
            values = getattr(self, axis)
            if values is None:
                continue
            numbers = [values] if isinstance(values, int | float) else list(values)
            whole = axis != "rates"
            for value in numbers:
                fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
                if not fits or not math.isfinite(value) or (value <= 0 and axis != "seeds"):
                    raise OptionError(f"'{axis}' must be {'whole' if whole else 'positive'} numbers, found {value!r}.")
            if not numbers or len(set(numbers)) < len(numbers):
                raise OptionError(f"'{axis}' must be different numbers, at least one; found {numbers}.")
            ordered = sorted(numbers) if whole else sorted(map(float, numbers))
            object.__setattr__(self, axis, tuple(ordered))
        if len(self.rates) < 2:
            raise OptionError(
                f"'rates' needs at least two values to compare, found {list(self.rates)}; a good grid has five, half a "
                f"decade apart, such as {_around(self.rates[0])}."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Study:
        """Build a study from parsed YAML or JSON; unknown keys are errors with near misses."""
        return from_options(cls, values)

    def cells(self, rates: Iterable[float] | None = None) -> list[Cell]:
        """Return the runs of the whole grid, those of one batch size and seed next to each other.

        Parameters
        ----------
        rates
            In place of the study's.
        """
        axes = (self.batch_sizes, self.seeds, self.ranks or (None,), self.variants, rates or self.rates)
        return [Cell(v, k, b, r, s) for b, s, k, v, r in itertools.product(*axes)]

    def job_of(self, cell: Cell, **changes: Any) -> Job:
        """Return the job of a run.

        Raises
        ------
        OptionError
            What the variant and the shared options say does not go together; names the variant.
        """
        own = dict(self.variants[cell.variant])
        if cell.rank is not None:
            own["rank"] = cell.rank
        try:
            values = spelled_out(own, self.job, known=JOB_OPTIONS)
            axes = {"learning_rate": cell.rate, "batch_size": cell.batch_size, "seed": cell.seed}
            return from_options(Job, {**values, "name": cell.name, **axes, **changes})
        except OptionError as error:
            where = f"Variant '{cell.variant}'" + ("" if cell.rank is None else f" of rank {cell.rank}")
            raise OptionError(f"{where}: {error}") from error

    def measure(self) -> tuple[str, Literal["min", "max"]]:
        """Return the name of the score, and which way it is better."""
        name, way = self.job_of(self.cells()[0]).make_objective().best
        if self.score is not None and self.score != name:
            name, way = self.score, "min" if self.score in _LESS else "max"
        return name, self.better or way  # type: ignore[return-value]  # one of its choices


def _named(given: Any) -> dict[str, dict[str, Any]]:
    """Return name -> job options of each variant, in the order in which they were given."""
    pairs = list(given.items()) if isinstance(given, Mapping) else [_one(v) for v in given or ()]
    names = [str(name) for name, _ in pairs]
    if not names:
        raise OptionError("A study needs at least one variant, such as lora.")
    for name in names:
        if not _NAME.fullmatch(name):
            raise OptionError(
                "A variant's name consists of letters, digits, '_', '-' and '.', beginning with a letter or digit; "
                f"found {name!r}. Write NAME: {{method: ..., ...}} to call it otherwise."
            )
        if [other.lower() for other in names].count(name.lower()) > 1:
            raise OptionError(f"Two variants are called '{name}'; give each a name of its own.")
    return {str(name): _options(str(name), value) for name, value in pairs}


def _one(value: Any) -> tuple[str, Any]:
    if isinstance(value, str):
        return value, value
    if isinstance(value, Mapping) and "name" in value:
        return str(value["name"]), {k: v for k, v in value.items() if k != "name"}
    if isinstance(value, Mapping) and len(value) == 1:
        return next(iter(value.items()))
    raise OptionError(f"In a list, a variant is a name, NAME: {{...}}, or a mapping with a name; found {value!r}.")


def _options(name: str, value: Any) -> dict[str, Any]:
    if value is None or isinstance(value, str):
        return _known(value or name)
    if not isinstance(value, Mapping):
        raise OptionError(f"Variant '{name}' must be a name or a mapping of job options, found {value!r}.")
    for key in value:
        if key in AXES:
            raise OptionError(f"Variant '{name}': '{key}' is an axis of the study; give it as '{AXES[key]}'.")
        if key in SHARED:
            raise OptionError(f"Variant '{name}': '{key}' is shared by all variants; put it under 'job'.")
    return {str(k): v for k, v in value.items()}


def _known(name: str) -> dict[str, Any]:
    """Return the options that a name alone stands for: a method or preset, else a start or a dynamic of LoRA."""
    kinds: tuple[tuple[str, Iterable[str]], ...] = (
        ("method", (*METHODS, *presets())), ("start", STARTS), ("dynamics", DYNAMICS),
    )  # fmt: skip
    for kind, names in kinds:
        if name in names:
            return {kind: name}
    every = [n for _, names in kinds for n in names]
    raise OptionError(
        f"There is no method, preset, start or dynamic '{name}'.{near_misses(name, every)} `lorry methods` lists them; "
        "write NAME: {method: ..., start: ..., dynamics: ...} for a combination."
    )


def _around(rate: float) -> list[float]:
    return [float(f"{rate * 10**power:.2g}") for power in (-1, -0.5, 0, 0.5, 1)]


def beyond(scores: Mapping[float, float], better: Callable[[Sequence[float]], float]) -> float | None:
    """Return the next rate of a grid whose best rate lies at an end, on that side; None if it lies inside.

    Parameters
    ----------
    scores
        Rate -> score.
    better
        `min` or `max`.
    """
    grid = sorted(scores)
    winner = better(list(scores.values()))
    at = [rate for rate in grid if scores[rate] == winner]
    if len(grid) < 2 or set(at) - {grid[0], grid[-1]}:
        return None
    if at[0] == grid[0]:
        grid.reverse()
    # rates such as 0.003, 0.01, 0.03 repeat their steps every other one
    step = grid[-2] / grid[-3] if len(grid) > 2 else grid[-1] / grid[-2]
    return float(f"{grid[-1] * step:.6g}")
