"""Deep features of a U-Net, kept from a full pass and used again in shallow ones, for each adapter apart.

A shallow pass runs the first layer, the first down block without its downsampler, the last up block on the state that
was kept for it, and the last layers (DeepCache, Ma et al. 2024, at its shallowest). It works since the last up block
takes the skips of these alone. With a fresh state it is the full pass, bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.errors import SiteError


class BlockCache:
    """Lets a U-Net record and replay its deep blocks, inside a ``with`` block; afterwards it is as it was.

    Outside of `recording` and `replaying` the network runs as ever, its blocks being counted.

    Parameters
    ----------
    network
        A U-Net of diffusers: ``down_blocks``, ``mid_block``, ``up_blocks``.

    Attributes
    ----------
    blocks
        How many blocks have run since.

    Raises
    ------
    SiteError
        The network has no such blocks, or none that lie deep.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._deep = dict(_deep(network))
        self._shallow = dict(_shallow(network))
        if not self._deep:
            raise SiteError(
                f"{type(network).__name__} has one block only, so that nothing lies deep enough to be kept."
            )
        self._last = list(self._deep)[-1]
        self._kept: dict[Hashable, Tensor] = {}
        self._skips: dict[str, int | None] = {}
        self._own: dict[str, Any] = {}
        self._mode: tuple[str, tuple[Hashable, ...], int] | None = None
        self.blocks = 0

    def __enter__(self) -> BlockCache:
        """Stand in front of the blocks."""
        for path, module in {**self._shallow, **self._deep}.items():
            self._own[path] = module.__dict__.get("forward")
            module.forward = self._standing(path, module.forward)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the network as it was, and keep nothing."""
        for path, module in {**self._shallow, **self._deep}.items():
            if path not in self._own:
                continue
            own = self._own.pop(path)
            if own is None:
                del module.forward
            else:
                module.forward = own
        self._kept.clear()
        self._mode = None

    def has(self, unit: Hashable, copies: int) -> bool:
        """Return whether a state is kept for a unit with so many copies in the batch (2 with guidance)."""
        return (unit, copies) in self._kept

    def drop(self, units: Iterable[Hashable]) -> None:
        """Forget the states of units."""
        gone = set(units)
        for key in [key for key in self._kept if key[0] in gone]:  # type: ignore[index]
            del self._kept[key]

    @contextmanager
    def recording(self, units: Sequence[Hashable], copies: int) -> Iterator[None]:
        """Keep the states of what runs meanwhile: `copies` times one entry of the batch for each unit, in order."""
        with self._in("record", units, copies):
            yield

    @contextmanager
    def replaying(self, units: Sequence[Hashable], copies: int) -> Iterator[None]:
        """Let what runs meanwhile be shallow, on states that were kept for these units.

        Raises
        ------
        SiteError
            There is no state for one of them.
        """
        missing = [unit for unit in units if not self.has(unit, copies)]
        if missing:
            raise SiteError(f"No state is kept for {missing[0]!r} with {copies} copies; run a full pass of it first.")
        with self._in("replay", units, copies):
            yield

    @contextmanager
    def _in(self, mode: str, units: Sequence[Hashable], copies: int) -> Iterator[None]:
        self._mode = (mode, tuple(units), copies)
        try:
            yield
        finally:
            self._mode = None

    def _standing(self, path: str, own: Callable[..., Any]) -> Callable[..., Any]:
        """Return a forward that stands in front of a block's own."""

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._mode is not None and self._mode[0] == "replay" and path in self._deep:
                return self._replayed(path, _state(args, kwargs))
            result = own(*args, **kwargs)
            self.blocks += "downsamplers" not in path
            if self._mode is not None and self._mode[0] == "record" and path in self._deep:
                self._record(path, result)
            return result

        return forward

    def _record(self, path: str, result: Any) -> None:
        assert self._mode is not None
        _, units, copies = self._mode
        self._skips[path] = len(result[1]) if isinstance(result, tuple) else None
        if path == self._last:
            state = result[0] if isinstance(result, tuple) else result
            each = state.detach().unflatten(0, (copies, len(units)))
            for index, unit in enumerate(units):
                self._kept[unit, copies] = each[:, index].clone()

    def _replayed(self, path: str, state: Tensor) -> Any:
        """Return what the block gave; of all but the last only that something came, since nobody looks at it."""
        assert self._mode is not None
        _, units, copies = self._mode
        if path == self._last:
            state = torch.stack([self._kept[unit, copies] for unit in units], 1).flatten(0, 1)
        skips = self._skips[path]
        return state if skips is None else (state, (state,) * skips)


def has_blocks(network: nn.Module) -> bool:
    """Return whether a network is a U-Net with blocks that can be kept."""
    return all(isinstance(getattr(network, name, None), nn.ModuleList) for name in ("down_blocks", "up_blocks"))


def _deep(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what a shallow pass leaves out, in the order in which it runs."""
    if not has_blocks(network):
        raise SiteError(
            f"{type(network).__name__} has no down and up blocks; only features of U-Nets are kept. Sample without the "
            "cache (cache=False)."
        )
    down: Any = network.down_blocks
    up: Any = network.up_blocks
    for index, module in enumerate(getattr(down[0], "downsamplers", None) or ()):
        yield f"down_blocks.0.downsamplers.{index}", module
    yield from ((f"down_blocks.{index}", module) for index, module in enumerate(down) if index)
    if isinstance(network.mid_block, nn.Module):
        yield "mid_block", network.mid_block
    yield from ((f"up_blocks.{index}", module) for index, module in enumerate(up[:-1]))


def _shallow(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the blocks that run in every pass."""
    down: Any = network.down_blocks
    up: Any = network.up_blocks
    yield "down_blocks.0", down[0]
    yield f"up_blocks.{len(up) - 1}", up[-1]


def _state(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden states that a block is given."""
    found: Tensor = args[0] if args else kwargs["hidden_states"]
    return found
