"""Earlier and foreign names of job options: read everywhere, warned of where they will go."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

from lorry.core.errors import OptionError

C = TypeVar("C", bound=type)

#: Names of the first edition, which go with the next release.
EARLIER = {
    "rate": "learning_rate",
    "clip": "max_grad_norm",
    "accumulation": "gradient_accumulation_steps",
    "train_also": "modules_to_save",
}
#: Names that other trainers use for the same thing.
FOREIGN = {"per_device_train_batch_size": "batch_size", "lr_scheduler_type": "schedule"}


def renamed(
    values: Mapping[str, Any], warn: bool = True, *, names: Mapping[str, str] | None = None, what: str = "job option"
) -> dict[str, Any]:
    """Return options under their present names.

    Parameters
    ----------
    values
        Options by any of their names.
    warn
        Give a `DeprecationWarning` for names that will go.
    names
        Earlier names with the present ones; those of a job if not given.
    what
        What the options are called in messages.

    Raises
    ------
    OptionError
        An option is there under two names.
    """
    earlier, foreign = (EARLIER, FOREIGN) if names is None else (names, {})
    found: dict[str, Any] = {}
    for name, value in values.items():
        now = earlier.get(name) or foreign.get(name) or name
        if now != name and now in values:
            raise OptionError(f"The {what}s '{name}' and '{now}' are the same; give '{now}' alone.")
        if warn and name in earlier:
            warnings.warn(
                f"The {what} '{name}' is called '{now}' now; the earlier name goes with the next release.",
                DeprecationWarning,
                stacklevel=3,
            )
        found[now] = value
    return found


def with_aliases(cls: C) -> C:
    """Let a dataclass take its options by earlier and foreign names too, and give them by the earlier ones."""
    made = cls.__init__  # type: ignore[misc]

    @functools.wraps(made)
    def init(self: Any, *args: Any, **options: Any) -> None:
        made(self, *args, **renamed(options))

    cls.__init__ = init  # type: ignore[misc]
    for earlier, now in EARLIER.items():
        setattr(cls, earlier, _reader(earlier, now))
    return cls


def _reader(earlier: str, now: str) -> property:
    def read(self: Any) -> Any:
        warnings.warn(f"Job.{earlier} is called {now} now.", DeprecationWarning, stacklevel=2)
        return getattr(self, now)

    return property(read, doc=f"The option `{now}` by its earlier name.")
