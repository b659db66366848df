"""The sampler's loop.

`denoise` is the loop, a function of pipeline, latents and conditions. It asks two things of whoever calls it:

``predict(step)``
    gives the prediction that the scheduler's step is made with; the guided prediction, `Step.guided`, if nobody is
    asked. A sampler of its own runs the network here as often as it likes (`Step.run`), for other prompts, other
    compositions or other latents, chooses adapters by `Step.number`, and may put other latents into `Step.latents`
    before it returns. The loop computes no gradients; under ``torch.enable_grad()`` they go through `Step.run` to
    latents and conditions that require them.
``after_step(step)``
    sees the latents that the scheduler made, and may replace them.

Each run of the network tells adapters its step and time, gives each row its composition, and leaves nothing behind:
whatever is raised in the middle of a sample, network and pipeline are as before. The scheduler is a copy, so that the
pipeline's own is never touched. The same prompts, seeds and settings give what the pipeline's own call gives.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.forward.compose import Composition
from lorry.core.life import api
from lorry.core.life.state import kept_state
from lorry.diffusion.conditions import Conditions, joined
from lorry.diffusion.errors import DiffusionError
from lorry.diffusion.families import Family, family_of

#: What applies to a picture: a name, weights by name, text as `parse_composition` reads it, or None.
Applied = str | Composition | None
Hook = Callable[["Step"], None]


@dataclass(eq=False)
class Step:
    """One step of the loop.

    Attributes
    ----------
    number, count
        Which step it is, from 0, of how many.
    time
        Scalar, on the scheduler's scale.
    latents
        ``(rows, channels, height, width)``: before the scheduler's step, and after it when ``after_step`` is called.
    conditions, negative
        What the rows are told, and told to keep away from (None without guidance by a text).
    guidance, distilled
        As in `denoise`.
    compositions
        What applies to each row; None for what is active anyway.
    family, network, scheduler
        What the loop runs.
    """

    number: int
    count: int
    time: Tensor
    latents: Tensor
    conditions: Conditions
    negative: Conditions | None
    guidance: float
    distilled: float | None
    compositions: Sequence[Applied] | None
    family: Family
    network: nn.Module
    scheduler: Any

    def run(
        self,
        conditions: Conditions | None = None,
        *,
        latents: Tensor | None = None,
        compositions: Sequence[Applied] | None = None,
        copies: int = 1,
    ) -> Tensor:
        """Run the network once.

        Parameters
        ----------
        conditions
            Of each row; those of the step if not given.
        latents
            Those of the step if not given; they are scaled here as the scheduler wants it.
        compositions
            What applies to each row; those of the step if not given.
        copies
            How often the whole batch follows itself; compositions are given once.

        Returns
        -------
        Prediction of the shape of the latents.
        """
        conditions = self.conditions if conditions is None else conditions
        latents = self.latents if latents is None else latents
        chosen = self.compositions if compositions is None else compositions
        scale = getattr(self.scheduler, "scale_model_input", None)
        given = latents if scale is None else scale(latents, self.time)
        with told(self.network, self.number, self.time), composed(self.network, chosen, copies):
            return self.family.predict(
                self.network, given, self.time.expand(len(given)), conditions, distilled=self.distilled
            )

    def guided(
        self,
        conditions: Conditions | None = None,
        negative: Conditions | None = None,
        *,
        latents: Tensor | None = None,
        compositions: Sequence[Applied] | None = None,
    ) -> Tensor:
        """Run the network with and without the prompt, and combine; parameters as in `run`."""
        conditions = self.conditions if conditions is None else conditions
        negative = self.negative if negative is None else negative
        latents = self.latents if latents is None else latents
        if negative is None or self.guidance <= 1:
            return self.run(conditions, latents=latents, compositions=compositions)
        if self.family.guided_together:
            both = joined([negative, conditions])
            unwanted, wanted = self.run(
                both, latents=torch.cat([latents, latents]), compositions=compositions, copies=2
            ).chunk(2)
        else:
            wanted = self.run(conditions, latents=latents, compositions=compositions)
            unwanted = self.run(negative, latents=latents, compositions=compositions)
        return self.family.guide(wanted, unwanted, self.guidance)


@contextmanager
def told(network: nn.Module, number: int | None, time: Tensor) -> Iterator[None]:
    """Tell adapters on a network step and time of what it runs, if there are any, beside what they are told already."""
    state = kept_state(network)
    if state is None:
        yield
        return
    with api.context(network, step=number, timestep=time, **state.runtimes.own().context.values):
        yield


@contextmanager
def composed(network: nn.Module, compositions: Sequence[Applied] | None, copies: int = 1) -> Iterator[None]:
    """Let each row have its composition, where any are given."""
    if compositions is None or kept_state(network) is None:
        yield
        return
    with api.rows(network, list(compositions), tile=copies):
        yield


def fresh_scheduler(pipeline: Any) -> Any:
    """Return a scheduler like the pipeline's own, at its beginning."""
    return type(pipeline.scheduler).from_config(pipeline.scheduler.config)


