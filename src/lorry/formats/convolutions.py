"""Convolutions at which the forward pass of other tools computes something that no update of the weight does."""

from __future__ import annotations

from torch import nn

from lorry.core.errors import CheckpointError
from lorry.core.sites.site import Site


def check_convolution(where: str, site: Site, *, factors: bool) -> None:
    """Raise `CheckpointError` if what others train at a convolution is no update of its weight.

    Parameters
    ----------
    where
        The file, for the error.
    site
        The place; nothing but convolutions is looked at.
    factors
        Whether the update is run as two convolutions of their own, which take over size, stride and padding and
        nothing else; otherwise as one with the whole update as its weight, which leaves the padding mode out.
    """
    module = site.owner
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return
    padded = module.padding != "valid" and (isinstance(module.padding, str) or any(module.padding))
    window = max(module.kernel_size) > 1
    found = ""
    if factors and module.groups != 1:
        found = f"in {module.groups} groups. The factors that other tools train there see all channels"
    elif factors and window and max(module.dilation) != 1:
        found = f"with dilation {module.dilation}. The factors that other tools train there see neighbouring positions"
    elif padded and window and module.padding_mode != "zeros":
        found = f"that pads its input in the mode '{module.padding_mode}'. Other tools pad it with zeros for the update"
    if found:
        raise CheckpointError(
            f"'{where}': '{site.path}' is a convolution {found}, which no update of its weight does; Lorry cannot "
            "carry it. Train the adapter without this target, or in Lorry."
        )
