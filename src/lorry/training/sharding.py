"""A base whose weights lie in parts on several processes (FSDP2), with adapters that are whole on each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from lorry.core.errors import OptionError
from lorry.core.life.adapter import Adapter
from lorry.core.sites.site import Site
from lorry.core.sites.stacks import find_stacks
from lorry.core.sites.storage import DENSE

from .processes import Processes
from .run import Run


def check_splittable(runs: Sequence[Run], shard: bool) -> None:
    """Refuse jobs whose rows cannot be split over processes, and bases whose weights cannot.

    Raises
    ------
    OptionError
        Names the job, what is in the way, and what to do.
    """
    for run in runs:
        assert run.prepared is not None and run.adapter is not None
        task, reading = run.prepared.task, [d.name for d in run.acting.dynamics if d.reads_base]
        rows = [d.name for d in run.acting.dynamics if d.row_gradients]
        problem = None
        if not task.by_example:
            problem = f"objective '{task.name}' compares the examples of a micro-batch with each other"
        elif run.adapter.row_draws > 1:
            problem = f"the method '{run.adapter.method.info.slug}' compares several draws of each row"
        elif rows:
            problem = f"the dynamics '{rows[0]}' want the gradient of each row"
        if problem:
            raise OptionError(
                f"Job '{run.name}' cannot be trained on several processes, which split its rows: {problem}. Train it "
                "in a run of its own on one process."
            )
        if shard and reading:
            raise OptionError(
                f"Job '{run.name}': the dynamics '{reading[0]}' read the base's weights between passes, where each "
                "process has a part of them only. Set shard: false, which keeps the base whole in each process."
            )
    other = quantised_site(runs)
    if shard and other is not None:
        raise OptionError(
            f"The weight of '{other.path}' is a {type(other.stored).__name__} of {other.stored.dtype}, and quantised "
            "weights cannot be spread over processes. Set shard: false, which keeps the base whole in each process, or "
            "load it with dtype: bfloat16."
        )


def quantised_site(runs: Sequence[Run]) -> Site | None:
    """Return a site whose weight is no plain floating tensor; None if there is none."""
    sites = (site for run in runs if run.adapter is not None for site in run.adapter.sites)
    return next((site for site in sites if not DENSE.keeps(site.stored)), None)


def place_base(model: nn.Module, adapters: Iterable[Adapter], processes: Processes, shard: bool) -> None:
    """Bring the model to where the process computes, its base's weights spread over all processes or whole.

    They are spread one block of a stack at a time.

    Adapters stay whole: their tensors are small, optimizers and rules of methods see all of a tensor, tensors that
    sites share have no one block that they lie in, and whatever the first process writes needs no gathering.

    Parameters
    ----------
    model
        With its adapters; all processes have the same.
    adapters
        All that it carries.
    processes
        Of which this is one.
    shard
        Whether to spread them.
    """
    if not shard:
        if processes.device is not None:
            model.to(processes.device)
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    found = list(adapters)
    whole = {p for adapter in found for _, p, _ in adapter.named_tensors() if isinstance(p, nn.Parameter)}
    if processes.device is not None:
        for adapter in found:
            for _, home in adapter.homes():
                home.move(processes.device)
        for p in whole:
            p.data = p.data.to(processes.device)
    kind = "cpu" if processes.device is None else processes.device.type
    mesh = init_device_mesh(kind, (processes.size,))
    for path in find_stacks((path for path, _ in model.named_parameters()), model).lengths:
        stack = model.get_submodule(path)
        for block in stack.children() if isinstance(stack, nn.ModuleList) else ():
            fully_shard(block, mesh=mesh, ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)
