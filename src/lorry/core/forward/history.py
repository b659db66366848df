"""What applied when: a checkpointed segment is computed again in the backward pass, after other passes may have run.

Autograd numbers the nodes of its graph in the order in which they are made. What becomes active is noted with the
number that the next node will get; the number of the node whose backward pass asks for the recomputation then says
what applied in its time.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lorry.core.forward.active import Active
    from lorry.core.method.call import Context

#: Changes that are remembered; more of them between a forward pass and its backward pass are not expected.
_MOST = 256


class History:
    """The last changes of what is active on a model."""

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._what: list[tuple[Active | None, Context]] = []

    def note(self, active: Active | None, context: Context) -> None:
        """Note that this applies from now on."""
        number = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        if self._numbers and self._numbers[-1] >= number:
            # nothing was computed since the last change
            del self._numbers[-1], self._what[-1]
        elif len(self._numbers) >= _MOST:
            del self._numbers[: _MOST // 2], self._what[: _MOST // 2]
        self._numbers.append(number)
        self._what.append((active, context))

    def of_running_node(self) -> tuple[Active | None, Context]:
        """Return what applied when the node was made whose backward pass runs now; the oldest that is known if it is
        older.
        """
        node = torch._C._current_autograd_node()
        if node is None:
            return self._what[-1]
        return self._what[max(bisect_right(self._numbers, node._sequence_nr()) - 1, 0)]

    def clear(self) -> None:
        """Forget everything, so that nothing is kept alive."""
        self._numbers.clear()
        self._what.clear()
