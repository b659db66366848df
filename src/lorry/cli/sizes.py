"""The part of ``lorry plan`` that says how much memory and time training or serving takes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lorry.cli.output import facts_table, out, size, table
from lorry.core.errors import LorryError, OptionError

if TYPE_CHECKING:
    from lorry.training.estimate import ServingEstimate, TrainingEstimate

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{end}": base**power
    for power, letter in enumerate("kmgt", 1)
    for end, base in (("ib", 1024), ("b", 1000), ("", 1000))
}
_PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "cache")


@dataclass(frozen=True)
class Asked:
    """What the user wants to know: see the flags of ``lorry plan``."""

    batch_size: int = 8
    length: int = 512
    jobs: int = 1
    requests: int = 8
    memory: int | None = None
    dtype: torch.dtype | None = None
    optimizer: str = "adamw"
    flops: float | None = None
    bandwidth: float | None = None
    calibrate: bool = False


def byte_count(text: str | None) -> int | None:
    """Return the bytes that a text such as ``24GiB`` or ``800 MB`` means.

    Raises
    ------
    OptionError
        It is no size.
    """
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not found or found[2].lower() not in _UNITS:
        raise OptionError(f"Expected a size such as 24GiB or 800MB, found {text!r}.")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def estimates(model: Any, job: dict[str, Any], asked: Asked) -> dict[str, Any]:
    """Return training (with and without checkpointing) and serving as plain data; a reason in place of what cannot be.

    Parameters
    ----------
    model
        On the meta device.
    job
        The adapter as fields of a job: method, targets and what else chooses sites.
    asked
        The sizes.
    """
    found: dict[str, Any] = {}
    job = {**job, "optimizer": asked.optimizer}
    machine = _machine(asked)
    for name, checkpointing in (("training", False), ("training, checkpointing", True)):
        try:
            found[name] = _training(model, job, asked, checkpointing, machine)
        except (LorryError, RuntimeError, TypeError, ValueError) as error:
            found[name] = {"not_estimated": str(error).splitlines()[0]}
    try:
        found["serving"] = _serving(model, job, asked, machine)
    except (LorryError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        found["serving"] = {"not_estimated": str(error).splitlines()[0]}
    return found


def _machine(asked: Asked) -> Any:
    from lorry.training.machine import Machine, calibrate

    if (asked.flops is None) != (asked.bandwidth is None):
        raise OptionError("--flops and --bandwidth belong together: give both, or --calibrate to measure this machine.")
    if asked.flops is not None and asked.bandwidth is not None:
        return Machine(asked.flops, asked.bandwidth)
    return calibrate(dtype=asked.dtype or torch.float32) if asked.calibrate else None


def _training(model: Any, job: dict[str, Any], asked: Asked, checkpointing: bool, machine: Any) -> dict[str, Any]:
    from lorry.training.estimate import estimate_training, largest

    def estimate(batch_size: int) -> TrainingEstimate:
        jobs = [{**job, "batch_size": batch_size} for _ in range(asked.jobs)]
        return estimate_training(model, jobs, length=asked.length, dtype=asked.dtype, checkpointing=checkpointing)

    made = estimate(asked.batch_size)
    facts: dict[str, Any] = {"bytes": made.memory.to_dict(), "tokens": made.tokens, "flops": made.work.flops}
    if asked.memory is not None:
        facts["largest_batch"] = largest(lambda n: estimate(n).memory.total, asked.memory)
    if machine is not None:
        facts["seconds"] = made.work.seconds(machine)
    return facts


def _serving(model: Any, job: dict[str, Any], asked: Asked, machine: Any) -> dict[str, Any]:
    from lorry.training.estimate import estimate_serving, largest

    def estimate(requests: int) -> ServingEstimate:
        jobs = [job] * asked.jobs
        return estimate_serving(model, jobs, requests=requests, length=asked.length, dtype=asked.dtype)

    made = estimate(asked.requests)
    facts: dict[str, Any] = {"bytes": made.memory.to_dict(), "requests": made.requests}
    facts |= {"cache_per_token": made.cache_per_token, "flops_per_token": made.decode.flops // made.requests}
    if asked.memory is not None:
        facts["largest_batch"] = largest(lambda n: estimate(n).memory.total, asked.memory)
    if machine is not None:
        facts |= {"prefill_seconds": made.prefill.seconds(machine), "token_seconds": made.decode.seconds(machine)}
    return facts


def show(found: dict[str, Any], asked: Asked) -> None:
    """Print estimates as a table of bytes, and the facts below it."""
    rows, facts = [], []
    for name, given in found.items():
        if "not_estimated" in given:
            facts.append((name, f"not estimated: {given['not_estimated']}"))
            continue
        held = given["bytes"]
        rows.append([name, *(size(held[part]) if held[part] else "-" for part in _PARTS), size(held["total"])])
        what = "requests" if name == "serving" else "rows of each job"
        if "largest_batch" in given:
            facts.append((name, f"up to {given['largest_batch']} {what} in {size(asked.memory or 0)}"))
        if "seconds" in given:
            rate = given["tokens"] / given["seconds"]
            facts.append((name, f"about {given['seconds']:.3g} s for a pass, {rate:,.0f} tokens a second"))
        if "token_seconds" in given:
            rate = given["requests"] / given["token_seconds"]
            text = f"about {given['prefill_seconds']:.3g} s to read a request, then {rate:,.0f} tokens a second for all"
            facts.append((name, text))
        if "cache_per_token" in given:
            facts.append((name, f"{size(given['cache_per_token'])} of keys and values for a token of a request"))
    title = (
        f"Memory: {asked.jobs} adapter{'s' if asked.jobs > 1 else ''}, training with {asked.batch_size} rows each, "
        f"serving {asked.requests} requests, of {asked.length} tokens"
    )
    if rows:
        columns = ("", *_PARTS, "total")
        out().print(table(title, columns, rows, right=columns[1:]))
    if facts:
        out().print(facts_table("", facts))
