"""An adapter that everybody uses now may lie in the base weights for as long as that lasts, if it pays.

What it costs to put it there and to take it out again is measured, and so is what a pass costs with the adapter beside
the base and in it. It goes in once the time that was lost by not having it there exceeds that cost, as one buys skis
once renting them has cost as much: never more than twice the time of who knows the future.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from lorry.core.errors import LorryError
from lorry.serving.served import Resolved, Version

#: Passes of one composition after which an adapter is put in to see what that costs and saves.
TRIAL = 16
#: Weight of the last measurement in a running mean.
_RECENT = 0.3


class HotAdapter:
    """Which adapter lies in the base weights.

    Parameters
    ----------
    enabled
        Whether any ever does.
    clock
        Gives seconds.

    Attributes
    ----------
    version
        The one that lies there now; None if none does.
    fused
        How often one was put there.
    """

    def __init__(self, enabled: bool, clock: Callable[[], float] = time.perf_counter) -> None:
        self.enabled = enabled
        self.clock = clock
        self.version: Version | None = None
        self.fused = 0
        self._cost: float | None = None
        self._candidate: Version | None = None
        self._passes, self._lost = 0, 0.0
        self._seconds: dict[tuple[bool, int], float] = {}
        self._refused: set[int] = set()

    def settle(self, compositions: set[Resolved], tokens: int) -> bool:
        """Put an adapter into the base weights before a pass, or take it out; returns whether they changed.

        Parameters
        ----------
        compositions
            Of all requests of the pass.
        tokens
            Of the pass.
        """
        version = self._alone(compositions)
        if self.version is not None:
            return False if version is self.version and self._pays(tokens) else self.leave()
        if not self.enabled or version is None:
            self._candidate = None
            return False
        if version is not self._candidate:
            self._candidate, self._passes, self._lost = version, 0, 0.0
        beside, inside = (self._seconds.get((where, tokens)) for where in (False, True))
        self._passes += 1
        self._lost += 0.0 if beside is None or inside is None else beside - inside
        due = self._passes >= TRIAL if self._cost is None or inside is None else self._lost > self._cost
        return due and self._enter(version)

    def measured(self, compositions: set[Resolved], tokens: int, seconds: float) -> None:
        """Take note of what a pass took."""
        if self.enabled and len(compositions) == 1:
            inside = self.version is not None or not next(iter(compositions))  # the bare base costs the same
            before = self._seconds.get((inside, tokens), seconds)
            self._seconds[inside, tokens] = (1 - _RECENT) * before + _RECENT * seconds

    def leave(self) -> bool:
        """Give the base its own weights back, bit for bit; returns whether they changed."""
        version, self.version, self._candidate = self.version, None, None
        if version is None:
            return False
        start = self.clock()
        version.adapter.unfuse()
        self._cost = (self._cost or 0.0) / 2 + self.clock() - start
        return True

    def _enter(self, version: Version) -> bool:
        start = self.clock()
        try:
            version.adapter.fuse()
        except LorryError:  # a base that cannot be written to, an update that is not finite
            self._refused.add(version.serial)
            return False
        self._cost = 2 * (self.clock() - start)  # until it is known what the way back costs
        self.version, self.fused = version, self.fused + 1
        return True

    def _pays(self, tokens: int) -> bool:
        beside, inside = (self._seconds.get((where, tokens)) for where in (False, True))
        return beside is None or inside is None or inside <= beside

    def _alone(self, compositions: set[Resolved]) -> Version | None:
        """Return the adapter that all requests use with weight 1, if it fuses exactly."""
        if len(compositions) != 1:
            return None
        (resolved,) = compositions
        if len(resolved) != 1 or resolved[0][1] != 1.0 or resolved[0][0].serial in self._refused:
            return None
        version = resolved[0][0]
        exact = all(entry.method.fusing == "exact" for entry in version.adapter.entries.values())
        return version if exact else None
