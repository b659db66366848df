"""The registry of methods and of their published presets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lorry.core.method.base import FuseClass, Method, MethodInfo
from lorry.core.options import from_options
from lorry.core.registry import Registry
from lorry.core.sites.kinds import Kind

M = TypeVar("M", bound=type[Method])
METHODS: Registry[MethodInfo] = Registry("method", "`lorry methods` lists them.")
_DEFAULT: list[str] = []


def register(
    slug: str,
    *,
    paper: str,
    kinds: Callable[[Kind], bool] | Sequence[str] = lambda kind: not kind.whole,
    identity_at_start: bool = True,
    fuse: FuseClass | None = None,
    linear_in_scale: bool = True,
    default: bool = False,
) -> Callable[[M], M]:
    """Register a method under a slug. This is the only thing a new method does besides its mathematics.

    Parameters
    ----------
    slug
        Lower-case name used on the command line, in YAML and in checkpoints.
    paper
        Reference, e.g. ``arXiv 2106.09685``.
    kinds
        Whether the method can sit on a kind of site, by what the kind can do, or the names of kinds; all that have a
        weight if not given.
    identity_at_start
        Whether a fresh adapter leaves the model's output unchanged.
    fuse
        Overrides the family's way of fusing.
    linear_in_scale
        Whether weight k in the active set gives k times the update.
    default
        Whether it is the method that is meant where nobody names one.
    """
    names = () if callable(kinds) else tuple(kinds)
    takes = kinds if callable(kinds) else lambda kind: kind.name in names

    def decorate(cls: M) -> M:
        fuses = fuse or cls.fuses
        info = MethodInfo(slug, cls, paper, cls.family, takes, identity_at_start, fuses, linear_in_scale)
        cls.info = info
        METHODS.add(slug, info)
        if default:
            _DEFAULT[:] = [slug]
        return cls

    return decorate


@dataclass(frozen=True)
class Preset:
    """A published name for a method with certain options."""

    slug: str
    of: str
    options: Mapping[str, Any]
    paper: str


PRESETS: Registry[Preset] = Registry("preset")


def preset(slug: str, of: str, *, paper: str, **options: Any) -> Preset:
    """Register a published variant that differs from a method by options only."""
    return PRESETS.add(slug, Preset(slug, of, options, paper))


def presets() -> dict[str, Preset]:
    """Return all presets by slug."""
    METHODS.discover()
    return dict(PRESETS)


def methods() -> dict[str, MethodInfo]:
    """Return every registered method by slug."""
    return dict(METHODS)


def method_from(values: Mapping[str, Any] | str | None = None) -> Method:
    """Build a method from its slug, or from plain data with the key ``method`` and its options; the default one for
    None, or where the key is missing.

    Raises
    ------
    OptionError
        Unknown slug or option (with near misses), or a value out of range.
    """
    values = {"method": values} if isinstance(values, str) else dict(values or {})
    known = presets()
    slug = values.pop("method", None) or _DEFAULT[0]
    if slug in known:
        values = {**known[slug].options, **values}
        slug = known[slug].of
    return from_options(METHODS.find(slug, also=known).cls, values)
