"""Merging into a mixture: adapters become the experts of one that chooses among them, instead of one plain LoRA."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorry.core.life.adapter import Adapter
from lorry.core.method.base import Method
from lorry.core.receipt import Receipt
from lorry.formats.file import AdapterFile
from lorry.formats.mixture import from_adapters, mixture
from lorry.merging.sources import AdapterLike, open_expert

__all__ = ["Mixture", "from_adapters", "mix"]


@dataclass(frozen=True)
class Mixture:
    """An adapter that was made from others.

    Attributes
    ----------
    adapter
        As data.
    receipt
        How many adapters it holds, and the error that the method makes of them.
    """

    adapter: AdapterFile
    receipt: Receipt

    def file(self) -> AdapterFile:
        """Return the result as data."""
        return self.adapter

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = True) -> Receipt:
        """Write an adapter directory; errors as for `lorry.formats.file.AdapterFile.save`."""
        return self.adapter.save(path, overwrite=overwrite)

    def attach(
        self, model: nn.Module, name: str | None = None, *, activate: bool = True, trainable: bool = False
    ) -> Adapter:
        """Attach the result to a model; errors as for `lorry.load`."""
        return self.adapter.load(model, name=name or self.adapter.name, activate=activate, trainable=trainable)


def mix(
    inputs: Mapping[str, AdapterLike],
    method: Method | Mapping[str, Any] | str,
    *,
    weights: Mapping[str, float] | None = None,
    name: str = "mixture",
    model: nn.Module | None = None,
    check_base: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Mixture:
    """Make one adapter of a method that takes other adapters in; nothing of them is changed.

    Parameters
    ----------
    inputs
        Folders, single files or live adapters by name, in the order of the experts.
    method
        One of `lorry.formats.mixture.adopting`, with its options.
    weights, name, check_base, dtype, seed
        As in `lorry.formats.mixture.mixture`.
    model
        The base, for files that only a model can read.

    Raises
    ------
    AdapterError, CheckpointError, FingerprintError, OptionError
        With the adapter's name and the reason.
    """
    with ExitStack() as stack:
        files = {n: open_expert(item, model, stack) for n, item in inputs.items()}
        made, error = mixture(files, method, weights=weights, name=name, seed=seed, dtype=dtype, check_base=check_base)
    count = sum(len(site.values or {}) for site in made.sites.values()) + len(made.shared_values)
    notes = tuple(f"made from '{n}' ({file.where}), {file.method.info.slug}" for n, file in files.items())
    receipt = Receipt(
        f"merge by {made.method.info.slug}", name, count, count, len(made.sites), "match", 0.0, error, notes
    )
    made.metadata["lineage"] = {"mixture": receipt.to_dict()}
    return Mixture(made, receipt)
