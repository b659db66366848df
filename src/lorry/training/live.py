"""Counting the memory of tensors while operations run: the bytes that are alive, and the most that were."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Adds up the storages that operations give rise to, and takes them off as they are freed.

    Storages that an operation is given and that are new here were there before the start. What an operation allocates
    for itself and gives back before it returns is not seen.

    Attributes
    ----------
    live, most
        Bytes of storages made since the start that are alive now, and at most.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        return self.watched(func, args, kwargs or {})[0]

    def watched(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, list[Tensor], list[Tensor]]:
        """Run an operation; return its result, the tensors it was given and those that it gave."""
        given = dense_tensors((args, kwargs))
        for tensor in given:
            self._note(tensor.untyped_storage(), 0)
        result = func(*args, **kwargs)
        made = dense_tensors(result)
        for tensor in made:
            storage = tensor.untyped_storage()
            self._note(storage, storage.nbytes())
        return result, given, made

    def _note(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        weakref.finalize(storage, self._freed, key, size)
        self.live += size
        self.most = max(self.most, self.live)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def dense_tensors(tree: Any) -> list[Tensor]:
    """Return the tensors in arguments or results; of a sparse one those that hold its data."""
    return [part for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) for part in _dense(leaf)]


def _dense(tensor: Tensor) -> list[Tensor]:
    if tensor.layout is torch.sparse_csr:
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout is torch.sparse_csc:
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor] if tensor.layout is torch.strided else []
