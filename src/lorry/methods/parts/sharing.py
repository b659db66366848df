"""Tensors that sites of one type share: which sites those are, and how such tensors are laid out and found again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Generator, Tensor

from lorry.core.method.spec import Init, Layout, Tensors, TensorSpec
from lorry.core.sites.site import Site


def type_of(site: Site) -> str:
    """Return the name of what a site shares with its like: its path without numbers of layers, and its shape.

    A number is that of a layer where it is a whole component of the path; digits of a name (``fc1``, ``w3``,
    ``wi_0``) tell projections apart. So does a number at the end below a layer (the parts of an ``nn.Sequential``).
    """
    *parents, last = site.path.split(".")
    numbered = any(part.isdecimal() for part in parents)
    found = ["*" if part.isdecimal() else part for part in parents]
    found.append(last if numbered or not last.isdecimal() else "*")
    return f"{'.'.join(found)}[{site.out_features}x{site.in_features}]"


def by_type(
    sites: Sequence[Site],
    own: Callable[[Site, int], Mapping[str, TensorSpec]],
    shared: Callable[[Site, int], Mapping[str, TensorSpec]],
) -> Layout:
    """Return a layout in which all sites of a type share some tensors.

    Parameters
    ----------
    sites
        Of the adapter.
    own
        The tensors of a site, given the site and how many there are of its type.
    shared
        Those of a type by name, given its first site and how many there are.
    """
    types: dict[str, list[Site]] = {}
    for site in sites:
        types.setdefault(type_of(site), []).append(site)
    layout = Layout({site.path: {} for site in sites})
    for name, members in types.items():
        layout.shared.update({f"{name}.{key}": spec for key, spec in shared(members[0], len(members)).items()})
        layout.sites.update({site.path: dict(own(site, len(members))) for site in members})
    return layout


def of_type(tensors: Tensors, site: Site, name: str) -> Tensor:
    """Return a tensor that the sites of a type share (`by_type`)."""
    return tensors[f"{type_of(site)}.{name}"]


def uniform(fan_in: int) -> Init:
    """Return a start in ±1/√fan_in: as a whole vector of A starts, where a tensor's rows are only parts of one."""
    bound = fan_in**-0.5

    def fill(tensor: Tensor, generator: Generator) -> None:
        tensor.uniform_(-bound, bound, generator=generator)

    return fill
