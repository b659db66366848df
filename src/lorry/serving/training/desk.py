"""What clients may ask for, checked against whose it is."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

from lorry.core.errors import LorryError
from lorry.serving.service import Overloaded
from lorry.serving.training.errors import Missing, Refused
from lorry.serving.training.folders import copy_folder
from lorry.serving.training.names import Address, model_id
from lorry.serving.training.operations import INFLIGHT
from lorry.serving.training.queues import PASS
from lorry.serving.training.sampling import Wish, sampled
from lorry.serving.training.store import Entry, Model
from lorry.serving.training.tenant import LoraChoice
from lorry.serving.training.trainer import JSON, Trainer, plain
from lorry.serving.training.wire import MEDIA, PassRequest

_log = logging.getLogger(__name__)
_REQUEST = re.compile(r"(.{1,200}:(train|sample):[^:]{1,64}):([0-9]{1,18})")
#: Seconds that a client waits for an answer before it asks again, and for which answers of samples are kept.
PATIENCE, KEPT_SAMPLES = 20.0, 600.0
#: Samples whose answers are kept, at most.
_MOST_ANSWERS = 20_000


@dataclass
class _Sample:
    """A request for samples that is under way or done; answers are kept in memory alone."""

    owner: str
    task: asyncio.Task[tuple[bytes, str]]
    ended: float | None = None


class Leave(Protocol):
    """What a key may take, to be given back."""

    used: int

    def end(self) -> None:
        """Give it back but for the tokens that were used."""


Take = Callable[[int, int], Leave]


class Desk:
    """Takes requests of clients.

    Parameters
    ----------
    trainer
        Does what concerns models.
    base
        The name of the base.
    """

    def __init__(self, trainer: Trainer, base: str) -> None:
        self.trainer, self.base = trainer, base
        self.store, self.checkpoints = trainer.store, trainer.checkpoints
        self._samples: dict[str, _Sample] = {}

    # -- sessions and models

    def open_session(self, owner: str, facts: dict[str, Any]) -> str:
        """Return the id of a new session."""
        id = str(uuid.uuid4())
        self.store.add_session(id, owner, facts)
        return id

    def session(self, id: str, owner: str) -> dict[str, Any]:
        """Return what is known of a session; raise `Missing` if there is none."""
        found = self.store.session(id, owner)
        if found is None:
            raise Missing(f"There is no session {id[:100]!r} of this key. Open one first.")
        return found

    def model(self, id: str, owner: str, *, gone: bool = False) -> Model:
        """Return a model, also one that was unloaded if `gone`; raise `Missing` if there is none."""
        found = self.store.model(id)
        if found is None or found.owner != owner or (found.gone and not gone):
            raise Missing(f"There is no model {id[:200]!r} of this key, or it was unloaded. Create one first.")
        return found

    def check_base(self, name: str | None) -> None:
        """Raise `Refused` for another base than that which is served."""
        if name is not None and name != self.base:
            raise Refused(f"This server trains and samples '{self.base}', found {name[:200]!r}.")

    def create_model(
        self, owner: str, session: str, number: int, *, rank: int, seed: int | None, attention: bool, mlp: bool,
        unembed: bool, facts: dict[str, Any] | None,
    ) -> Entry:  # fmt: skip
        """Take a request for a new model; returns it.

        Raises
        ------
        Refused
            A rank out of bounds, or nothing to train.
        """
        options = self.trainer.options
        if not 1 <= rank <= options.max_rank:
            raise Refused(f"The rank must be between 1 and {options.max_rank} here, found {rank}.")
        if not (attention or mlp or unembed):
            raise Refused("Nothing is to be trained: set train_attn, train_mlp or train_unembed.")
        if seed is None:
            seed = secrets.randbits(31)
        choice = LoraChoice(rank, options.alpha, seed, attention, mlp, unembed)
        return self._new_model(owner, session, number, choice.as_dict(), facts, "create", {})

    def create_by_loading(
        self, owner: str, session: str, number: int, path: str, optimizer: bool, facts: dict[str, Any] | None
    ) -> Entry:
        """Take a request for a new model with saved weights; returns it."""
        saved = self.checkpoints.readable(path, owner)
        asked = {"path": path, "optimizer": optimizer}
        return self._new_model(owner, session, number, saved.config, facts, "load", asked)

    def _new_model(
        self, owner: str, session: str, number: int, config: dict[str, Any], facts: Any, kind: str, asked: Any
    ) -> Entry:
        self.session(session, owner)
        id = model_id(session, number)
        entry = Entry(id, 0, kind, plain(asked))
        self.store.add_model(id, session, owner, config, facts)
        self.trainer.submit(entry)
        return entry

    # -- requests of models

    def ask(self, owner: str, kind: str, model: str, seq: int | None, asked: dict[str, Any]) -> Entry:
        """Take a request that is no pass; returns it."""
        return self._take(owner, Entry(model, _checked(seq), kind, plain(asked)))

    def ask_pass(self, owner: str, body: bytes) -> Entry:
        """Take a request for a pass; returns it."""
        envelope = PassRequest(body)
        return self._take(owner, Entry(envelope.model, _checked(envelope.seq), PASS, body))

    def _take(self, owner: str, entry: Entry) -> Entry:
        self.model(entry.model, owner)
        self.trainer.submit(entry)
        return entry

    async def answer(self, owner: str, request: str) -> tuple[bytes, str] | None:
        """Return the answer to a request with its media type, None if it is not there after a while.

        Raises
        ------
        Missing
            There is no such request, or its answer is no longer kept.
        """
        found = _REQUEST.fullmatch(request)
        if found is None:
            raise Missing(f"There is no request {request[:200]!r}.")
        if found[2] == "sample":
            return await self._sample(owner, request)
        self.model(found[1], owner, gone=True)
        entry = await self.trainer.answer(found[1], int(found[3]), PATIENCE)
        if entry is None:
            raise Missing(f"The answer to {request} is not kept any longer. Send the request again.")
        return None if entry.answer is None else (entry.answer, entry.media)

    # -- samples

    def open_sampler(self, owner: str, session: str, number: int, path: str | None, base: str | None) -> str:
        """Return the id of a new sampling session."""
        self.session(session, owner)
        self.check_base(base)
        if path is not None:
            path = self.sampled_path(owner, path)
        id = f"{session}:sample:{number}"
        self.store.add_sampler(id, session, owner, path)
        return id

    def sampler(self, owner: str, id: str) -> str | None:
        """Return the path of the weights of a sampling session, None for the base; raise `Missing`."""
        found = self.store.sampler(id, owner)
        if found is None:
            raise Missing(f"There is no sampling session {id[:200]!r} of this key. Open one first.")
        return found[0]

    def sampled_path(self, owner: str, path: str) -> str:
        """Return the path of weights that can be sampled from; raise `Refused` or `Missing`."""
        saved = self.checkpoints.readable(path, owner)
        if saved.kind != "sampler_weights":
            raise Refused(f"{path} cannot be sampled from; save the weights with save_weights_for_sampler.")
        return saved.path

    def sample(self, owner: str, wish: Wish, path: str | None, sampler: str | None, seq: int | None, take: Take) -> str:
        """Begin to sample, on the running loop; returns the request's id. An id that is known is not begun again.

        Raises
        ------
        Refused, Missing
            What is wished for cannot be had.
        Overloaded
            Too much is under way.
        Exception
            What `take` raises, which is asked for leave for so many samples and tokens.
        """
        service = self.trainer.service
        id = f"{sampler or f'{uuid.uuid4()}:sample:0'}:{0 if seq is None else _checked(seq, 0)}"
        if id in self._samples:
            return id
        if path is not None:
            self.checkpoints.readable(path, owner)
        sampling = wish.sampling(service.engine.context)
        if service.under_way + wish.samples > service.max_requests or len(self._samples) >= _MOST_ANSWERS:
            raise Overloaded("The server has as many requests for samples as it takes; try again later.")

        leave = take(wish.samples, wish.samples * (len(wish.prompt) + sampling.max_tokens))

        async def run() -> bytes:
            composition = await asyncio.to_thread(self.trainer.samplers.composition, path)
            name = f"tinker-{uuid.uuid4().hex}"
            answer, leave.used = await sampled(service, wish, sampling, composition, name, owner)
            return answer

        task = asyncio.get_running_loop().create_task(_answered(run()))
        task.add_done_callback(lambda _: leave.end())  # also of a task that was cancelled before it began
        self._samples[id] = _Sample(owner, task)
        return id

    async def _sample(self, owner: str, id: str) -> tuple[bytes, str] | None:
        self._forget_samples()
        found = self._samples.get(id)
        if found is None or found.owner != owner:
            raise Missing(f"There is no request {id[:200]!r} for samples. Send it again.")
        try:
            answer = await asyncio.wait_for(asyncio.shield(found.task), PATIENCE)
        except TimeoutError:
            return None
        found.ended = time.monotonic()
        return answer

    def cancel(self, owner: str, id: str) -> None:
        """Give up a request for samples."""
        found = self._samples.get(id)
        if found is not None and found.owner == owner:
            found.task.cancel()

    def _forget_samples(self) -> None:
        old = time.monotonic() - KEPT_SAMPLES
        for id, each in list(self._samples.items()):
            if each.ended is None and each.task.done():
                each.ended = time.monotonic()
            if each.ended is not None and each.ended < old:
                del self._samples[id]

    # -- weights

    def copy(self, owner: str, path: str, session: str | None, number: int | None, lifetime: int | None) -> str:
        """Copy saved weights into a new model that is not trained; returns the path of the copy."""
        saved = self.checkpoints.readable(path, owner)
        address = Address.parse(saved.path)
        if session is None:
            session, number = self.open_session(owner, {}), 0
        self.session(session, owner)
        model = model_id(session, number or 0)
        if self.store.model(model) is None:
            self.store.add_model(model, session, owner, saved.config, saved.facts)
            self.store.drop_model(model)
        source = self.checkpoints.folder(saved)
        copied = Address(model, address.kind, address.name if address.name != INFLIGHT else f"{INFLIGHT}-copy")
        self.checkpoints.save(
            copied, owner, saved.config, lambda folder: copy_folder(source, folder), overwrite=True, lifetime=lifetime,
            facts=saved.facts,
        )  # fmt: skip
        return copied.path


async def _answered(work: Coroutine[Any, Any, bytes]) -> tuple[bytes, str]:
    """Return an answer with its media type; errors become answers."""
    try:
        return await work, MEDIA
    except LorryError as error:
        failed = {"error": str(error), "category": "user"}
    except asyncio.CancelledError:
        failed = {"error": "The request was cancelled.", "category": "user"}
    except Exception as error:
        _log.exception("A request for samples failed.")
        failed = {"error": f"The server failed at this request: {error}", "category": "server"}
    return json.dumps(failed).encode(), JSON


def _checked(seq: int | None, least: int = 1) -> int:
    """Return the number of a request in its model's order; raise `Refused` for none."""
    if seq is None or not least <= seq < 1 << 62:
        raise Refused(
            f"seq_id must be a whole number of at least {least}, found {seq!r}; it counts a model's requests."
        )
    return seq
