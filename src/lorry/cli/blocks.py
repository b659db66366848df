"""Sites by block: what belongs together in a network, as its authors named it."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorry.merging.compare import Comparison


class By(enum.StrEnum):
    """What a table has rows for."""

    site = "site"
    block = "block"


#: Levels of a U-Net, whose parts (``attentions.1``, ``resnets.0``) are its blocks.
_LEVELS = frozenset({"down_blocks", "mid_block", "up_blocks"})


def block_of(path: str) -> str:
    """Return the block of a site: of a U-Net ``up_blocks.0.attentions.1``, elsewhere the path to its first number; what
    lies in no block is called by its first name.
    """
    parts = path.split(".")
    start = next((i for i, part in enumerate(parts) if part in _LEVELS), None)
    wanted = 1 if start is None or parts[start] == "mid_block" else 2
    seen = 0
    for i, part in enumerate(parts):
        seen += part.isdigit()
        if seen == wanted:
            return ".".join(parts[: i + 1])
    return parts[0]


def by_block(sites: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one entry for each block, in the order of the sites: how many, their parameters and the norm of all."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for site in sites:
        groups.setdefault(block_of(site["path"]), []).append(site)
    total = math.sqrt(sum(s["norm"] ** 2 for s in sites if "norm" in s))
    found = []
    for block, members in groups.items():
        measured = [s for s in members if "norm" in s]
        norm = math.sqrt(sum(s["norm"] ** 2 for s in measured)) if measured else None
        facts = {"block": block, "sites": len(members), "parameters": sum(s["parameters"] for s in members)}
        if norm is not None:
            largest = max(measured, key=lambda s: s["norm"])["path"]
            share = (norm / total) ** 2 if total else 0.0
            facts |= {"norm": norm, "share": share, "largest_at": largest}
        found.append(facts)
    return found


def times_of(metadata: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the range of times that an adapter was trained for, from low to below high; None if it has none."""
    training = metadata.get("training")
    job = training.get("job") if isinstance(training, Mapping) else None
    objective = job.get("objective") if isinstance(job, Mapping) else None
    times = objective.get("timesteps") if isinstance(objective, Mapping) else None
    return (float(times[0]), float(times[1])) if isinstance(times, Sequence) and len(times) == 2 else None


def pairs_by_block(result: Comparison) -> dict[str, dict[str, dict[str, float]]]:
    """Return ``"a|b"`` -> block -> norms of both and the cosine of what they do there; a site that one of them lacks
    counts as 0.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for pair, shared in result.pairs.items():
        first, _, second = pair.partition("|")
        norms = [result.norms[first], result.norms[second]]
        blocks: dict[str, dict[str, float]] = {}
        for path in dict.fromkeys([*norms[0], *norms[1]]):
            sums = blocks.setdefault(block_of(path), dict.fromkeys(("first", "second", "product"), 0.0))
            own = [each.get(path, 0.0) for each in norms]
            sums["first"] += own[0] ** 2
            sums["second"] += own[1] ** 2
            sums["product"] += shared[path].cosine * own[0] * own[1] if path in shared else 0.0
        found[pair] = {
            block: {
                "first_norm": math.sqrt(s["first"]),
                "second_norm": math.sqrt(s["second"]),
                "cosine": s["product"] / scale if (scale := math.sqrt(s["first"] * s["second"])) else 0.0,
            }
            for block, s in blocks.items()
        }
    return found
