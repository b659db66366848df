"""What the data side of training raises, and the near misses that its messages offer."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from lorry.core.errors import LorryError


class DataError(LorryError):
    """Training data that cannot be used; the message says what was expected, what was found and what to
    do.
    """


def suggest(name: str, known: Iterable[object]) -> str:
    """Return the end of a sentence about a wrong name: its near misses, or else all the names that exist."""
    names = [str(k) for k in known]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(repr(n) for n in near) + "?"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"there is: {shown}." if names else "there is none."
