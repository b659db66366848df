"""Finding the place of every tensor of a file in a model, without changing the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from torch import Generator, Tensor, nn

from lorry.core.errors import CheckpointError, some
from lorry.core.life.state import ModelState
from lorry.core.method.base import Method
from lorry.core.method.declared import whole_module
from lorry.core.method.families import Bottleneck
from lorry.core.sites.fingerprint import Fingerprint
from lorry.core.sites.site import Site
from lorry.formats import flux
from lorry.formats.convolutions import check_convolution
from lorry.formats.file import AdapterFile
from lorry.formats.names import Resolver
from lorry.formats.peft_extras import bind_extras
from lorry.formats.resize import of_rank
from lorry.formats.stored import StoredSite, doubled_by_peft


@dataclass
class Bound:
    """A file's tensors by the names that a model's adapter gives them.

    Attributes
    ----------
    chosen
        Every site with its method.
    values
        ``PATH.TENSOR`` -> tensor in Lorry's layout.
    verified
        Tensors of the file that were found equal to the base's own and need no place.
    elsewhere
        Tensors that belong to another model of the pipeline.
    paths
        The file's site path -> the model's.
    """

    chosen: list[tuple[Site, Method]] = field(default_factory=list)
    values: dict[str, Tensor] = field(default_factory=dict)
    verified: int = 0
    elsewhere: int = 0
    paths: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def bind(file: AdapterFile, state: ModelState) -> Bound:
    """Find the place of every tensor.

    Raises
    ------
    CheckpointError
        A tensor has no place, or a site that the file's targets name has no tensors.
    """
    bound = Bound(notes=list(file.notes))
    if file.pipeline:
        _bind_single(file, state, bound)
        return bound
    resolver = Resolver(state)
    targeted = file.config.parameter_targeted if file.config is not None else None
    for label, part in file.sites.items():
        if part.kind == "block":
            site = resolver.whole(part.path)
        else:
            site = resolver.find(part.path, part.depth, targeted)
        if site is None:
            raise resolver.missing(part.path, file.where, some(part.keys.values(), 2))
        _put(file, _of_parameter(file, part, site, resolver), site, bound)
        bound.paths[label] = site.path
        if file.format == "peft" and doubled_by_peft(site.path, site.kind.name) and ".base_layer." in part.keys["A"]:
            bound.notes.append(
                f"PEFT adds the update at '{site.path}' twice; it was doubled, so that outputs are equal"
            )
    for name, value in file.shared_tensors().items():
        if name not in file.shared_unsaved:
            bound.values[f"shared.{name}"] = value
    if file.config is not None and file.format == "peft":
        left = bind_extras(file, resolver, bound.chosen, bound.values)
        _check_targets(file, state, resolver, bound)
        _base_copies(file, left, resolver, bound)
    bound.notes += resolver.notes
    return bound


def _of_parameter(file: AdapterFile, part: StoredSite, site: Site, resolver: Resolver) -> StoredSite:
    """Return what is stored for a site; PEFT's patterns mean a bank by the path of its parameter, which only the model
    tells.
    """
    if file.config is None or file.format != "peft" or site.kind.name not in ("experts", "router"):
        return part
    return replace(part, method=file.config.method(resolver.original(site.path), parameter=True))


def _put(file: AdapterFile, part: StoredSite, site: Site, bound: Bound) -> None:
    kind = site.kind.name
    if part.kind is not None and kind != part.kind:
        raise CheckpointError(
            f"'{file.where}' was made for a {part.kind} at '{part.path}', but the model has a {kind} there: "
            f"{site}. It is an adapter for another architecture."
        )
    method = _method(file, part, site)
    values = {n: t for n, t in file.site_tensors(part, kind, site.lead).items() if n not in part.unsaved}
    form = method.peft_form
    if not file.native and form is not None and form.computed and not values.keys() & set(form.computed):
        values.update(_taken_out(method, site, form.computed))
    if not file.native:
        check_convolution(file.where, site, factors=True)
        _check_reached(file, part, site, values)
    for name, value in _of_one_type(values, method, site).items():
        full = f"{site.path}.{name}"
        if full in bound.values:
            raise CheckpointError(f"'{file.where}' holds two tensors for '{full}' of this model; nothing was loaded.")
        bound.values[full] = value
    bound.chosen.append((site, method))


def _check_reached(file: AdapterFile, part: StoredSite, site: Site, values: Mapping[str, Tensor]) -> None:
    """Refuse an update of an attention module's output projection that PEFT wrapped by itself: the module reads the
    weight past PEFT's wrapper, so nothing of it was ever trained or applied there.
    """
    if file.format != "peft" or not doubled_by_peft(site.path, site.kind.name) or part.values is not None:
        return
    if ".base_layer." not in part.keys["A"] and bool(values["B"].any()):
        raise CheckpointError(
            f"'{file.where}' targets '{site.path}' by itself. PEFT does not apply an adapter there, since the "
            "attention module around it reads the weight past PEFT's layer, yet this one's update is not zero; nothing "
            f"was loaded. Target the attention module ('{site.path.rpartition('.')[0]}'), or merge it in PEFT "
            "(merge_and_unload), which applies it."
        )


def _method(file: AdapterFile, part: StoredSite, site: Site) -> Method:
    """Return the method at a site, where PEFT's config needs the model to tell it.

    Raises
    ------
    CheckpointError
        A start that changed a weight which other layers share.
    """
    if file.format != "peft" or file.config is None or part.values is not None:
        return part.method
    if file.config.parameter_targeted(parameter := f"{part.path}.{site.parameter}"):
        return file.config.method(parameter, parameter=True)
    form = part.method.peft_form
    if form is None or not form.start:
        return part.method
    if site.tied:
        raise CheckpointError(
            f"'{file.where}' was trained with init_lora_weights='{file.config.start}' on '{site.path}', whose weight "
            f"{some(site.tied)} shares. PEFT took the start out of it there, too, which no adapter at '{site.path}' "
            "describes; nothing was loaded. Train it on a base with tie_word_embeddings=False, or without this target."
        )
    most = min(site.out_features, site.in_features)  # a decomposition has no more directions than the smaller side
    if not isinstance(part.method, Bottleneck) or getattr(part.method, "rank", most) <= most:
        return part.method
    return of_rank(part.method, site, most, own=True)


def _of_one_type(values: dict[str, Tensor], method: Method, site: Site) -> dict[str, Tensor]:
    """Return the tensors of a site in the smallest floating type that holds them all; those of a type of their own
    stay.
    """
    if method.whole or len({t.dtype for t in values.values()}) < 2:
        return values
    own = {n for n, spec in method.layout([site]).sites[site.path].items() if spec.dtype is not None}
    types = {t.dtype for n, t in values.items() if n not in own and t.is_floating_point()}
    if len(types) < 2:
        return values
    common = reduce(torch.promote_types, (torch.bfloat16 if t.itemsize == 1 else t for t in types))
    return {n: t if n in own or not t.is_floating_point() else t.to(common) for n, t in values.items()}


def _taken_out(method: Method, site: Site, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the factors of what was taken out of the base weight when the adapter was made."""
    specs = method.tensors(site)
    fresh = {name: torch.empty(spec.shape, device=site.device) for name, spec in specs.items()}
    with torch.no_grad():
        method.setup(fresh, site, Generator().manual_seed(0))
    return {name: fresh[name] for name in names}


