"""Saved weights in the engine: loaded when they are asked for, a bounded number of them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

from lorry.core.errors import AdapterError
from lorry.serving.engine import Engine
from lorry.serving.training.names import Address


class Samplers:
    """Loads saved weights into an engine and lets go of those that were used longest ago.

    Parameters
    ----------
    engine
        Where requests for samples go.
    root
        The folder of checkpoints.
    most
        Saved weights that stay loaded, at most.
    """

    def __init__(self, engine: Engine, root: Path, most: int) -> None:
        self.engine, self.root, self.most = engine, root, most
        self._lock = threading.Lock()
        self._loaded: OrderedDict[str, None] = OrderedDict()

    def composition(self, path: str | None) -> dict[str, float]:
        """Return what a request for samples of saved weights applies, after loading them; None is the bare base.

        Raises
        ------
        CheckpointError
            The weights cannot be read.
        """
        if path is None:
            return {}
        address = Address.parse(path)
        with self._lock:
            served = {adapter.name for adapter in self.engine.adapters()}
            if path not in self._loaded or address.served not in served:
                self.engine.load(address.served, address.below(self.root))
            self._loaded[path] = None
            self._loaded.move_to_end(path)
            while len(self._loaded) > self.most:
                self._unload(next(iter(self._loaded)))
        return {address.served: 1.0}

    def forget(self, path: str) -> None:
        """Take note that saved weights changed or are gone; requests under way end on what they began with."""
        with self._lock:
            self._unload(path)

    def _unload(self, path: str) -> None:
        if path in self._loaded:
            del self._loaded[path]
            try:
                self.engine.unload(Address.parse(path).served)
            except AdapterError:  # unloaded by hand
                return
