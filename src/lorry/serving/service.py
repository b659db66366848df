"""One thread that drives an engine, and the asyncio face of what it answers."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from lorry.core.errors import LorryError
from lorry.serving.request import Output, Request

T = TypeVar("T")
_log = logging.getLogger(__name__)
#: Seconds to wait after a step that failed, and after one that had nothing to say while requests wait for a load.
_AFTER_FAILURE, _AFTER_NOTHING = 0.05, 0.0005


class Overloaded(LorryError):
    """More requests are under way than the service takes."""


class Draining(LorryError):
    """The service finishes what runs and takes nothing new."""


class Driven(Protocol):
    """What a service asks of an engine."""

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""

    def submit(self, request: Request) -> None:
        """Take a request; called from any thread."""

    def cancel(self, id: str) -> bool:
        """Give a request up; called from any thread."""

    def step(self) -> list[Output]:
        """Do a step, on one thread."""


E = TypeVar("E", bound=Driven)


@dataclass(frozen=True)
class _Reader:
    """Where the outputs of a request go: a queue, and the loop that it belongs to."""

    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[Output]


class Service(Generic[E]):
    """Drives an engine on a thread of its own and hands its outputs to coroutines.

    Parameters
    ----------
    engine
        What is driven. After the service has begun, nobody else calls its `step`.
    max_requests
        Sequences that may be under way at once, waiting ones included.
    """

    def __init__(self, engine: E, *, max_requests: int = 4096) -> None:
        self.engine, self.max_requests = engine, max_requests
        self._readers: dict[str, _Reader] = {}
        self._jobs: deque[Callable[[bool], None]] = deque()
        self._wake = threading.Condition()
        self._draining = self._closed = False
        self._thread = threading.Thread(target=self._drive, name="lorry-engine", daemon=True)
        self._thread.start()

    @property
    def under_way(self) -> int:
        """How many sequences have not ended."""
        return len(self._readers)

    @property
    def alive(self) -> bool:
        """Whether the engine is driven."""
        return self._thread.is_alive()

    @property
    def draining(self) -> bool:
        """Whether nothing new is taken."""
        return self._draining

    async def stream(self, *requests: Request) -> AsyncGenerator[Output, None]:
        """Yield the outputs of requests as they come, until the last of them has ended.

        A caller that stops reading (whose client went away, say) cancels what has not ended; close the
        iterator with ``aclose`` then.

        Raises
        ------
        OptionError, AdapterError
            The engine refuses a request; none of them runs then.
        Overloaded, Draining
            The service takes no more at the moment, or none any longer.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Output]()
        with self._wake:
            self._admit(requests)
            self._readers.update((request.id, _Reader(loop, queue)) for request in requests)
        left = {request.id for request in requests}
        try:
            await asyncio.to_thread(self._submit, requests)
            while left:
                output = await queue.get()
                if output.finish is not None:
                    left.discard(output.id)
                yield output
        finally:
            self._forget(left)

    async def call(self, function: Callable[[], T]) -> T:
        """Return what a function returns that runs on the engine's thread, between two steps."""
        return await asyncio.wrap_future(self.ask(function))

    def ask(self, function: Callable[[], T]) -> Future[T]:
        """Let a function run on the engine's thread, between two steps; called from any thread.

        Raises
        ------
        Draining
            The service has ended; if it ends before the function's turn, the future has this error.
        """
        answer: Future[T] = Future()

        def job(ended: bool) -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                if ended:
                    raise Draining("The service has ended.")
                answer.set_result(function())
            except BaseException as error:
                answer.set_exception(error)

        with self._wake:
            if self._closed:
                raise Draining("The service has ended.")
            self._jobs.append(job)
            self._wake.notify()
        return answer

    def drain(self) -> None:
        """Take nothing new from now on; what runs goes on."""
        self._draining = True

    async def drained(self, timeout: float | None = None) -> bool:
        """Take nothing new, and return whether all that runs has ended within so many seconds."""
        self.drain()
        end = None if timeout is None else time.monotonic() + timeout
        while self._readers:
            if end is not None and time.monotonic() > end:
                return False
            await asyncio.sleep(0.02)
        return True

    def close(self) -> None:
        """Cancel what runs and end the thread."""
        with self._wake:
            self._draining = self._closed = True
            self._wake.notify()
        self._thread.join()
        while self._jobs:
            self._jobs.popleft()(True)
        self._deliver(self._failed("The server has ended."))

    # -- the side of the callers

    def _admit(self, requests: tuple[Request, ...]) -> None:
        if self._draining:
            raise Draining("The server is shutting down and takes no new requests; ask another one.")
        if len(self._readers) + len(requests) > self.max_requests:
            raise Overloaded(
                f"{len(self._readers)} requests are under way and {len(requests)} came, of {self.max_requests} that "
                "this server takes; try again later."
            )
        names = [request.id for request in requests]
        if len(set(names)) < len(names) or not self._readers.keys().isdisjoint(names):
            raise ValueError("A request with one of these ids is under way.")

    def _submit(self, requests: tuple[Request, ...]) -> None:
        for request in requests:
            self.engine.submit(request)
            if request.id not in self._readers:  # its reader went away while it was taken in
                self.engine.cancel(request.id)
            with self._wake:
                self._wake.notify()

    def _forget(self, left: Iterable[str]) -> None:
        """Cancel requests whose reader has gone."""
        for name in left:
            if self._readers.pop(name, None) is not None:
                self.engine.cancel(name)
        with self._wake:
            self._wake.notify()

    # -- the side of the engine

    def _drive(self) -> None:
        while True:
            with self._wake:
                while not (self._closed or self._jobs or not self.engine.idle):
                    self._wake.wait()
                if self._closed:
                    break
                jobs, self._jobs = self._jobs, deque()
            for job in jobs:
                job(False)
            if not self.engine.idle:
                self._deliver(self._step())

    def _step(self) -> list[Output]:
        try:
            outputs = self.engine.step()
        except Exception as error:
            _log.exception("A step of the engine failed; the requests under way end with an error.")
            time.sleep(_AFTER_FAILURE)
            return self._failed(f"The server failed at this request ({type(error).__name__}); its log says more.")
        if not outputs:
            time.sleep(_AFTER_NOTHING)
        return outputs

    def _failed(self, why: str) -> list[Output]:
        """Give up all that is under way, and return what its readers are told."""
        names = list(self._readers)
        for name in names:
            try:
                self.engine.cancel(name)
            except Exception:
                _log.exception("The engine could not cancel %s.", name)
        return [Output(name, finish="error", error=why) for name in names]

    def _deliver(self, outputs: Iterable[Output]) -> None:
        """Hand outputs to their readers: one call for each loop."""
        parcels: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[Output], Output]]] = {}
        for output in outputs:
            ended = output.finish is not None
            reader = self._readers.pop(output.id, None) if ended else self._readers.get(output.id)
            if reader is not None:
                parcels.setdefault(reader.loop, []).append((reader.queue, output))
        for loop, parcel in parcels.items():
            try:
                loop.call_soon_threadsafe(_put, parcel)
            except RuntimeError:  # the loop has ended with its readers
                self._forget(output.id for _, output in parcel)


def _put(parcel: list[tuple[asyncio.Queue[Any], Output]]) -> None:
    for queue, output in parcel:
        queue.put_nowait(output)
