"""What a bench is, and the registry of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lorry.core.errors import OptionError, near_misses
from lorry.core.registry import Registry


@dataclass(frozen=True)
class Bench:
    """One comparison side by side.

    Attributes
    ----------
    name
        On the command line.
    help
        What is compared, in a sentence.
    function
        Measures; its parameters are the options, with their defaults. Returns plain data.
    table
        Turns the result of `function` into what a terminal shows.
    """

    name: str
    help: str
    function: Callable[..., dict[str, Any]]
    table: Callable[[dict[str, Any]], Any]

    def run(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Measure with these options; an option that there is not raises `OptionError`."""
        known = inspect.signature(self.function).parameters
        for key in options:
            if key not in known:
                raise OptionError(
                    f"The bench '{self.name}' has no option '{key}'.{near_misses(key, known)} "
                    f"It has: {', '.join(known)}."
                )
        return self.function(**options)


BENCHES: Registry[Bench] = Registry("bench")


def register(
    name: str,
    function: Callable[..., dict[str, Any]],
    table: Callable[[dict[str, Any]], Any],
    *,
    help: str | None,
) -> Bench:
    """Register a bench; see `Bench` for the parameters.

    Of `help`, which may be a module's docstring, the first paragraph is shown, on one line.
    """
    first = inspect.cleandoc(help or "").partition("\n\n")[0]
    return BENCHES.add(name, Bench(name, " ".join(first.split()), function, table))
