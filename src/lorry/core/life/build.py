"""Making an adapter that the model does not know of yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorry.core.forward.entry import Entry, TensorHome
from lorry.core.life.adapter import Adapter
from lorry.core.life.state import ModelState
from lorry.core.method.base import Method
from lorry.core.method.spec import TensorSpec
from lorry.core.method.start import fresh, joint_layout, mix_seed
from lorry.core.sites.fingerprint import Fingerprint
from lorry.core.sites.site import Site


def build(
    state: ModelState,
    name: str,
    method: Method,
    chosen: Sequence[tuple[Site, Method]],
    *,
    dtype: torch.dtype,
    values: Callable[[str, TensorSpec], Tensor] | None,
    seed: int,
    metadata: Mapping[str, Any],
    fingerprint: Fingerprint | None = None,
) -> Adapter:
    """Make an adapter that the model does not know of yet.

    `chosen` gives each site with the method to use there; `values` gives each tensor by its full name (loading), and
    without it all start afresh from `seed`; `fingerprint` is that of the base, where it is known.
    """
    for site, at_site in chosen:
        at_site.check_model(state.root, site)
    sites = {site.path: site for site, _ in chosen}
    if fingerprint is None:
        fingerprint = state.fingerprint(base for site, at in chosen for base in at.bases(site))
    adapter = Adapter(state, name, method, metadata, fingerprint)
    layout = joint_layout(chosen)

    def fill(prefix: str, specs: Mapping[str, TensorSpec], device: torch.device) -> dict[str, Tensor]:
        tensors = {}
        for key, spec in specs.items():
            full = f"{prefix}.{key}"
            if values is not None and spec.saved:
                tensors[key] = values(full, spec).to(device)
            else:
                tensors[key] = fresh(spec, mix_seed(seed, full), dtype).to(device)
        return tensors

    if layout.shared:
        adapter.shared = TensorHome(layout.shared, fill("shared", layout.shared, next(iter(sites.values())).device))
    for site, at_site in chosen:
        own = fill(site.path, layout.sites[site.path], site.device)
        entry = Entry(
            name,
            site,
            at_site,
            TensorHome(layout.sites[site.path], own),
            adapter.shared if site.path in layout.sharing else None,
        )
        adapter.entries[site.path] = entry
        if values is None and type(at_site).setup is not Method.setup:
            at_site.setup(own, site, torch.Generator().manual_seed(mix_seed(seed, site.path, "setup")))
    return adapter
