"""Calibration: what a method may see of the data before training, and what it does after a step that is not
gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.errors import AdapterError, SiteError
from lorry.core.forward.entry import Entry, TensorHome
from lorry.core.forward.exchange import exchanged
from lorry.core.life.adapter import Adapter
from lorry.core.method.base import Method
from lorry.core.method.spec import Observed
from lorry.core.method.start import fresh, mix_seed
from lorry.core.receipt import Receipt
from lorry.core.sites.site import Site
from lorry.core.sites.storage import Dense, storage_of

LossFn = Callable[[nn.Module, Any], Tensor]


def needs_calibration(adapter: Adapter) -> bool:
    """Whether the adapter's method wants to see calibration batches that it has not seen yet."""
    wants = any(e.method.calibration != "none" for e in adapter.entries.values())
    return wants and "calibration" not in adapter.metadata


def calibrate(adapter: Adapter, batches: Iterable[Any], loss_fn: LossFn, *, components: int = 256) -> Receipt:
    """Run batches through the frozen base with all adapters off, and let the method set its tensors.

    Args:
        adapter: a fresh adapter whose method declares `calibration`.
        batches: a few batches; each counts the same.
        loss_fn: called with the model and a batch; returns the scalar loss. Where the method wants inputs only it need
            not return anything, and it may give a padding mask by `lorry.context`, so that padding is left out.
        components: how many directions of each layer's inputs are kept; exact for layers that are not wider.

    Raises:
        AdapterError: the method takes no calibration, an adapter is merged into the base, or there are no batches;
            nothing is changed then.
        SiteError: a site whose weight or input cannot be observed.
    """
    wanted = {path: e for path, e in adapter.entries.items() if e.method.calibration != "none"}
    state = adapter.state
    if not wanted:
        raise AdapterError(f"Adapter '{adapter.name}' ({adapter.method.info.slug}) takes no calibration.")
    if state.merged:
        raise AdapterError(
            f"Adapter '{state.merged[0]}' is merged into the base; unmerge it before calibrating another one."
        )
    by_gradient = [e.site for e in wanted.values() if e.method.calibration == "gradients"]
    by_inputs = [e.site for e in wanted.values() if e.method.calibration == "inputs"]
    watch_gradients, watch_inputs = _Gradients(by_gradient), _Inputs(by_inputs, components)
    count = 0
    with _plain(adapter), ExitStack() as stack:
        stack.enter_context(watch_gradients.watching())
        stack.enter_context(watch_inputs.watching(adapter))
        for batch in batches:
            with torch.set_grad_enabled(bool(by_gradient)):
                loss = loss_fn(state.root, batch)
                if by_gradient:
                    loss.backward()
            count += 1
    if not count:
        raise AdapterError("Calibration was given no batches.")
    seen = {**watch_gradients.result(count), **watch_inputs.result()}
    _apply(adapter, {path: entry.method for path, entry in wanted.items()}, seen)
    adapter.metadata["calibration"] = {"batches": count, "sites": len(wanted)}
    state.changed()
    return Receipt("calibrate", adapter.name, len(seen), len(wanted), len(wanted), "match")


def finish_step(
    adapter: Adapter, step: int, total: int, records: Mapping[str, Mapping[str, Tensor]] | None = None
) -> None:
    """Let the adapter's methods update what is not gradient.

    It is to be called after the optimizer's step and before the gradients are cleared.

    Args:
        adapter: the adapter that was trained.
        step: number of this optimizer step, from 1.
        total: number of all steps that are planned.
        records: by site path, what `Call.record` kept in this step.
    """
    with torch.no_grad():
        for path, entry in adapter.entries.items():
            if type(entry.method).after_step is not Method.after_step:
                entry.method.after_step(entry.tensors(), entry.site, (records or {}).get(path, {}))
        for method, entries in adapter.groups().items():
            if type(method).balance is not Method.balance:
                method.balance([(e.site, e.tensors()) for e in entries.values()], step, total)


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
            _exchange(adapter, path, to, seed)
        adapter.train(was)
    with torch.no_grad():
        for path in methods:
            entry = adapter.entries.get(path)
            if entry is not None:
                generator = torch.Generator().manual_seed(mix_seed(seed, path, "prepare"))
                entry.method.prepare(entry.tensors(), entry.site, seen[path], generator)


def _exchange(adapter: Adapter, path: str, method: Method | None, seed: int) -> None:
    """Give a site another method (other options), or take it out of the adapter."""
    old = adapter.entries[path]
    if method is None:
        del adapter.entries[path]
        return
    dtype = next(t.dtype for n, t in old.home.tensors().items() if old.home.specs[n].dtype is None)
    specs = method.layout([old.site]).sites[path]
    tensors = {k: fresh(s, mix_seed(seed, f"{path}.{k}"), dtype).to(old.site.device) for k, s in specs.items()}
    adapter.entries[path] = Entry(old.name, old.site, method, TensorHome(specs, tensors), old.shared)


