"""Weights by adapter, site and layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorry.core.errors import OptionError, near_misses
from lorry.core.sites.targets import matches

#: A number; a list that is spread over the layers from the first to the last; or pattern of sites -> either of these.
Weight = float | Sequence[float] | Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """A factor on weights at some sites.

    Attributes
    ----------
    sites
        Pattern of site paths, as for targets.
    layers
        First and last block index, both included; None for all.
    weights
        Adapter -> factor; adapters that are not named keep theirs.
    """

    sites: str = "*"
    layers: tuple[int, int] | None = None
    weights: Mapping[str, float] | float = 1.0

    def factor(self, name: str, path: str, layer: int | None) -> float:
        """Return the factor for an adapter at a site; 1 if the step does not mean it."""
        if not matches(path, self.sites) or not self._inside(layer):
            return 1.0
        return self.weights.get(name, 1.0) if isinstance(self.weights, Mapping) else float(self.weights)

    def _inside(self, layer: int | None) -> bool:
        return self.layers is None or (layer is not None and self.layers[0] <= layer <= self.layers[1])


def layer_of(path: str) -> int | None:
    """Return the index of the block that a site lies in: the first number in its path."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


class Weights:
    """The weight of each adapter at each site.

    Parameters
    ----------
    names
        The adapters.
    given
        Weights by name; None for 1/n each.
    schedule
        Factors on them at some sites.
    paths
        All sites.

    Raises
    ------
    OptionError
        A name is unknown, a weight is missing or not finite, or a pattern matches no site.
    """

    def __init__(
        self, names: Sequence[str], given: Mapping[str, Weight] | None, schedule: Sequence[Step], paths: Sequence[str]
    ) -> None:
        self.given: dict[str, Weight] = dict(given) if given is not None else dict.fromkeys(names, 1 / len(names))
        for name in self.given:
            if name not in names:
                raise OptionError(
                    f"There is no adapter '{name}' to give a weight.{near_misses(name, names)} There are: "
                    f"{', '.join(names)}."
                )
        missing = [n for n in names if n not in self.given]
        if missing:
            raise OptionError(f"Weights are given, but none for {', '.join(repr(m) for m in missing)}.")
        self.schedule = schedule
        layers = [layer for p in paths if (layer := layer_of(p)) is not None]
        self._first, self._last = (min(layers), max(layers)) if layers else (0, 0)
        for name, weight in self.given.items():
            _check(name, weight, paths)
        for step in schedule:
            self._check_step(step, names, paths)

    def at(self, name: str, path: str) -> float:
        """Return the weight of an adapter at a site."""
        layer = layer_of(path)
        weight = self._value(self.given[name], path, layer)
        for step in self.schedule:
            weight *= step.factor(name, path, layer)
        return weight

    def _value(self, weight: Weight, path: str, layer: int | None) -> float:
        if isinstance(weight, Mapping):
            found = next((v for pattern, v in weight.items() if matches(path, pattern)), 0.0)
            return self._value(found, path, layer)
        if isinstance(weight, Sequence):
            span = max(self._last - self._first, 1)
            place = ((layer if layer is not None else self._first) - self._first) / span * (len(weight) - 1)
            low = min(int(place), len(weight) - 1)
            high = min(low + 1, len(weight) - 1)
            return float(weight[low] + (weight[high] - weight[low]) * (place - low))
        return float(weight)

    def _check_step(self, step: Step, names: Sequence[str], paths: Sequence[str]) -> None:
        if not any(matches(p, step.sites) and step._inside(layer_of(p)) for p in paths):
            raise OptionError(
                f"A step of the schedule (sites '{step.sites}', layers {step.layers}) means none of the {len(paths)} "
                "sites."
            )
        values = step.weights if isinstance(step.weights, Mapping) else {names[0]: step.weights}
        for name, value in values.items():
            if name not in names:
                raise OptionError(f"The schedule names the unknown adapter '{name}'.{near_misses(name, names)}")
            _check(name, value, paths)


def _check(name: str, weight: Weight, paths: Sequence[str]) -> None:
    if isinstance(weight, Mapping):
        for pattern, value in weight.items():
            if not any(matches(p, pattern) for p in paths):
                raise OptionError(f"The weight of '{name}' for '{pattern}' matches none of the {len(paths)} sites.")
            _check(name, value, paths)
        if not weight:
            raise OptionError(f"The weight of '{name}' is empty.")
        return
    values = list(weight) if isinstance(weight, Sequence) and not isinstance(weight, str) else [weight]
    for value in values if values else [float("nan")]:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise OptionError(
                f"The weight of '{name}' must be a finite number, a list of them, or pattern -> these; found {value!r}."
            )
