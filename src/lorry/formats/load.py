"""Loading an adapter onto a model: exact, or not at all."""

from __future__ import annotations

import os
import re

import torch
from torch import Tensor, nn

from lorry.core.errors import CheckpointError, some
from lorry.core.life.adapter import Adapter
from lorry.core.life.api import check_name, install
from lorry.core.life.build import build
from lorry.core.life.state import ModelState, open_state
from lorry.core.method.families import Bottleneck
from lorry.core.method.spec import TensorSpec
from lorry.core.receipt import FingerprintVerdict, Receipt
from lorry.core.sites.fingerprint import Fingerprint
from lorry.formats.bind import Bound, bind, renamed
from lorry.formats.file import AdapterFile
from lorry.formats.reader import open_adapter
from lorry.formats.registry import LOADERS
from lorry.formats.tensors import check_finite


def load(
    model: nn.Module,
    path: str | os.PathLike[str] | AdapterFile,
    *,
    name: str | None = None,
    trainable: bool = False,
    activate: bool = True,
    check_base: bool = True,
    dtype: torch.dtype | None = None,
    expect: str | None = None,
) -> Adapter:
    """Load an adapter onto a model; every tensor finds its place, or nothing is changed.

    Parameters
    ----------
    model
        The base.
    path
        Lorry's or PEFT's folder (of its other tuners too, if peft is installed), a single ``.safetensors`` file in
        kohya's or diffusers' naming, what a registered reader knows, or an opened adapter.
    name
        On the model; the name it was saved under if not given.
    trainable
        Go on training it: its tensors become parameters.
    activate
        Let it apply from now on.
    check_base
        Refuse a base that is not the one the adapter was made for, where the file says which.
    dtype
        Of the adapter's floating tensors; as in the file if not given.
    expect
        Slug of the method that the file must hold.

    Returns
    -------
    Adapter
        Its `receipt` says how many tensors were applied to how many sites, and whether the base matched.

    Raises
    ------
    CheckpointError, FingerprintError, AdapterError, SiteError
        What was expected and found; the model is as it was.
    """
    file = open_adapter(path)
    transient = not isinstance(path, AdapterFile)
    adapter: Adapter = LOADERS.find(file.loader)(
        file,
        model,
        name=name,
        trainable=trainable,
        activate=activate,
        check_base=check_base,
        dtype=dtype,
        expect=expect,
        transient=transient,
    )
    if transient:
        file.close()
    return adapter


def load_sites(
    file: AdapterFile,
    model: nn.Module,
    *,
    name: str | None = None,
    trainable: bool = False,
    activate: bool = True,
    check_base: bool = True,
    dtype: torch.dtype | None = None,
    expect: str | None = None,
    transient: bool = False,
) -> Adapter:
    """Load an opened adapter whose sites are known; options and errors as for `load`.

    `transient` says that nobody else uses the file's tensors, so that they need not be copied.
    """
    adapter = built_for(
        file, model, name=name, check_base=check_base, dtype=dtype, expect=expect, private=trainable or not transient
    )
    return install(adapter, trainable=trainable, activate=activate)


LOADERS.add("sites", load_sites)


def built_for(
    file: AdapterFile,
    model: nn.Module,
    *,
    name: str | None,
    check_base: bool,
    dtype: torch.dtype | None,
    expect: str | None = None,
    private: bool = True,
) -> Adapter:
    """Return the file's adapter for a model that does not know of it yet; the model is as it was."""
    state = open_state(model)
    name = name if name is not None else _name(file)
    check_name(name, state)
    file.check_method(expect)
    file.read_all()
    return _built(file, state, name, dtype, check_base=check_base, private=private)


def _built(
    file: AdapterFile,
    state: ModelState,
    name: str,
    dtype: torch.dtype | None,
    *,
    check_base: bool,
    private: bool,
) -> Adapter:
    bound = bind(file, state)
    _check_scales(file, bound)
    state.check_owners(site for site, _ in bound.chosen)
    found = state.fingerprint(base for site, at in bound.chosen for base in at.bases(site))
    mark, verdict = _base_verdict(file, bound, found, check_base)
    if file.loaded is not None:
        file.check_finite()
    else:
        check_finite(bound.values, file.where)
    values = _Values(file, bound, dtype, private=private)
    metadata = dict(file.metadata)
    seed = metadata.get("seed", 0)
    adapter = build(
        state,
        name,
        file.method,
        bound.chosen,
        dtype=dtype or values.dtype,
        values=values,
        seed=seed if isinstance(seed, int) else 0,
        metadata=metadata,
        fingerprint=found,
    )
    values.check_all_used()
    if mark is not None and verdict == "ignored":
        adapter.fingerprint = mark
    total, sites = file.tensor_count, len(bound.chosen)
    applied = total - bound.elsewhere
    adapter.receipt = Receipt("load", name, applied, total, sites, verdict, notes=tuple(bound.notes))
    return adapter


