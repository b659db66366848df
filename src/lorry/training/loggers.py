"""Loggers: where a job's metrics go besides its ``metrics.jsonl``. A new one is a class in a file that registers it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from lorry.core.errors import OptionError
from lorry.core.options import check_options, option
from lorry.core.registry import Registry

from .hooks import by_name


class Log(ABC):
    """An open log of one job."""

    @abstractmethod
    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the metrics of a step or of an evaluation (whose names begin with ``eval_``)."""

    @abstractmethod
    def close(self) -> None:
        """Write what is held back, and close."""


class Logger(ABC):
    """Somewhere metrics go. Subclasses are frozen dataclasses whose fields are the user's options."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        """Check every option against its declared range."""
        check_options(self)

    @abstractmethod
    def open(self, folder: Path, job: str, options: Mapping[str, Any], step: int) -> Log:
        """Return the log of one job.

        Parameters
        ----------
        folder
            Of the job, inside the fleet's output folder.
        job
            Its name.
        options
            Its options as plain data.
        step
            Steps that are done already, where a run is taken up again; what was logged after them is void.

        Raises
        ------
        OptionError
            The package behind it is not installed.
        """


L = TypeVar("L", bound=type[Logger])
LOGGERS: Registry[type[Logger]] = Registry("logger")


def register_logger(name: str) -> Callable[[L], L]:
    """Return a decorator that registers a logger under a name."""
    return LOGGERS.named(name)


def loggers_from(given: Any) -> list[Logger]:
    """Return loggers from names, mappings ``{logger: name, **options}`` or instances, one or several.

    Raises
    ------
    OptionError
        An unknown name or option, with near misses.
    """
    several = given if isinstance(given, Sequence) and not isinstance(given, str) else [] if given is None else [given]
    return [by_name(LOGGERS, "logger", value) for value in several]


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}


class Logs:
    """The open logs of one job, which take the rows of its ``metrics.jsonl``."""

    def __init__(
        self, loggers: Sequence[Logger], folder: Path, job: str, options: Mapping[str, Any], step: int
    ) -> None:
        self._logs: list[Log] = []
        try:
            for logger in loggers:
                self._logs.append(logger.open(folder, job, options, step))
        except BaseException:
            self.close()
            raise

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row with its ``step``; what is no number is left out."""
        for log in self._logs:
            log.write(int(row["step"]), _numbers({k: v for k, v in row.items() if k != "step"}))

    def close(self) -> None:
        """Close them all."""
        for log in self._logs:
            log.close()
        self._logs.clear()


@register_logger("tensorboard")
@dataclass(frozen=True)
class TensorBoard(Logger):
    """Curves for TensorBoard (``tensorboard --logdir OUT``), in the folder ``tensorboard`` of each job."""

    def open(self, folder: Path, job: str, options: Mapping[str, Any], step: int) -> Log:
        """Open an event file."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise OptionError(
                "The logger 'tensorboard' needs its package: pip install 'lorry[tensorboard]'."
            ) from error
        writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1 if step else None)
        writer.add_text("job", "\n".join(f"    {k}: {v}" for k, v in options.items()))
        return _Events(writer)


@dataclass
class _Events(Log):
    writer: Any

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(
                name.replace("eval_", "eval/", 1) if "eval_" in name else f"train/{name}", value, step
            )

    def close(self) -> None:
        self.writer.close()


@register_logger("wandb")
@dataclass(frozen=True)
class WeightsAndBiases(Logger):
    """Runs at Weights & Biases, one for each job; ``WANDB_MODE=offline`` keeps them in the job's folder."""

    project: str = option("lorry", "Project that the runs belong to.")
    entity: str | None = option(None, "User or team; the one that is logged in if not given.")
    group: str | None = option(None, "Group of the runs.")
    mode: str | None = option(
        None,
        "online, offline or disabled; what WANDB_MODE says if not given.",
        choices=("online", "offline", "disabled"),
    )

    def open(self, folder: Path, job: str, options: Mapping[str, Any], step: int) -> Log:
        """Begin a run beside those of other jobs."""
        try:
            import wandb
        except ImportError as error:
            raise OptionError("The logger 'wandb' needs its package: pip install 'lorry[wandb]'.") from error
        folder.mkdir(parents=True, exist_ok=True)
        mode: Any = self.mode  # one of the choices above
        run = wandb.init(
            project=self.project,
            entity=self.entity,
            group=self.group,
            mode=mode,
            name=job,
            config=dict(options),
            dir=str(folder),
            reinit="create_new",
            settings=wandb.Settings(silent=True),
        )
        return _Run(run)


@dataclass
class _Run(Log):
    run: Any

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()
