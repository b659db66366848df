"""Merge methods: typed functions whose signatures are their options, registered by one decorator.

A method for single sites is ``f(site: SiteInput, *, option: Annotated[type, Knob(...)] = default) -> Factors``; one
for whole adapters is ``f(pool: Pool, *, ...) -> Iterator[tuple[str, Factors]]``. The keyword-only parameters are
turned into a frozen dataclass of options, from which checks, help and schema follow.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from lorry.core.errors import OptionError
from lorry.core.options import check_options, from_options, option
from lorry.core.registry import Registry

Space = Literal["factor", "delta", "aligned"]
Scope = Literal["site", "adapter"]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Knob:
    """Help and range of an option, as the metadata of ``Annotated``."""

    help: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def rules(self) -> dict[str, float]:
        """Return the ranges that are set."""
        return {k: v for k in ("at_least", "above", "at_most", "below") if (v := getattr(self, k)) is not None}


@dataclass(frozen=True)
class MergeMethod:
    """What the registry knows of a merge method.

    Attributes
    ----------
    space
        ``delta``: works on the updates ΔW, so the result does not depend on how they are split into factors;
        ``factor``: works on A and B separately; ``aligned``: on coordinates in the joint singular basis (KnOTS), which
        the split does not change either.
    scope
        ``site``: each site on its own, streamed; ``adapter``: the method sees all sites.
    exact
        Whether the result is the weighted sum itself (up to rounding).
    plain
        Options under which one adapter with weight 1, and n copies of it with weights 1/n, give that adapter back;
        None if there are none, and then `note` says why.
    linear
        Whether weights times k give the update times k.
    needs
        What besides adapters must be given: ``objective``, ``tasks``.
    note
        Where the method departs from what one would expect, said to the user.
    """

    slug: str
    function: Callable[..., Any]
    options: type
    space: Space
    scope: Scope
    source: str
    help: str
    exact: bool = False
    plain: Mapping[str, Any] | None = field(default_factory=dict)
    linear: bool = True
    needs: tuple[str, ...] = ()
    note: str = ""

    def parse(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return all options with defaults filled in; unknown names and values out of range raise `OptionError`."""
        try:
            instance: Any = from_options(self.options, values)
            check_options(instance)
        except OptionError as error:
            raise OptionError(f"Merge method '{self.slug}': {error}") from None
        return {f.name: getattr(instance, f.name) for f in dataclasses.fields(instance)}

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as plain data, with options, defaults and help."""
        options = {
            f.name: {"default": f.default, "type": str(f.type), **dict(f.metadata)}
            for f in dataclasses.fields(self.options)
        }
        facts = {k: v for k, v in vars(self).items() if k not in ("function", "options")}
        return {**facts, "plain": None if self.plain is None else dict(self.plain), "options": options}


#: Every merge method by slug.
MERGES: Registry[MergeMethod] = Registry("merge method")
_ALIASES: dict[str, str] = {}
_ORIGINS: dict[str, str] = {}


def merge_method(slug: str, *, space: Space, source: str, scope: Scope = "site", **facts: Any) -> Callable[[F], F]:
    """Register a merge function; its keyword-only parameters are the options. See `MergeMethod` for `facts`."""

    def decorate(function: F) -> F:
        add(slug, function, _options_of(slug, function), space=space, scope=scope, source=source, **facts)
        return function

    return decorate


def add(slug: str, function: Callable[..., Any], options: type, *, help: str = "", **facts: Any) -> None:
    """Register a method whose options were worked out already (rows of a table of variants)."""
    defined = getattr(function, "func", function)  # a variant is a partial of its table's function
    origin = f"{defined.__module__}.{defined.__qualname__}"
    if _ORIGINS.setdefault(slug, origin) != origin:
        raise OptionError(f"Two merge methods are called '{slug}': {_ORIGINS[slug]} and {origin}.")
    text = help or (inspect.getdoc(function) or "").partition("\n")[0]
    MERGES.add(slug, MergeMethod(slug, function, options, help=text, **facts))


def alias(name: str, of: str) -> None:
    """Let another name mean a method."""
    _ALIASES[name] = of


def merge_methods() -> dict[str, MergeMethod]:
    """Return every merge method by slug."""
    return dict(MERGES)


def merge_method_named(slug: str) -> MergeMethod:
    """Return a merge method by its slug or alias; unknown ones raise `OptionError` with near misses."""
    MERGES.discover()
    return MERGES.find(_ALIASES.get(slug, slug), also=_ALIASES)


def _options_of(slug: str, function: Callable[..., Any]) -> type:
    """Return the dataclass that the keyword-only parameters of a function describe."""
    hints = typing.get_type_hints(function, include_extras=True)
    fields = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            default = dataclasses.MISSING if parameter.default is parameter.empty else parameter.default
            fields.append(_field(name, hints[name], default))
    return options_class(slug, fields)


def options_class(slug: str, fields: list[tuple[str, Any, Any]]) -> type:
    """Return a frozen dataclass of options."""
    return dataclasses.make_dataclass(
        f"Options of {slug}".replace(" ", "_").replace("-", "_"), fields, frozen=True, kw_only=True
    )


def _field(name: str, hint: Any, default: Any) -> tuple[str, Any, Any]:
    knob = next((m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Knob)), None)
    if knob is None:
        raise TypeError(f"option '{name}' of a merge method needs Annotated[..., Knob(...)]")
    kind = typing.get_args(hint)[0]
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else None
    text = "str" if choices else getattr(kind, "__name__", str(kind)) if not typing.get_args(kind) else str(kind)
    return name, text.replace("typing.", ""), option(default, knob.help, choices=choices, **knob.rules())