def _check_targets(file: AdapterFile, state: ModelState, resolver: Resolver, bound: Bound) -> None:
    """Raise if a site that PEFT's config targets has no tensors: the file was cut."""
    config = file.config
    assert config is not None
    if not config.targets_known:
        return
    have = {site.path for site, _ in bound.chosen}
    missing = []
    for path, site in state.sites.items():
        if path in have or site.kind.name in ("experts", "router"):
            continue
        if site.kind.name == "qkv":
            if not path.endswith(".in_proj_weight"):
                continue
            path = path.removesuffix(".in_proj_weight")
        if config.targeted(resolver.original(path)):
            missing.append(site.path)
    if missing:
        raise CheckpointError(
            f"'{file.where}' targets {len(missing)} sites of this model for which it holds no tensors: "
            f"{some(missing)}. The file is incomplete, or it is for another model; nothing was loaded."
        )
    for name in config.values.get("modules_to_save") or ():
        if not any(s.path.endswith(name) for s, m in bound.chosen if m.whole):
            found = [p for p, _ in state.root.named_modules() if p.endswith(name)]
            if found:
                raise CheckpointError(
                    f"'{file.where}' lists '{name}' in modules_to_save but holds no tensors for {some(found)}."
                )


def _base_copies(file: AdapterFile, copies: Mapping[str, str], resolver: Resolver, bound: Bound) -> None:
    """Check embeddings that were saved along with an adapter against the base, and carry those that differ
    as whole modules.
    """
    full = whole_module()
    for path, key in copies.items():
        module_path, _, name = path.rpartition(".")
        site = resolver.whole(module_path)
        own = site.owner._parameters.get(name) if site is not None else None
        if site is None or own is None or not _is_embedding(site.owner, resolver.state.root):
            raise CheckpointError(
                f"'{file.where}' holds the tensor '{key}', which is neither a factor nor one of modules_to_save nor an "
                f"embedding of {type(resolver.state.root).__name__}; nothing was loaded."
            )
        value = file.read(key)
        if value.shape != own.shape:
            raise CheckpointError(
                f"'{file.where}' was trained with an embedding of {tuple(value.shape)} at '{site.path}', "
                f"this model has {tuple(own.shape)}. Resize it first: "
                f"model.resize_token_embeddings({value.shape[0]})."
            )
        if torch.equal(value.to(own.dtype), own.detach().to(value.device)) or _lacks_start(value, site, bound):
            bound.verified += 1
            bound.notes.append(f"'{key}' equals the base's own and was left out")
            continue
        if any(s.owner is site.owner for s, _ in bound.chosen):
            raise CheckpointError(
                f"'{file.where}' holds another base weight for '{site.path}', which it adapts too: it was "
                "made for another base."
            )
        bound.values[f"{site.path}.{name}"] = value
        bound.chosen.append((site, full))
        bound.notes.append(f"'{site.path}' differs from the base and is carried whole")


