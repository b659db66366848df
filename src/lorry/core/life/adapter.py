"""The adapter: a named instance of a method on sites of one base, as the user holds it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn

from lorry.core.errors import AdapterError, some
from lorry.core.forward.entry import Entry, TensorHome
from lorry.core.life import duties
from lorry.core.life.fuse import fuse_into_base
from lorry.core.life.state import ModelState, parameter_prefix
from lorry.core.life.trial import run_once
from lorry.core.life.writers import WRITERS
from lorry.core.method.base import Method
from lorry.core.method.spec import TensorSpec
from lorry.core.method.start import joint_layout
from lorry.core.receipt import Receipt
from lorry.core.sites.fingerprint import Fingerprint
from lorry.core.sites.quantized import keep_differentiable
from lorry.core.sites.site import Site


class Adapter:
    """A named set of trained tensors on sites of one base model.

    Attributes
    ----------
    name
        Unique on its model.
    method
        The method at most of its sites; single sites may differ in options.
    entries
        Site path -> the adapter at that site.
    shared
        Tensors that all sites share, or None.
    receipt
        What attaching or loading did.
    fingerprint
        Of the base that the adapter was made for.
    metadata
        Lineage and training facts; plain data, written to and read from the checkpoint.
    fused
        Whether it is part of the base weights now.
    """

    def __init__(
        self, state: ModelState, name: str, method: Method, metadata: Mapping[str, Any], fingerprint: Fingerprint
    ) -> None:
        self.state = state
        self.name = name
        self.method = method
        self.entries: dict[str, Entry] = {}
        self.shared: TensorHome | None = None
        self.metadata: dict[str, Any] = dict(metadata)
        self.fingerprint = fingerprint
        self.receipt = Receipt("attach", name, 0, 0, 0)

    @property
    def in_base(self) -> bool:
        """Whether its update is in the base weights now: fused, or switched on."""
        return self.name in self.state.edits

    @property
    def fused(self) -> bool:
        """As `in_base`."""
        return self.in_base

    @property
    def sites(self) -> list[Site]:
        """The sites in the order of the model."""
        return [e.site for e in self.entries.values()]

    @property
    def row_draws(self) -> int:
        """How many copies of each row a training step needs; see `Method.row_draws`."""
        return max((e.method.row_draws for e in self.entries.values()), default=1)

    def homes(self) -> Iterator[tuple[str, TensorHome]]:
        """Yield every home of tensors with the prefix of its names in a checkpoint."""
        if self.shared is not None:
            yield "shared", self.shared
        for path, entry in self.entries.items():
            yield path, entry.home

    def named_tensors(self) -> Iterator[tuple[str, Tensor, TensorSpec]]:
        """Yield every tensor with its name ``PATH.TENSOR`` and its spec."""
        for prefix, home in self.homes():
            for name, tensor in home.tensors().items():
                yield f"{prefix}.{name}", tensor, home.specs[name]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trained parameters; none while the adapter is frozen."""
        for name, tensor, spec in self.named_tensors():
            if spec.trained and isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                yield name, tensor

    def parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters, for an optimizer."""
        return [p for _, p in self.named_parameters()]

    @property
    def trainable(self) -> bool:
        """Whether its tensors are parameters of the model that receive gradients."""
        return any(home.registered for _, home in self.homes())

    def train(self, mode: bool = True) -> Adapter:
        """Register its tensors as parameters that receive gradients, or freeze them and take them out of the module
        tree.
        """
        if mode and self.in_base:
            raise AdapterError(f"Adapter '{self.name}' is fused into the base; unfuse it before training it.")
        if mode:
            keep_differentiable(self.state.root)
        prefix = parameter_prefix(self.name)
        for path, home in self.homes():
            if mode and not home.registered:
                # shared tensors lie in the first site's module: its class hides them from the state dict already
                entry = next(iter(self.entries.values())) if path == "shared" else self.entries[path]
                # two sites of one module (packed q/k/v and output projection) need names of their own
                own = "" if entry.site.kind.additive else f"{entry.site.name}_"
                home.register(entry.site.owner, prefix + ("shared_" if path == "shared" else own))
            elif not mode:
                home.unregister()
        if mode:
            duties.watch(self)
        self.state.changed()
        return self

    def to(self, dtype: torch.dtype) -> Adapter:
        """Cast its floating tensors; indices and masks keep their type."""
        was = self.trainable
        self.train(False)
        for _, home in self.homes():
            for name, tensor in home.tensors().items():
                if home.specs[name].dtype is None:
                    home.replace(name, tensor.to(dtype))
        return self.train(was)

    def fuse(self, *, safe: bool = True, keep: bool = True) -> Receipt:
        """Add the update to the base weights; `unfuse` restores every byte.

        It then applies to everything the model computes, whatever is active; see `lorry.core.life.fuse`.

        Parameters
        ----------
        safe
            Refuse updates that are not finite, and measure the rounding error for the receipt.
        keep
            Keep the original weights. Without them the sum is written where the weights lie: no memory is taken, and
            there is no way back.

        Raises
        ------
        AdapterError
            It is in the base already, its method never fuses, an update is not finite, rows have adapters of their own
            now, or it is active with another weight than 1. Nothing is changed then.
        """
        if self.in_base:
            raise AdapterError(f"Adapter '{self.name}' is fused already.")
        self.state.check_fuse(self.name, 1.0)
        run_once(self.state, self.name, self.sites)
        edit, receipt = fuse_into_base(self.name, list(self.entries.values()), check=safe, keep=keep)
        self.state.edits.made(edit)
        self.state.changed()
        past = self.state.passed_by(self.sites)
        if past:
            note = (
                f"{some(past)}: something reads the weight past the layer, so the adapter had no effect there before; "
                "fused it has one"
            )
            receipt = replace(receipt, notes=(*receipt.notes, note))
        return receipt

    def unfuse(self) -> Receipt:
        """Give the base its own weights back, bit for bit.

        Raises
        ------
        AdapterError
            The adapter is not in the base, another one was put into the same weights later, or the base was changed
            since.
        """
        edit = self.state.edits.undo(self.name)
        if edit.again is not None:  # written in place
            self.state.hashes.release(self.sites)
        self.state.changed()
        return Receipt("unfuse", self.name, 0, 0, len(edit.places), "match")

    def merge(self, *, safe: bool = True, keep: bool = True) -> Receipt:
        """Do what `fuse` does, under its old name, for one more release: *merge* is for adapters with each other."""
        warn("Adapter.merge is called fuse now; merging is for adapters with each other.", FutureWarning, stacklevel=2)
        return self.fuse(safe=safe, keep=keep)

    def unmerge(self) -> Receipt:
        """Do what `unfuse` does, under its old name, for one more release."""
        warn("Adapter.unmerge is called unfuse now.", FutureWarning, stacklevel=2)
        return self.unfuse()

    @property
    def merged(self) -> bool:
        """As `fused`, under its old name, for one more release."""
        warn("Adapter.merged is called fused now.", FutureWarning, stacklevel=2)
        return self.fused

    def detach(self, *, keep: bool = False) -> None:
        """Take the adapter off the model; with the last one the model is bit for bit what it was.

        Parameters
        ----------
        keep
            Leave its update in the base weights if it is there; the base is then another one for good.

        Raises
        ------
        AdapterError
            It is not attached any more, another adapter combines it, or it cannot be taken out of the base.
        """
        if self.state.adapters.get(self.name) is not self:
            raise AdapterError(f"Adapter '{self.name}' is not attached any more.")
        if self.in_base and (keep or not self.state.edits.kept(self.name)):
            if self.state.edits.forget(self.name).again is not None:
                self.state.hashes.release(self.sites)
        elif self.in_base:
            self.unfuse()
        self.train(False)
        self.state.remove(self)

    def save(self, path: str | Path, **options: Any) -> Receipt:
        """Write the adapter as a directory. See `lorry.formats.save.save_adapter`."""
        return WRITERS.find("folder")(self, Path(path), **options)

    def deltas(self) -> Iterator[tuple[Site, Tensor]]:
        """Yield each site with its weight update ``(*lead, out, in)``; raises if the method has none."""
        for entry in self.entries.values():
            with torch.no_grad(), self.state.edits.bare():
                delta = entry.delta()
            # outside: the mode would stay with the caller, and wrong for good where two walks go side by side
            yield entry.site, delta

    def joint_losses(self, left: Mapping[tuple[str, str, str], Tensor]) -> list[Tensor]:
        """Return the losses that its methods make of what the sites left in a pass together; see
        `Method.joint_loss`.
        """
        places: dict[str, dict[str, Tensor]] = {}
        for (owner, place, name), value in left.items():
            if owner == self.name:
                places.setdefault(place, {})[name] = value
        losses = []
        for method, entries in self.groups().items():
            # a place that is no site is shared, by the method that leaves something there
            loss = method.joint_loss({p: v for p, v in places.items() if p in entries or p not in self.entries})
            losses += [] if loss is None else [loss]
        return losses

    def configure(self, **options: Any) -> Adapter:
        """Change options that the tensors do not depend on (gates, top-k, loss weights); others are refused.

        Raises
        ------
        OptionError
            An unknown option or a value out of range.
        AdapterError
            The options ask for other tensors than the adapter has. Nothing is changed then.
        SiteError
            They do not fit the model.
        """
        changed: dict[str, Method] = {}
        for path, entry in self.entries.items():
            if type(entry.method) is type(self.method):
                changed[path] = entry.method.with_options(**options)
                changed[path].check_model(self.state.root, entry.site)
        method = self.method.with_options(**options)
        layout = joint_layout([(e.site, changed.get(p, e.method)) for p, e in self.entries.items()])
        for prefix, home in self.homes():
            specs = layout.shared if prefix == "shared" else layout.sites[prefix]
            here, there = ({n: (s.shape, s.trained) for n, s in group.items()} for group in (home.specs, specs))
            if here != there:
                raise AdapterError(
                    f"Adapter '{self.name}' has tensors {sorted(here)} at '{prefix}' whose shapes do not fit the "
                    f"options {options}; "
                    "attach a fresh adapter with them."
                )
        for path, changed_method in changed.items():
            self.entries[path].method = changed_method
        self.method = method
        self.state.changed()
        return self

    def groups(self) -> dict[Method, dict[str, Entry]]:
        """Return the entries by method: sites with the same options belong together."""
        groups: dict[Method, dict[str, Entry]] = {}
        for path, entry in self.entries.items():
            groups.setdefault(entry.method, {})[path] = entry
        return groups

    def penalties(self) -> list[Tensor]:
        """Return the losses that its methods put on the tensors themselves."""
        found = []
        for method, entries in self.groups().items():
            if type(method).penalty is not Method.penalty:
                value = method.penalty([(e.site, e.tensors()) for e in entries.values()])
                found += [] if value is None else [value]
        return found

    def count(self) -> int:
        """Return the number of trained elements."""
        return sum(spec.numel for _, home in self.homes() for spec in home.specs.values() if spec.trained)

    def __repr__(self) -> str:
        """Return name, method, number of sites and parameters."""
        return f"Adapter('{self.name}', {self.method}, {len(self.entries)} sites, {self.count():,} parameters)"
