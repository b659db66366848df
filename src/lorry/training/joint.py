"""One forward and backward pass for micro-batches of several jobs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.life.api import auxiliary_loss, context, rows
from lorry.core.method.start import mix_seed

from .routing import policy_loss
from .task import Batch, Prepared, Setting, Tally, Task, split


@dataclass(frozen=True)
class Place:
    """Where the rows of a share lie in a pass.

    Attributes
    ----------
    start, stop
        The share's rows of the batch.
    total
        Rows of the whole batch.
    """

    start: int
    stop: int
    total: int


@dataclass
class Share:
    """One job's part of a joint pass.

    Attributes
    ----------
    name
        The job and its adapter.
    prepared
        Its task, and which of the head's outputs are its own.
    examples
        What it learns from in this pass.
    task_ids
        The task that each example belongs to; None where they have none.
    seed
        Of its dropout in this pass.
    weight
        Factor of the summed loss (one over the predictions of the optimizer step).
    auxiliary
        Factor of the layers' auxiliary losses.
    draws
        How often each example goes through the pass, each time with routes of its own; the loss is the mean over them,
        and above 1 the difference between them trains what drew the routes.
    around
        What the job does around the pass, given the place of its rows.
    step
        The optimizer step that its examples belong to, counted from the one that is open.
    chosen
        Which examples of the data they are, where a planner takes the examples of a step apart; None for the next
        micro-batch as a whole.
    padding_free
        Whether its rows lie one after another in a pass ``(1, tokens)``; all shares of a pass have the same.
    loss
        Filled in by the pass: the summed loss of its examples.
    penalty
        Filled in: the auxiliary loss, unweighted.
    records
        Filled in: what its layers recorded, by (site path, name).
    error
        Filled in: why its examples could not be used.
    """

    name: str
    prepared: Prepared
    examples: Sequence[Any]
    task_ids: Sequence[int] | None = None
    seed: int = 0
    weight: float = 1.0
    auxiliary: float = 1.0
    draws: int = 1
    around: Callable[[Place], AbstractContextManager[Any]] | None = None
    step: int = 0
    chosen: tuple[int, ...] | None = None
    padding_free: bool = False
    loss: float = 0.0
    penalty: float = 0.0
    records: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    error: str | None = None

    @property
    def task(self) -> Task:
        """What is learned."""
        return self.prepared.task

    @property
    def family(self) -> tuple[Hashable, ...]:
        """Shares of one family may go into one pass; those whose rows have tasks go with others that have."""
        return self.task.family, self.task_ids is not None, self.task.kin(self.examples[0])

    @property
    def cost(self) -> int:
        """Size of its largest row."""
        return max(self.task.cost(e) for e in self.examples)

    @property
    def passed(self) -> list[Any]:
        """The examples as they go through the base: all of them once for each draw, draw after draw."""
        return [*self.examples] * self.draws

    @property
    def height(self) -> int:
        """Number of its rows in the pass."""
        return self.draws * sum(self.task.rows_of(e) for e in self.examples)

    def part(self, places: Sequence[int]) -> Share:
        """Return the share of some examples of a whole step, to go without padding; `places` are theirs in it."""
        assert self.chosen is not None
        chosen = tuple(self.chosen[i] for i in places)
        return replace(
            self,
            examples=[self.examples[i] for i in places],
            chosen=chosen,
            seed=mix_seed(self.seed, *chosen),
            auxiliary=len(chosen) / len(self.chosen),
            padding_free=True,
            records={},
        )

    def part_of(self, chosen: Sequence[int]) -> Share:
        """Return what `part` does, by which examples of the data are wanted; equal ones may stand for each other."""
        assert self.chosen is not None
        left = list(enumerate(self.chosen))
        places = [left.pop(next(k for k, (_, found) in enumerate(left) if found == i))[0] for i in chosen]
        return self.part(places)

    @property
    def row_tasks(self) -> list[int]:
        """The task of each of its rows."""
        pairs = zip(self.examples, self.task_ids or (), strict=True)
        return [tag for e, tag in pairs for _ in range(self.task.rows_of(e))] * self.draws


def grouped(shares: Sequence[Share], max_pad_ratio: float | None, max_tokens: int | None) -> list[list[Share]]:
    """Split shares into passes of one family each, largest rows first, so that small rows are not padded too much.

    Parameters
    ----------
    shares
        One for each job.
    max_pad_ratio
        Largest cost of a pass, padding included, as a multiple of the costs alone; None joins all of a family.
    max_tokens
        Largest cost of a pass (tokens, for text), padding included; a single share may be larger.
    """
    groups: list[list[Share]] = []
    last: dict[tuple[Hashable, ...], list[Share]] = {}
    for share in sorted(shares, key=lambda s: -s.cost):
        group = last.get(share.family)
        if group is not None and _fits([*group, share], max_pad_ratio, max_tokens):
            group.append(share)
        else:
            last[share.family] = [share]
            groups.append(last[share.family])
    order = {id(s): i for i, s in enumerate(shares)}
    return [sorted(group, key=lambda s: order[id(s)]) for group in groups]


def _fits(group: Sequence[Share], ratio: float | None, most: int | None) -> bool:
    padded = max(s.cost for s in group) * sum(s.height for s in group)
    # each job pads its own rows anyway; that is not the company's fault
    alone = sum(s.cost * s.height for s in group)
    return (ratio is None or padded <= ratio * alone) and (most is None or padded <= most)


class Base:
    """The model as joint passes use it."""

    def __init__(self, setting: Setting, base_dropout: bool = False) -> None:
        self.setting = setting
        self.base_dropout = base_dropout

    @property
    def model(self) -> nn.Module:
        """The model with its adapters."""
        return self.setting.model

    @contextmanager
    def mode(self, training: bool) -> Iterator[None]:
        """Put the model into training or evaluation while the context lasts.

        In training the adapted layers alone are in training mode, so that the adapters' dropout is on, and
        that of the base, whose masks would depend on the company of other jobs, is off unless asked for. Blocks
        under gradient checkpointing are in training mode too, because transformers asks for that.
        """
        before = [(m, m.training) for m in self.model.modules()]
        self.model.train(training and self.base_dropout)
        if training and not self.base_dropout:
            for module, _ in before:
                if "_lorry_link" in module.__dict__ or getattr(module, "gradient_checkpointing", False):
                    module.training = True
        try:
            yield
        finally:
            for module, was in before:
                module.training = was


@dataclass
class Outcome:
    """What a pass gave.

    Attributes
    ----------
    parts
        Each share's own outputs and targets.
    whole
        The outputs of all of them together.
    records
        What layers recorded, by (adapter, site path, name).
    """

    parts: list[tuple[Any, Any]]
    whole: Any
    records: dict[tuple[str, str, str], Tensor]


@contextmanager
def forward(
    base: Base,
    shares: Sequence[Share],
    seeds: dict[str, int] | None = None,
    run: Callable[[Batch], Any] | None = None,
) -> Iterator[Outcome]:
    """Run the rows of all shares, which are of one family, through the base at once, each with its job's adapter.

    What the pass left behind (auxiliary losses, the state of its dropout) lasts as long as the context. `run` takes the
    place of the task's forward pass where a process has a stage of the base.
    """
    task, model = shares[0].task, base.model
    together = task.collate_in_one if shares[0].padding_free else task.collate
    batch = together(base.setting, [e for share in shares for e in share.passed])
    facts = dict(batch.facts)
    if shares[0].task_ids is not None:
        tags = [tag for share in shares for tag in share.row_tasks]
        facts["task_ids"] = torch.tensor(tags, device=base.setting.device)
    facts["draws"] = {share.name: share.draws for share in shares if share.draws > 1}
    sizes = [share.height for share in shares]
    names = [share.name for share, size in zip(shares, sizes, strict=True) for _ in range(size)]
    with ExitStack() as stack:
        left = stack.enter_context(context(model, **facts))
        stack.enter_context(rows(model, names, seeds=seeds, lengths=batch.lengths))
        start = 0
        for share, size in zip(shares, sizes, strict=True):
            if share.around is not None:
                stack.enter_context(share.around(Place(start, start + size, sum(sizes))))
            start += size
        outputs = task.forward(base.setting, batch) if run is None else run(batch)
        if batch.lengths is None:
            own, targets = split(outputs, sizes), split(batch.targets, sizes)
        else:
            tokens = [sum(share.task.cost(e) for e in share.examples) for share in shares]
            own, targets = outputs.split(tokens, 1), batch.targets.split(tokens, 1)
        pairs = zip(shares, own, targets, strict=True)
        parts = [(share.prepared.own(out), wanted) for share, out, wanted in pairs]
        yield Outcome(parts, outputs, left.records)


def train_pass(base: Base, shares: Sequence[Share], seed: int) -> None:
    """Add the gradients of all shares to their adapters' parameters; fills in losses, records and errors.

    A share whose loss is not finite, or cannot be computed, gets an error and no gradient; the others are not
    touched by it. A pass that fails as a whole is run again share by share, to find the one that is at fault.
    """
    try:
        _train_pass(base, shares, seed)
    except (ValueError, RuntimeError, IndexError, TypeError, KeyError) as error:
        if len(shares) == 1:
            shares[0].error = f"{type(error).__name__}: {error}"
            return
        for share in shares:
            if share.error is None:
                train_pass(base, [share], seed)


def _train_pass(base: Base, shares: Sequence[Share], seed: int) -> None:
    if base.base_dropout:
        torch.manual_seed(seed % 2**63)
    with forward(base, shares, {share.name: share.seed for share in shares}) as outcome:
        weighted, known = [], []
        for share, (own, targets) in zip(shares, outcome.parts, strict=True):
            try:
                total, shown = loss_of(base.model, share, own, targets)
            except ValueError as error:
                share.error = str(error)
                continue
            penalty = auxiliary_loss(base.model, share.name)
            value = total * share.weight
            known.append((share, shown.double(), None if penalty is None else penalty.detach().double()))
            weighted.append(value if penalty is None else value + penalty * share.auxiliary)
        losses = _finite(known, weighted)
        if losses:
            torch.stack(losses).sum().backward()
        for (adapter, path, name), record in outcome.records.items():
            for share in shares:
                if share.name == adapter:
                    share.records[path, name] = record


def loss_of(model: nn.Module, share: Share, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """Return the summed loss of a share's examples, averaged over draws: as it is trained on, and as it is reported.

    They differ where examples were drawn several times: what trains the policy is not a loss of the data.
    """
    if share.draws == 1:
        total, _ = share.task.loss(outputs, targets)
        return total, total.detach()
    losses, _ = share.task.losses(outputs, targets)
    trained = policy_loss(model, share.name, losses, share.draws) * len(share.examples)
    return trained, losses.detach().sum() / share.draws


def _finite(known: list[tuple[Share, Tensor, Tensor | None]], weighted: list[Tensor]) -> list[Tensor]:
    """Read all losses at once, and return those that may go into the backward pass."""
    if not known:
        return []
    zero = torch.zeros((), dtype=torch.float64, device=known[0][1].device)
    values = torch.stack([torch.stack([loss, zero if p is None else p]) for _, loss, p in known]).tolist()
    kept = []
    for (share, _, _), (loss, penalty), value in zip(known, values, weighted, strict=True):
        share.loss, share.penalty = loss, penalty
        total = loss + penalty
        if total != total or total in (float("inf"), float("-inf")):
            share.error = f"the loss became {total}"
        else:
            kept.append(value)
    return kept


@torch.no_grad()
def evaluate_pass(base: Base, shares: Sequence[Share]) -> list[Tally]:
    """Return the evaluation sums of each share."""
    with forward(base, shares) as outcome:
        return [share.task.tally(own, targets) for share, (own, targets) in zip(shares, outcome.parts, strict=True)]
