"""Gates over members that each step draws, and pictures of a right adapter among wrong ones."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lorry
from lorry.core.errors import OptionError
from lorry.core.options import check_options, option
from lorry.diffusion import Pictures, sample
from lorry.diffusion.task import fleet
from lorry.merging import merge
from lorry.pocket.diffusion import Judge, read
from lorry.systems.autolora.pool import Pool, as_image

#: The sampler and the name of a trained gate.
GATE = "gate"
#: What each way of running a triple is called, and its weights: the right adapter's, and each wrong one's.
SUMS: dict[str, tuple[float, float]] = {
    "right adapter alone": (1.0, 0.0),
    "sum": (1.0, 1.0),
    "sum, half": (0.5, 0.5),
    "sum, a third": (1 / 3, 1 / 3),
}


@dataclass(frozen=True)
class GateTraining:
    """How a gate is trained.

    Raises
    ------
    OptionError
        A value out of its range.
    """

    steps: int = option(160, "Optimizer steps.", at_least=1)
    rows: int = option(6, "Pictures of a step.", at_least=1)
    members: int = option(3, "Adapters that a picture has: its own among others.", at_least=1)
    pictures: int = option(8, "Pictures of each adapter's concept.", at_least=1)
    rate: float = option(4e-3, "Learning rate, falling by a cosine.", above=0)

    def __post_init__(self) -> None:
        """Check every option against its range."""
        check_options(self)


@dataclass(frozen=True)
class Triple:
    """A right adapter, whose trigger is in the prompt, and wrong ones that are active beside it.

    Attributes
    ----------
    right, wrong
        Names in the pool.
    seed
        Of the picture's noise.
    """

    right: str
    wrong: tuple[str, ...]
    seed: int

    def weights(self, right: float, wrong: float) -> dict[str, float]:
        """Return the composition of these weights; those of 0 are left out."""
        found = {self.right: right, **dict.fromkeys(self.wrong, wrong)}
        return {name: weight for name, weight in found.items() if weight}


def triples(pool: Pool, names: Sequence[str], each: int, seed: int, wrong: int = 2) -> list[Triple]:
    """Return each adapter beside wrong ones that have other triggers, `each` times.

    Raises
    ------
    OptionError
        There are not enough adapters of other triggers.
    """
    rng, found = random.Random(f"triples {seed}"), []
    for number in range(each):
        for right in names:
            others = [n for n in names if pool.concepts[n].trigger != pool.concepts[right].trigger]
            if len(others) < wrong:
                raise OptionError(f"Beside '{right}' there are {len(others)} adapters of other triggers, not {wrong}.")
            found.append(Triple(right, tuple(rng.sample(others, wrong)), 1000 * seed + number))
    return found


def train_gates(
    pipeline: Any,
    pool: Pool,
    names: Sequence[str],
    out: Path,
    settings: GateTraining,
    *,
    gates: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Train gates over adapters of a pool, each on pictures of them with drawn others beside; the members stay loaded.

    Parameters
    ----------
    pipeline
        Of diffusers.
    pool, names
        The adapters.
    out
        Folder of the fleet.
    settings
        How.
    gates
        Name -> options of the method ``gated-fusion``; one of the name `GATE` if not given.
    seed
        Of pictures and draws.

    Returns
    -------
    dict
        Name -> the gate on the pipeline's network, not active.
    """
    rng, data = random.Random(f"gate {seed}"), []
    for name in names:
        concept = pool.concepts[name]
        data += [
            {"image": as_image(concept.scene(rng)), "text": concept.prompt, "adapter": name}
            for _ in range(settings.pictures)
        ]
    jobs = [
        {
            "name": gate,
            "method": {"method": "gated-fusion", **options},
            "members": {name: str(pool.path(name)) for name in names},
            "drawn_members": min(settings.members, len(names)),
            "data": data,
            "task_ids": {"column": "adapter", "names": list(names)},
            "objective": "diffusion",
            "steps": settings.steps,
            "batch_size": settings.rows,
            "learning_rate": settings.rate,
            "schedule": "cosine",
            "seed": seed,
        }
        for gate, options in (gates or {GATE: {}}).items()
    ]
    return dict(fleet(pipeline, jobs, out, progress=False).train().adapters)


