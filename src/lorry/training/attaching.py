"""The adapter of a job on its base, with those that it combines."""

from __future__ import annotations

from pathlib import Path
from weakref import WeakKeyDictionary

from torch import nn

from lorry.core.errors import AdapterError, OptionError, some
from lorry.core.life.adapter import Adapter
from lorry.core.life.api import adapters, attach
from lorry.core.method.base import Method
from lorry.formats.load import load
from lorry.formats.mixture import from_adapters

from .jobs import DTYPES, Job

#: The adapter of a job -> those that were loaded for it to combine.
_LOADED: WeakKeyDictionary[Adapter, list[Adapter]] = WeakKeyDictionary()
#: An adapter that was loaded to be combined -> where from.
_SOURCES: WeakKeyDictionary[Adapter, str] = WeakKeyDictionary()


def attach_job(model: nn.Module, job: Job) -> Adapter:
    """Attach the adapter of a job to its base, not active; adapters that it combines are loaded before it."""
    experts = job.experts()
    if not experts:
        return _beside_members(model, job)
    weights = {name: weight for name, (_, weight) in experts.items() if weight is not None}
    made = from_adapters(
        model,
        job.make_method(),
        {name: path for name, (path, _) in experts.items()},
        weights=weights or None,
        name=job.name,
        seed=job.seed,
        dtype=DTYPES[job.dtype],
        activate=False,
    )
    if not made.parameters():
        made.detach()
        raise OptionError(
            f"Job '{job.name}': {made.method.info.slug} built from {len(experts)} adapters has nothing left to train. "
            "Give more adapters, or options that let it train them."
        )
    return made


def detach_job(adapter: Adapter) -> None:
    """Detach the adapter of a job, and those that were loaded for it unless another one combines them."""
    loaded = _LOADED.pop(adapter, [])
    adapter.detach()
    _release(loaded)


def _beside_members(model: nn.Module, job: Job) -> Adapter:
    """Load what a job combines, and attach its adapter."""
    loaded: list[Adapter] = []
    method, targets = job.make_method(), job.targets
    try:
        for name, path in job.combined().items():
            _member(model, job, name, path, loaded)
        if job.combined():
            method = job.over_members(method)
            if targets == Job.targets:  # nobody said where, so it is where all of its members are
                targets = _common_sites(model, job)
        made = _attached(model, job, method, targets)
    except BaseException:
        _release(loaded)
        raise
    if job.combined():
        made.metadata["members"] = job.combined()
    if loaded:
        _LOADED[made] = loaded
    return made


def _attached(model: nn.Module, job: Job, method: Method, targets: object) -> Adapter:
    return attach(
        model,
        method,
        targets=targets,  # type: ignore[arg-type]
        name=job.name,
        seed=job.seed,
        exclude=job.exclude,
        layers=job.layers,
        site_options=job.site_options,
        train_also=job.modules_to_save,
        dtype=DTYPES[job.dtype],
        activate=False,
    )


def _member(model: nn.Module, job: Job, name: str, path: str, loaded: list[Adapter]) -> None:
    """Let a member be on the model under its name, frozen and not active."""
    there = adapters(model).get(name)
    if there is not None:
        if path == name or _SOURCES.get(there) == path:
            loaded += [there] if there in _SOURCES else []
            return
        raise AdapterError(
            f"Job '{job.name}' is to load a member '{name}' from '{path}', but another adapter of this name is on the "
            "model. Give the member another name: members: {NAME: PATH}."
        )
    if not Path(path).exists():
        raise AdapterError(
            f"Job '{job.name}': the member '{path}' is neither an adapter on this model ({some(adapters(model))}) nor "
            "a file. Give the path of an adapter."
        )
    loaded.append(load(model, path, name=name, activate=False))
    _SOURCES[loaded[-1]] = path


def _common_sites(model: nn.Module, job: Job) -> list[str]:
    """Return the sites on which all members sit."""
    found = [list(adapters(model)[name].entries) for name in job.combined()]
    common = [path for path in found[0] if all(path in other for other in found)]
    if not common:
        raise AdapterError(
            f"Job '{job.name}': no layer carries all of the members {some(job.combined())}. Combine adapters with "
            "layers in common, or say the targets."
        )
    return common


def _release(loaded: list[Adapter]) -> None:
    """Detach members that were loaded, unless another adapter combines them."""
    kept = {id(adapter) for others in _LOADED.values() for adapter in others}
    for adapter in loaded:
        if id(adapter) not in kept and adapters(adapter.state.root).get(adapter.name) is adapter:
            adapter.detach()