@torch.no_grad()
def denoise(
    pipeline: Any,
    latents: Tensor,
    conditions: Conditions,
    *,
    negative: Conditions | None = None,
    guidance: float = 1.0,
    distilled: float | None = None,
    steps: int = 30,
    scheduler: Any = None,
    compositions: Sequence[Applied] | None = None,
    generators: Sequence[torch.Generator] | None = None,
    predict: Callable[[Step], Tensor] | None = None,
    after_step: Hook | None = None,
) -> Tensor:
    """Take noise to latents of pictures.

    Parameters
    ----------
    pipeline
        Of diffusers; its network is run, nothing of it is changed.
    latents
        Noise of variance 1, ``(rows, channels, height, width)``; it is scaled here as the scheduler wants it.
    conditions, negative
        Of each row (`Family.encode`, `Family.sized`), and what it is told to keep away from.
    guidance
        How far predictions go from those without the prompt beyond those with it; 1 does not guide.
    distilled
        The guidance that a network was distilled for (Flux).
    steps, scheduler
        Steps of the scheduler, which is a copy of the pipeline's own if not given.
    compositions
        What applies to each row: a name, ``{name: weight}`` or None. If not given, what is active applies to all.
    generators, predict, after_step
        One for each row, for schedulers that draw noise; what takes the place of parts of the loop.

    Returns
    -------
    Latents as `Family.pixels` takes them.

    Raises
    ------
    DiffusionError, AdapterError
        No family knows the pipeline, rows are given in different numbers, or an adapter is not there.
    """
    family = family_of(pipeline)
    network, scheduler = family.network(pipeline), scheduler or fresh_scheduler(pipeline)
    check_rows(len(latents), conditions=conditions.rows, compositions=_count(compositions))
    times = family.set_times(scheduler, steps, latents)
    options = _options(scheduler, generators)
    latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
    told = (conditions, negative, guidance, distilled, compositions, family, network, scheduler)
    for number, time in enumerate(times):
        step = Step(number, len(times), time, latents, *told)
        prediction = step.guided() if predict is None else predict(step)
        step.latents = scheduler.step(prediction.detach(), time, step.latents.detach(), **options)[0]
        if after_step is not None:
            after_step(step)
        latents = step.latents
    return latents


def _options(scheduler: Any, generators: Sequence[torch.Generator] | None) -> dict[str, Any]:
    """Return what a scheduler's step is given beside prediction, time and latents."""
    options: dict[str, Any] = {"return_dict": False}
    if generators is not None and "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = list(generators) if len(generators) > 1 else generators[0]
    return options


def _count(values: Sequence[Any] | None) -> int | None:
    return None if values is None else len(values)


def check_rows(rows: int, **given: int | None) -> None:
    """Raise `DiffusionError` unless everything that is given has this number of rows."""
    for name, found in given.items():
        if found is not None and found != rows:
            raise DiffusionError(f"There are {rows} pictures, but {name} for {found}; give one for each.")
