"""Why an operation fails: through its client, or through the server."""

from __future__ import annotations

from lorry.core.errors import LorryError


class Refused(LorryError):
    """A request asks for what cannot be done; the text says what to ask for instead."""


class Missing(LorryError):
    """There is nothing of this name that the caller may use."""
