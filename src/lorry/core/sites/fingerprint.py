"""Fingerprints: short hashes that tell one base model from another, site by site.

A site's hash covers its shape and a sample of its weights, rounded to bfloat16 so that a float32 and a bfloat16 copy
of the same model agree. It does not cover names of classes or heads: the same encoder under another head has the same
fingerprint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lorry.core.errors import FingerprintError, some
from lorry.core.receipt import FingerprintVerdict
from lorry.core.sites.site import Site
from lorry.core.sites.storage import lossless as comparable

_SAMPLES = 16


@dataclass(frozen=True)
class Fingerprint:
    """Hashes of the sites that an adapter sits on.

    Attributes
    ----------
    sites
        Site path -> ``shape:weights``, each part 8 hexadecimal digits; the weights' part is empty for quantised
        storage.
    base
        Free text that names the base for people, e.g. its repository name.
    """

    sites: Mapping[str, str]
    base: str = ""

    @property
    def digest(self) -> str:
        """One hash over all sites, 16 hexadecimal digits."""
        text = "\n".join(f"{path} {value}" for path, value in sorted(self.sites.items()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint."""
        return {"base": self.base, "digest": self.digest, "sites": dict(self.sites)}

    def compare(self, other: Fingerprint) -> FingerprintVerdict | Literal["differs"]:
        """Compare with another fingerprint over the sites that both cover."""
        verdict: FingerprintVerdict | Literal["differs"] = "unknown"
        for path in self.sites.keys() & other.sites.keys():
            shape, _, weights = self.sites[path].partition(":")
            other_shape, _, other_weights = other.sites[path].partition(":")
            if shape != other_shape or (weights and other_weights and weights != other_weights):
                return "differs"
            comparable = bool(weights and other_weights)
            verdict = "quantized" if verdict == "quantized" or not comparable else "match"
        return verdict

    def require(self, found: Fingerprint, what: str) -> FingerprintVerdict:
        """Return the verdict, or raise `FingerprintError` naming both bases if they differ."""
        verdict = self.compare(found)
        if verdict != "differs":
            return verdict
        wrong = [p for p in self.sites if p in found.sites and self.sites[p] != found.sites[p]]
        raise FingerprintError(
            f"{what} was made for the base '{self.base or 'unnamed'}' ({self.digest}), but this model is "
            f"'{found.base or 'unnamed'}' ({found.digest}): {len(wrong)} of {len(self.sites)} sites have other "
            "weights or "
            f"shapes, e.g. {some(wrong, 2)}. Load the right base, or pass check_base=False if you know better."
        )


def site_hash(site: Site) -> str:
    """Return ``shape:weights`` for one site."""
    shape = hashlib.sha256("x".join(map(str, site.shape)).encode()).hexdigest()[:8]
    stored = site.stored
    if stored.is_meta or not comparable(stored):
        return f"{shape}:"
    flat = stored.detach().reshape(-1)
    step = max(flat.numel() // _SAMPLES, 1)
    sample = flat[::step][:_SAMPLES].to("cpu", torch.bfloat16).view(torch.int16)
    return f"{shape}:{hashlib.sha256(repr(sample.tolist()).encode()).hexdigest()[:8]}"


def fingerprint(sites: Iterable[Site], base: str = "", cache: dict[str, str] | None = None) -> Fingerprint:
    """Return the fingerprint of some sites; hashes already in `cache` are taken from there and new ones put there."""
    cache = {} if cache is None else cache
    hashes = {}
    for site in sites:
        if not site.parameter:
            continue
        if site.path not in cache:
            cache[site.path] = site_hash(site)
        hashes[site.path] = cache[site.path]
    return Fingerprint(hashes, base)
