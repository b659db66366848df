"""Fingerprints: short hashes that tell one base model from another, site by site.

A site's hash covers its shape and every element of its weight. It does not cover names of classes or heads: the same
encoder under another head has the same fingerprint. A site is written as ``SHAPE:SAMPLE:MARKS``:

- ``SHAPE``: hash of the shape, 8 hexadecimal digits;
- ``SAMPLE``: hash of 16 of the weights in bfloat16, 8 digits. Files of the first edition have ``SHAPE:SAMPLE`` alone
  and are compared by the sample. Empty for quantised weights and those on the meta device;
- ``MARKS``, joined by ``.``: ``b`` and the checksum of all values in bfloat16, ``s`` and that in float32, ``d`` and
  that in float64, ``h`` and that in float16, as far as the weight's own type goes; ``q`` and the checksum of the stored
  bytes of a quantised weight. See `lorry.core.sites.checksum`.

What both sides hold is compared: two float32 weights bit by bit, a float32 and a bfloat16 copy of one model by the
values in bfloat16. A float16 copy of a model in another type rounds and clips in its own way: where the values in
bfloat16 differ, it says that the weights cannot be compared. So does a quantised weight whose bytes differ, since
processors and versions quantise differently.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from lorry.core.errors import FingerprintError, some
from lorry.core.receipt import FingerprintVerdict
from lorry.core.sites.checksum import checksum_of, checksums
from lorry.core.sites.site import Site
from lorry.core.sites.storage import find_storage

_SAMPLES = 16
_MARKS = {torch.bfloat16: "b", torch.float32: "s", torch.float64: "d", torch.float16: "h"}
Verdict = FingerprintVerdict | Literal["differs"]


@dataclass(frozen=True)
class Fingerprint:
    """Hashes of the sites that an adapter sits on.

    Attributes
    ----------
    sites
        Site path -> hash of shape and weight, in the form that the module describes.
    base
        Free text that names the base for people, e.g. its repository name.
    """

    sites: Mapping[str, str]
    base: str = ""

    @property
    def digest(self) -> str:
        """One hash over all sites, 16 hexadecimal digits; the same for a float32 and a bfloat16 copy of a model."""
        text = "\n".join(f"{path} {_coarse(value)}" for path, value in sorted(self.sites.items()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint."""
        return {"base": self.base, "digest": self.digest, "sites": dict(self.sites)}

    def compare(self, other: Fingerprint) -> Verdict:
        """Compare with another fingerprint over the sites that both cover."""
        verdict: Verdict = "unknown"
        for path in self.sites.keys() & other.sites.keys():
            found = compare_sites(self.sites[path], other.sites[path])
            if found == "differs":
                return found
            verdict = "quantized" if "quantized" in (verdict, found) else "match"
        return verdict

    def require(self, found: Fingerprint, what: str) -> FingerprintVerdict:
        """Return the verdict, or raise `FingerprintError` naming both bases if they differ."""
        verdict = self.compare(found)
        if verdict != "differs":
            return verdict
        both = [path for path in self.sites if path in found.sites]
        wrong = [path for path in both if compare_sites(self.sites[path], found.sites[path]) == "differs"]
        raise FingerprintError(
            f"{what} was made for the base '{self.base or 'unnamed'}' ({self.digest}), but this model is "
            f"'{found.base or 'unnamed'}' ({found.digest}): {len(wrong)} of {len(self.sites)} sites have other weights "
            f"or shapes, e.g. {some(wrong, 2)}. Load the right base, or pass check_base=False if you know better."
        )


def compare_sites(one: str, other: str) -> Literal["match", "quantized", "differs"]:
    """Compare the hashes of one site: the same, not the same, or of the same shape with weights that cannot be
    compared.
    """
    if one == other and not one.endswith(":"):  # nothing after the shape: weights that cannot be read
        return "match"
    shape, sample, marks = _parts(one)
    other_shape, other_sample, other_marks = _parts(other)
    if shape != other_shape:
        return "differs"
    if "b" in marks and "b" in other_marks:
        half = ("h" in marks) != ("h" in other_marks)
        same = all(marks[key] == other_marks[key] for key in marks.keys() & other_marks.keys())
        return "match" if same else "quantized" if half else "differs"
    if "q" in marks and marks["q"] == other_marks.get("q"):
        return "match"
    if sample and other_sample:
        return "match" if sample == other_sample else "differs"
    return "quantized"


def _parts(value: str) -> tuple[str, str, dict[str, str]]:
    """Return shape, sample and marks of a site's hash."""
    shape, _, rest = value.partition(":")
    sample, _, marks = rest.partition(":")
    return shape, sample, {mark[0]: mark[1:] for mark in marks.split(".") if mark}


