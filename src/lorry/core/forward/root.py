"""What the root of a model tells of each pass: how many rows, which positions; and which sites were passed by."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorry.core.errors import AdapterError, some
from lorry.core.forward.active import Active
from lorry.core.forward.link import Link
from lorry.core.forward.reentrant import Openings
from lorry.core.forward.runtime import Runtimes
from lorry.core.method.call import recomputing
from lorry.core.method.context import Context
from lorry.core.method.layout import Pass

#: Arguments that hold one row for each row of the batch, with positions in their second dimension.
_TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids")
_EXPECTED = ("expected", "")


class RootHooks:
    """Hooks around the forward of a model's root.

    Parameters
    ----------
    runtimes
        Of the model.
    links
        Adapted modules by the path of their first site.
    """

    def __init__(self, runtimes: Runtimes, links: Mapping[str, Link]) -> None:
        self.runtimes = runtimes
        self.links = links
        self._names: list[str] = []
        self._root: nn.Module | None = None
        self._openings: Openings | None = None
        self._handles: list[RemovableHandle] = []
        self._suspects: dict[str, RemovableHandle] = {}
        self._parents_ran: set[str] = set()
        #: Sites that did not run with an adapter although the module around them did.
        self.passed_by: set[str] = set()
        self._ran: dict[str, int] = {}  # sites that ran -> what read them then
        self._asked: set[str] = set()

    def install(self, root: nn.Module) -> None:
        """Watch the root from now on."""
        self._root = root
        self._openings = Openings(root)
        self._names = list(inspect.signature(type(root).forward).parameters)[1:]
        self._handles = [
            root.register_forward_pre_hook(self._before, with_kwargs=True),
            root.register_forward_hook(self._after, always_call=True),
        ]

    def remove(self) -> None:
        """Leave the root as it was."""
        if self._openings is not None:
            self._openings.remove()
        for handle in (*self._handles, *self._suspects.values()):
            handle.remove()
        self._handles, self._suspects, self._root, self._openings = [], {}, None, None
        self.passed_by.clear()
        self._ran.clear()
        self._asked.clear()

    def untried(self, paths: Iterable[str]) -> list[str]:
        """Return those paths of which no pass has told yet whether they run; each is returned once."""
        found = [p for p in paths if p not in self._ran and p not in self.passed_by and p not in self._asked]
        self._asked.update(found)
        return found

    def _before(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or recomputing():
            return
        runtime = self.runtimes.own()
        if self._openings is not None and root.training and torch.is_grad_enabled() and _trains(runtime.active):
            self._openings.follow()
        if runtime.active is not None or runtime.taps or runtime.passing is not None:
            values = {**dict(zip(self._names, args, strict=False)), **kwargs}
            dim = 1 if getattr(root, "batch_first", True) is False else 0  # torch's attention may have the length first
            runtime.begin(_pass(values, runtime.context, dim))
            if runtime.active is not None and _EXPECTED not in runtime.active.kept:
                for path in self._expected_of(runtime.active) - self._ran.keys() - self.passed_by:
                    self._suspect(path)  # what never ran is watched from the first pass on

    def _after(self, root: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling() or recomputing():
            return
        runtime = self.runtimes.own()
        seen = runtime.passing
        if seen is None:
            return
        runtime.end()
        active = runtime.active
        if output is not None and active is not None and seen.outer is None:
            self._judge(active, seen)

    # -- sites that were passed by

    def _judge(self, active: Active, seen: Pass) -> None:
        """Look for sites whose adapters had no effect because something read the weight past the layer."""
        expected = self._expected_of(active)
        for path in self._suspects.keys() & seen.called:
            self._suspects.pop(path).remove()
        if not self._ran.keys() >= seen.called:
            for path in seen.called - self._ran.keys():
                self._ran[path] = self._reader(path)
        if len(seen.called) >= len(expected) and expected <= seen.called:
            return
        found = []
        for path in sorted(expected - seen.called - self.passed_by):
            if self._ran.get(path) == self._reader(path):
                continue  # it ran before: keys and values of a cross-attention lie in a cache later
            if getattr(self._parent(path), "fused_projections", False):
                raise AdapterError(
                    f"'{path}' carries an adapter that is active, but its module was fused with others "
                    "(fuse_qkv_projections) and no longer runs, so the adapter had no effect. Undo the fusion "
                    "(unfuse_qkv_projections), or fuse the adapter into the base first."
                )
            if path in self._suspects and path in self._parents_ran:
                self._suspects.pop(path).remove()
                found.append(path)
            else:
                self._suspect(path)
        self._parents_ran.clear()
        self._warn(found)

    def _suspect(self, path: str) -> None:
        """Watch whether the module around a site runs while the site does not."""
        parent = self._parent(path)
        if parent is None or path in self._suspects:
            return

        def ran(module: nn.Module, args: Any) -> None:
            if self.runtimes.current().passing is not None:  # not where a part of the model is run by itself
                self._parents_ran.add(path)

        self._suspects[path] = parent.register_forward_pre_hook(ran)

    def _parent(self, path: str) -> nn.Module | None:
        """Return the module around a site; None for the root, which may have parts that a pass has no use for."""
        assert self._root is not None
        return self._root.get_submodule(path.rpartition(".")[0]) if "." in path else None

    def _reader(self, path: str) -> int:
        """Return what tells the code around a site from other code that may have taken its place."""
        assert self._root is not None
        parent = self._root.get_submodule(path.rpartition(".")[0])
        return hash((id(parent.__dict__.get("processor")), id(parent.__dict__.get("forward")), type(parent)))

    def _expected_of(self, active: Active) -> frozenset[str]:
        """Return the first sites of the modules on which adapters act."""
        known: frozenset[str] | None = active.kept.get(_EXPECTED)
        if known is None:
            paths = {p for q in active.portions if not q.adapter.in_base for p in q.adapter.entries}
            known = frozenset(first for first, link in self.links.items() if any(s.path in paths for s in link.sites))
            active.kept[_EXPECTED] = known
        return known

    def _warn(self, found: list[str]) -> None:
        """Say which sites did not run although the module around them did; each once."""
        self.passed_by.update(found)
        if found:
            warnings.warn(
                f"{len(found)} sites with an active adapter did not run although the module around them did: "
                f"{some(found)}. Something reads their weights past the layer (another attention processor, a "
                "fused path), or has no use for them in this pass; in the first case the adapter has no effect there: "
                "fuse it into the base, or put the original processor back.",
                stacklevel=4,
            )


def _trains(active: Active | None) -> bool:
    return active is not None and any(p.adapter.trainable for p in active.portions)


def _pass(values: Mapping[str, Any], context: Context, dim: int) -> Pass:
    """Return what the arguments of the root tell, rows being in dimension `dim`."""
    tensors = {n: v for n, v in values.items() if isinstance(v, Tensor) and v.ndim}
    name = next((n for n in _TOKENS if n in tensors), None) or next(iter(tensors), None)
    if name is None:
        return Pass(0)
    main = tensors[name]
    if dim and main.ndim > 2:
        return Pass(main.shape[dim])
    uneven = next(
        (len(t) for t in tensors.values() if t.ndim > 1 and t.is_floating_point() and len(t) not in (1, len(main))), 0
    )
    if name not in _TOKENS or main.ndim < 2:
        return Pass(len(main), uneven=uneven)
    return Pass(len(main), main.shape[1], _offset(values) if context.by_position() else 0, uneven)


def _offset(values: Mapping[str, Any]) -> int:
    """Return how many positions lie in a cache."""
    cache = values.get("past_key_values")
    length = getattr(cache, "get_seq_length", None)
    if callable(length):
        return int(length())
    position = values.get("cache_position")
    return int(position[0]) if isinstance(position, Tensor) and position.numel() else 0