def on_network(pipeline: Any, pool: Pool, names: Sequence[str]) -> None:
    """Load adapters of a pool that are not on the network yet, not active."""
    for name in names:
        if name not in lorry.adapters(pipeline.unet):
            lorry.load(pipeline.unet, pool.path(name), name=name, activate=False)


def drawn(
    pipeline: Any, pool: Pool, wanted: Sequence[Triple], way: str | tuple[float, float], *, steps: int, merged: str = ""
) -> Pictures:
    """Return a picture for each triple.

    Parameters
    ----------
    pipeline
        With the adapters on its network.
    pool, wanted
        What is wanted.
    way
        Weights of the right and the wrong adapters, whose updates add up; or the name of a gate.
    steps
        Of the sampler.
    merged
        Name of a merge method, by which a triple's adapters become one first.
    """
    prompts, seeds = [pool.concepts[one.right].prompt for one in wanted], [one.seed for one in wanted]
    settings: dict[str, Any] = {"steps": steps, "guidance": 4.0, "batch_size": 16}
    if merged:
        return _merged(pipeline, wanted, merged, prompts, settings)
    weights = (1.0, 1.0) if isinstance(way, str) else way
    if isinstance(way, str):
        settings["sampler"] = {"sampler": "gated", "gate": way}
    compositions: list[Any] = [one.weights(*weights) or None for one in wanted]
    return sample(pipeline, prompts, compositions=compositions, seeds=seeds, **settings)


def _merged(
    pipeline: Any, wanted: Sequence[Triple], method: str, prompts: Sequence[str], settings: Mapping[str, Any]
) -> Pictures:
    """Pictures under each triple's adapters made one."""
    there, made = lorry.adapters(pipeline.unet), []
    names: dict[tuple[str, ...], str] = {}
    try:
        for one in wanted:
            parts = (one.right, *one.wrong)
            if parts not in names:
                names[parts] = f"merged-{len(names)}"
                whole = merge({n: there[n] for n in parts}, weights=dict.fromkeys(parts, 1.0), method=method)
                made.append(whole.attach(pipeline.unet, names[parts], activate=False))
        compositions = [names[one.right, *one.wrong] for one in wanted]
        return sample(pipeline, prompts, compositions=compositions, seeds=[one.seed for one in wanted], **settings)
    finally:
        for adapter in made:
            adapter.detach()


def shown(judge: Judge, pool: Pool, wanted: Sequence[Triple], pictures: Tensor) -> float:
    """Return the share of words of the right concepts that the judge sees in the pictures ``(triples, 3, 32, 32)``."""
    found = read(judge, pictures)
    each = [
        ok for one, scene in zip(wanted, found, strict=True) for ok in pool.concepts[one.right].shown(scene).values()
    ]
    return sum(each) / len(each)


def all_ways(
    pipeline: Any, judge: Judge, pool: Pool, wanted: Sequence[Triple], gates: Sequence[str], *, steps: int
) -> dict[str, float]:
    """Return what `shown` says of every way to run the triples: the base, sums, merges, and gates by their names."""
    ways: dict[str, tuple[str | tuple[float, float], str]] = {"base": ((0.0, 0.0), "")}
    ways |= {name: (weights, "") for name, weights in SUMS.items()}
    ways |= {f"merged by {method}": ((1.0, 1.0), method) for method in ("ties", "dare-ties")}
    ways |= {name: (name, "") for name in gates}
    found = {}
    for name, (way, merged) in ways.items():
        with torch.no_grad():
            pixels = drawn(pipeline, pool, wanted, way, steps=steps, merged=merged).pixels
        found[name] = shown(judge, pool, wanted, pixels)
    return found
