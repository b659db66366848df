"""Several models addressed as one: the U-Net and text encoders of a pipeline, a vision tower and a language model.

An adapter over several roots is a bundle: one name, one file, an adapter on each root.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from lorry.core.errors import AdapterError, SiteError, near_misses, some
from lorry.core.forward.compose import Composition
from lorry.core.life import api
from lorry.core.life.adapter import Adapter
from lorry.core.method.base import Method
from lorry.core.receipt import Receipt
from lorry.core.sites.targets import Targets
from lorry.formats.bundle import load_bundle, save_bundle

#: For each root its own, or one for all.
PerRoot = Mapping[str, Targets] | Targets


@dataclass(frozen=True)
class Bundle:
    """One adapter over several roots.

    Attributes
    ----------
    name
        On every root.
    parts
        Root -> the adapter there.
    """

    name: str
    parts: Mapping[str, Adapter]

    @property
    def receipts(self) -> dict[str, Receipt]:
        """What attaching or loading did, by root."""
        return {root: part.receipt for root, part in self.parts.items()}

    def parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters of all roots, for an optimizer."""
        return [p for part in self.parts.values() for p in part.parameters()]

    def train(self, mode: bool = True) -> Bundle:
        """Train or freeze it on every root."""
        for part in self.parts.values():
            part.train(mode)
        return self

    def fuse(self) -> dict[str, Receipt]:
        """Add its updates to the weights of every root; of none if one refuses."""
        return _all_or_none(self.parts, lambda part: part.fuse(), lambda part: part.unfuse())

    def unfuse(self) -> None:
        """Give every root its own weights back."""
        for part in self.parts.values():
            part.unfuse()

    def detach(self) -> None:
        """Take it off every root."""
        for part in self.parts.values():
            part.detach()

    def save(self, path: str | os.PathLike[str], **options: Any) -> Receipt:
        """Write it as one folder; see `lorry.formats.bundle.save_bundle`."""
        return save_bundle(self.parts, path, name=self.name, **options)


class Roots(Mapping[str, nn.Module]):
    """Models by name, addressed as one.

    Parameters
    ----------
    models
        Name -> model; or an object with ``components`` (a pipeline of diffusers), of which the models are taken.

    Raises
    ------
    SiteError
        There are no models.
    """

    def __init__(self, models: Mapping[str, nn.Module] | Any) -> None:
        found = getattr(models, "components", models)
        if not isinstance(found, Mapping):
            raise SiteError(f"Expected models by name, or a pipeline with components, found {type(models).__name__}.")
        self._models = {str(name): model for name, model in found.items() if isinstance(model, nn.Module)}
        if not self._models:
            raise SiteError(f"There is no torch.nn.Module among {some(map(str, found))}.")

    def __getitem__(self, name: str) -> nn.Module:
        """Return the model of this name."""
        return self._models[name]

    def __iter__(self) -> Iterator[str]:
        """Yield the names in the order in which they were given."""
        return iter(self._models)

    def __len__(self) -> int:
        """Return the number of models."""
        return len(self._models)

    def attach(
        self,
        method: Method | Mapping[str, Any] | str | None = None,
        *,
        targets: PerRoot,
        name: str = "default",
        train_also: Mapping[str, Sequence[str]] | None = None,
        **options: Any,
    ) -> Bundle:
        """Attach a fresh adapter to several roots: to all of those that `targets` names, or to none.

        Parameters
        ----------
        method, name, options
            As in `lorry.attach`.
        targets
            Root -> which of its sites; or one for all roots.
        train_also
            Root -> modules that are trained whole beside the adapter and saved with it.

        Raises
        ------
        SiteError, AdapterError, OptionError
            A root that is not there, or as in `lorry.attach`; no root is changed then.
        """
        chosen = dict(targets) if isinstance(targets, Mapping) else dict.fromkeys(self, targets)
        also = dict(train_also or {})
        self._check_roots({*chosen, *also})
        done: dict[str, Adapter] = {}
        try:
            for root in [r for r in self if r in chosen]:
                given = {**options, "targets": chosen[root], "name": name, "train_also": also.get(root, ())}
                done[root] = api.attach(self[root], method, **given)
        except BaseException:
            for part in done.values():
                part.detach()
            raise
        return Bundle(name, done)

    def load(self, path: str | os.PathLike[str], **options: Any) -> Bundle:
        """Load a bundle onto all roots that it has an adapter for, or onto none; see `lorry.formats.bundle`."""
        parts = load_bundle(self, path, **options)
        return Bundle(next(iter(parts.values())).name, parts)

    def activate(self, composition: str | Composition | None) -> None:
        """Let adapters apply on every root where they are; see `lorry.activate`.

        Raises
        ------
        AdapterError
            An adapter that is on no root; nothing is changed then.
        """
        each = {root: self.on(root, composition) for root in self}
        self.check([composition])
        for root, model in self.items():
            api.activate(model, each[root])

    @contextmanager
    def rows(self, compositions: Sequence[str | Composition | None], **layout: Any) -> Iterator[None]:
        """Give each row of a batch its own composition on every root while the context lasts; see `lorry.rows`."""
        self.check(compositions)
        with ExitStack() as stack:
            for root, model in self.items():
                if api.adapters(model):
                    here = [self.on(root, c) for c in compositions]
                    stack.enter_context(api.rows(model, here, **layout))
            yield

    @contextmanager
    def context(self, **facts: Any) -> Iterator[None]:
        """Tell every root that carries adapters what it may need of a forward pass; see `lorry.context`."""
        with ExitStack() as stack:
            for model in self.values():
                if api.adapters(model):
                    stack.enter_context(api.context(model, **facts))
            yield

    def on(self, root: str, composition: Any) -> Any:
        """Return what of a composition there is on a root; None if there is nothing."""
        loaded = api.adapters(self[root])
        if composition is None or isinstance(composition, str):
            return composition if composition in loaded else None
        if all(isinstance(key, int) for key in composition):
            return {kind: self.on(root, inner) for kind, inner in composition.items()}
        return {name: weight for name, weight in composition.items() if name in loaded} or None

    def check(self, compositions: Sequence[str | Composition | None]) -> None:
        """Raise `AdapterError` if compositions name an adapter that is on no root."""
        loaded = {name for model in self.values() for name in api.adapters(model)}
        for name in (name for composition in compositions for name in _names(composition)):
            if name not in loaded:
                raise AdapterError(
                    f"No adapter '{name}' is loaded on any of the roots {some(self)}.{near_misses(name, loaded)} "
                    f"Loaded: {some(sorted(loaded)) or 'none'}."
                )

    def _check_roots(self, names: set[str]) -> None:
        wrong = sorted(names - set(self))
        if wrong:
            raise SiteError(f"There is no root '{wrong[0]}'.{near_misses(wrong[0], self)} There are: {some(self)}.")


def _names(composition: Any) -> list[str]:
    if composition is None or isinstance(composition, str):
        return [] if composition is None else [composition]
    inner = [_names(value) if isinstance(key, int) else [str(key)] for key, value in composition.items()]
    return [name for names in inner for name in names]


def _all_or_none(parts: Mapping[str, Adapter], do: Any, undo: Any) -> dict[str, Receipt]:
    done: dict[str, Receipt] = {}
    try:
        for root, part in parts.items():
            done[root] = do(part)
    except BaseException:
        for root in done:
            undo(parts[root])
        raise
    return done
