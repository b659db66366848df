"""Convolutions."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lorry.core.sites.site import Kind, Site, register_kind
from lorry.kernels.thin import thin_linear


@register_kind
class ConvKind(Kind):
    """``nn.Conv1d/2d/3d``; A is a convolution to `rank` channels, B a pointwise one."""

    name = "conv"
    priority = 1
    presets = ("convolutions",)
    positionwise = False

    def sites(self, path: str, module: nn.Module) -> Iterator[Site]:
        """Yield the module itself (transposed convolutions are not carried)."""
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            fan_in = module.in_channels // module.groups * math.prod(module.kernel_size)
            yield Site(path, self, module, module, "weight", module.out_channels, fan_in)

    def factors_apply(self, site: Site) -> bool:
        """Cheaply only without groups: every group sees other channels."""
        return _conv(site).groups == 1

    def _convolve(self, site: Site, x: Tensor, weight: Tensor) -> Tensor:
        result = site.owner._conv_forward(x, weight, None)  # type: ignore[operator]
        assert isinstance(result, Tensor)
        return result

    def _shape(self, site: Site) -> tuple[int, ...]:
        conv = _conv(site)
        return (conv.in_channels // conv.groups, *conv.kernel_size)

    def down(self, site: Site, x: Tensor, a: Tensor) -> Tensor:
        """Convolve with A and move the rank units to the end; with groups, each group has its own:
        ``(..., groups, rank)``.
        """
        groups = _conv(site).groups
        kernel = a.reshape(a.shape[0], *self._shape(site))
        if groups == 1:
            return self._convolve(site, x, kernel).movedim(1, -1)
        units = self._convolve(site, x, kernel.repeat(groups, *[1] * (kernel.ndim - 1))).movedim(1, -1)
        return units.unflatten(-1, (groups, a.shape[0]))

    def up(self, site: Site, h: Tensor, b: Tensor) -> Tensor:
        """Mix the rank units at each position and move the channels back."""
        groups = _conv(site).groups
        if groups > 1:
            return torch.einsum("...gr,gor->...go", h, b.unflatten(0, (groups, -1))).flatten(-2).movedim(-1, 1)
        return thin_linear(h, b).movedim(-1, 1)

    def dense(self, site: Site, x: Tensor, matrix: Tensor) -> Tensor:
        """Convolve with the matrix as kernel."""
        return self._convolve(site, x, self.to_weight(site, matrix))

    def to_matrix(self, site: Site, weight: Tensor) -> Tensor:
        """Flatten input channels and kernel."""
        return weight.flatten(1)

    def to_weight(self, site: Site, matrix: Tensor) -> Tensor:
        """Unflatten input channels and kernel."""
        return matrix.reshape(matrix.shape[0], *self._shape(site))

    def channels_last(self, site: Site, y: Tensor) -> Tensor:
        """Move the channels to the end."""
        return y.movedim(1, -1)

    def channels_back(self, site: Site, y: Tensor) -> Tensor:
        """Move the channels behind the batch again."""
        return y.movedim(-1, 1)

    def kernel(self, site: Site) -> tuple[int, ...]:
        """Return the size of the window."""
        return tuple(_conv(site).kernel_size)


def _conv(site: Site) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
    assert isinstance(site.owner, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return site.owner
