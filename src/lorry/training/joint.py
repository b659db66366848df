"""One forward and backward pass for micro-batches of several jobs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.life.api import auxiliary_loss, context, rows
from lorry.core.life.state import state_of, unwrapped

from .batches import block_mask, collate
from .objectives import Objective, Tally
from .routing import policy_loss
from .rows import Encoded


@dataclass
class Share:
    """One job's part of a joint pass.

    Attributes:
        name: the job and its adapter.
        objective: makes the loss of its rows.
        rows: its rows.
        classes: how many of the head's logits are its own; None for all.
        seed: of its dropout in this pass.
        weight: factor of the summed loss (one over the predictions of the optimizer step).
        auxiliary: factor of the layers' auxiliary losses.
        draws: how often each row goes through the pass, each time with routes of its own; the loss is the mean
            over them, and above 1 the difference between them trains what drew the routes.
        loss: filled in by the pass: the summed loss of its rows.
        penalty: filled in: the auxiliary loss, unweighted.
        records: filled in: what its layers recorded, by (site path, name).
        error: filled in: why its rows could not be used.
    """

    name: str
    objective: Objective
    rows: Sequence[Encoded]
    classes: int | None = None
    seed: int = 0
    weight: float = 1.0
    auxiliary: float = 1.0
    draws: int = 1
    loss: float = 0.0
    penalty: float = 0.0
    records: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    error: str | None = None

    @property
    def length(self) -> int:
        """Tokens of its longest row."""
        return max(len(row) for row in self.rows)

    @property
    def passed(self) -> list[Encoded]:
        """The rows as they go through the base: all of them once for each draw, draw after draw."""
        return [*self.rows] * self.draws


def grouped(shares: Sequence[Share], max_pad_ratio: float | None, max_tokens: int | None) -> list[list[Share]]:
    """Split shares into passes, longest first, so that short rows are not padded too much.

    Args:
        shares: one for each job.
        max_pad_ratio: most tokens of a pass, padding included, as a multiple of those alone; None joins all.
        max_tokens: most tokens of a pass, padding included; a single share may be larger.
    """
    groups: list[list[Share]] = []
    for share in sorted(shares, key=lambda s: -s.length):
        if groups and _fits([*groups[-1], share], max_pad_ratio, max_tokens):
            groups[-1].append(share)
        else:
            groups.append([share])
    order = {id(s): i for i, s in enumerate(shares)}
    return [sorted(group, key=lambda s: order[id(s)]) for group in groups]


def _fits(group: Sequence[Share], ratio: float | None, most: int | None) -> bool:
    padded = max(s.length for s in group) * sum(len(s.passed) for s in group)
    # each job pads its own rows anyway; that is not the company's fault
    alone = sum(s.length * len(s.passed) for s in group)
    return (ratio is None or padded <= ratio * alone) and (most is None or padded <= most)


class Base:
    """The model as joint passes use it: where its inputs go, and what its forward understands."""

    def __init__(self, model: nn.Module, pad_id: int, base_dropout: bool = False) -> None:
        self.model = model
        self.pad_id = pad_id
        self.base_dropout = base_dropout
        self.config: Any = getattr(unwrapped(model), "config", None)
        accepted = inspect.signature(unwrapped(model).forward).parameters
        self.extra = {"use_cache": False} if "use_cache" in accepted else {}
        self.token_types = "token_type_ids" in accepted

    def logits(self, rows: Sequence[Encoded]) -> tuple[Tensor, Tensor, Tensor]:
        """Run the model on rows; returns logits, labels and the boolean padding mask."""
        device = next(self.model.parameters()).device
        batch = {k: v.to(device) for k, v in collate(rows, self.pad_id).items()}
        labels, mask = batch.pop("labels"), batch["attention_mask"].bool()
        if "position_ids" in batch:
            eager = getattr(self.config, "_attn_implementation", "sdpa") != "sdpa"
            dtype = getattr(self.model, "dtype", torch.float32) if eager else None
            batch["attention_mask"] = block_mask(batch["position_ids"], batch["attention_mask"], dtype)
        if not self.token_types:
            batch.pop("token_type_ids", None)
        state_of(self.model).context.padding_mask = mask
        return self.model(**batch, **self.extra).logits, labels, mask

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
    model = base.model
    names = [share.name for share in shares for _ in share.passed]
    if base.base_dropout:
        torch.manual_seed(seed % 2**63)
    seeds = {share.name: share.seed for share in shares}
    with context(model) as facts, rows(model, names, seeds=seeds):
        logits, labels, _ = base.logits([row for share in shares for row in share.passed])
        sizes = [len(share.passed) for share in shares]
        weighted, known = [], []
        # split, not slices: its backward writes the gradient once instead of once for each job
        for share, own, targets in zip(shares, logits.split(sizes), labels.split(sizes), strict=True):
            try:
                total, shown = _loss(model, share, own[..., : share.classes] if share.classes else own, targets)
            except ValueError as error:
                share.error = str(error)
                continue
            penalty = auxiliary_loss(model, share.name)
            value = total * share.weight
            known.append((share, shown.double(), None if penalty is None else penalty.detach().double()))
            weighted.append(value if penalty is None else value + penalty * share.auxiliary)
        losses = _finite(known, weighted)
        if losses:
            torch.stack(losses).sum().backward()
        for (adapter, path, name), record in facts.records.items():
            for share in shares:
                if share.name == adapter:
                    share.records[path, name] = record


def _loss(model: nn.Module, share: Share, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed loss of a share's rows, averaged over draws: as it is trained on, and as it is reported.

    They differ where rows were drawn several times: what trains the policy is not a loss of the data.
    """
    if share.draws == 1:
        total, _ = share.objective.loss(logits, labels)
        return total, total.detach()
    pairs = zip(logits.split(1), labels.split(1), strict=True)
    losses = torch.stack([share.objective.loss(row, target)[0] for row, target in pairs])
    trained = policy_loss(model, share.name, losses, share.draws) * len(share.rows)
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
    """The evaluation sums of each share."""
    names = [share.name for share in shares for _ in share.rows]
    with context(base.model), rows(base.model, names):
        logits, labels, _ = base.logits([row for share in shares for row in share.rows])
    sizes = [len(share.rows) for share in shares]
    return [
        share.objective.tally(own[..., : share.classes] if share.classes else own, targets)
        for share, own, targets in zip(shares, logits.split(sizes), labels.split(sizes), strict=True)
    ]
