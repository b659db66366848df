"""The models that are in memory, and how they get there and away again."""

from __future__ import annotations

import logging
import shutil
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor, nn

from lorry.serving.training.errors import Missing
from lorry.serving.training.folders import remove
from lorry.serving.training.names import folder_name
from lorry.serving.training.states import snapshot, write_state
from lorry.serving.training.store import Store
from lorry.serving.training.tenant import LoraChoice, Tenant

_log = logging.getLogger(__name__)


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
        self._writer = ThreadPoolExecutor(1, "lorry-states")

    def get(self, id: str) -> Tenant:
        """Return a model; called while nothing else uses the base."""
        tenant = self._here.get(id)
        if tenant is None:
            known = self.store.model(id)
            if known is None or known.gone:
                raise Missing(f"There is no model {id}, or it was unloaded. Create one.")
            tenant = Tenant(self.model, id, LoraChoice(**known.config), known.owner)
            try:
                if known.state is not None:
                    tenant.load(self.root / known.state, optimizer=True)
            except BaseException:
                tenant.leave()
                raise
            self._here[id] = tenant
        self._here.move_to_end(id)
        return tenant

    def shrink(self, used: set[str]) -> list[Tenant]:
        """Forget those that were used longest ago, where there are too many; returns them, to be taken off.

        `used` are those that take part in passes.
        """
        gone = []
        for id in list(self._here):
            if len(self._here) <= self.most:
                break
            if id not in used and not self._here[id].collecting and self.written(self._here[id]):
                gone.append(self._here.pop(id))
        return gone

    def here(self, id: str) -> Tenant | None:
        """Return a model if it is in memory."""
        return self._here.get(id)

    def write_open(self, tenant: Tenant) -> Future[bool]:
        """Let weights be written that changed since they were written last, while the caller goes on.

        One write of a model is under way at a time. If the disk refuses, which is logged and makes the result false,
        the model's requests stay written down in the place of its weights.
        """
        if tenant.writing is None or tenant.writing.done():
            if not tenant.unwritten:
                return _done()
            tensors = snapshot(tenant.adapter, tenant.optimizer)
            tenant.writing = self._writer.submit(self._write, tenant, tenant.unwritten[-1], tensors)
        return tenant.writing

    def written(self, tenant: Tenant) -> bool:
        """Write all changes of a model's weights, and return whether that is done."""
        while tenant.unwritten:
            if not self.write_open(tenant).result():
                return False
        return True

    def close(self) -> None:
        """Write what is not written, and end the thread that writes."""
        for tenant in self._here.values():
            self.written(tenant)
        self._writer.shutdown()

    def _write(self, tenant: Tenant, seq: int, tensors: dict[str, Tensor]) -> bool:
        folder = self.root / folder_name(tenant.id)
        state = f"{folder.name}/{seq:09d}.safetensors"
        try:
            write_state(tensors, {"seq": seq, "lora": tenant.choice.as_dict()}, self.root / state)
            self.store.settle(tenant.id, seq, state)
        except Exception:
            _log.exception("The weights of %s could not be written after request %s.", tenant.id, seq)
            return False
        while tenant.unwritten and tenant.unwritten[0] <= seq:
            tenant.unwritten.popleft()
        for old in folder.glob("*"):
            if old.name != Path(state).name:
                remove(old)
        return True

    def drop(self, id: str) -> Tenant | None:
        """Forget a model for good, with its state on disk; returns it, to be taken off, if it is in memory."""
        tenant = self._here.pop(id, None)
        if tenant is not None and tenant.writing is not None:
            tenant.writing.result()
        self.store.drop_model(id)
        shutil.rmtree(self.root / folder_name(id), ignore_errors=True)
        return tenant

    def clean(self) -> None:
        """Remove states on disk that no model needs: of a process that was killed while it wrote."""
        wanted = {known.state for known in self.store.models() if not known.gone}
        for state in self.root.glob("*/*"):
            if state.relative_to(self.root).as_posix() not in wanted:
                remove(state)


def _done() -> Future[bool]:
    found: Future[bool] = Future()
    found.set_result(True)
    return found
