"""Calibration: what a method may see of the data before training, and what it does after a step that is not
gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.errors import AdapterError
from lorry.core.forward.entry import Entry, TensorHome
from lorry.core.life import duties
from lorry.core.life.adapter import Adapter
from lorry.core.life.probes import PROBES
from lorry.core.method.base import Method
from lorry.core.method.spec import Observed
from lorry.core.method.start import fresh, mix_seed
from lorry.core.receipt import Receipt
from lorry.core.sites.site import Site

LossFn = Callable[[nn.Module, Any], Tensor]


def needs_calibration(adapter: Adapter) -> bool:
    """Whether the adapter's method wants to see calibration batches that it has not seen yet."""
    wants = any(e.method.calibration != "none" for e in adapter.entries.values())
    return wants and "calibration" not in adapter.metadata


#: What methods call the probes in `Method.calibration`.
_PROBE_OF = {"gradients": "gradient", "inputs": "input"}


def calibrate(
    adapter: Adapter, batches: Iterable[Any], loss_fn: LossFn, *, components: int = 256, again: bool = False
) -> Receipt:
    """Run batches through the frozen base with all adapters off, and let the method set its tensors.

    Parameters
    ----------
    adapter
        A fresh adapter whose method declares `calibration`.
    batches
        A few batches; each counts the same.
    loss_fn
        Called with the model and a batch; returns the scalar loss. Where the method wants inputs only it need
        not return anything, and it may give a padding mask by `lorry.context`, so that padding is left out.
    components
        How many directions of each layer's inputs are kept; exact for layers that are not wider.
    again
        Set the tensors though the adapter is not fresh: what it learned is lost.

    Raises
    ------
    AdapterError
        The method takes no calibration, the adapter is not fresh, an adapter is fused into the base, or there are no
        batches; nothing is changed then.
    SiteError
        A site whose weight or input cannot be observed.
    """
    wanted = {path: e for path, e in adapter.entries.items() if e.method.calibration != "none"}
    if not wanted:
        raise AdapterError(f"Adapter '{adapter.name}' ({adapter.method.info.slug}) takes no calibration.")
    past = None if again else past_of(adapter)
    if past is not None:
        raise AdapterError(
            f"Adapter '{adapter.name}' {past}, and calibration sets its tensors anew: what it learned would be lost. "
            "Attach a fresh adapter and calibrate that one, or say again=True."
        )
    shown = 0

    def counted() -> Iterator[Any]:
        nonlocal shown
        for batch in batches:
            shown += 1
            yield batch

    by_probe: dict[str, list[Site]] = {}
    for entry in wanted.values():
        by_probe.setdefault(_PROBE_OF.get(entry.method.calibration, entry.method.calibration), []).append(entry.site)
    found = observe(adapter, by_probe, counted(), loss_fn, components=components)
    seen = {path: observed for sites in found.values() for path, observed in sites.items()}
    _apply(adapter, {path: entry.method for path, entry in wanted.items()}, seen)
    adapter.metadata["calibration"] = {"batches": shown, "sites": len(wanted)}
    adapter.state.changed()
    return Receipt("calibrate", adapter.name, len(seen), len(wanted), len(wanted), "match")


def observe(
    adapter: Adapter,
    probes: Mapping[str, Sequence[Site]],
    batches: Iterable[Any],
    loss_fn: LossFn,
    *,
    components: int = 256,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, dict[str, Observed]]:
    """Run batches through the bare base in evaluation mode, and return what probes see at sites.

    Parameters
    ----------
    adapter
        An adapter on the model; none applies meanwhile.
    probes
        Name of a probe (`lorry.core.life.probes.PROBES`) -> the sites that it watches.
    batches, loss_fn, components
        As in `calibrate`.
    options
        Further options of probes, by the names of these.

    Returns
    -------
    dict
        Probe -> site path -> what was seen.

    Raises
    ------
    AdapterError
        An adapter is fused into the base, there are no batches, or a probe that moves the weights is not alone.
    SiteError
        A site that a probe cannot watch.
    """
    state = adapter.state
    if state.fused:
        raise AdapterError(
            f"Adapter '{state.fused[0]}' is fused into the base; unfuse it before calibrating another one."
        )
    _check_alone(probes)
    watching = {
        name: PROBES.find(name)(sites, components, **(options or {}).get(name, {})) for name, sites in probes.items()
    }
    backward = any(probe.backward for probe in watching.values())
    count = 0
    with _plain(adapter), ExitStack() as stack:
        for probe in watching.values():
            stack.enter_context(probe.watching(adapter))
        for batch in batches:
            with torch.set_grad_enabled(backward):
                loss = loss_fn(state.root, batch)
                if backward:
                    loss.backward()
            count += 1
    if not count:
        raise AdapterError("Calibration was given no batches.")
    return {name: probe.result(count) for name, probe in watching.items()}


def _check_alone(probes: Mapping[str, Sequence[Site]]) -> None:
    """Raise `AdapterError` if a probe that moves the weights would watch beside others."""
    moving = [name for name in probes if PROBES.find(name).moves]
    if moving and len(probes) > 1:
        raise AdapterError(
            f"The probe '{moving[0]}' moves the weights between batches, so no other can watch beside it; observe with "
            "each by itself."
        )


