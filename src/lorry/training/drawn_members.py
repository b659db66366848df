"""Which of its members a gate over adapters combines, drawn anew in every pass (AutoLoRA, arXiv 2508.02107)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from lorry.core.errors import OptionError, some

from .hooks import Dynamic, Moment


@dataclass(frozen=True)
class DrawnMembers(Dynamic):
    """Lets each row combine a few of the job's members, so that the gate learns to serve any of them and any number.

    It acts where a job says ``drawn_members``. Where examples belong to tasks that are named as members (``task_ids:
    {column: adapter, names: [...]}``), the member of its own task is among those of a row: the gate sees a right
    adapter beside wrong ones. The others are drawn from the members of the rows beside it, filled up with further ones,
    so that a pass computes few updates. The adapter is bound to none of the members afterwards:
    ``lorry.context(model, combined={gate: names})``, or the sampler ``gated``, say which it combines.

    Attributes
    ----------
    count
        Members of a row.
    """

    name: ClassVar = "drawn-members"

    count: int = 3

    def begin(self, at: Moment) -> None:
        """Refuse tasks that are no members."""
        members = _members(at)
        stray = [task for task in at.tasks if task not in members]
        if stray:
            raise OptionError(
                f"Examples belong to '{stray[0]}', which is no member ({some(members)}). Name tasks as members, or "
                "leave out task_ids."
            )

    def around_pass(self, at: Moment) -> AbstractContextManager[Any]:
        """Tell the pass which members its rows combine."""
        return self._told(at)

    @contextmanager
    def _told(self, at: Moment) -> Iterator[None]:
        assert at.rows is not None
        first, last, total = at.rows
        context, name = at.adapter.state.runtimes.own().context, at.adapter.name
        own = None if context.task_ids is None or not at.tasks else context.task_ids[first:last].tolist()
        order = _order(at)
        chosen = draw_members(len(order), own, last - first, self.count, at.generator(at.micro))
        weights: dict[str, Tensor] = {}
        for number, member in enumerate(order):
            rows = [first + row for row, drawn in enumerate(chosen) if number in drawn]
            if rows:
                weights[member] = torch.zeros(total)
                weights[member][rows] = 1.0
        combined = context.values.setdefault("combined", {})
        combined[name] = weights
        try:
            yield
        finally:
            combined.pop(name, None)


def draw_members(
    count: int, own: Sequence[int] | None, rows: int, each: int, generator: Generator
) -> list[tuple[int, ...]]:
    """Return the members of each row, by number.

    Parameters
    ----------
    count
        Members that there are.
    own
        The member that each row must have; None if all rows have the same, drawn ones.
    rows
        Number of rows.
    each
        Members of a row.
    generator
        Source of randomness.
    """
    order: Tensor = torch.randperm(count, generator=generator)
    if own is None:
        return [tuple(order[:each].tolist())] * rows
    present = list(dict.fromkeys(own))
    near = [*present, *(n for n in order.tolist() if n not in present)][: max(each, len(present))]
    found = []
    for mine in own:
        others = [n for n in near if n != mine]
        drawn = torch.randperm(len(others), generator=generator)[: each - 1].tolist()
        found.append((mine, *(others[i] for i in drawn)))
    return found


def _members(at: Moment) -> list[str]:
    return list(at.adapter.metadata.get("members", {}))


def _order(at: Moment) -> list[str]:
    """Return the members in the order of the tasks, where there are tasks."""
    tasks = list(at.tasks)
    return [*tasks, *(name for name in _members(at) if name not in tasks)]
