"""Which adapters settle high frequencies early, and where a run's early phase ends, measured (for CMLoRA, Switch-A).

>>> high, low = frequency_order(pipeline, ["style", "background"], "a red square")  # doctest: +SKIP
>>> sample(pipeline, "a red square", compositions={"style": 1.0, "background": 1.0},
...        sampler=CMLoRA(high=high, low=low))  # doctest: +SKIP
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorry.diffusion.errors import DiffusionError
from lorry.diffusion.making import sample
from lorry.diffusion.samplers.base import Course, Sampler, Wanted, sampler_from
from lorry.diffusion.samplers.cmlora import EARLY
from lorry.diffusion.samplers.parts.spectrum import early_change, high_share, split_by_change
from lorry.diffusion.sampling import Step


def frequency_profile(
    pipeline: Any,
    composition: Any,
    prompt: str,
    *,
    seeds: Sequence[int] = (0, 1, 2, 3),
    cut: float = 0.2,
    sampler: Sampler | str | Mapping[str, Any] = "merge",
    **settings: Any,
) -> Tensor:
    """Return H of the latents after each step but the last, the mean of several pictures.

    Parameters
    ----------
    pipeline
        Of diffusers, with adapters.
    composition
        What applies; the name of an adapter profiles it alone.
    prompt, seeds, settings
        Of the pictures; as in `lorry.diffusion.sample`.
    cut
        Where high frequencies begin, as a share of the largest.
    sampler
        Composes several adapters; without one their updates add up.

    Returns
    -------
    ``(steps - 1,)``, in float32.
    """
    found: dict[int, list[Tensor]] = {}
    watched = _Watching(sampler_from(sampler), found, cut)
    options = {"batch_size": len(seeds), **settings}
    sample(pipeline, prompt, compositions=composition, seeds=list(seeds), sampler=watched, **options)
    return torch.stack([torch.cat(found[number]).mean() for number in sorted(found)])


def frequency_order(
    pipeline: Any,
    adapters: Sequence[str],
    prompts: str | Mapping[str, str],
    *,
    early: float = EARLY,
    distance: int = 1,
    **settings: Any,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Profile each adapter alone, and split them into the high and the low set.

    Parameters
    ----------
    pipeline, settings
        As in `frequency_profile`.
    adapters
        Their names.
    prompts
        For each adapter its own, or one for all.
    early
        Share of the run that is early.
    distance
        z: over how many steps H is compared with itself.

    Returns
    -------
    The high set, whose H changes much in the early part of a run, and the low set; each by falling change.
    """
    changes = {}
    for name in adapters:
        prompt = prompts if isinstance(prompts, str) else prompts[name]
        changes[name] = early_change(frequency_profile(pipeline, name, prompt, **settings), early, distance)
    return split_by_change(changes)


def calibrated_threshold(
    pipeline: Any,
    composition: Any,
    prompt: str,
    *,
    early: float = EARLY,
    steps: int = 30,
    **settings: Any,
) -> float:
    """Return the g with which the online phase ends where a share of the steps is done, for latents of this size.

    Parameters
    ----------
    pipeline, composition, prompt, settings
        As in `frequency_profile`.
    early
        The share of the steps.
    steps
        Of the run.

    Raises
    ------
    DiffusionError
        H does not fall there, so that no threshold can tell.
    """
    profile = frequency_profile(pipeline, composition, prompt, steps=steps, **settings)
    last = math.floor(early * steps + 1e-9)  # the last early step sees H after the step before it
    if not 1 <= last < len(profile):
        raise DiffusionError(f"The early phase of {steps} steps would end after {last}; take more steps.")
    before, after = float(profile[last - 1]), float(profile[last])
    if before <= after:
        raise DiffusionError(
            f"H goes from {before:.3f} to {after:.3f} where the early phase is to end, and does not fall; use the "
            "phase 'offline', which counts steps."
        )
    return (before + after) / 2


@dataclass(frozen=True)
class _Watching(Sampler):
    """Another sampler, with H of the latents noted before each step."""

    inner: Sampler
    found: dict[int, list[Tensor]]
    cut: float

    def described(self) -> dict[str, Any]:
        """Return what the other sampler says of itself."""
        return self.inner.described()

    @contextmanager
    def begin(self, pipeline: Any, orders: Sequence[Wanted]) -> Iterator[Course]:
        """Begin with a batch."""
        with self.inner.begin(pipeline, orders) as course:
            yield _Noting(course, self.found, self.cut)


@dataclass
class _Noting:
    course: Course
    found: dict[int, list[Tensor]]
    cut: float

    def predict(self, step: Step) -> Tensor:
        if step.number:
            self.found.setdefault(step.number, []).append(high_share(step.latents, self.cut))
        return self.course.predict(step)

    def reports(self) -> list[dict[str, Any]]:
        return self.course.reports()
