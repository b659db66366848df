"""The models that are in memory, and how they get there and away again."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from torch import nn

from lorry.serving.training.errors import Missing
from lorry.serving.training.names import folder_name
from lorry.serving.training.store import Store
from lorry.serving.training.tenant import LoraChoice, Tenant

T = TypeVar("T")
#: Runs a function while nothing else uses the model.
Alone = Callable[[Callable[[], T]], T]


class Tenants:
    """Models by id; one that is asked for and not there is made as it was left.

    Parameters
    ----------
    model
        The shared base.
    store, root
        What is known of models, and the folder of their weights.
    most
        Models in memory, at most, but for those that collect a gradient.
    """

    def __init__(self, model: nn.Module, store: Store, root: Path, most: int) -> None:
        self.model, self.store, self.root, self.most = model, store, root, most
        self._here: OrderedDict[str, Tenant] = OrderedDict()

    def get(self, id: str) -> Tenant:
        """Return a model; called while nothing else uses the base."""
        tenant = self._here.get(id)
        if tenant is None:
            known = self.store.model(id)
            if known is None or known.gone:
                raise Missing(f"There is no model {id}, or it was unloaded. Create one.")
            tenant = Tenant(self.model, id, LoraChoice(**known.config))
            try:
                if known.state is not None:
                    tenant.load(self.root / known.state, optimizer=True)
            except BaseException:
                tenant.leave()
                raise
            self._here[id] = tenant
        self._here.move_to_end(id)
        return tenant

    def shrink(self) -> list[Tenant]:
        """Forget those that were used longest ago, where there are too many; returns them, to be taken off."""
        gone = []
        for id in list(self._here):
            if len(self._here) <= self.most:
                break
            if not self._here[id].collecting:
                gone.append(self._here.pop(id))
        return gone

    def drop(self, id: str) -> Tenant | None:
        """Forget a model for good, with its state on disk; returns it, to be taken off, if it is in memory."""
        self.store.drop_model(id)
        shutil.rmtree(self.root / folder_name(id), ignore_errors=True)
        return self._here.pop(id, None)

    def write(self, tenant: Tenant, seq: int) -> str:
        """Write a model's weights and optimizer after a request; returns the folder, below that of all models.

        Raises
        ------
        CheckpointError
            The disk refuses.
        """
        state = f"{folder_name(tenant.id)}/{seq:09d}"
        tenant.save(self.root / state, {"seq": seq})
        return state

    def prune(self, id: str, state: str) -> None:
        """Remove what was written of a model before `state`."""
        for folder in (self.root / folder_name(id)).glob("*"):
            if folder.name != Path(state).name:
                shutil.rmtree(folder, ignore_errors=True)

    def clean(self) -> None:
        """Remove states on disk that no model needs: of a process that was killed while it wrote."""
        wanted = {known.state for known in self.store.models() if not known.gone}
        for folder in self.root.glob("*/*"):
            if folder.relative_to(self.root).as_posix() not in wanted:
                shutil.rmtree(folder, ignore_errors=True)
