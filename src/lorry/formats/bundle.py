"""Bundles: one adapter over several roots (U-Net and text encoders, a vision tower and a language model) in one file.

A bundle is a folder like any other of Lorry's: the tensors of root R are called ``R/site.tensor``, and ``lorry.json``
has a section with fingerprint, methods and sites for each root. Single files of diffusion tools, whose names begin
with ``unet.`` or ``text_encoder.``, open as bundles too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lorry.core.errors import AdapterError, CheckpointError, some
from lorry.core.life.adapter import Adapter
from lorry.core.life.api import install
from lorry.core.life.state import unwrapped
from lorry.core.receipt import Receipt
from lorry.formats.file import AdapterFile
from lorry.formats.load import built_for
from lorry.formats.reader import open_adapter
from lorry.formats.registry import LOADERS
from lorry.formats.save import save_adapter
from lorry.formats.snapshot import as_file, is_sharded

_ROOT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-]{0,127}")


def bundled(
    parts: Mapping[str, Adapter | AdapterFile], name: str = "default", metadata: Mapping[str, Any] | None = None
) -> AdapterFile:
    """Return one adapter as data over several roots.

    Parameters
    ----------
    parts
        Name of each root (letters, digits, ``_`` and ``-``; diffusers' own names such as ``unet`` and
        ``text_encoder`` are read by other tools) -> its adapter.
    name
        Of the whole.
    metadata
        Of the whole; those of the parts stay with them.

    Raises
    ------
    AdapterError
        There are no parts, or the name of a root is not well formed.
    """
    wrong = [root for root in parts if not isinstance(root, str) or not _ROOT.fullmatch(root)]
    if wrong or not parts:
        raise AdapterError(
            f"A bundle needs at least one root, named by letters, digits, '_' and '-'; found {some(map(str, parts))}."
        )
    files = {root: as_file(part, copy=False) for root, part in parts.items()}
    sites = {}
    for root, file in files.items():
        for path, stored in file.sites.items():
            stored.component = root
            sites[f"{root}.{path}"] = stored
    first = next(iter(files.values()))
    return AdapterFile(
        name=name,
        method=first.method,
        sites=sites,
        metadata=dict(metadata or {}),
        loader="bundle",
        components=files,
    )


def save_bundle(
    parts: Mapping[str, Adapter | AdapterFile],
    path: str | os.PathLike[str],
    *,
    name: str = "default",
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = True,
) -> Receipt:
    """Write the adapters of several roots as one folder, in one step.

    Parameters
    ----------
    parts, name, metadata
        As for `bundled`.
    path
        The folder.
    overwrite
        Replace an adapter that lies there.

    Raises
    ------
    AdapterError
        The names of the roots are not well formed, or tensors are sharded.
    CheckpointError
        A tensor is empty or not finite, or the disk refuses; what was there before is left.
    """
    if any(is_sharded(p) for p in parts.values()):
        raise AdapterError("A bundle needs whole tensors: save each adapter, load it in one process, bundle it there.")
    return save_adapter(bundled(parts, name, metadata), path, overwrite=overwrite, format="lorry")


def load_bundle(
    roots: Mapping[str, nn.Module],
    path: str | os.PathLike[str] | AdapterFile,
    *,
    name: str | None = None,
    trainable: bool = False,
    activate: bool = True,
    check_base: bool = True,
    dtype: torch.dtype | None = None,
) -> dict[str, Adapter]:
    """Load one adapter onto several roots: onto all of those that it has, or onto none.

    Parameters
    ----------
    roots
        Name -> model; a root that the file has nothing for carries no adapter afterwards.
    path
        A bundle of Lorry's, a single file with the models of a pipeline, or an opened one.
    name
        On every root; the name it was saved under if not given.
    trainable, activate, check_base, dtype
        As in `lorry.load`.

    Returns
    -------
    The adapter of each root that the file has one for.

    Raises
    ------
    CheckpointError
        The file is no bundle, or has a root that was not given; or as in `lorry.load`.
    FingerprintError, AdapterError, SiteError
        As in `lorry.load`. All roots are as they were then.
    """
    file = open_adapter(path)
    try:
        _check_roots(file, roots)
        file.read_all()
        built = {
            root: built_for(part, roots[root], name=name or part.name, check_base=check_base, dtype=dtype)
            for root, part in file.components.items()
        }
    finally:
        if file is not path:
            file.close()
    done: list[Adapter] = []
    try:
        for adapter in built.values():
            adapter.state.check_owners(adapter.sites)  # a root may be a part of one before it
            done.append(install(adapter, trainable=trainable, activate=activate))
    except BaseException:
        for adapter in reversed(done):
            adapter.detach()
        raise
    return built


def _check_roots(file: AdapterFile, roots: Mapping[str, nn.Module]) -> None:
    if not file.components:
        raise CheckpointError(f"'{file.where}' holds an adapter of one model; load it with lorry.load.")
    for root in file.components:
        if root not in roots:
            raise missing_root(file, root, roots)

    models = [unwrapped(roots[root]) for root in file.components]
    if len({id(m) for m in models}) != len(models):
        raise AdapterError(f"Two of the roots {some(file.components)} are one model; each needs a model of its own.")


def missing_root(file: AdapterFile, root: str, roots: Iterable[str]) -> CheckpointError:
    """Return the error of a file that has an adapter for a root that was not given.

    Parameters
    ----------
    file
        With the adapter.
    root
        Where it belongs, e.g. ``text_encoder``.
    roots
        Names of the models that were given.
    """
    given = list(roots)
    rest = [name for name in file.components if name in given]
    each = f", or load what it has for {some(rest)} alone, each with lorry.open(path).components[name].load(model)"
    return CheckpointError(
        f"'{file.where}' has an adapter for the root '{root}', which was not given; given are {some(given)}. Give the "
        f"model '{root}', too (a pipeline has to be made with it){each if rest else ''}."
    )


def _load_single(file: AdapterFile, model: nn.Module, **options: Any) -> Adapter:
    """Refuse to load a bundle onto one model, unless it has one root only."""
    if len(file.components) != 1:
        raise CheckpointError(
            f"'{file.where}' is one adapter over the roots {some(file.components)}. Load it with "
            "lorry.formats.bundle.load_bundle, or a single root with lorry.open(path).components[root].load(model)."
        )
    file.read_all()
    part = next(iter(file.components.values()))
    return part.load(model, **{**options, "transient": False})


LOADERS.add("bundle", _load_single)
