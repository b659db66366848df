"""A method as a case of a bench: with options that make it comparable, at sites that it can sit on."""

from __future__ import annotations

from typing import Any

from lorry.core.method.registry import method_from


def options(method: str, rank: int) -> dict[str, Any]:
    """Return a method's options as plain data: its defaults, with `rank` if it has one."""
    fields = method_from(method).to_dict()
    return {"method": method, **({"rank": rank} if "rank" in fields else {})}


def targets(method: str) -> str | list[str]:
    """Return every linear layer, or the feed-forward blocks for a method that sits on whole blocks alone."""
    return ["layers.*.mlp"] if method_from(method).info.kinds == ("block",) else "all-linear"
