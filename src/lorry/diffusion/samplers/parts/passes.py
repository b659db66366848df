"""Runs of the network for units: one picture under one composition each, many units in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn

from lorry.diffusion.conditions import joined
from lorry.diffusion.samplers.parts.block_cache import BlockCache, has_blocks
from lorry.diffusion.sampling import Applied, Step

#: What surrounds a run: told which half of a guided pass it is, and how many copies of each unit lie in its batch.
Around = Callable[[str, int], AbstractContextManager[None]]


@dataclass(frozen=True)
class Unit:
    """One picture under one adapter.

    Attributes
    ----------
    row
        Which picture of the batch.
    adapter
        None for the bare base.
    """

    row: int
    adapter: str | None


def halves(step: Step, compositions: Sequence[Applied], around: Around | None = None) -> Tensor:
    """Run the network for every row of a step, with and without the prompt.

    Parameters
    ----------
    step
        With as many rows as there are compositions.
    compositions
        What applies to each row.
    around
        Surrounds each run; the half is ``both``, ``wanted`` or ``unwanted``.

    Returns
    -------
    ``(2, rows, channels, height, width)``, without the prompt first; or ``(1, ...)`` if nothing is guided.
    """
    around = around or (lambda half, copies: nullcontext())
    if step.negative is None or step.guidance <= 1:
        with around("wanted", 1):
            return step.run(compositions=compositions).unsqueeze(0)
    if step.family.guided_together:
        with around("both", 2):
            both = joined([step.negative, step.conditions])
            latents = torch.cat([step.latents, step.latents])
            found = step.run(both, latents=latents, compositions=compositions, copies=2)
        return found.unflatten(0, (2, -1))
    with around("wanted", 1):
        wanted = step.run(compositions=compositions)
    with around("unwanted", 1):
        unwanted = step.run(step.negative, compositions=compositions)
    return torch.stack([unwanted, wanted])


def guided(step: Step, predictions: Tensor) -> Tensor:
    """Return the guided prediction of what `halves` gives."""
    if len(predictions) == 1:
        return predictions[0]
    return step.family.guide(predictions[1], predictions[0], step.guidance)


def rows_of(step: Step, rows: Sequence[int], latents: Tensor | None = None) -> Step:
    """Return a step of some of its pictures, in the order of `rows`; a picture may come several times."""
    given = step.latents if latents is None else latents
    return Step(
        step.number,
        step.count,
        step.time,
        given[torch.tensor(list(rows), device=given.device)],
        step.conditions.take(rows),
        None if step.negative is None else step.negative.take(rows),
        step.guidance,
        step.distilled,
        None,
        step.family,
        step.network,
        step.scheduler,
    )


class Passes:
    """Runs units, and keeps deep features between steps where that is wanted; used in a ``with`` block.

    Parameters
    ----------
    network
        What is run.
    keep
        Whether units have deep features kept, so that those who have any run shallow.
    at_once
        How many units go through the network in one batch; 0 for all.
    """

    def __init__(self, network: nn.Module, *, keep: bool = False, at_once: int = 0) -> None:
        self.cache = BlockCache(network) if keep or has_blocks(network) else None
        self.keep = keep
        self.at_once = at_once
        self._counted: dict[int, list[int]] = {}  # full passes, shallow passes, blocks
        self._stack = ExitStack()

    def __enter__(self) -> Passes:
        """Stand in front of the network's blocks."""
        if self.cache is not None:
            self._stack.enter_context(self.cache)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the network as it was."""
        self._stack.close()

    def drop(self, unit: Unit) -> None:
        """Forget a unit's deep features, so that its next pass is a full one."""
        if self.cache is not None:
            self.cache.drop([(unit, half) for half in ("both", "wanted", "unwanted")])

    def counts(self, row: int) -> dict[str, int]:
        """Return what was run for a picture: full and shallow passes of adapters, and blocks in them."""
        full, shallow, blocks = self._counted.get(row, [0, 0, 0])
        counted = {} if self.cache is None else {"blocks": blocks}
        return {"full_passes": full, "shallow_passes": shallow, **counted}

    def run(self, step: Step, units: Sequence[Unit], compositions: Sequence[Applied]) -> dict[Unit, Tensor]:
        """Run units, shallow where features are kept.

        Returns
        -------
        Unit -> ``(1 or 2, channels, height, width)``, as `halves`.
        """
        known = [i for i, unit in enumerate(units) if self.keep and self._kept(step, unit)]
        fresh = [i for i in range(len(units)) if i not in set(known)]
        found: dict[Unit, Tensor] = {}
        for shallow, chosen in ((False, fresh), (True, known)):
            size = self.at_once or max(1, len(chosen))
            for start in range(0, len(chosen), size):
                part = chosen[start : start + size]
                here = [units[i] for i in part]
                rows = rows_of(step, [unit.row for unit in here])
                before = self._blocks()
                each = halves(rows, [compositions[i] for i in part], self._around(here, shallow))
                found.update({unit: each[:, i] for i, unit in enumerate(here)})
                for unit in here:
                    counted = self._counted.setdefault(unit.row, [0, 0, 0])
                    counted[shallow] += 1
                    counted[2] += self._blocks() - before
        return found

    def _blocks(self) -> int:
        return 0 if self.cache is None else self.cache.blocks

    def _kept(self, step: Step, unit: Unit) -> bool:
        assert self.cache is not None
        if step.negative is None or step.guidance <= 1:
            return self.cache.has((unit, "wanted"), 1)
        if step.family.guided_together:
            return self.cache.has((unit, "both"), 2)
        return self.cache.has((unit, "wanted"), 1) and self.cache.has((unit, "unwanted"), 1)

    def _around(self, units: Sequence[Unit], shallow: bool) -> Around | None:
        cache = self.cache
        if cache is None or not self.keep:
            return None

        def around(half: str, copies: int) -> AbstractContextManager[None]:
            keys = [(unit, half) for unit in units]
            return cache.replaying(keys, copies) if shallow else cache.recording(keys, copies)

        return around
