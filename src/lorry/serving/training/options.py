"""Options of training as a service."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorry.core.options import check_options, option


@dataclass(frozen=True)
class TrainingOptions:
    """Where a server keeps what its clients train, and how it uses its memory.

    Raises
    ------
    OptionError
        A value out of its range.
    """

    folder: Path = option(Path("lorry-training"), "Folder of sessions, models and checkpoints.")
    max_tokens: int = option(
        8192, "Tokens of a joint pass with their padding, at most; a longer row goes alone.", at_least=1
    )
    max_rank: int = option(256, "Rank that a client may ask for, at most.", at_least=1)
    alpha: float = option(32.0, "Numerator of the adapters' scale alpha/rank.", above=0)
    max_models: int = option(
        64, "Models that stay in memory; what was used longest ago is read from disk again.", at_least=1
    )
    max_samplers: int = option(64, "Saved weights that stay loaded for sampling, at most.", at_least=1)
    kept_snapshots: int = option(16, "Unnamed weights for sampling that are kept of each model.", at_least=1)
    gather: float = option(0.005, "Seconds to wait for requests of other clients before a pass.", at_least=0)

    def __post_init__(self) -> None:
        """Check every option."""
        check_options(self)
