"""What is simulated: replicas with their pools and costs; and what comes out of it."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorry.core.options import check_options, option


@dataclass(frozen=True)
class Deployment:
    """Equal replicas of one base.

    A step of the engine takes ``step_seconds``, and for each token that it computes ``decode_seconds`` or
    ``prompt_seconds``; an adapter that is not in the pool takes ``load_seconds`` for each of its pages, during which
    the engine waits. Replace the defaults by what was measured on the machine in question.
    """

    replicas: int = option(1, "How many replicas.", at_least=1)
    pages: int = option(4096, "Pages in the pool of a replica.", at_least=1)
    page: int = option(16, "Tokens in a page.", at_least=1)
    tokens_per_rank: int = option(4, "Tokens whose keys and values take as much as a rank of an adapter.", at_least=0)
    adapter_share: float | None = option(
        None, "Part of the pages that is for adapters alone; null for one unified pool.", at_least=0, at_most=1
    )
    policy: str | Mapping[str, Any] = "fcfs"
    routing: str = option("affinity", "To which replica a request goes: random, hash or affinity.")
    slack: int = option(4, "Requests by which a replica with the adapter may be busier than the idlest.", at_least=0)
    max_running: int = option(256, "Most requests in a batch.", at_least=1)
    prompt_tokens: int = option(4096, "Most tokens of prompts in a step, unless one prompt is longer.", at_least=1)
    admit_every: int = option(10, "Steps between attempts to admit.", at_least=1)
    step_seconds: float = option(0.02, "Seconds of a step, whatever is in it.", above=0)
    decode_seconds: float = option(0.0001, "Seconds for each request that decodes.", at_least=0)
    prompt_seconds: float = option(0.00005, "Seconds for each token of a prompt.", at_least=0)
    load_seconds: float = option(0.0005, "Seconds for each page of an adapter that is loaded.", at_least=0)
    seed: int = option(0, "Seed of what routing draws.")

    def __post_init__(self) -> None:
        """Check every option against its range."""
        check_options(self)

    def adapter_pages(self, rank: int) -> int:
        """Return the pages of an adapter."""
        return -(-rank * self.tokens_per_rank // self.page)

    @property
    def parts(self) -> tuple[int, int | None]:
        """The pages for keys and values, and those for adapters alone; None where both share the first."""
        if self.adapter_share is None:
            return self.pages, None
        adapters = round(self.adapter_share * self.pages)
        return self.pages - adapters, adapters


@dataclass
class Report:
    """What a simulation found.

    Attributes
    ----------
    requests
        How many came.
    dropped, refused
        How many a policy gave up, and how many are larger than a pool.
    seconds
        From the first arrival's clock to the last token.
    input_tokens, output_tokens
        Of the requests that were served.
    first_token
        Seconds to the first token of each served request, ascending.
    in_time, satisfaction
        How many had it within their deadline, and the sum of ``1 - (t / deadline) ** 2`` over them (S-LoRA's measure).
    hits
        How many found their adapter in the pool.
    admitted
        Times of admissions, ascending.
    busy
        Seconds that replicas computed, summed over them.
    token_pages, adapter_pages, resident
        Pages of keys and values, pages of adapters, and adapters in the pools, each times the seconds that replicas
        computed with them.
    replicas
        How many there are.
    """

    replicas: int
    requests: int = 0
    dropped: int = 0
    refused: int = 0
    seconds: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    first_token: list[float] = field(default_factory=list)
    in_time: int = 0
    satisfaction: float = 0.0
    hits: int = 0
    admitted: list[float] = field(default_factory=list)
    busy: float = 0.0
    token_pages: float = 0.0
    adapter_pages: float = 0.0
    resident: float = 0.0

    def worked(self, seconds: float, token_pages: int, adapter_pages: int, resident: int) -> None:
        """Note that a replica computed, and what its pool held meanwhile."""
        self.busy += seconds
        self.token_pages += seconds * token_pages
        self.adapter_pages += seconds * adapter_pages
        self.resident += seconds * resident

    @property
    def served(self) -> int:
        """How many requests were answered."""
        return len(self.first_token)

    def admitted_by(self, time: float) -> int:
        """Return how many requests were admitted up to a time."""
        return bisect.bisect_right(self.admitted, time)

    def first_token_quantile(self, share: float) -> float:
        """Return the seconds within which this share of the served requests had their first token."""
        if not self.first_token:
            return float("nan")
        return self.first_token[min(int(share * self.served), self.served - 1)]

    def row(self) -> dict[str, float]:
        """Return the figures of a table's row."""
        return {
            "replicas": self.replicas,
            "requests": self.requests,
            "served": self.served,
            "dropped": self.dropped,
            "refused": self.refused,
            "requests per second": self.served / self.seconds if self.seconds else 0.0,
            "tokens per second": self.output_tokens / self.seconds if self.seconds else 0.0,
            "first token p50": self.first_token_quantile(0.5),
            "first token p99": self.first_token_quantile(0.99),
            "attainment": self.in_time / self.requests if self.requests else 0.0,
            "satisfaction": self.satisfaction / self.requests if self.requests else 0.0,
            "adapter hits": self.hits / self.served if self.served else 0.0,
            "busy": self.busy / (self.seconds * self.replicas) if self.seconds else 0.0,
            "token pages": self.token_pages / self.busy if self.busy else 0.0,
            "adapter pages": self.adapter_pages / self.busy if self.busy else 0.0,
            "adapters held": self.resident / self.busy if self.busy else 0.0,
        }
