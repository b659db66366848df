"""Whole modules."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lorry.core.sites.site import KINDS, Kind, Site


class BlockKind(Kind):
    """A whole module whose forward a method replaces or surrounds."""

    name = "block"
    priority = 40
    additive = False
    whole = True

    def sites(self, path: str, module: nn.Module) -> Iterator[Site]:
        """Yield the module itself, whatever it is."""
        yield self.site(path, module)

    def site(self, path: str, module: nn.Module) -> Site:
        """Return the module as a site."""
        return Site(path, self, module, module, "", 0, 0)


BLOCK = BlockKind()
KINDS.add(BLOCK.name, BLOCK)
