"""The update that stored tensors describe, worked out without a model: sites that stand in for real ones, factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorry.core.errors import AdapterError, CheckpointError
from lorry.core.method.base import Method
from lorry.core.method.families import Bottleneck
from lorry.core.sites.kinds import KINDS, Kind, current_name
from lorry.core.sites.site import Site

#: Singular values below this fraction of the largest one count as rounding of a method's own arithmetic, which may
#: run in single precision.
_ROUNDING = 1e-7


class NeedsBase(AdapterError):
    """An update cannot be worked out from the file alone."""


@dataclass(frozen=True)
class SiteFacts:
    """What is known of a site without its model: kind, ``(*lead, out, in)``, and a convolution's
    ``(channels, *kernel)``.
    """

    kind: str
    shape: tuple[int, ...]
    kernel: tuple[int, ...] = ()


class StandIn(Site):
    """A site of a model that is not there: its shape is known, its weight is not."""

    def matrix(self) -> Tensor:
        """Refuse: there is no weight."""
        raise NeedsBase(f"the update at '{self.path}' depends on the base weight")


def kind_named(name: str, where: str) -> Kind:
    """Return the kind of this name or former name, or raise `CheckpointError`."""
    found = KINDS.get(current_name(name)) if isinstance(name, str) else None
    if found is None:
        raise CheckpointError(f"'{where}' names a site of the unknown kind '{name}'; known are {', '.join(KINDS)}.")
    return found


def stand_in(path: str, facts: SiteFacts) -> StandIn:
    """Return a site without its model; a convolution's module carries the shape of its kernel, without any data.

    Raises
    ------
    CheckpointError
        The kind is unknown, or the kernel does not fit the shape.
    """
    owner = nn.Module()
    *lead, out, inner = facts.shape
    if facts.kind == "conv" and facts.kernel:
        channels, *kernel = facts.kernel
        cls = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}.get(len(kernel))
        if cls is None or inner != channels * math.prod(kernel):
            raise CheckpointError(f"'{path}': kernel {facts.kernel} does not fit {inner} inputs.")
        owner = cls(channels, out, tuple(kernel), device="meta")  # type: ignore[arg-type]
    return StandIn(path, kind_named(facts.kind, path), owner, owner, "weight", out, inner, lead=tuple(lead))


def is_plain(method: Method) -> bool:
    """Whether the update is ``scale · B A`` of the method's own factors."""
    return isinstance(method, Bottleneck) and method.plain


def exact_factors(method: Method, tensors: Mapping[str, Tensor], site: Site) -> tuple[Tensor, Tensor, float]:
    """Return factors of any update that does not depend on the input, and the relative error of the factors.

    ``scale · B A`` is taken as it is. Any other update is decomposed down to rounding (relative 1e-7 of the largest
    singular value, in float64), so its rank may be as large as the layer.

    Parameters
    ----------
    method, tensors, site
        The method, its tensors (shared ones too) and the place.

    Returns
    -------
    A ``(*lead, rank, in)`` and B ``(*lead, out, rank)`` in float64, the scale folded into B, and the relative error.

    Raises
    ------
    AdapterError
        The update depends on the input, with the method's name; `NeedsBase` where the base weight is missing.
    """
    exact = doubled(tensors)
    if isinstance(method, Bottleneck) and method.plain:
        a, b = method.factors(exact, site)
        return a, b * method.scale(site), 0.0
    delta = exact_delta(method, exact, site)
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    top = float(s.max()) if s.numel() else 0.0
    keep = max(int((s > _ROUNDING * top).flatten(0, -2).any(0).sum() if s.ndim > 1 else (s > _ROUNDING * top).sum()), 1)
    total = float(s.square().sum())
    lost = float(s[..., keep:].square().sum())
    root = s[..., :keep].sqrt()
    a, b = root.unsqueeze(-1) * vt[..., :keep, :], u[..., :keep] * root.unsqueeze(-2)
    return a, b, (lost / total) ** 0.5 if total else 0.0


def exact_delta(method: Method, tensors: Mapping[str, Tensor], site: Site) -> Tensor:
    """Return the update of the weight as ``(*lead, out, in)`` in float64; errors as in `exact_factors`."""
    if method.fusing == "never":
        raise AdapterError(
            f"{type(method).__name__} at '{site.path}' depends on the input of the layer (gates for each token, or "
            "its own forward), so it has no update of the weight to merge. Serve such adapters side by side instead."
        )
    exact = doubled(tensors)
    if method.bias_delta(exact, site) is not None:
        raise AdapterError(
            f"{type(method).__name__} changes the bias at '{site.path}' too, which an update of the weight leaves out. "
            "Fuse it into the base (adapter.fuse()), or serve it beside the others."
        )
    return method.delta(exact, site).double()


def doubled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors on the CPU, floating ones in float64."""
    return {
        n: t.detach().to("cpu", torch.float64) if t.is_floating_point() else t.detach().cpu()
        for n, t in tensors.items()
    }