def _coarse(value: str) -> str:
    """Return what the hashes of a site have in common for copies of different precision."""
    shape, sample, marks = _parts(value)
    return f"{shape}:{marks['b']}" if "b" in marks else f"{shape}:{sample}{marks.get('q', '')}"


class FingerprintCache:
    """The hashes of a base's weights, each read once for as long as it is the same.

    A weight is read again where it was written to in place, where its tensor or its memory was exchanged, and where it
    went to another dtype or device. PyTorch does not tell of writes through ``weight.data``; call `forget` after these.
    """

    def __init__(self) -> None:
        self._read: dict[int, _Entry] = {}
        self._held: dict[str, list[str]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy of the model takes along: its tensors are others, what they stand for is the same."""
        return {"_read": {}, "_held": {path: list(values) for path, values in self._held.items()}}

    def hash_of(self, site: Site) -> str:
        """Return the hash of a site, in the form that the module describes."""
        held = self._held.get(site.path)
        if held:
            return held[0]
        return f"{_shape_mark(site.shape)}:{self._of_weight(site)}"

    def hold(self, sites: Iterable[Site]) -> None:
        """Keep the present hashes as those of the base, whatever is written into the weights, until `release`.

        For what is fused into a base and can be taken out again: the base stays the one that it was.
        """
        for site in sites:
            if site.parameter:
                self._held.setdefault(site.path, []).append(self.hash_of(site))

    def release(self, sites: Iterable[Site]) -> None:
        """Undo one `hold`."""
        for site in sites:
            if site.parameter and len(held := self._held[site.path]) == 1:
                del self._held[site.path]
            elif site.parameter:
                held.pop()

    def forget(self) -> None:
        """Read every weight again when it is asked for next."""
        self._read.clear()

    def _of_weight(self, site: Site) -> str:
        weight = site.stored
        found = self._read.get(id(weight))
        if found is not None and found.of(weight):
            return found.value
        value = _hash(site)
        if not weight.is_meta and not weight.is_inference():  # whose writes PyTorch does not count
            key, read = id(weight), self._read
            read[key] = _Entry(weight, value, lambda: read.pop(key, None))
        return value


class _Entry:
    """A hash, and by what one sees that a tensor is still the one that was read."""

    def __init__(self, weight: Tensor, value: str, gone: Any) -> None:
        self.value = value
        self._weight = weakref.ref(weight, lambda _: gone())
        self._memory = weakref.ref(_memory(weight))
        self._facts = _facts(weight)

    def of(self, weight: Tensor) -> bool:
        """Whether `weight` is what was read, unchanged."""
        # a moved or cast parameter keeps its identity and counts no write, and new memory may have the old address
        return self._weight() is weight and self._memory() is _memory(weight) and self._facts == _facts(weight)


@lru_cache(maxsize=1024)
def _shape_mark(shape: tuple[int, ...]) -> str:
    """Return the hash of a shape."""
    return hashlib.sha256("x".join(map(str, shape)).encode()).hexdigest()[:8]


def _memory(weight: Tensor) -> torch.UntypedStorage | Tensor:
    """Return the memory of a weight; of a tensor subclass, which has none of its own, the weight."""
    return weight.untyped_storage() if type(weight) in (Tensor, torch.nn.Parameter) else weight


def _facts(weight: Tensor) -> tuple[object, ...]:
    return weight._version, weight.dtype, weight.device, weight.shape, weight.stride()


def _hash(site: Site) -> str:
    """Return ``SAMPLE:MARKS`` of a site's weight."""
    stored = site.stored.detach()
    storage = None if stored.is_meta else find_storage(site.stored)
    if storage is None:
        return ""
    if not storage.lossless:
        codes = storage.codes(site)
        return "" if codes is None else f":q{checksum_of(codes)}"
    marks = [f"{_MARKS[kind]}{value}" for kind, value in checksums(stored).items()]
    return f"{_sample(stored)}:{'.'.join(marks)}"


def _sample(stored: Tensor) -> str:
    """Return the hash by which the first edition recognised a weight."""
    places = range(0, stored.numel(), max(stored.numel() // _SAMPLES, 1))[:_SAMPLES]
    at = torch.tensor(list(places), dtype=torch.long, device=stored.device)
    where = torch.unravel_index(at, stored.shape)
    sample = stored[where].to("cpu", torch.bfloat16).view(torch.int16)
    return hashlib.sha256(repr(sample.tolist()).encode()).hexdigest()[:8]


def fingerprint(sites: Iterable[Site], base: str = "", cache: FingerprintCache | None = None) -> Fingerprint:
    """Return the fingerprint of some sites; weights that `cache` knows are not read again."""
    cache = FingerprintCache() if cache is None else cache
    return Fingerprint({site.path: cache.hash_of(site) for site in sites if site.parameter}, base)
