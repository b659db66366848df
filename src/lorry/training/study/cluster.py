"""Parts of a study as Ray tasks: each loads the base once in its worker, trains a fleet, and sends back records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lorry.core.errors import LorryError

from .fleets import Bench
from .options import Cell, Study
from .records import Record, Timing

#: Gives a base and its tokenizer.
Load = Callable[[], tuple[nn.Module, Any]]
#: What a task is: runs that are trained side by side, or one that is timed alone.
Part = Sequence[Cell] | Cell
#: Of this process, while it is a Ray worker: the last study's base. A worker gets tasks of one driver alone.
_BENCHES: dict[str, Bench] = {}


def work(bench: Bench, part: Part) -> list[Record] | Timing:
    """Do a part of a study."""
    return bench.time(part) if isinstance(part, Cell) else bench.train(part)


def _task(key: str, study: Study, load: Load, part: Part) -> list[Record] | Timing:
    if key not in _BENCHES:
        _BENCHES.clear()
        _BENCHES[key] = Bench(study, *load())
    return work(_BENCHES[key], part)


@contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    """Give ray, connected to a cluster; one that is started here, for want of an address, is stopped again."""
    try:
        import ray
    except ImportError as error:
        raise LorryError("A study on a cluster needs Ray: pip install 'lorry[cluster]'.") from error
    if ray.is_initialized():
        yield ray
        return
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise LorryError(f"No Ray cluster could be reached at '{address}': {error}.") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def on_cluster(
    study: Study,
    load: Load,
    parts: Sequence[Part],
    *,
    address: str | None = None,
    gpus: float = 0.0,
) -> Iterator[list[Record] | Timing]:
    """Do parts of a study on a cluster, and give what each came to as soon as it is there.

    Parameters
    ----------
    study
        Its data must be readable on every machine.
    load
        Called once in each worker.
    parts
        Each is a task; one whose worker dies is run again.
    address
        Of a cluster; None takes one that is initialised, or starts one on this machine.
    gpus
        Of each task; a fraction lets several share one.

    Raises
    ------
    LorryError
        Ray is not installed or not reached, or a task failed with its reason.
    """
    with _cluster(address) as ray:
        task = ray.remote(num_cpus=1, num_gpus=gpus)(_task)
        shared, loader = ray.put(study), ray.put(load)
        key = ray.get_runtime_context().get_job_id()
        waiting = [task.remote(key, shared, loader, part) for part in parts]
        while waiting:
            (done,), waiting = ray.wait(waiting, num_returns=1)
            try:
                yield ray.get(done)
            except ray.exceptions.RayTaskError as error:
                cause = error.cause
                raise (cause if isinstance(cause, LorryError) else LorryError(f"A task failed: {cause}.")) from None
