"""What a federation is made of: one run file that the server and every client read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any

from lorry.core.errors import OptionError
from lorry.core.method.families import Bottleneck
from lorry.core.method.start import mix_seed
from lorry.core.options import check_options, from_options, option
from lorry.training.data import held_out_indices, load_records, require_column
from lorry.training.jobs import Job
from lorry.training.task import Examples

from .aggregate import AGGREGATIONS, Aggregation
from .privacy import Privacy
from .splits import deal


@dataclass(frozen=True)
class Federation:
    """Federated training of one adapter.

    Raises
    ------
    OptionError
        A value out of its range, or options that do not go together.
    """

    base: str = option(MISSING, "'pocket', a local Hugging Face model folder, or a name on the hub.")
    out: str = option(MISSING, "Folder for the adapter, the state of the server and the report.")
    job: Any = option(MISSING, "Job options that every client trains by; its data are dealt out in a simulation.")
    clients: Any = option(3, "Number of clients, or a mapping NAME -> {data: ..., rank: ...}.")
    rounds: int = option(10, "Rounds of training and aggregation.", at_least=1)
    local_steps: int = option(10, "Optimizer steps of a client in a round.", at_least=1)
    freeze: str = option(
        "A", "Factor that is never trained nor sent: A (FFA-LoRA), B, or none.", choices=("A", "B", "none")
    )
    aggregation: str = option("average", "How the server makes one state of the updates: average, exact, stack, svd.")
    weights: str | None = option(
        None,
        "Weight of a client: examples, or equal; equal under privacy if not given, since the count would tell.",
        choices=("examples", "equal"),
    )
    split: Any = option("even", "How data are dealt out: even, dirichlet, dominant, size, or {split: name, **options}.")
    fraction: float = option(1.0, "Share of the clients that take part in a round.", above=0, at_most=1)
    minimum: int = option(1, "Clients without whose updates a round does not count.", at_least=1)
    privacy: Any = option(None, "Differential privacy of each client: {epsilon, delta, max_grad_norm, ...}.")
    eval_every: int = option(0, "Rounds between evaluations at the server; 0 evaluates at the end.", at_least=0)
    dtype: str = option("auto", "Dtype of the base in memory.", choices=("auto", "float32", "bfloat16", "float16"))
    seed: int = option(0, "Of the start that all clients share, the split, and the draws of clients.")

    def __post_init__(self) -> None:
        """Check every option, and the rules between them."""
        check_options(self)
        found = self.make_aggregation()
        if self.freeze != "none" and not found.frozen:
            raise OptionError(
                f"The aggregation '{found.name}' changes both factors, so none may be frozen: set freeze to none, or "
                "use average, which is exact with a frozen factor."
            )
        self.make_privacy()
        job = self.make_job()
        if isinstance(self.clients, bool) or not isinstance(self.clients, int | Mapping) or not self.clients:
            raise OptionError(f"Option clients is a number from 1, or a mapping of names; found {self.clients!r}.")
        if isinstance(self.clients, int) and self.clients < 1:
            raise OptionError(f"Option clients must be at least 1, found {self.clients}.")
        if self.minimum > len(self.names()):
            raise OptionError(f"Option minimum is {self.minimum}, but there are {len(self.names())} clients.")
        method = job.make_method()
        if not isinstance(method, Bottleneck) or "plain" not in method.capabilities or not hasattr(method, "rank"):
            raise OptionError(
                f"A federation aggregates factors A and B, which '{method.info.slug}' does not have; use lora."
            )
        for name in ("built_from", "members", "start", "dynamics", "stages", "site_options"):
            if getattr(job, name) not in (None, (), []):
                raise OptionError(f"A federation does not take the job option '{name}'; leave it out.")
        self._check_ranks(found, method)

    def _check_ranks(self, found: Aggregation, method: Any) -> None:
        ranks = {name: self.rank(name) for name in self.names()}
        if len(set(ranks.values())) == 1:
            return
        if found.equal_ranks or self.freeze != "none":
            why = f"'{found.name}' averages factors" if found.equal_ranks else f"a frozen {self.freeze} is one for all"
            raise OptionError(
                f"The clients' ranks differ ({ranks}), and {why}. Give all of them one rank, or use the aggregation "
                "stack or svd with freeze: none."
            )

    def make_aggregation(self) -> Aggregation:
        """Return the aggregation."""
        return AGGREGATIONS.find(self.aggregation)

    def make_privacy(self) -> Privacy | None:
        """Return the privacy of each client; None without."""
        if self.privacy is None or isinstance(self.privacy, Privacy):
            return self.privacy
        if not isinstance(self.privacy, Mapping):
            raise OptionError(f"Option privacy must be a mapping such as {{epsilon: 3}}, found {self.privacy!r}.")
        return from_options(Privacy, self.privacy)

    def make_job(self, data: Any = None) -> Job:
        """Return the job of a client with these data."""
        if isinstance(self.job, Job):
            return self.job if data is None else dataclasses.replace(self.job, data=data)
        if not isinstance(self.job, Mapping):
            raise OptionError(f"Option job must be a mapping of job options, found {self.job!r}.")
        values = {"name": "federated", "data": [], **self.job}
        return Job.from_dict(values if data is None else {**values, "data": data})

    def names(self) -> list[str]:
        """Return the names of the clients that may take part."""
        if isinstance(self.clients, int):
            return [f"client-{i}" for i in range(self.clients)]
        return [str(name) for name in self.clients]

    def rank(self, name: str) -> int:
        """Return the rank of a client."""
        rank = self._own(name).get("rank")
        return int(getattr(self.make_job().make_method(), "rank", 0)) if rank is None else int(rank)

    def weighting(self) -> str:
        """Return how clients are weighted."""
        return self.weights or ("equal" if self.privacy is not None else "examples")

    def _own(self, name: str) -> dict[str, Any]:
        if name not in self.names():
            raise OptionError(f"There is no client '{name}' in this run file. There are: {', '.join(self.names())}.")
        own = {} if isinstance(self.clients, int) else (self.clients[name] or {})
        if not isinstance(own, Mapping) or set(own) - {"data", "rank"}:
            raise OptionError(f"Client '{name}' takes data and rank, found {own!r}.")
        return dict(own)

    def data_of(self, name: str) -> Any:
        """Return the data of one client: its own, or its part of the job's.

        Raises
        ------
        OptionError, DataError
            No such client, or data that cannot be read or dealt out.
        """
        own = self._own(name)
        if own.get("data") is not None:
            return own["data"]
        if not isinstance(self.clients, int):
            raise OptionError(f"Client '{name}' has no data; give clients: {{{name}: {{data: FILE}}}}.")
        job = self.make_job()
        if isinstance(job.data, Examples):
            return job.data.part(self._parts([_label(e) for e in job.data.examples])[name])
        records, _ = self.pool()
        column = self.split.get("column") if isinstance(self.split, Mapping) else None
        if column is not None:
            require_column(records, column, "the split")
        labels = [r.get(column) if column is not None else r.get("label") for r in records]
        return [records[i] for i in self._parts(labels)[name]]

    def pool(self) -> tuple[list[Any], Any]:
        """Return the records that are dealt out, and what is held out of them for the server (None for nothing)."""
        job = self.make_job()
        records = load_records(job.data)
        if job.eval_data is not None or not job.hold_out:
            return list(records), job.eval_data
        held = set(held_out_indices(len(records), job.hold_out, mix_seed(self.seed, "hold out")))
        rest = [r for i, r in enumerate(records) if i not in held]
        return rest, [r for i, r in enumerate(records) if i in held]

    def evaluation(self) -> Any:
        """Return what the server evaluates on; None for nothing."""
        job = self.make_job()
        if job.eval_data is not None or not job.hold_out:
            return job.eval_data
        if not isinstance(self.clients, int):
            raise OptionError(
                "Option hold_out needs data at the server; give eval_data where every client has data of its own."
            )
        return self.pool()[1]

    def _parts(self, labels: list[Any]) -> dict[str, list[int]]:
        names = self.names()
        return dict(zip(names, deal(self.split, labels, len(names), mix_seed(self.seed, "split")), strict=True))


def _label(example: Any) -> Any:
    """Return the class of an example in memory, for splits by label."""
    found = getattr(example, "label", None)
    return int(example[-1]) if found is None and isinstance(example, tuple) else found
