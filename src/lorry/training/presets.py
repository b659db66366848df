"""Presets: published names for combinations of a method, a start, a scaling and dynamics.

A name that differs from a method by options alone is a preset of that method (`lorry.core.method.registry.preset`);
what else a paper changes is named here. A job says ``preset: lora-ga``, or ``method: lora-ga``; what it sets besides is
added, and what contradicts the name is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorry.core.errors import OptionError
from lorry.core.method.base import Method
from lorry.core.method.registry import METHODS, method_from, presets
from lorry.core.registry import Registry

from .hooks import DYNAMICS, by_name
from .scalings import SCALINGS
from .starts import STARTS


@dataclass(frozen=True)
class Combination:
    """What a published name stands for: each part as a job would write it, None or empty for the method's own way."""

    name: str
    paper: str
    method: Mapping[str, Any] = field(default_factory=lambda: {"method": "lora"})
    start: Any = None
    scaling: Any = None
    dynamics: tuple[Any, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the parts as plain data."""
        parts = {"method": dict(self.method), "start": self.start, "scaling": self.scaling}
        return {"paper": self.paper, **parts, "dynamics": list(self.dynamics)}


COMBINATIONS: Registry[Combination] = Registry("preset", "`lorry methods --kind preset` lists them.")


def combination(name: str, paper: str, method: str | Mapping[str, Any] = "lora", **parts: Any) -> None:
    """Register a published combination."""
    chosen = {"method": method} if isinstance(method, str) else method
    COMBINATIONS.add(name, Combination(name, paper, chosen, **parts))


def named(name: str) -> Combination:
    """Return the combination of a name; that of a method, or of a method's preset, is the method alone.

    Raises
    ------
    OptionError
        There is none, with near misses.
    """
    if name not in COMBINATIONS and (name in METHODS or name in presets()):
        slug = presets()[name].of if name in presets() else name
        paper = presets()[name].paper if name in presets() else METHODS[name].paper
        return Combination(name, paper, {"method": slug, **(presets()[name].options if name in presets() else {})})
    return COMBINATIONS.find(name, also=[*presets(), *METHODS])


def parts_of(job: Any) -> dict[str, Any]:
    """Return method, start, scaling and dynamics of a job with those of its preset filled in; empty without a preset.

    Parameters
    ----------
    job
        Has the attributes `preset`, `method`, `start`, `scaling` and `dynamics`.

    Raises
    ------
    OptionError
        There is no such preset, or what the job says besides contradicts it.
    """
    slug, options = _split(job.method)
    name = job.preset
    if name is None:
        if slug is None or slug in METHODS or slug in presets() or slug not in COMBINATIONS:
            return {}
        name, slug = slug, None
    chosen = named(name)
    own = method_from(chosen.method)
    if isinstance(job.method, Method):
        if type(job.method) is not type(own):
            raise _contradicted(job.name, name, "method", own.info.slug, job.method.info.slug)
        method: Any = job.method
    else:
        given = None if slug in (None, name) else method_from(slug)
        if given is not None and type(given) is not type(own):
            raise _contradicted(job.name, name, "method", own.info.slug, given.info.slug)
        method = {**chosen.method, **options}
    start = _one(job, name, "start", chosen.start)
    scaling = _one(job, name, "scaling", chosen.scaling)
    several = (
        [job.dynamics] if not isinstance(job.dynamics, Sequence) or isinstance(job.dynamics, str) else job.dynamics
    )
    also = {by_name(DYNAMICS, "dynamics", d).name for d in several}
    more = [d for d in chosen.dynamics if by_name(DYNAMICS, "dynamics", d).name not in also]
    return {"preset": name, "method": method, "start": start, "scaling": scaling, "dynamics": (*more, *several)}


def _split(method: Any) -> tuple[str | None, dict[str, Any]]:
    """Return the slug and the options of a method as a job writes it."""
    if isinstance(method, str):
        return method, {}
    if isinstance(method, Mapping):
        return method.get("method"), {k: v for k, v in method.items() if k != "method"}
    return None, {}


def _one(job: Any, preset: str, part: str, wanted: Any) -> Any:
    """Return a part of the job: the preset's if the job gives none, else the job's own, which must be of that name."""
    given = getattr(job, part)
    if given is None or wanted is None:
        return wanted if given is None else given
    registries: dict[str, Registry[Any]] = {"start": STARTS, "scaling": SCALINGS}
    found, own = (by_name(registries[part], part, value).name for value in (given, wanted))
    if found != own:
        raise _contradicted(job.name, preset, part, own, found)
    return given


def _contradicted(job: str, preset: str, part: str, wanted: str, found: str) -> OptionError:
    return OptionError(
        f"Job '{job}': the preset '{preset}' is the {part} '{wanted}', found '{found}' beside it. Leave out the preset "
        f"and name the parts that you want, or leave out the {part}."
    )


combination("lora-ga", "arXiv 2407.05000", start="lora-ga", scaling="rslora")
combination("lora-ga-pro", "arXiv 2601.22708", start="lora-ga-pro", scaling="rslora")
combination("gora", "arXiv 2502.12171", start="gora", scaling="rslora")
combination("nlora", "arXiv 2502.14482", "mos-lora", start="nlora")
combination("lora-one", "arXiv 2502.01235", start="lora-one")
combination("lora-sb", "arXiv 2411.19557", "lora-xs", start="lora-sb")
combination("lora-da", "arXiv 2510.24561", start="lora-da")
combination("nz-lora", "arXiv 2505.23194", start="nz-lora")
combination("milora", "arXiv 2406.09044", start="milora")
combination("corda", "arXiv 2406.05223", start="corda")
combination("dude", "arXiv 2505.14367", "dora", start="pissa")
combination("lora-pro", "arXiv 2407.18242", scaling="rslora", dynamics=("lora-pro",))
combination("relora", "arXiv 2307.05695", dynamics=("relora",))
combination("plora", "arXiv 2402.16141", dynamics=("plora",))
combination("delta-lora", "arXiv 2309.02411", dynamics=("delta-lora",))
combination("allora", "arXiv 2410.09692", scaling="constant", dynamics=("allora",))
combination("lora-ggpo", "arXiv 2502.14538", dynamics=("lora-ggpo",))
combination("flat-lora", "arXiv 2409.14396", dynamics=({"dynamics": "lora-ggpo", "beta": 0.0},))