def _lacks_start(value: Tensor, module: Site, bound: Bound) -> bool:
    """Whether a saved weight is the base's own without the start that an adapter took out of it, to rounding."""
    for site, method in bound.chosen:
        form = method.peft_form
        if site.owner is not module.owner or form is None or not form.computed or not isinstance(method, Bottleneck):
            continue
        start = {n: bound.values[f"{site.path}.{n}"].float() for n in form.computed}
        trained = {n: torch.zeros(spec.shape) for n, spec in method.tensors(site).items() if n not in start}
        own = site.matrix().float().cpu()
        left = own + method.delta({**trained, **{n: t.cpu() for n, t in start.items()}}, site)
        apart = site.kind.to_matrix(site, value.float().cpu()) - left
        rough = 1e-3 if value.dtype.itemsize > 2 else 2e-2
        return bool(apart.norm() <= rough * own.norm())
    return False


def _is_embedding(module: nn.Module, root: nn.Module) -> bool:
    getter = getattr(root, "get_output_embeddings", None)
    return isinstance(module, nn.Embedding) or (callable(getter) and getter() is module)


def _bind_single(file: AdapterFile, state: ModelState, bound: Bound) -> None:
    """Choose the components of a pipeline's file that this model is, and bind them."""
    groups: dict[str, list[StoredSite]] = {}
    for part in file.sites.values():
        groups.setdefault(part.component, []).append(part)
    resolver = Resolver(state, flat=file.flat)
    placed = {c: _single_sites(file, parts, resolver) for c, parts in groups.items()}
    whole = [c for c, pairs in placed.items() if all(s is not None and _fits(file, p, s) for p, s in pairs)]
    if not whole:
        best = max(placed, key=lambda c: sum(s is not None for _, s in placed[c]))
        lacking = [p for p, s in placed[best] if s is None]
        if lacking:
            raise resolver.missing(lacking[0].path, file.where, some(lacking[0].keys.values(), 2))
        whole = [best]  # every site is there; a shape differs, and the check of shapes says which
    places: dict[str, str] = {}
    for component in whole:
        for part, site in placed[component]:
            assert site is not None
            if site.path in places:
                raise CheckpointError(
                    f"'{file.where}' has two components, '{places[site.path]}' and '{component}', that both "
                    "fit this model; split the file."
                )
            places[site.path] = component
            _put(file, part, site, bound)
            bound.paths[part.path] = site.path
        if {part.path for part, _ in placed[component]} != {part.path for part in groups[component]}:
            bound.notes.append(flux.NOTE)
    for component in groups.keys() - set(whole):
        count = sum(len(p.keys) for p in groups[component])
        bound.elsewhere += count
        bound.notes.append(
            f"{count} tensors of '{component}' belong to another model of the pipeline and were left out"
        )
    bound.notes += resolver.notes


def _single_sites(
    file: AdapterFile, parts: Sequence[StoredSite], resolver: Resolver
) -> list[tuple[StoredSite, Site | None]]:
    """Return what is stored with its sites; layers of the original Flux in parts, where the model has diffusers'."""
    placed: list[tuple[StoredSite, Site | None]] = []
    for part in parts:
        site = _single_site(part, resolver)
        cut = flux.placed(file, part, resolver.find_dotted) if site is None else None
        placed += cut if cut is not None else [(part, site)]
    return placed


def _single_site(part: StoredSite, resolver: Resolver) -> Site | None:
    joint = "_" if resolver._flat is not None else "."
    inner = resolver.find(f"{part.component}{joint}{part.path}") if part.component else None
    found = inner or resolver.find(part.path)
    # what CLIP's text models put around their layers until transformers 5
    around = f"text_model{joint}"
    other = part.path.removeprefix(around) if part.path.startswith(around) else f"{around}{part.path}"
    return found or resolver.find(other)


def _fits(file: AdapterFile, part: StoredSite, site: Site) -> bool:
    """Whether the outer sizes of A and B are those of the site."""
    shapes = {n: t.shape for n, t in part.values.items()} if part.values is not None else {}
    if file.file is not None and not shapes:
        shapes = {n: torch.Size(file.file.places[key].shape) for n, key in part.keys.items()}
    a, b = shapes["A"], shapes["B"]
    return b[0] == site.out_features and (math.prod(a[1:]) == site.in_features or "mid" in part.keys)


def renamed(mark: Fingerprint, paths: Mapping[str, str]) -> Fingerprint:
    """Return a fingerprint with the file's site paths replaced by the model's."""
    if all(paths.get(p, p) == p for p in mark.sites):
        return mark
    return Fingerprint({paths.get(p, p): value for p, value in mark.sites.items()}, mark.base)
