"""Finding the site of a model that a file means by a path."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from lorry.core.errors import CheckpointError, near_misses
from lorry.core.life.state import ModelState
from lorry.core.sites.kinds.block import BLOCK
from lorry.core.sites.site import Site

_WRAPPERS = ("module.", "_orig_mod.", "model.", "base_model.model.")


class Resolver:
    """Turns the paths of a file into sites of a model.

    A path is taken as it is if the model has it. Otherwise wrapper prefixes are taken off, and the prefix
    under which the model's class keeps its body is added or taken off, so that an adapter made under one head
    fits the same body under another. What was done is in `notes`.
    """

    def __init__(self, state: ModelState, *, flat: bool = False) -> None:
        self.state = state
        self.sites: Mapping[str, Site] = state.sites
        body = str(getattr(state.root, "base_model_prefix", "") or "")
        self._added = (f"{body}.",) if body else ()
        self._removed = (*self._added, *_WRAPPERS)
        self._last: tuple[str, str] | None = None
        self.notes: list[str] = []
        self._banks: dict[str, list[Site]] | None = None
        self._flat = _flattened(state.sites) if flat else None

    def find(self, path: str, depth: int = 0, targeted: Callable[[str], bool] | None = None) -> Site | None:
        """Return the site meant by a path, or None.

        Parameters
        ----------
        path
            Module path in the file's words.
        depth
            How many parameters of the module PEFT wrapped outside of this one.
        targeted
            Which parameters of a bank PEFT wrapped.
        """
        if self._flat is not None:
            return self._flat.get(path)
        site = self._exact(path, depth, targeted)
        if site is not None:
            return site
        for variant in self._variants(path):
            site = self._exact(variant, depth, targeted)
            if site is not None:
                self._remember(path, variant)
                return site
        return None

    def find_dotted(self, path: str) -> Site | None:
        """Return the site of a path with dots, whatever the file's own paths have, or None."""
        return self.find(path.replace(".", "_") if self._flat is not None else path)

    def _exact(self, path: str, depth: int, targeted: Callable[[str], bool] | None) -> Site | None:
        if depth == 0:
            site = self.sites.get(path) or self.sites.get(f"{path}.in_proj_weight")
            if site is not None:
                return site
        if self._banks is None:
            self._banks = {}
            for site in self.sites.values():
                if site.kind.name in ("experts", "router"):
                    self._banks.setdefault(site.path.rpartition(".")[0], []).append(site)
        bank = [s for s in self._banks.get(path, ()) if targeted is None or targeted(s.path)]
        place = len(bank) - 1 - depth
        return bank[place] if 0 <= place < len(bank) else None

    def whole(self, path: str) -> Site | None:
        """Return a whole module as a site, or None."""
        for variant in self._variants(path):
            module = _module(self.state.root, variant)
            if module is not None:
                self._remember(path, variant)
                return BLOCK.site(variant, module)
        return None

    def _variants(self, path: str) -> list[str]:
        found = [path]
        if self._last is not None:
            removed, added = self._last
            if path.startswith(removed):
                found.append(added + path[len(removed) :])
        found += [path[len(p) :] for p in self._removed if path.startswith(p)]
        found += [p + path for p in self._added]
        return found

    def _remember(self, path: str, variant: str) -> None:
        if path == variant:
            return
        longer, shorter = (path, variant) if len(path) > len(variant) else (variant, path)
        prefix = longer[: len(longer) - len(shorter)]
        change = (prefix, "") if longer is path else ("", prefix)
        if change != self._last:
            self._last = change
            done = f"without the prefix '{prefix}'" if longer is path else f"with the prefix '{prefix}'"
            self.notes.append(f"the file's paths were found {done}, because this model has another head or wrapper")

    def original(self, path: str) -> str:
        """Return what the file would call the module of a site, given how its other paths were changed."""
        if self._last is None:
            return path
        removed, added = self._last
        return removed + path.removeprefix(added) if path.startswith(added) else path

    def missing(self, path: str, where: str, keys: object) -> CheckpointError:
        """Return the error for a path that the model does not have."""
        names = self._flat if self._flat is not None else self.sites
        return CheckpointError(
            f"'{where}' holds tensors for '{path}' ({keys}), but {type(self.state.root).__name__} has no such site."
            f"{near_misses(path, names)} It is an adapter for another architecture, or for a part of this model; "
            "nothing was loaded."
        )


def _flattened(sites: Mapping[str, Site]) -> dict[str, Site]:
    """Return the sites by their path with underscores for dots, as kohya writes it; names that two sites
    share are left out.
    """
    flat: dict[str, Site] = {}
    doubled: set[str] = set()
    for path, site in sites.items():
        name = path.replace(".", "_")
        if name in flat:
            doubled.add(name)
        flat[name] = site
    return {name: site for name, site in flat.items() if name not in doubled}


def _module(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path) if path else None
    except AttributeError:
        return None
