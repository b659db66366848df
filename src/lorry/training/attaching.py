"""The adapter of a job on its base."""

from __future__ import annotations

from torch import nn

from lorry.core.errors import OptionError
from lorry.core.life.adapter import Adapter
from lorry.core.life.api import attach
from lorry.formats.mixture import from_adapters

from .jobs import DTYPES, Job


def attach_job(model: nn.Module, job: Job) -> Adapter:
    """Attach the adapter of a job to its base, not active."""
    experts = job.experts()
    if experts:
        weights = {name: weight for name, (_, weight) in experts.items() if weight is not None}
        made = from_adapters(
            model,
            job.make_method(),
            {name: path for name, (path, _) in experts.items()},
            weights=weights or None,
            name=job.name,
            seed=job.seed,
            dtype=DTYPES[job.dtype],
            activate=False,
        )
        if not made.parameters():
            made.detach()
            raise OptionError(
                f"Job '{job.name}': {made.method.info.slug} built from {len(experts)} adapters has nothing left to "
                "train. Give more adapters, or options that let it train them."
            )
        return made
    return attach(
        model,
        job.make_method(),
        targets=job.targets,
        name=job.name,
        seed=job.seed,
        exclude=job.exclude,
        layers=job.layers,
        site_options=job.site_options,
        train_also=job.modules_to_save,
        dtype=DTYPES[job.dtype],
        activate=False,
    )
