"""One pass of which every process runs a part of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lorry.core.errors import OptionError
from lorry.core.life.api import adapters, auxiliary_loss
from lorry.core.life.state import state_of
from lorry.core.method.start import mix_seed

from .joint import Base, Outcome, Share, forward, loss_of
from .processes import Processes


def portions(shares: Sequence[Share], size: int) -> list[list[tuple[int, Share]]]:
    """Return what each of `size` processes runs of a pass: the examples of all shares, spread evenly by their size.

    Every process gets rows, since all take part in gathering the base's weights; one that would have none runs an
    example of another with the factor 0.

    Returns
    -------
    list
        For each process the number of each share that it has a part of, and the part.
    """
    places = [(share.task.cost(e), i, j) for i, share in enumerate(shares) for j, e in enumerate(share.examples)]
    loads, chosen = [0] * size, [[list[int]() for _ in shares] for _ in range(size)]
    for cost, i, j in sorted(places, key=lambda place: (-place[0], *place[1:])):
        least = min(range(size), key=lambda rank: (loads[rank], rank))
        loads[least] += cost * shares[i].task.rows_of(shares[i].examples[j])
        chosen[least][i].append(j)
    holders = [sum(bool(found[i]) for found in chosen) for i in range(len(shares))]
    parts = []
    for rank, found in enumerate(chosen):
        own = [(i, _part(s, found[i], rank, 1 / holders[i])) for i, s in enumerate(shares) if found[i]]
        parts.append(own or [(0, replace(_part(shares[0], [0], rank, 0.0), weight=0.0))])
    return parts


def _part(share: Share, places: Sequence[int], rank: int, auxiliary: float) -> Share:
    """Return a share of some of its examples; masks of dropout are drawn by process."""
    places = sorted(places)
    return replace(
        share,
        examples=[share.examples[j] for j in places],
        task_ids=None if share.task_ids is None else [share.task_ids[j] for j in places],
        seed=mix_seed(share.seed, "process", rank),
        auxiliary=share.auxiliary * auxiliary,
        records={},
    )


def train_split_pass(base: Base, shares: Sequence[Share], seed: int, processes: Processes) -> None:
    """Do what `joint.train_pass` does, each process with a part of the rows; gradients are not summed yet.

    A share whose loss is not finite in one process gets an error in all of them.

    Raises
    ------
    OptionError
        A method takes statistics or losses over all rows of a pass.
    Exception
        Whatever the pass raised; the processes cannot go on without each other.
    """
    if base.base_dropout:
        torch.manual_seed(mix_seed(seed, "process", processes.rank) % 2**63)
    own = portions(shares, processes.size)[processes.rank]
    here = [part for _, part in own]
    with forward(base, here, {part.name: part.seed for part in here}) as outcome:
        refuse_losses_over_rows(base.model, here, outcome)
        values = torch.zeros(len(shares), 3, dtype=torch.float64)
        losses: dict[int, Tensor] = {}
        for (place, part), (outputs, targets) in zip(own, outcome.parts, strict=True):
            total, shown = loss_of(base.model, part, outputs, targets)
            penalty = auxiliary_loss(base.model, part.name)
            losses[place] = total * part.weight if penalty is None else total * part.weight + penalty * part.auxiliary
            if part.weight:
                values[place, 0] = shown
                values[place, 1:] = torch.tensor([0.0 if penalty is None else float(penalty), 1.0])
        for share, (loss, penalties, holders) in zip(shares, processes.summed(values).tolist(), strict=True):
            share.loss, share.penalty = loss, penalties / holders
            found = loss + share.penalty
            if found != found or found in (float("inf"), float("-inf")):
                share.error = f"the loss became {found}"
        kept = [loss for place, loss in losses.items() if shares[place].error is None]
        # all take part in the backward pass, too; a loss that is not finite would spoil what it is added to
        torch.stack(kept or [loss.nan_to_num(0.0, 0.0, 0.0) * 0.0 for loss in losses.values()]).sum().backward()
    for share in shares:
        if share.error is not None:
            for parameter in adapters(base.model)[share.name].parameters():
                parameter.grad = None


def refuse_losses_over_rows(model: nn.Module, shares: Sequence[Share], outcome: Outcome) -> None:
    """Raise `OptionError` where a layer left a loss or a record of all rows of a pass, of which it saw a part."""
    context = state_of(model).context
    for share in shares:
        kept = (*context.losses, *context.left, *outcome.records)
        if any(owner == share.name for owner, _, _ in kept):
            slug = adapters(model)[share.name].method.info.slug
            raise OptionError(
                f"Job '{share.name}' cannot be trained on several processes: its method '{slug}' takes losses or "
                "statistics over all rows of a pass, of which each process would see a part. Train it in a run of its "
                "own on one process."
            )
