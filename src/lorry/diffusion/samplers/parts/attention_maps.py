"""Maps of where each text token is looked at from: the mean of a network's attention on one grid of the picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn

from lorry.attention.call import AttentionCall
from lorry.attention.sites import chosen_sites
from lorry.attention.watching import watch
from lorry.diffusion.errors import DiffusionError
from lorry.diffusion.sampling import Step

#: Divisors of the latents' height and width at which attention may lie.
_DIVISORS = (1, 2, 4, 8, 16, 32, 64)
#: The divisor that is taken where nothing else is asked for: 16 x 16 at 512 pixels in SD 1.5.
_USUAL = 4


@dataclass(frozen=True)
class MapSites:
    """The attention sites whose maps are used.

    Attributes
    ----------
    paths
        Of the sites in the network.
    height, width
        Of the maps.
    text_first
        For attention over text and picture together: whether the text comes first.
    """

    paths: tuple[str, ...]
    height: int
    width: int
    text_first: bool


@torch.no_grad()
def find_map_sites(step: Step, divisor: int | None = None, targets: Sequence[str] | None = None) -> MapSites:
    """Run the network to see where it attends to text, and on which grids.

    Parameters
    ----------
    step
        With one picture.
    divisor
        Maps are this many times smaller than the latents; the one nearest to 4 that there is if not given.
    targets
        Patterns of sites; every site if not given.

    Raises
    ------
    DiffusionError
        No site attends to text on such a grid.
    """
    tall, wide = step.latents.shape[-2:]
    tokens = step.conditions["text"].shape[1]
    text = step.conditions["text"]
    wanted = {site.path for site, _ in chosen_sites(step.network, targets, None)}
    seen = _seen(step)
    grids: dict[int, list[str]] = {}
    for path, (kind, queries, keys, _) in seen.items():
        if path not in wanted:
            continue
        for each in _DIVISORS:
            places = -(-tall // each) * -(-wide // each)
            cross = kind == "cross" and (queries, keys) == (places, tokens)
            if cross or (kind != "cross" and queries == keys == places + tokens):
                grids.setdefault(each, []).append(path)
                break
    if not grids or (divisor is not None and divisor not in grids):
        there = ", ".join(map(str, sorted(grids))) or "none"
        raise DiffusionError(
            f"No attention to text lies on a grid {divisor or _USUAL} times smaller than the latents ({tall} x "
            f"{wide}). Divisors that there are: {there}; name one of them, or other targets."
        )
    chosen = divisor or min(grids, key=lambda each: (abs(each.bit_length() - _USUAL.bit_length()), each))
    joint = next((path for path in grids[chosen] if seen[path][0] != "cross"), None)
    first = True
    if joint is not None:
        # the keys that change with the text in the network's first block are those of the text
        other = _seen(step, text.flip(1) + 1.0)
        changed = (seen[joint][3] != other[joint][3]).flatten(0, 1).any(-1).any(0)
        first = bool(changed[0])
    return MapSites(tuple(grids[chosen]), -(-tall // chosen), -(-wide // chosen), first)


def _seen(step: Step, text: Tensor | None = None) -> dict[str, tuple[str, int, int, Tensor]]:
    """Return kind, numbers of queries and keys, and the keys of the first site that is not cross-attention."""
    found: dict[str, tuple[str, int, int, Tensor]] = {}
    nothing = torch.empty(0)

    def read(call: AttentionCall) -> None:
        first = call.site.kind != "cross" and all(kind == "cross" for kind, *_ in found.values())
        keys = call.k if first else nothing
        found.setdefault(call.site.path, (call.site.kind, call.q.shape[2], call.k.shape[2], keys))

    conditions = step.conditions if text is None else step.conditions.with_(text=text)
    with watch(step.network, read, want=("q", "k")):
        step.run(conditions)
    return found


class MapStore:
    """Sums up the maps of one run of a network.

    Parameters
    ----------
    sites
        Where.
    tokens
        Number of text tokens.
    rows
        Entries of the batch that are looked at.
    """

    def __init__(self, sites: MapSites, tokens: int, rows: slice = slice(None)) -> None:
        self._sites = sites
        self._tokens = tokens
        self._rows = rows
        self._total: Tensor | None = None
        #: How many maps were added up.
        self.captured = 0

    def maps(self) -> Tensor:
        """Return the mean over heads and sites, ``(rows, height, width, tokens)``.

        Raises
        ------
        DiffusionError
            Not every site was seen.
        """
        if self._total is None or self.captured != len(self._sites.paths):
            raise DiffusionError(
                f"{self.captured} of {len(self._sites.paths)} attention sites gave maps. The network must run each of "
                "them once, with a processor on torch's attention product."
            )
        return (self._total / self.captured).unflatten(1, (self._sites.height, self._sites.width))

    def read(self, call: AttentionCall) -> None:
        """Add what one call of a site gives."""
        if call.part:  # image prompts
            return
        found = call.probabilities[self._rows].mean(1)
        if call.site.kind != "cross":
            text = slice(0, self._tokens) if self._sites.text_first else slice(-self._tokens, None)
            picture = slice(self._tokens, None) if self._sites.text_first else slice(0, -self._tokens)
            found = found[:, picture, text]
        self._total = found if self._total is None else self._total + found
        self.captured += 1


class MapWatch:
    """Looks at a network's attention while a ``with`` block lasts; nothing of the network is touched.

    Parameters
    ----------
    network
        What is run.
    sites
        Where maps are taken.
    """

    def __init__(self, network: nn.Module, sites: MapSites) -> None:
        self.sites = sites
        self._store: MapStore | None = None
        self._watch = watch(network, self._read, targets=list(sites.paths), want=("q", "probabilities"))

    def __enter__(self) -> MapWatch:
        """Begin to look."""
        self._watch.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the network as it was."""
        self._watch.__exit__(kind, error, trace)

    @contextmanager
    def into(self, store: MapStore) -> Iterator[None]:
        """Let a store have what is seen while the block lasts."""
        self._store = store
        try:
            yield
        finally:
            self._store = None

    def _read(self, call: AttentionCall) -> None:
        if self._store is not None:
            self._store.read(call)
