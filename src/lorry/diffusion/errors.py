"""What goes wrong with pictures."""

from __future__ import annotations

from lorry.core.errors import OptionError


class DiffusionError(OptionError):
    """A pipeline, prompt, picture or composition that cannot be used as asked."""
