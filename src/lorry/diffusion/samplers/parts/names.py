"""Adapters that options of a sampler name."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from lorry.core.errors import near_misses, some
from lorry.diffusion.errors import DiffusionError


def check_names(option: str, names: Iterable[str], pictures: Sequence[Collection[str]]) -> None:
    """Raise `DiffusionError` if an option names an adapter that no picture is composed of."""
    known = list(dict.fromkeys(name for picture in pictures for name in picture))
    for name in names:
        if name not in known:
            raise DiffusionError(
                f"The option '{option}' names the adapter '{name}', of which no picture is composed."
                f"{near_misses(name, known)} The pictures are composed of {some(known) or 'none'}."
            )
