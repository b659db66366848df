"""What starts that look at gradients share."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lorry.core.errors import SiteError
from lorry.core.forward.entry import Entry
from lorry.core.method.spec import Observed


def gradient_at(entry: Entry, seen: Mapping[str, Observed], name: str) -> Tensor:
    """Return the mean gradient of the weight ``(*lead, out, in)`` in float32.

    Raises
    ------
    SiteError
        It is zero or not finite, so that it has no directions.
    """
    gradient = seen["gradient"].gradient
    assert gradient is not None
    if not bool(gradient.isfinite().all()) or not bool(gradient.any()):
        found = "is zero" if not bool(gradient.any()) else "is not finite"
        raise SiteError(
            f"The gradient of the weight of '{entry.site.path}' over the calibration batches {found}, so the start "
            f"'{name}' has no directions there. Leave the site out (exclude), or give other data."
        )
    return gradient
