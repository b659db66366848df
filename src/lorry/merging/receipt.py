"""What a merge did, measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class InputRecord:
    """An adapter that went in: where from, what it is, its base, its own history."""

    name: str
    origin: str
    method: str
    weight: Any
    digest: str
    base: str
    base_digest: str
    sites: int
    ranks: tuple[int, int]
    lineage: Any = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SiteRecord:
    """What happened at one site.

    Attributes
    ----------
    weights
        Adapter -> weight here; adapters without an update here are missing.
    ranks
        Adapter -> rank; `rank` is the result's.
    norm, exact_norm
        Frobenius norms of the result and of the exact weighted sum.
    error
        ``‖result - exact weighted sum‖ / ‖exact weighted sum‖``: how far the method went from task arithmetic.
    rounding
        The same for the rounding of the stored factors against the method's own float64 result.
    cosines, reads, writes
        For each pair ``"a|b"``: cosine of the updates; mean squared cosine of the principal angles between what they
        read and between what they write (0 none, 1 one within the other).
    facts
        What the method noted: entries dropped, energy cut off, displacement, clusters.
    """

    path: str
    weights: dict[str, float]
    ranks: dict[str, int]
    rank: int
    norm: float
    exact_norm: float
    error: float
    rounding: float
    cosines: dict[str, float] = field(default_factory=dict)
    reads: dict[str, float] = field(default_factory=dict)
    writes: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MergeReceipt:
    """Proof of a merge.

    Attributes
    ----------
    base
        ``match``: all inputs were made for the same base; ``unknown``: at least one does not say; ``ignored``: the
        caller said so.
    dropped
        What of the inputs is not in the result, in words.
    error, rounding
        Over all sites, relative Frobenius norms as in `SiteRecord`.
    facts
        What a method noted of the whole: weights found, losses.
    """

    method: str
    options: dict[str, Any]
    inputs: tuple[InputRecord, ...]
    sites: tuple[SiteRecord, ...]
    base: str
    dtype: str
    error: float
    rounding: float
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    def pairs(self) -> dict[str, dict[str, float]]:
        """Return for each pair of adapters the mean over sites of cosine, of what both read and of what both write."""
        sums: dict[str, dict[str, list[float]]] = {}
        for site in self.sites:
            for kind in ("cosines", "reads", "writes"):
                for pair, value in getattr(site, kind).items():
                    sums.setdefault(pair, {}).setdefault(kind, []).append(value)
        return {p: {k: sum(v) / len(v) for k, v in kinds.items()} for p, kinds in sums.items()}

    def summary(self) -> dict[str, Any]:
        """Return the receipt without its sites, for a checkpoint's metadata."""
        return {**self._without_sites(), "pairs": self.pairs(), "site_count": len(self.sites)}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**self._without_sites(), "sites": tuple(dict(vars(s)) for s in self.sites)}

    def _without_sites(self) -> dict[str, Any]:
        # not asdict: its deep copies took a tenth of a small merge
        plain = {k: v for k, v in vars(self).items() if k != "sites"}
        return {**plain, "inputs": tuple(dict(vars(i)) for i in self.inputs)}

    def __str__(self) -> str:
        """Return a few lines for people."""
        names = ", ".join(f"{i.name} ({i.weight})" for i in self.inputs)
        ranks = sorted({s.rank for s in self.sites})
        span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        lines = [
            f"merge by {self.method}: {names} -> {len(self.sites)} sites of rank {span}, base {self.base}",
            f"  against the exact weighted sum {self.error:.2e}, rounding to {self.dtype} {self.rounding:.2e} "
            "(relative)",
        ]
        for pair, values in self.pairs().items():
            first, _, second = pair.partition("|")
            lines.append(
                f"  {first} and {second}: cosine {values['cosines']:+.3f}, shared input {values['reads']:.3f}, "
                f"shared output {values['writes']:.3f}"
            )
        lines += [f"  dropped: {d}" for d in self.dropped] + [f"  note: {n}" for n in self.notes]
        return "\n".join(lines)
