"""One piece of memory in pages of equal size, which adapters of any rank and other users of a server share.

Any free pages serve any request, so a request for no more pages than are free never fails. Method: unified paging of
S-LoRA (arXiv 2311.03285, section 5.1), there with key-value caches beside the adapters; a cache takes its pages by
`PagePool.take`, too.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import weakref
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from lorry.core.errors import AdapterError, OptionError
from lorry.core.forward.entry import TensorHome
from lorry.core.life.images import ALIGNED, Image, Plan, Slot, arranged, rounded, size_of


class PagePool:
    """Pages of memory on one device.

    Parameters
    ----------
    pages
        How many.
    page_bytes
        Bytes of each; a multiple of 64.
    device
        Where; the CPU or a CUDA device.

    Raises
    ------
    OptionError
        A size that is not positive, or not a multiple of 64; another kind of device.
    """

    def __init__(self, pages: int, page_bytes: int, device: torch.device | str = "cpu") -> None:
        if pages < 1 or page_bytes < ALIGNED or page_bytes % ALIGNED:
            raise OptionError(
                f"A page pool has at least one page, of a multiple of {ALIGNED} bytes; found {pages} pages of "
                f"{page_bytes} bytes."
            )
        if torch.device(device).type not in ("cpu", "cuda"):
            raise OptionError(f"A page pool lies on the CPU or on a CUDA device, found '{device}'.")
        with torch.inference_mode(False):
            self.memory = torch.zeros(pages, page_bytes, dtype=torch.uint8, device=device)
        self.pages = pages
        self.page_bytes = page_bytes
        self.device = self.memory.device
        self._taken = bytearray(pages)  # one byte for each page: runs of free ones are found by searching zeros
        self._held: dict[int, tuple[int, ...]] = {}
        self._loose: set[int] = set()
        self._returned: deque[int] = deque()  # filled by finalizers, which may run anywhere
        self._numbers = itertools.count()
        self._lock = threading.RLock()

    @property
    def free(self) -> int:
        """Number of pages that can be taken now."""
        with self._lock:
            self._collect()
            return self._taken.count(0)

    @property
    def used(self) -> int:
        """Number of pages that are taken, or still read by someone."""
        return self.pages - self.free

    def take(self, count: int, runs: Sequence[int] = ()) -> Lease:
        """Take pages, consecutive ones where there are.

        Parameters
        ----------
        count
            How many.
        runs
            If not all can be consecutive: how many of them in turn should be, adding up to `count`.

        Raises
        ------
        AdapterError
            Fewer are free.
        """
        with self._lock:
            self._collect()
            self._require(count)
            taken: list[int] = []
            whole = [count] if self._run(count) is not None else runs or [1] * count
            for length in whole:
                start = self._run(length)
                found = range(start, start + length) if start is not None else self._scattered(length)
                for page in found:
                    self._taken[page] = 1
                taken += found
            number = next(self._numbers)
            self._held[number] = tuple(taken)
            return Lease(self, number, tuple(taken))

    def take_loose(self, count: int) -> list[int]:
        """Take pages for a user who reads by page number and says himself when nobody reads them any more.

        They are taken from the end of the pool, so that consecutive ones are left for those who need such.

        Raises
        ------
        AdapterError
            Fewer are free.
        """
        with self._lock:
            self._collect()
            self._require(count)
            taken, page = [], self.pages
            for _ in range(count):
                page = self._taken.rfind(0, 0, page)
                self._taken[page] = 1
                taken.append(page)
            self._loose.update(taken)
            return taken

    def give_loose(self, pages: Sequence[int]) -> None:
        """Give pages back that `take_loose` gave out."""
        with self._lock:
            for page in pages:
                self._loose.remove(page)
                self._taken[page] = 0

    def rows(self, dtype: torch.dtype) -> Tensor:
        """Return all pages as vectors ``(pages, page_bytes / itemsize)``, for kernels that read by page number."""
        return self.memory.view(dtype)

    def check(self) -> None:
        """Raise `AssertionError` unless every page is free or taken exactly once."""
        with self._lock:
            self._collect()
            held = [page for pages in (*self._held.values(), self._loose) for page in pages]
            assert len(held) == len(set(held)), "a page is taken twice"
            assert set(held) == {p for p, taken in enumerate(self._taken) if taken}, "a page is taken by nobody"
            assert len(held) + self._taken.count(0) == self.pages, "pages are missing"

    def _require(self, count: int) -> None:
        free = self._taken.count(0)
        if count > free:
            raise AdapterError(
                f"The page pool has {self.pages} pages of {self.page_bytes} bytes, of which {free} are free; "
                f"{count} are needed. Evict or detach adapters, or make the pool larger."
            )

    def _run(self, length: int) -> int | None:
        start = self._taken.find(bytes(length))
        return None if start < 0 else start

    def _scattered(self, length: int) -> list[int]:
        found: list[int] = []
        page = -1
        for _ in range(length):
            page = self._taken.find(0, page + 1)
            found.append(page)
        return found

    def _collect(self) -> None:
        while self._returned:
            for page in self._held.pop(self._returned.popleft()):
                self._taken[page] = 0


class _Token:
    """What every tensor on taken pages holds; with the last one the pages are free again."""

    __slots__ = ("__weakref__", "memory")

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory


class _CudaMemory:
    """A part of a CUDA tensor, as torch takes it over together with its token."""

    def __init__(self, pointer: int, size: int, token: _Token) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (pointer, False), "version": 2}
        self.token = token


class Lease:
    """Pages that were taken.

    Attributes
    ----------
    pool
        Of which pool.
    pages
        Their numbers, in the order of what lies in them.
    runs
        Memory of consecutive pages ``(bytes,)``, each with its first byte in what lies there. The pages are free again
        when the lease is given back and no tensor reads them any more.
    """

    def __init__(self, pool: PagePool, number: int, pages: tuple[int, ...]) -> None:
        self.pool = pool
        self.pages = pages
        self._token: _Token | None = _Token(pool.memory)
        weakref.finalize(self._token, pool._returned.append, number).atexit = False
        self.runs: list[tuple[int, Tensor]] = []
        first = 0
        for place in range(1, len(pages) + 1):
            if place == len(pages) or pages[place] != pages[place - 1] + 1:
                self.runs.append((first * pool.page_bytes, self._memory(pages[first], place - first)))
                first = place

    def give_back(self) -> None:
        """Give the pages back; they are free as soon as no tensor reads them."""
        self._token, self.runs = None, []

    def whole(self, slot: Slot) -> Tensor | None:
        """Return a tensor in place, or None if its pages are not consecutive."""
        for start, memory in self.runs:
            if start <= slot.start and slot.stop <= start + len(memory):
                return slot.of(memory[slot.start - start : slot.stop - start])
        return slot.of(self.pool.memory.view(-1)[:0]) if not slot.nbytes else None

    def gathered(self, slot: Slot) -> Tensor:
        """Return a copy of a tensor."""
        with torch.inference_mode(False), torch.no_grad():
            parts = [m[max(slot.start - s, 0) : max(slot.stop - s, 0)] for s, m in self.runs]
            return slot.of(torch.cat(parts))

    def write(self, start: int, values: Tensor) -> None:
        """Write bytes from byte `start` on."""
        for first, memory in self.runs:
            low, high = max(start, first), min(start + len(values), first + len(memory))
            if low < high:
                memory[low - first : high - first].copy_(values[low - start : high - start])

    def _memory(self, page: int, count: int) -> Tensor:
        """Return pages as a tensor with a storage of its own, so that all its views keep the pages taken."""
        pool, token = self.pool, self._token
        assert token is not None
        pointer, size = pool.memory.data_ptr() + page * pool.page_bytes, count * pool.page_bytes
        with torch.inference_mode(False):
            if pool.device.type == "cuda":
                return torch.as_tensor(_CudaMemory(pointer, size, token), device=pool.device)
            array = (ctypes.c_uint8 * size).from_address(pointer)
            array.token = token  # type: ignore[attr-defined]
            return torch.frombuffer(array, dtype=torch.uint8)


class PagedImage:
    """Tensors of an adapter on pages of a pool.

    Attributes
    ----------
    lease
        The pages.
    ready
        Home -> its tensors, where all lie on consecutive pages.
    """

    def __init__(self, pool: PagePool, image: Image) -> None:
        self.plan = arranged(image.plan, pool.page_bytes)
        count = rounded(size_of(self.plan), pool.page_bytes) // pool.page_bytes
        self.lease = pool.take(count, runs_of(self.plan, pool.page_bytes, count))
        with torch.inference_mode(False), torch.no_grad():
            for home, slots in self.plan.items():
                for slot, packed in zip(slots, image.plan[home], strict=True):
                    self.lease.write(slot.start, image.flat[packed.start : packed.stop])
        self._found = {h: {s.name: (s, self.lease.whole(s)) for s in slots} for h, slots in self.plan.items()}
        self.ready: dict[TensorHome, dict[str, Tensor]] = {}
        for home, found in self._found.items():
            tensors = {name: tensor for name, (_, tensor) in found.items() if tensor is not None}
            if len(tensors) == len(found):
                self.ready[home] = tensors

    def tensors(self, home: TensorHome) -> dict[str, Tensor]:
        """Return the tensors of a home: views, and copies of what does not lie on consecutive pages."""
        return {n: self.lease.gathered(s) if t is None else t for n, (s, t) in self._found[home].items()}

    def pages(self, home: TensorHome) -> dict[str, tuple[tuple[int, ...], int]]:
        """Return for each tensor of a home the pages on which it lies, and its first byte in the first of them."""
        page, pages = self.lease.pool.page_bytes, self.lease.pages
        return {
            s.name: (pages[s.start // page : rounded(s.stop, page) // page], s.start % page) for s in self.plan[home]
        }

    def give_back(self) -> None:
        """Give the pages back; they are free as soon as no tensor reads them."""
        self._found, self.ready = {}, {}
        self.lease.give_back()


def pages_for(plan: Plan, pool: PagePool) -> int:
    """Return how many pages of a pool tensors take."""
    return rounded(size_of(arranged(plan, pool.page_bytes)), pool.page_bytes) // pool.page_bytes


def runs_of(plan: Plan, page: int, count: int) -> list[int]:
    """Return how many pages in turn should be consecutive: those that a large tensor covers, and others singly."""
    large = {
        s.start // page: rounded(s.stop, page) // page for slots in plan.values() for s in slots if s.nbytes > page
    }
    runs, position = [], 0
    while position < count:
        end = large.get(position, position + 1)
        runs.append(end - position)
        position = end
    return runs
