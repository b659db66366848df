"""What attaching would do, before it is done: sites, parameters, memory, and what is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lorry.core.life.api import SiteOptions, choose, selected, whole_modules
from lorry.core.life.state import open_state
from lorry.core.method.base import Method
from lorry.core.method.registry import method_from
from lorry.core.method.start import joint_layout
from lorry.core.sites.site import Site
from lorry.core.sites.targets import Layers, Targets


@dataclass(frozen=True)
class PlannedSite:
    """One site of a plan: its path, kind, shape, method options and trained parameters."""

    path: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    dtype: str
    tied: tuple[str, ...]
    method: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """What `lorry.attach` with the same arguments would do.

    Attributes
    ----------
    sites
        The sites in the order of the model.
    trained, frozen
        Elements that the adapter trains, and that it stores without training.
    base
        Elements of the base model.
    left_out
        Site path -> why it is not adapted.
    training_bytes
        Adapter weights, gradients and two AdamW moments in float32, without activations.
    checkpoint_bytes
        Size of the adapter's tensors on disk in float32.
    """

    method: Mapping[str, Any]
    sites: tuple[PlannedSite, ...]
    trained: int
    frozen: int
    base: int
    left_out: Mapping[str, str]
    training_bytes: int
    checkpoint_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data for JSON."""
        sites = [{**vars(s), "shape": list(s.shape), "tied": list(s.tied)} for s in self.sites]
        return {**vars(self), "sites": sites, "method": dict(self.method), "left_out": dict(self.left_out)}

    def __str__(self) -> str:
        """Return the plan in one line."""
        share = self.trained / self.base if self.base else 0.0
        return (
            f"{self.method['method']}: {len(self.sites)} sites, {self.trained:,} trained parameters ({share:.2%} of "
            f"the base's {self.base:,}), {len(self.left_out)} sites left out"
        )


def plan(
    model: nn.Module,
    method: Method | Mapping[str, Any] | str | None = None,
    targets: Targets = "all-linear",
    *,
    exclude: Targets = (),
    layers: Layers | None = None,
    site_options: SiteOptions | None = None,
    train_also: Sequence[str] = (),
) -> Plan:
    """Work out what `attach` would do, without touching the model (it may lie on the meta device)."""
    method = method if isinstance(method, Method) else method_from(method)
    state = open_state(model)
    chosen = choose(state, method, targets, exclude=exclude, layers=layers, site_options=site_options)
    chosen += whole_modules(state, train_also)
    layout = joint_layout(chosen)
    trained, everything = layout.count(), layout.count(trained=False)
    selection = selected(state, method, targets, exclude=exclude, layers=layers)
    left_out = dict(selection.left_out)
    used = {site.path for site, _ in chosen}
    for site in selection.sites:
        if site.path not in used and not any(site.path.startswith(f"{path}.") for path in used):
            left_out[site.path] = "the method leaves it out"
    return Plan(
        method=method.to_dict(),
        sites=tuple(_planned(site, at, layout.sites[site.path].values()) for site, at in chosen),
        trained=trained,
        frozen=everything - trained,
        base=sum(p.numel() for n, p in model.named_parameters() if "lorry_" not in n),
        left_out=left_out,
        training_bytes=16 * trained + 4 * (everything - trained),
        checkpoint_bytes=4 * everything,
    )


def _planned(site: Site, method: Method, specs: Any) -> PlannedSite:
    count = sum(s.numel for s in specs if s.trained)
    dtype = str(site.stored.dtype).removeprefix("torch.") if site.parameter else ""
    return PlannedSite(site.path, site.kind.name, site.shape, count, dtype, site.tied, method.to_dict())