def past_of(adapter: Adapter) -> str | None:
    """Return why an adapter is not fresh, as the rest of a sentence; None if it is."""
    if "calibration" in adapter.metadata:
        return "was calibrated already"
    if adapter.receipt.action != "attach" or "training" in adapter.metadata:
        return "was trained or loaded"
    if "start" in adapter.metadata:
        return None  # its tensors were set on purpose, so they say nothing
    seed = adapter.metadata.get("seed", 0)
    for prefix, home in adapter.homes():
        own = {}
        for name, tensor in home.tensors().items():
            own[name] = fresh(home.specs[name], mix_seed(seed, f"{prefix}.{name}"), tensor.dtype).to(tensor.device)
        entry = adapter.entries.get(prefix)
        if entry is not None and type(entry.method).setup is not Method.setup:
            entry.method.setup(own, entry.site, torch.Generator().manual_seed(mix_seed(seed, prefix, "setup")))
        if any(not torch.equal(own[name], tensor.detach()) for name, tensor in home.tensors().items()):
            return "is not as it was attached: it was trained or changed"
    return None


def finish_step(
    adapter: Adapter, step: int, total: int, records: Mapping[str, Mapping[str, Tensor]] | None = None
) -> None:
    """Let the adapter's methods update what is not gradient.

    It is to be called after the optimizer's step and before the gradients are cleared.

    Parameters
    ----------
    adapter
        The adapter that was trained.
    step
        Number of this optimizer step, from 1.
    total
        Number of all steps that are planned.
    records
        By site path, what `Call.record` kept in this step.
    """
    duties.attend(adapter, duties.RULES)
    with torch.no_grad():
        for path, entry in adapter.entries.items():
            if type(entry.method).after_step is not Method.after_step:
                entry.method.after_step(entry.tensors(), entry.site, (records or {}).get(path, {}))
        for method, entries in adapter.groups().items():
            if type(method).adjust is not Method.adjust:
                method.adjust([(e.site, e.tensors()) for e in entries.values()], step, total)


@contextmanager
def _plain(adapter: Adapter) -> Iterator[None]:
    """Run the bare base in evaluation mode, so that what is seen does not depend on dropout."""
    state = adapter.state
    modes = [(module, module.training) for module in state.root.modules()]
    runtime, scope = state.enter(None)
    state.root.eval()
    try:
        yield
    finally:
        state.leave(runtime, scope)
        for module, mode in modes:
            module.training = mode


def _apply(adapter: Adapter, methods: Mapping[str, Method], seen: Mapping[str, Observed]) -> None:
    """Exchange what allocation changes, then prepare every site."""
    groups: dict[Method, dict[str, Observed]] = {}
    for path, method in methods.items():
        groups.setdefault(method, {})[path] = seen[path]
    was = adapter.trainable
    seed = adapter.metadata.get("seed", 0)
    changes = {path: to for old, group in groups.items() for path, to in old.allocate(group).items()}
    if changes:
        adapter.train(False)
        for path, to in changes.items():
            exchange_method(adapter, path, to, seed)
        adapter.train(was)
    with torch.no_grad():
        for path in methods:
            entry = adapter.entries.get(path)
            if entry is not None:
                generator = torch.Generator().manual_seed(mix_seed(seed, path, "prepare"))
                entry.method.prepare(entry.tensors(), entry.site, seen[path], generator)


def exchange_method(adapter: Adapter, path: str, method: Method | None, seed: int) -> None:
    """Give a site of a frozen adapter another method (other options) with fresh tensors, or (None) take it out of the
    adapter.
    """
    old = adapter.entries[path]
    if method is None:
        del adapter.entries[path]
        return
    dtype = next(t.dtype for n, t in old.home.tensors().items() if old.home.specs[n].dtype is None)
    specs = method.layout([old.site]).sites[path]
    tensors = {k: fresh(s, mix_seed(seed, f"{path}.{k}"), dtype).to(old.site.device) for k, s in specs.items()}
    adapter.entries[path] = Entry(old.name, old.site, method, TensorHome(specs, tensors), old.shared)


def replace_entry(adapter: Adapter, path: str, method: Method, tensors: Mapping[str, Tensor]) -> None:
    """Give an adapter another method (other options) and other tensors at one site, in training too.

    Parameters
    ----------
    adapter
        The adapter; its tensors elsewhere, and their parameters, stay as they are.
    path
        The site.
    method
        The method there from now on.
    tensors
        A value for every tensor of the method at the site, in the shape that it has there.

    Raises
    ------
    AdapterError
        Tensors that the method does not have there, or in another shape; nothing is changed then.
    """
    old = adapter.entries[path]
    specs = method.layout([old.site]).sites[path]
    here, there = ({n: tuple(v.shape) for n, v in group.items()} for group in (tensors, specs))
    if old.shared is not None or here != there:
        raise AdapterError(
            f"Adapter '{adapter.name}' needs tensors of its own with the shapes {there} at '{path}', found {here}"
            f"{' and tensors that it shares with other sites' if old.shared is not None else ''}."
        )
    was = adapter.trainable
    values = {n: t.detach().to(old.site.device).clone() for n, t in tensors.items()}
    old.home.unregister()
    adapter.entries[path] = Entry(old.name, old.site, method, TensorHome(specs, values), old.shared)
    if was:
        adapter.train()
    adapter.state.changed()
