"""Options of an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorry.core.errors import OptionError
from lorry.core.options import check_options, option


@dataclass(frozen=True)
class EngineOptions:
    """How an engine uses its memory and its time.

    Raises
    ------
    OptionError
        A value out of its range.
    """

    pool: str = option(
        "unified",
        "One memory of pages for adapters and keys and values, or slots of one size for adapters beside the pages.",
        choices=("unified", "slots"),
    )
    pool_bytes: int = option(256 << 20, "Memory of the pool, in bytes.", at_least=1)
    pages: int | None = option(None, "Pages of the pool, in the place of its bytes.", at_least=1)
    slots: int = option(8, "Adapters that have a slot at the same time, where there are slots.", at_least=1)
    slot_share: float = option(0.5, "Part of the pool's memory that the slots take.", above=0, below=1)
    host_bytes: int | None = option(
        None, "Host memory for adapters; those that were used longest ago go to `folder` beyond it.", at_least=0
    )
    folder: Path | None = option(None, "Folder for adapters that find no room in host memory.")
    prefetch: int = option(4, "Waiting requests whose adapters are brought early.", at_least=0)
    page_tokens: int = option(16, "Tokens whose keys and values lie on one page.", at_least=1)
    max_running: int = option(64, "Requests that run at the same time, at most.", at_least=1)
    max_batch_tokens: int = option(
        512, "Tokens of one pass, at most; prompts that are longer are taken in several.", at_least=1
    )
    policy: str | Mapping[str, Any] = option(
        "fcfs", "In which order waiting requests are tried: a name, or {policy: name, **options}."
    )
    overcommit: bool = option(
        False, "Admit whoever fits now, and let the last admitted make way where it turns out to be too much."
    )
    preemption: str = option(
        "recompute",
        "What a request that made way goes on with: computed again, or what was kept in host memory.",
        choices=("recompute", "swap"),
    )
    fuse_hot: bool = option(
        False,
        "Put an adapter into the base weights while all requests use it and that saves time; takes the memory of a "
        "second copy of these weights, and rounds the sum to their type.",
    )
    prefix_cache: bool = option(True, "Keep the pages of ended requests for others that begin alike.")

    def __post_init__(self) -> None:
        """Check every option."""
        check_options(self)
        if (self.host_bytes is None) != (self.folder is None):
            raise OptionError("host_bytes and folder go together: what is too much for host memory lies in the folder.")
