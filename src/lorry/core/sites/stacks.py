"""The stacks of equal blocks that a model is built of, and which block a site lies in.

A stack is what lies under the first number of a site's path: ``model.layers.7.mlp.up_proj`` lies in block 7 of the
stack ``model.layers``. The main stack is the longest one that holds sites; a U-Net (``down_blocks`` as long as
``up_blocks``) and an encoder-decoder with two equal stacks have none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Stacks:
    """The stacks of a model.

    Attributes
    ----------
    lengths
        Path of each stack -> number of its blocks that hold sites.
    """

    lengths: Mapping[str, int]

    @property
    def main(self) -> str | None:
        """Path of the longest stack; None if there is none, or more than one of that length."""
        most = max(self.lengths.values(), default=0)
        longest = [path for path, length in self.lengths.items() if length == most]
        return longest[0] if len(longest) == 1 else None

    def place(self, path: str) -> tuple[str, int] | None:
        """Return the stack and the index of the block that a site at `path` lies in, or None if it lies in no stack."""
        found = split_at_number(path)
        return found if found is not None and found[0] in self.lengths else None

    def layer(self, path: str) -> int | None:
        """Return the index of the block of the main stack that a site at `path` lies in, or None."""
        place, main = self.place(path), self.main
        return place[1] if place is not None and main is not None and place[0] == main else None

    def __str__(self) -> str:
        """Return all stacks with their lengths, the longest first."""
        ordered = sorted(self.lengths.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"'{path}' ({length} {'block' if length == 1 else 'blocks'})" for path, length in ordered)


def split_at_number(path: str) -> tuple[str, int] | None:
    """Return what stands before the first number among the components of a path, and the number."""
    parts = path.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if at is None else (".".join(parts[:at]), int(parts[at]))


def find_stacks(paths: Iterable[str], model: nn.Module | None = None) -> Stacks:
    """Return the stacks that hold the sites at `paths`.

    With `model`, sequences of unlike layers (``nn.Sequential``) count only where it has no ``nn.ModuleList`` of blocks.
    """
    blocks: dict[str, set[int]] = {}
    for path in paths:
        place = split_at_number(path)
        if place is not None:
            blocks.setdefault(place[0], set()).add(place[1])
    lengths = {path: len(numbers) for path, numbers in blocks.items()}
    if model is not None:
        lists = {path: n for path, n in lengths.items() if isinstance(model.get_submodule(path), nn.ModuleList)}
        lengths = lists or lengths
    return Stacks(lengths)
