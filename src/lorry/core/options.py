"""Options: one definition of each, from which checks, CLI help, YAML schema and docs are derived."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from lorry.core.errors import OptionError, near_misses

T = TypeVar("T")


def option(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: tuple[Any, ...] | None = None,
) -> Any:
    """Declare a dataclass field with its help text and its range.

    Parameters
    ----------
    default
        The default value; the field is required if it is ``dataclasses.MISSING``.
    help
        One sentence for CLI, schema and docs.
    at_least, above, at_most, below, choices
        The rule that `check_options` applies to any value that is not None.
    """
    rules = {"at_least": at_least, "above": above, "at_most": at_most, "below": below, "choices": choices}
    metadata = {"help": help, **{k: v for k, v in rules.items() if v is not None}}
    return dataclasses.field(default=default, metadata=metadata)


def check_options(instance: Any) -> None:
    """Check every field of a dataclass instance against the rules it was declared with.

    Raises
    ------
    OptionError
        Names the option, the rule and the value.
    """
    owner = type(instance).__name__
    for field in dataclasses.fields(instance):
        value, rules = getattr(instance, field.name), field.metadata
        if value is None:
            if field.default is not None and "None" not in str(field.type):
                raise OptionError(f"{owner}: option '{field.name}' must not be None.")
            continue
        _check_type(owner, field, value)
        given = callable(value) and "Callable" in str(field.type)  # a function of the user's, in the place of a choice
        if "choices" in rules and not given and value not in rules["choices"]:
            hint = near_misses(str(value), map(str, rules["choices"]))
            raise OptionError(
                f"{owner}: option '{field.name}' must be one of {list(rules['choices'])}, found {value!r}.{hint}"
            )
        _check_range(owner, field.name, value, rules)


def _check_type(owner: str, field: dataclasses.Field[Any], value: Any) -> None:
    """Refuse text for numbers and fractions for whole numbers; annotations are read as text."""
    declared = str(field.type).split("|")[0].strip()
    number = isinstance(value, int | float) and not isinstance(value, bool)
    wrong = (
        (declared == "int" and (not number or isinstance(value, float)))
        or (declared == "float" and (not number or not math.isfinite(value)))
        or (declared == "bool" and not isinstance(value, bool))
        or (declared == "str" and "|" not in str(field.type) and not isinstance(value, str))
    )
    if wrong:
        raise OptionError(f"{owner}: option '{field.name}' must be {declared}, found {value!r}.")


def _check_range(owner: str, name: str, value: Any, rules: Mapping[str, Any]) -> None:
    tests: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
        "at_least": (operator.ge, "at least"),
        "above": (operator.gt, "above"),
        "at_most": (operator.le, "at most"),
        "below": (operator.lt, "below"),
    }
    for rule, (holds, words) in tests.items():
        if rule in rules and not isinstance(value, str) and not holds(value, rules[rule]):
            raise OptionError(f"{owner}: option '{name}' must be {words} {rules[rule]}, found {value!r}.")


def from_options(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build a dataclass from plain data, refusing unknown keys by name.

    Raises
    ------
    OptionError
        An unknown key (with near misses), a missing one, or a value out of range.
    """
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise OptionError(
                f"{cls.__name__} has no option '{key}'.{near_misses(key, fields)} It has: {', '.join(fields)}."
            )
    missing = [
        n
        for n, f in fields.items()
        if n not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise OptionError(f"{cls.__name__} needs a value for {', '.join(repr(m) for m in missing)}.")
    tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return cls(**tuples)
