"""Weights of a composition by the sampler's time, and compositions as text: ``a:0.7+b:0.3@200-800``."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from lorry.core.errors import near_misses
from lorry.core.forward.compose import Composition
from lorry.core.forward.weights import ByTimestep, Weight
from lorry.diffusion.errors import DiffusionError

_PART = re.compile(r"(?P<name>[^:@+]+)(:(?P<weight>[^@]*))?(@(?P<low>[\d.]+)-(?P<high>[\d.]+))?")


@dataclass(frozen=True)
class _Range:
    low: float
    high: float
    weight: float

    def __call__(self, timestep: Tensor | float) -> float | Tensor:
        if isinstance(timestep, Tensor):
            inside = (timestep >= self.low) & (timestep < self.high)
            return torch.where(inside, self.weight, 0.0).to(timestep.device)
        return self.weight if self.low <= timestep < self.high else 0.0


def within(low: float, high: float, weight: float = 1.0) -> ByTimestep:
    """Return a weight that is there at times from `low` to below `high`, and zero at others.

    Parameters
    ----------
    low, high
        On the scheduler's scale: noise is at 1000, the picture at 0.
    weight
        Between them.

    Raises
    ------
    DiffusionError
        The range is empty.
    """
    if not low < high:
        raise DiffusionError(f"A range of times goes from a smaller to a larger one, found {low:g} to {high:g}.")
    return ByTimestep(_Range(low, high, weight))


def parse_composition(text: str, names: Collection[str]) -> Composition | None:
    """Return the composition that ``NAME[:WEIGHT][@LOW-HIGH][+...]`` means; None for ``none``.

    Parameters
    ----------
    text
        Weights are 1 where none is written; a range of times may follow.
    names
        The adapters that are there.

    Raises
    ------
    DiffusionError
        A name that is not there, a weight that is no number, or an adapter that is named twice.
    """
    if text.strip() == "none" and "none" not in names:
        return None
    found: dict[str, Weight] = {}
    for part in text.split("+"):
        read = _PART.fullmatch(part.strip())
        name = read["name"].strip() if read else part.strip()
        if name not in names:
            there = ", ".join(sorted(names)) or "none"
            raise DiffusionError(
                f"The composition '{text}' names the adapter '{name}', which is not loaded.{near_misses(name, names)} "
                f"Loaded: {there}."
            )
        assert read is not None
        if name in found:
            raise DiffusionError(f"The composition '{text}' names the adapter '{name}' twice; give one weight for it.")
        try:
            weight = 1.0 if read["weight"] is None else float(read["weight"])
        except ValueError:
            raise DiffusionError(
                f"The composition '{text}' gives '{name}' the weight '{read['weight']}'; expected a number, as in "
                f"{name}:0.7."
            ) from None
        ranged = read["low"] is not None
        found[name] = within(float(read["low"]), float(read["high"]), weight) if ranged else weight
    return found


def composition_text(composition: str | Composition | None) -> str:
    """Return a composition as people write it."""
    if composition is None:
        return "none"
    if isinstance(composition, str):
        return composition
    return "+".join(_part_text(str(name), weight) for name, weight in composition.items()) or "none"


def _part_text(name: str, weight: object) -> str:
    if isinstance(weight, ByTimestep) and isinstance(weight.at, _Range):
        found = weight.at
        factor = "" if found.weight == 1 else f":{found.weight:g}"
        return f"{name}{factor}@{found.low:g}-{found.high:g}"
    if isinstance(weight, int | float):
        return name if weight == 1 else f"{name}:{weight:g}"
    return f"{name}:({type(weight).__name__})"