class _Gradients:
    """Collects the gradient of each site's weight, one layer at a time: it is taken to the CPU and freed as
    soon as it is there.

    Each site sees its weight as a leaf of its own that shares the memory, so a tied weight gives each of its
    sites that site's share, and a layer that is called twice gives the sum of both calls.
    """

    def __init__(self, sites: list[Site]) -> None:
        self.sites = sites
        self.sums: dict[str, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while the context lasts."""
        pairs, handles = [], []
        for site in self.sites:
            if isinstance(storage_of(site), Dense):
                leaf = site.stored.detach().requires_grad_()
                leaf.register_post_accumulate_grad_hook(lambda t, s=site: self._harvest(s, t))
                pairs.append((site.holder, site.parameter, leaf))
            elif site.kind.additive:
                handles.append(site.owner.register_forward_hook(lambda m, x, y, s=site: self._probe(s, x[0], y)))
            else:
                raise SiteError(f"'{site.path}' is quantised inside a larger module; its gradient cannot be observed.")
        try:
            with exchanged(pairs):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _harvest(self, site: Site, leaf: Tensor) -> None:
        assert leaf.grad is not None
        self._add(site, site.kind.to_matrix(site, leaf.grad))
        leaf.grad = None

    def _add(self, site: Site, gradient: Tensor) -> None:
        gradient = gradient.detach().to("cpu", torch.float32)
        total = self.sums.get(site.path)
        self.sums[site.path] = gradient.clone() if total is None else total.add_(gradient)

    def _probe(self, site: Site, x: Tensor, output: Tensor) -> Tensor:
        """Observe a weight that is not a floating tensor through the layer's input and the gradient of its
        output.
        """
        x = x.detach()
        if not output.requires_grad:
            output = output.detach().requires_grad_()

        def receive(gradient: Tensor) -> None:
            with torch.enable_grad():
                stand_in = torch.zeros(site.shape, dtype=gradient.dtype, device=gradient.device, requires_grad=True)
                y = site.kind.dense(site, x.to(gradient.dtype) if x.is_floating_point() else x, stand_in)
                (found,) = torch.autograd.grad(y, stand_in, gradient)
            self._add(site, found)

        output.register_hook(receive)
        return output

    def result(self, batches: int) -> dict[str, Observed]:
        """Return the mean gradient of each site; zero where the loss does not depend on it."""
        none = [s.path for s in self.sites if s.path not in self.sums]
        if len(none) == len(self.sites) and none:
            raise AdapterError(f"The calibration loss depends on none of the {len(none)} sites.")
        zeros = {s.path: s for s in self.sites if s.path in none}
        found = {path: Observed(gradient=total / batches) for path, total in self.sums.items()}
        return {**found, **{path: Observed(gradient=torch.zeros(site.shape)) for path, site in zeros.items()}}


class _Inputs:
    """Collects the covariance of each site's inputs as a few rows (incremental principal components, Ross et
    al. 2008).
    """

    def __init__(self, sites: list[Site], components: int) -> None:
        self.components = components
        self.sites = sites
        self.seen: dict[str, Observed] = {}

    @contextmanager
    def watching(self, adapter: Adapter) -> Iterator[None]:
        """Watch while the context lasts."""
        handles = []
        for site in self.sites:
            if site.kind.name != "linear":
                raise SiteError(f"'{site.path}' is a {site.kind.name} site; inputs are observed at linear sites only.")

            def hook(module: nn.Module, args: Any, kwargs: Any, site: Site = site) -> None:
                x = args[0] if args else next(iter(kwargs.values()))
                mask = adapter.state.context.padding_mask
                kept = x[mask.to(x.device)] if mask is not None and mask.shape == x.shape[:-1] else x
                self._add(site.path, kept.detach().reshape(-1, kept.shape[-1]).float())

            handles.append(site.owner.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, path: str, x: Tensor) -> None:
        if not len(x):
            return
        mean = x.mean(0)
        rows = x - mean
        variance = float(rows.square().sum())
        before = self.seen.get(path)
        count = len(x)
        if before is not None and before.inputs is not None and before.mean is not None:
            old, total = before.mean.to(x), before.count + len(x)
            between = (before.count * len(x) / total) ** 0.5 * (old - mean)
            rows = torch.cat([before.inputs.to(x), rows, between.unsqueeze(0)])
            variance += before.variance + float(between.square().sum())
            mean, count = old + (mean - old) * (len(x) / total), total
        if len(rows) > self.components:
            _, s, vt = torch.linalg.svd(rows, full_matrices=False)
            rows = (s.unsqueeze(-1) * vt)[: self.components]
        self.seen[path] = Observed(inputs=rows.cpu(), mean=mean.cpu(), count=count, variance=variance)

    def result(self) -> dict[str, Observed]:
        """Return what was seen of each site."""
        for site in self.sites:
            if site.path not in self.seen:
                raise SiteError(f"'{site.path}' saw no input in calibration.")
        return self.seen
