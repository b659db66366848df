"""Options of an engine."""

from __future__ import annotations

from dataclasses import dataclass

from lorry.core.options import check_options, option


@dataclass(frozen=True)
class EngineOptions:
    """How an engine uses its memory and its time.

    Raises
    ------
    OptionError
        A value out of its range.
    """

    pool_bytes: int = option(256 << 20, "Memory of the page pool, in bytes.", at_least=1)
    pages: int | None = option(None, "Pages of the pool, in the place of its bytes.", at_least=1)
    page_tokens: int = option(16, "Tokens whose keys and values lie on one page.", at_least=1)
    max_running: int = option(64, "Requests that run at the same time, at most.", at_least=1)
    max_batch_tokens: int = option(
        512, "Tokens of one pass, at most; prompts that are longer are taken in several.", at_least=1
    )
    prefix_cache: bool = option(True, "Keep the pages of ended requests for others that begin alike.")

    def __post_init__(self) -> None:
        """Check every option."""
        check_options(self)
