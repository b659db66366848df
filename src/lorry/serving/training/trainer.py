"""One thread that does what clients ask of their models: in each model's order, passes of all models together."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from lorry.core.errors import LorryError
from lorry.serving.engine import Engine
from lorry.serving.service import Draining, Overloaded, Service
from lorry.serving.training.checkpoints import Checkpoints
from lorry.serving.training.errors import Refused
from lorry.serving.training.folders import clear_drafts
from lorry.serving.training.losses import check_datum, loss_named
from lorry.serving.training.operations import Operations
from lorry.serving.training.options import TrainingOptions
from lorry.serving.training.passes import Passes, Work
from lorry.serving.training.queues import PASS, Queue
from lorry.serving.training.samplers import Samplers
from lorry.serving.training.store import Entry, Store
from lorry.serving.training.tenant import Tenant
from lorry.serving.training.tenants import Tenants
from lorry.serving.training.wire import MEDIA, PassRequest, pass_response
from lorry.training.joint import Base
from lorry.training.task import Setting

T = TypeVar("T")
_log = logging.getLogger(__name__)
JSON = "application/json"
#: Requests of one model that may wait.
MOST_WAITING = 4096


class Trainer:
    """Trains the models of all clients on the base of an engine.

    Requests are written down before they are done, and weights after each change. What a process that was killed had
    not finished is done again by the next one: from the last weights on disk, in the same order.

    Parameters
    ----------
    service
        Drives the engine; passes run between its steps.
    options
        Folder and limits.

    Attributes
    ----------
    positions
        Tokens of a row that the base can see, at most.

    Raises
    ------
    CheckpointError
        Another server has the folder.
    """

    def __init__(self, service: Service[Engine], options: TrainingOptions | None = None) -> None:
        self.service, self.options = service, options if options is not None else TrainingOptions()
        folder = self.options.folder
        engine = service.engine
        self.store = Store(folder / "server.sqlite3")
        clear_drafts(folder)
        self.samplers = Samplers(engine, folder / "checkpoints", self.options.max_samplers)
        self.checkpoints = Checkpoints(self.store, folder / "checkpoints", self.samplers)
        self._operations = Operations(self.store, self.checkpoints, self.options.kept_snapshots)
        with engine.applied({}) as model:
            config: Any = model.config
        self.positions: int = getattr(config, "max_position_embeddings", None) or 1 << 30
        self._tenants = Tenants(model, self.store, folder / "models", self.options.max_models)
        self._tenants.clean()
        self.passes = Passes(Base(Setting(model)), self.options.max_tokens)
        self._wake = threading.Condition()
        self._closed = False
        self._queues: dict[str, Queue] = {}
        self._busy: set[str] = set()
        self._company: deque[set[str]] = deque(maxlen=2)  # the models of the last two joint passes
        self._unloading: deque[tuple[str, Future[None]]] = deque()
        self._watchers: dict[tuple[str, int], list[Future[Entry]]] = {}
        self._stepped = False  # whether the last round did no pass
        self._take_up()
        self._thread = threading.Thread(target=self._work, name="lorry-trainer", daemon=True)
        self._thread.start()

    def _take_up(self) -> None:
        """Go on where the last process ended."""
        for known in self.store.models():
            if known.gone:
                continue
            entries = self.store.open_requests(known.id, known.durable)
            self._queues[known.id] = Queue(known.durable + 1, {entry.seq: entry for entry in entries})
            if entries:
                self._busy.add(known.id)

    # -- the side of the clients

    def submit(self, entry: Entry) -> None:
        """Take a request; one that is known already is not taken again.

        Raises
        ------
        Refused
            Its number is that of a request that was done long ago.
        Overloaded, Draining
            Nothing new is taken at the moment, or any longer.
        """
        if self.service.draining:
            raise Draining("The server is shutting down and takes no new requests; try again.")
        with self._wake:
            queue = self._queues.setdefault(entry.model, Queue())
            if len(queue.waiting) >= MOST_WAITING:
                raise Overloaded(f"{MOST_WAITING} requests of this model wait; send more when some are done.")
            if entry.seq < queue.next and self.store.request(entry.model, entry.seq) is None:
                raise Refused(f"The model's next request is {queue.next}, found {entry.seq}, whose answer is gone.")
            if self.store.add_request(entry):
                queue.waiting[entry.seq] = entry
                self._busy.add(entry.model)
                self._wake.notify_all()

    async def answer(self, model: str, seq: int, seconds: float) -> Entry | None:
        """Return a request as soon as it is answered, or as it is after so many seconds; None if there is none."""
        watcher: Future[Entry] = Future()
        with self._wake:
            self._watchers.setdefault((model, seq), []).append(watcher)
        try:
            entry = await asyncio.to_thread(self.store.request, model, seq)
            if entry is not None and entry.answer is None:
                with suppress(TimeoutError):
                    entry = await asyncio.wait_for(asyncio.wrap_future(watcher), seconds)
            return entry
        finally:
            with self._wake:
                left = self._watchers.get((model, seq), [])
                if watcher in left:
                    left.remove(watcher)
                if not left:
                    self._watchers.pop((model, seq), None)

    async def unload(self, model: str) -> None:
        """Forget a model; its checkpoints stay."""
        done: Future[None] = Future()
        with self._wake:
            if self._closed:
                raise Draining("The server has ended.")
            self._unloading.append((model, done))
            self._wake.notify_all()
        await asyncio.wrap_future(done)

    def close(self) -> None:
        """End the thread; what is not done is done by the next server on the folder."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        self._thread.join()
        for _, done in self._unloading:
            done.cancel()
        self._tenants.close()
        self.store.close()

    # -- the side of the models

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or bool(self._unloading) or bool(self._ready()))
                if self._closed:
                    return
            try:
                self._round()
            except Draining:
                return
            except Exception:
                _log.exception("A round of training failed.")

    def _ready(self) -> list[tuple[str, Queue]]:
        """Return the models that can go on."""
        found = []
        for model in list(self._busy):
            queue = self._queues.get(model)
            if queue is None or not queue.waiting:
                self._busy.discard(model)
            elif queue.head is not None:
                found.append((model, queue))
        return found

    def _round(self) -> None:
        """Do what is no pass, then the next pass of all models that wait for one."""
        while self._unloading:
            self._unload(*self._unloading.popleft())
        with self._wake:
            singles = [(q, q.head) for _, q in self._ready() if q.head is not None and q.head.kind != PASS]
        for queue, entry in singles:
            assert entry is not None
            self._single(queue, entry)
        # models that just took a step come with passes about now; but steps without end do not keep passes waiting
        self._stepped = bool(singles) and not self._stepped
        if self._stepped:
            return
        with self._wake:
            ready = dict(self._ready())
            if not any(queue.under_way for queue in ready.values()):
                # clients that had passes just now come again about now
                wanted = set().union(*self._company) & self._queues.keys()
                self._wake.wait_for(
                    lambda: self._closed or wanted <= {model for model, _ in self._ready()}, self.options.gather
                )
                ready = dict(self._ready())
            fresh = [(queue, entry) for queue in ready.values() for entry in queue.fresh_passes()]
        begun = self._on_engine(lambda: [self._begun(entry) for _, entry in fresh]) if fresh else []
        for (queue, entry), found in zip(fresh, begun, strict=True):
            if isinstance(found, Work):
                queue.works[entry.seq] = found
            else:
                self._end(queue, entry, found)
        works = {work: (queue, entry) for queue in ready.values() for entry, work in queue.under_way}
        if works:
            live = [work for work in works if not work.done]
            took = self._on_engine(lambda: self.passes.next(live)) if live else []
            self._company.append({works[work][1].model for work in took})
            for work, (queue, entry) in works.items():
                if work.done:
                    self._end(queue, entry, work)
        used = {entry.model for queue in ready.values() for entry, _ in queue.under_way}
        for tenant in self._tenants.shrink(used):
            self._on_engine(tenant.leave)

    def _unload(self, model: str, done: Future[None]) -> None:
        with self._wake:
            self._queues.pop(model, None)
            self._busy.discard(model)
        try:
            tenant = self._tenants.drop(model)
            if tenant is not None:
                self._on_engine(tenant.leave)
        finally:
            if done.set_running_or_notify_cancel():
                done.set_result(None)

    def _single(self, queue: Queue, entry: Entry) -> None:
        """Do one request that is no pass; it stays written down until its effect is."""
        tenant: Tenant | None = None
        changed = False
        answer: bytes | None = entry.answer
        try:
            tenant = self._tenant(entry.model)
            if answer is None or not self._operations.saves(entry.kind):
                found = self._operations.run(entry.kind, tenant, entry.seq, json.loads(entry.payload))
                answer, changed = json.dumps(found).encode(), self._operations.changes(entry.kind)
        except Draining:
            raise
        except Exception as error:
            answer = self._failure(entry, error)
        with self.store.change():
            self.store.answer(entry.model, entry.seq, answer, JSON)
            if tenant is not None and not (changed or tenant.unwritten or tenant.collecting):
                self.store.settle(entry.model, entry.seq)
        if tenant is not None and changed:
            tenant.unwritten.append(entry.seq)
            if entry.kind != "optim_step":
                self._tenants.written(tenant)
            elif len(tenant.unwritten) >= self.options.write_every:
                self._tenants.write_open(tenant)
        self._tell(replace(entry, answer=answer, media=JSON))
        with self._wake:
            queue.answered(entry)

    def _begun(self, entry: Entry) -> Work | Exception:
        """Return what a request for a pass asks for, or why it cannot be; called while nothing else uses the base."""
        try:
            return self._prepared(entry)
        except Exception as error:
            return error

    def _end(self, queue: Queue, entry: Entry, found: Work | Exception) -> None:
        """Answer a request for a pass that needs no more of them, or has none."""
        error = found.error if isinstance(found, Work) else found
        if error is None:
            assert isinstance(found, Work)
            outputs = [{"logprobs": each} for each in found.logprobs]
            answer, media = pass_response(outputs, {"loss:sum": found.loss}), MEDIA
        else:
            self._spoil(entry, error)
            answer, media = self._failure(entry, error), JSON
        tenant = self._tenants.here(entry.model)
        first = all(other.seq >= entry.seq for other, _ in queue.under_way)
        with self.store.change():
            self.store.answer(entry.model, entry.seq, answer, media)
            if tenant is not None and first and not (tenant.collecting or tenant.unwritten):
                self.store.settle(entry.model, entry.seq)
        self._tell(replace(entry, answer=answer, media=media))
        with self._wake:
            queue.answered(entry)

    def _tenant(self, model: str) -> Tenant:
        """Return a model, made on the engine's thread if it is not in memory."""
        if self._tenants.here(model) is None:
            return self._on_engine(lambda: self._tenants.get(model))
        return self._tenants.get(model)

    def _prepared(self, entry: Entry) -> Work:
        """Return what a request for a pass asks for, checked."""
        asked = PassRequest(entry.payload)
        tenant = self._tenants.get(entry.model)
        data, (loss, config) = asked.data(), loss_named(asked.loss, asked.config)
        if not data:
            raise Refused("The request has no examples; send at least one.")
        engine = self.service.engine
        for place, datum in enumerate(data):
            check_datum(datum, loss, asked.loss, place, engine.vocabulary, self.positions)
        return Work(tenant.adapter.name, data, loss, config, asked.forward_only, tenant.owner)

    def _spoil(self, entry: Entry, error: Exception) -> None:
        """Let the step that a failed pass belongs to fail too."""
        try:
            if not PassRequest(entry.payload).forward_only:
                self._tenant(entry.model).spoiled = str(error)
        except LorryError:
            return

    def _tell(self, entry: Entry) -> None:
        """Hand an answer to those who wait for it."""
        with self._wake:
            for watcher in self._watchers.pop((entry.model, entry.seq), []):
                if watcher.set_running_or_notify_cancel():
                    watcher.set_result(entry)

    def _failure(self, entry: Entry, error: Exception) -> bytes:
        """Return the answer to a request that cannot be done: through its client, or through the server."""
        if isinstance(error, LorryError):
            said, category = str(error), "user"
        else:
            _log.error("A request for '%s' of %s failed.", entry.kind, entry.model, exc_info=error)
            said, category = f"The server failed at this request ({type(error).__name__}); its log says more.", "server"
        return json.dumps({"error": said, "category": category}).encode()

    def _on_engine(self, function: Callable[[], T]) -> T:
        """Return what a function returns that runs while nothing else uses the model."""
        return self.service.ask(self._alone(function)).result()

    def _alone(self, function: Callable[[], T]) -> Callable[[], T]:
        def run() -> T:
            with self.service.engine.applied({}):
                return function()

        return run


def plain(value: Any) -> bytes:
    """Return plain data as the payload of a request."""
    return json.dumps(value).encode()