class _Values:
    """Gives `build` each tensor, checked and cast, and knows which were not asked for."""

    def __init__(self, file: AdapterFile, bound: Bound, dtype: torch.dtype | None, *, private: bool) -> None:
        self.where = file.where
        self.left = bound.values
        self.wanted = dtype
        self.private = private
        floating = (_computable(v.dtype) for v in bound.values.values() if v.is_floating_point())
        self.dtype = dtype or next(floating, torch.float32)

    def __call__(self, full: str, spec: TensorSpec) -> Tensor:
        value = self.left.pop(full, None)
        if value is None:
            raise CheckpointError(
                f"'{self.where}' lacks the tensor '{full}' of shape {tuple(spec.shape)}; nothing was "
                "loaded. The file is incomplete."
            )
        if value.shape != spec.shape:
            raise CheckpointError(
                f"'{self.where}': the tensor '{full}' must be of shape {tuple(spec.shape)} in this model, found "
                f"{tuple(value.shape)}; nothing was loaded. The model has another width, or rank and file disagree."
            )
        if spec.dtype is not None:
            if value.dtype != spec.dtype:
                raise CheckpointError(f"'{self.where}': the tensor '{full}' must be {spec.dtype}, found {value.dtype}.")
            if (wrong := spec.misplaced(value)) is not None:
                raise CheckpointError(
                    f"'{self.where}': the tensor '{full}' must hold {wrong}; nothing was loaded. The file is damaged, "
                    "or it is for a model of another width."
                )
        elif not value.is_floating_point():
            raise CheckpointError(f"'{self.where}': the tensor '{full}' must be floating, found {value.dtype}.")
        elif value.dtype != (dtype := self.wanted or _computable(value.dtype)):
            return value.to(dtype)
        if self.private:
            return value.clone(memory_format=torch.contiguous_format)
        # products of tensors that lie askew in memory round otherwise than those of the adapter that was saved
        aligned = value.is_contiguous() and value.data_ptr() % 64 == 0
        return value if aligned else value.clone(memory_format=torch.contiguous_format)

    def check_all_used(self) -> None:
        if self.left:
            raise CheckpointError(
                f"'{self.where}' holds {len(self.left)} tensors that its methods do not have at this "
                f"model's sites: {some(self.left)}; nothing was loaded."
            )


def _computable(dtype: torch.dtype) -> torch.dtype:
    """Return the type to compute in: bfloat16 for 8-bit types, all of whose values it has."""
    return torch.bfloat16 if dtype.itemsize == 1 else dtype


def _name(file: AdapterFile) -> str:
    cleaned = re.sub(r"[^A-Za-z0-9_.\-]+", "_", file.name).lstrip("_.-")
    return cleaned[:128] or "default"


def _check_scales(file: AdapterFile, bound: Bound) -> None:
    """Refuse scales that single precision does not hold: the forward pass could not apply them."""
    for site, method in bound.chosen:
        scale = method.scale(site) if isinstance(method, Bottleneck) else getattr(method, "alpha", None) or 0.0
        if not abs(scale) <= torch.finfo(torch.float32).max:
            raise CheckpointError(
                f"'{file.where}' scales the update at '{site.path}' by {scale:.3g}, which single precision does not "
                "hold; nothing was loaded. The file is damaged."
            )


def _base_verdict(
    file: AdapterFile, bound: Bound, found: Fingerprint, check: bool
) -> tuple[Fingerprint | None, FingerprintVerdict]:
    """Compare the base with the one that the file was made for; raise `FingerprintError` if they differ and
    `check` is set.
    """
    if file.fingerprint is None:
        return None, "unknown"
    mark = renamed(file.fingerprint, bound.paths)
    if check:
        return mark, mark.require(found, f"The adapter in '{file.where}'")
    verdict = mark.compare(found)
    return mark, "ignored" if verdict == "differs" else verdict
