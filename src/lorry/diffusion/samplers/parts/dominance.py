"""Who is dominant at a step, how much it weighs, and at which steps features are worked out anew (CMLoRA)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorry.core.errors import OptionError


def dominance_weights(count: int, dominant: int, coefficient: float) -> tuple[float, ...]:
    """Return the weight of each adapter; the weights sum to their number.

    Parameters
    ----------
    count
        Number of adapters n.
    dominant
        Which of them is dominant.
    coefficient
        c, how many times the dominant one weighs what another one does; 1 gives equal weights.
    """
    whole = coefficient + count - 1
    # the product comes first, so that a single adapter weighs exactly 1
    return tuple((coefficient if index == dominant else 1.0) * count / whole for index in range(count))


def coefficient_at(refresh: int, count: int, first: float | None, base: float, least: float | None) -> float:
    """Return c at a refresh.

    Parameters
    ----------
    refresh
        How many refreshes came before this one.
    count
        Number of adapters n.
    first
        c at the first refresh; ``n - 0.5`` if not given.
    base
        What the decay shrinks by: refresh number k takes ``base ** k`` off for those after it; 0 for no decay.
    least
        Below this it never falls; None for no bound.
    """
    start = count - 0.5 if first is None else first
    found = start - (sum(base**k for k in range(refresh)) if base else 0.0)
    return found if least is None else max(least, found)


def refresh_steps(
    schedule: str, steps: int, *, period: int = 2, early: float = 0.375, late: float = 0.875, c1: int = 2, c2: int = 3
) -> tuple[int, ...]:
    """Return the steps at which the dominant adapter changes and is worked out in full; step 0 is one of them.

    Parameters
    ----------
    schedule
        ``non-uniform``: every `c1` steps before `early` of the run and from `late` of it on, every `c2` between;
        ``uniform``: every `period`; ``every``: each step.
    steps
        Steps of the run.
    period, early, late, c1, c2
        As above; shares of the run for `early` and `late`.

    Raises
    ------
    OptionError
        There is no such schedule, or the shares are not in order.
    """
    if schedule == "every":
        return tuple(range(steps))
    if schedule == "uniform":
        return tuple(range(0, steps, period))
    if schedule != "non-uniform":
        raise OptionError(f"A schedule is 'non-uniform', 'uniform' or 'every', found '{schedule}'.")
    if early > late:
        raise OptionError(f"The sparse part begins before it ends: expected early <= late, found {early} and {late}.")
    first, second = math.ceil(early * steps), math.ceil(late * steps)
    return (*range(0, first, c1), *range(first, second, c2), *range(second, steps, c1))


def dominant_adapter(high: Sequence[str], low: Sequence[str], refresh: int, *, early: bool, pool: str = "low") -> str:
    """Return the adapter that is dominant from a refresh on.

    Parameters
    ----------
    high, low
        Adapters that change high frequencies early, and the others.
    refresh
        How many refreshes came before this one.
    early
        Whether the run is in its early phase, which the high set rules.
    pool
        Who rules late: the ``low`` set, or the ``tail`` of all adapters without the first (the released code, whose
        turns still count the high set).
    """
    if early and high or not low:
        return high[refresh % len(high)]
    if pool == "low" or not high:
        return low[refresh % len(low)]
    return (*high, *low)[refresh % len(high) + 1]
