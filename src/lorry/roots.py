"""Several models addressed as one: the U-Net and text encoders of a pipeline, a vision tower and a language model.

An adapter over several roots is a bundle: one name, one file, an adapter on each root. The public verbs (`attach`,
`load`, `activate`, `rows`, `context`, `adapters`) take a pipeline, or models by name, where they take a model.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, overload

from torch import Tensor, nn

from lorry.core.errors import AdapterError, CheckpointError, SiteError, near_misses, some
from lorry.core.forward.around import around_calls
from lorry.core.forward.compose import Composition
from lorry.core.life import api
from lorry.core.life.adapter import Adapter
from lorry.core.method.base import Method
from lorry.core.receipt import Receipt
from lorry.core.sites.targets import Targets
from lorry.formats.bundle import bundled, load_bundle, missing_root
from lorry.formats.file import AdapterFile
from lorry.formats.load import load as load_one
from lorry.formats.reader import open_adapter
from lorry.formats.snapshot import is_sharded

#: What diffusers calls the network of a pipeline that predicts.
_NETWORKS = ("unet", "transformer", "prior")
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

    def fuse(self, **options: Any) -> dict[str, Receipt]:
        """Add its updates to the weights of every root; of none if one refuses."""
        return _all_or_none(self.parts, lambda part: part.fuse(**options), lambda part: part.unfuse())

    def unfuse(self) -> None:
        """Give every root its own weights back."""
        for part in self.parts.values():
            part.unfuse()

    def detach(self) -> None:
        """Take it off every root."""
        for part in self.parts.values():
            part.detach()

    def file(self, metadata: Mapping[str, Any] | None = None) -> AdapterFile:
        """Return it as data, whose tensors are those of the models."""
        found = bundled(self.parts, self.name, metadata)
        if len(found.components) == 1:  # a folder of one root is that of its model, which says where it belongs
            root, part = next(iter(found.components.items()))
            part.metadata = {**part.metadata, **(metadata or {}), "root": root}
        return found

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        format: str = "lorry",
        metadata: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Receipt:
        """Write it: as one folder, or as a single file of diffusion tools.

        Parameters
        ----------
        path
            The folder, or the ``.safetensors`` file.
        format
            ``lorry`` (a folder), ``diffusers`` or ``kohya`` (a file).
        metadata
            Of the whole, in a folder.
        options
            Of the writer, e.g. ``overwrite``.

        Raises
        ------
        CheckpointError
            A tensor is empty or not finite, the format cannot say it, or the disk refuses; what was there before is
            left.
        AdapterError
            Tensors are sharded.
        """
        if any(is_sharded(part) for part in self.parts.values()):
            raise AdapterError(
                "An adapter over several models needs whole tensors: save each part, load it in one process, and save "
                "the whole there."
            )
        return self.file(metadata).save(path, format=format, **options)


class _Activations(ExitStack):
    """What applies on several roots; entered, it holds until the block ends."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[api.Activation] = []

    def __enter__(self) -> _Activations:
        """Let what was active before be active again once the block ends."""
        super().__enter__()
        for activation in self.waiting:
            self.enter_context(activation)
        return self


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
        self._whole = found is models
        if not isinstance(found, Mapping):
            raise SiteError(f"Expected models by name, or a pipeline with components, found {type(models).__name__}.")
        self._models = {str(name): model for name, model in found.items() if isinstance(model, nn.Module)}
        if not self._models:
            raise SiteError(f"There is no torch.nn.Module among {some(map(str, found))}.")

    @property
    def network(self) -> str | None:
        """Name of the model that predicts, in a pipeline of diffusers; None elsewhere."""
        return next((name for name in _NETWORKS if name in self), None)

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
        targets: PerRoot = "all-linear",
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
            Root -> which of its sites; or those of the network that predicts, for a pipeline, and of all roots for
            models by name.
        train_also
            Root -> modules that are trained whole beside the adapter and saved with it.

        Raises
        ------
        SiteError, AdapterError, OptionError
            A root that is not there, or as in `lorry.attach`; no root is changed then.
        """
        every = [self.network] if self.network and not self._whole else list(self)
        chosen = dict(targets) if isinstance(targets, Mapping) else dict.fromkeys(every, targets)
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

    def load(self, path: str | os.PathLike[str] | AdapterFile, **options: Any) -> Bundle:
        """Load an adapter onto all roots that it has tensors for, or onto none; see `lorry.formats.bundle`.

        One that was saved for one model alone goes onto the root that it names, or onto the network of a pipeline.
        """
        file = open_adapter(path)
        try:
            if file.components:
                parts = load_bundle(self, file, **options)
            else:
                root = str(file.metadata.get("root") or self.network or "")
                if root not in self:
                    if file.metadata.get("root"):
                        raise missing_root(file, root, self)
                    raise CheckpointError(
                        f"'{file.where}' holds an adapter of one model and does not say of which of the roots "
                        f"{some(self)}; load it onto that model with lorry.load."
                    )
                parts = {root: load_one(self[root], file, **options)}
        finally:
            if file is not path:
                file.close()
        return Bundle(next(iter(parts.values())).name, parts)

    def adapters(self) -> dict[str, Bundle]:
        """Return all adapters by name, each with its parts."""
        found: dict[str, dict[str, Adapter]] = {}
        for root, model in self.items():
            for name, part in api.adapters(model).items():
                found.setdefault(name, {})[root] = part
        return {name: Bundle(name, parts) for name, parts in found.items()}

    def fuse(self, name: str, **options: Any) -> dict[str, Receipt]:
        """Add the updates of an adapter to the weights of every root where it is; of none if one refuses."""
        return self._named(name).fuse(**options)

    def detach(self, name: str) -> None:
        """Take an adapter off every root."""
        self._named(name).detach()

    def _named(self, name: str) -> Bundle:
        self.check([name])
        return self.adapters()[name]

    def activate(self, composition: str | Composition | None) -> ExitStack:
        """Let adapters apply on every root where they are, from now on or while a ``with`` block lasts.

        Raises
        ------
        AdapterError
            An adapter that is on no root; nothing is changed then.
        """
        each = {root: self.on(root, composition) for root in self}
        self.check([composition])
        block = _Activations()
        for root, model in self.items():
            block.waiting.append(api.activate(model, each[root]))
        return block

    @contextmanager
    def rows(
        self, compositions: Sequence[str | Composition | None], *, pictures: int = 1, **layout: Any
    ) -> Iterator[None]:
        """Give each row of a batch its own composition on every root while the context lasts; see `lorry.rows`.

        Around the call of a pipeline, rows are its prompts: text encoders see each of them once, and the network sees
        `pictures` of each, and all of these once more where the call is guided.

        Parameters
        ----------
        compositions
            One for each prompt; for a call with several pictures of each prompt also one for each picture, where no
            text encoder has an adapter.
        pictures
            Pictures of each prompt (``num_images_per_prompt``).
        layout
            As for `lorry.rows`, on every root; for models by name.
        """
        self.check(compositions)
        by_name = self._whole or bool(layout)
        with ExitStack() as stack:
            for root, model in self.items():
                if api.adapters(model):
                    each = [self.on(root, c) for c in compositions]
                    as_called = root == self.network and not by_name
                    stack.enter_context(
                        _rows_as_called(model, each, pictures) if as_called else api.rows(model, each, **layout)
                    )
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


@contextmanager
def _rows_as_called(
    network: nn.Module, compositions: Sequence[str | Composition | None], pictures: int
) -> Iterator[None]:
    """Give each prompt of a pipeline's call its composition in its network, guided or not: every call of the network
    says by its batch how often all pictures follow themselves.
    """
    entries = len(compositions) * pictures
    with api.rows(network, compositions, repeat=pictures):
        pass  # what cannot be applied is refused now

    def enter(args: tuple[Any, ...], options: dict[str, Any]) -> AbstractContextManager[None]:
        seen = next(v for v in (*args, *options.values()) if isinstance(v, Tensor) and v.ndim > 2)
        return api.rows(network, compositions, repeat=pictures, tile=max(1, len(seen) // entries))

    with around_calls(network, enter):
        yield


class Pipeline(Protocol):
    """What holds several models, as a pipeline of diffusers does."""

    @property
    def components(self) -> Mapping[str, Any]:
        """Models and other parts by name."""
        ...


P = ParamSpec("P")
One = TypeVar("One", covariant=True)
Several = TypeVar("Several", covariant=True)


class Verb(Protocol[P, One, Several]):
    """A public verb, which takes a model, a pipeline, or models by name."""

    @overload
    def __call__(self, model: nn.Module, *args: P.args, **options: P.kwargs) -> One: ...
    @overload
    def __call__(self, model: Pipeline | Mapping[str, nn.Module], *args: Any, **options: Any) -> Several: ...


def _verb(
    one: Callable[Concatenate[nn.Module, P], One], several: Callable[Concatenate[Roots, ...], Several]
) -> Verb[P, One, Several]:
    """Return a verb that does `one` for a model, and `several` for a pipeline or models by name."""

    @functools.wraps(one)
    def verb(model: Any, *args: Any, **options: Any) -> Any:
        if isinstance(model, nn.Module) or not (isinstance(model, Mapping) or hasattr(model, "components")):
            return one(model, *args, **options)
        return several(model if isinstance(model, Roots) else Roots(model), *args, **options)

    return verb


attach = _verb(api.attach, Roots.attach)
load = _verb(load_one, Roots.load)
activate = _verb(api.activate, Roots.activate)
rows = _verb(api.rows, Roots.rows)
context = _verb(api.context, Roots.context)
adapters = _verb(api.adapters, Roots.adapters)
