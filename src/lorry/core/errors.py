"""What can go wrong, said so that the reader knows what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LorryError(ValueError):
    """Base of every error that Lorry raises on purpose."""


class OptionError(LorryError):
    """An option of a method, a job or a command is out of its range or unknown."""


class SiteError(LorryError):
    """A target selects nothing, or a site cannot carry the method."""


class AdapterError(LorryError):
    """An adapter is missing, doubled, fused, or used in a way that its method does not allow."""


class CheckpointError(LorryError):
    """A file is missing, damaged, foreign, unsafe, or does not fit the model."""


class FingerprintError(LorryError):
    """An adapter meets a base model that it was not made for."""


def near_misses(name: str, options: Iterable[str], limit: int = 3) -> str:
    """Return `` Did you mean 'a', 'b'?`` for the closest options, or an empty string."""
    close = difflib.get_close_matches(name, list(options), n=limit, cutoff=0.5)
    return f" Did you mean {', '.join(repr(c) for c in close)}?" if close else ""


def some(names: Iterable[str], limit: int = 4) -> str:
    """Return the first few names as text, and how many were left out."""
    listed = list(names)
    head = ", ".join(repr(n) for n in listed[:limit])
    return head + (f" and {len(listed) - limit} more" if len(listed) > limit else "")
