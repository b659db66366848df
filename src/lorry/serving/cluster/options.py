"""Options of a server on several replicas."""

from __future__ import annotations

from dataclasses import dataclass

from lorry.core.errors import OptionError
from lorry.core.options import check_options, option


@dataclass(frozen=True)
class ClusterOptions:
    """How many replicas there are, and what each takes.

    Raises
    ------
    OptionError
        A value out of its range.
    """

    replicas: int = option(1, "Replicas of the base; the least of them where the number follows the load.", at_least=1)
    most_replicas: int | None = option(None, "Replicas at most under load; as many as `replicas` if not given.")
    target: float = option(16.0, "Requests of a replica beyond which there shall be more replicas.", above=0)
    ongoing: int = option(256, "Requests that a replica takes at the same time; others wait for one.", at_least=1)
    queue: int = option(4096, "Requests that may wait for a replica; more are refused.", at_least=1)
    held: int = option(1024, "Adapters that a replica holds, those that were used longest ago leave.", at_least=1)
    replica_cpus: float = option(1.0, "Processors of a replica, as Ray counts them.", at_least=0)
    replica_gpus: float = option(0.0, "GPUs of a replica, as Ray counts them.", at_least=0)
    health_seconds: float = option(10.0, "Seconds between two questions whether a replica is well.", above=0)
    health_patience: float = option(60.0, "Seconds after which a replica that gives no answer is replaced.", above=0)

    def __post_init__(self) -> None:
        """Check every option."""
        check_options(self)
        if self.most_replicas is not None and self.most_replicas < self.replicas:
            raise OptionError(
                f"most_replicas must be at least replicas, found {self.most_replicas} and {self.replicas}. Leave it "
                "out for a fixed number."
            )
