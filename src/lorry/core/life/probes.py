"""Probes: what calibration observes at sites while batches run through the bare base; a new one registers itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorry.core.errors import AdapterError, SiteError
from lorry.core.forward.exchange import exchanged
from lorry.core.life.adapter import Adapter
from lorry.core.method.spec import Observed
from lorry.core.registry import Registry
from lorry.core.sites.site import Site
from lorry.core.sites.storage import Dense, storage_of


class Probe(ABC):
    """Watches some sites in forward and backward passes.

    Parameters
    ----------
    sites
        Where.
    components
        How many directions of inputs or output gradients are kept for each site.
    """

    #: Whether it needs the backward pass of a loss.
    backward: ClassVar[bool] = True
    #: Whether it changes what other probes would see.
    moves: ClassVar[bool] = False

    def __init__(self, sites: Sequence[Site], components: int = 256) -> None:
        self.sites = list(sites)
        self.components = components

    @abstractmethod
    def watching(self, adapter: Adapter) -> AbstractContextManager[Any]:
        """Watch while the context lasts."""

    @abstractmethod
    def result(self, batches: int) -> dict[str, Observed]:
        """Return what was seen of each site in so many batches."""


P = TypeVar("P", bound=type[Probe])
PROBES: Registry[type[Probe]] = Registry("probe")


def register_probe(name: str) -> Callable[[P], P]:
    """Return a decorator that registers a probe under a name."""

    def add(cls: P) -> P:
        PROBES.add(name, cls)
        return cls

    return add


@register_probe("gradient")
class WeightGradients(Probe):
    """Collects the gradient of each site's weight, one layer at a time: it is taken to the CPU and freed as
    soon as it is there.

    Each site sees its weight as a leaf of its own that shares the memory, so a tied weight gives each of its
    sites that site's share, and a layer that is called twice gives the sum of both calls.
    """

    def __init__(self, sites: Sequence[Site], components: int = 256) -> None:
        super().__init__(sites, components)
        self.sums: dict[str, Tensor] = {}

    @contextmanager
    def watching(self, adapter: Adapter) -> Iterator[None]:
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
        zero = {site.path: torch.zeros(site.shape) for site in self.sites}
        means = {path: self.sums[path] / batches if path in self.sums else zero[path] for path in zero}
        return {site.path: Observed(gradient=_over_processes(means[site.path], site)) for site in self.sites}


def _over_processes(mean: Tensor, site: Site) -> Tensor:
    """Return the mean of a tensor over data-parallel processes, all of which must take part; itself in one process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return mean
    # the backend of the site's device is the one that is sure to be there
    total = mean.to(site.device)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).cpu()


@register_probe("weight change")
class WeightChange(Probe):
    """Sees how each site's weight changes where every batch is one step of full fine-tuning; the base stays as it is.

    The steps are AdaLomo's (arXiv 2310.10195): a factored second moment, and an update relative to the weight's size.
    Each weight moves in the backward pass as soon as its gradient is there, so that one gradient lies in memory at a
    time; the copies of the weights that move do lie there.

    Parameters
    ----------
    sites, components
        As for every probe.
    learning_rate
        Of the steps.
    """

    moves: ClassVar[bool] = True

    def __init__(self, sites: Sequence[Site], components: int = 256, learning_rate: float = 5e-4) -> None:
        super().__init__(sites, components)
        self.learning_rate = learning_rate
        self.originals: dict[str, Tensor] = {}
        self.changes: dict[str, Tensor] = {}
        #: Site path -> steps done, and the running means of the squared gradient over columns and over rows.
        self.moments: dict[str, tuple[int, Tensor, Tensor]] = {}

    @contextmanager
    def watching(self, adapter: Adapter) -> Iterator[None]:
        """Watch while the context lasts."""
        pairs = []
        for site in self.sites:
            if not isinstance(storage_of(site), Dense):
                raise SiteError(
                    f"'{site.path}' is quantised, and full fine-tuning moves floating-point weights only. Load the "
                    "base without quantising it, or take another start."
                )
            leaf = site.stored.detach().clone().requires_grad_()
            self.changes[site.path] = torch.zeros(site.shape, device=site.device)
            leaf.register_post_accumulate_grad_hook(lambda t, s=site: self._step(s, t))
            pairs.append((site.holder, site.parameter, leaf))
            self.originals[site.path] = site.stored
        with exchanged(pairs):
            yield

    def _step(self, site: Site, leaf: Tensor) -> None:
        assert leaf.grad is not None
        gradient = site.kind.to_matrix(site, leaf.grad).float()
        leaf.grad = None
        squares = gradient.square() + 1e-30
        step, rows, columns = self.moments.get(site.path, (0, squares.mean(-1), squares.mean(-2)))
        step += 1
        keep = 1 - step**-0.8
        rows = keep * rows + (1 - keep) * squares.mean(-1)
        columns = keep * columns + (1 - keep) * squares.mean(-2)
        self.moments[site.path] = step, rows, columns
        root = (rows.unsqueeze(-1) * columns.unsqueeze(-2) / rows.mean(-1)[..., None, None]).sqrt()
        update = gradient / root
        change, base = self.changes[site.path], site.kind.to_matrix(site, self.originals[site.path].detach()).float()
        size = (base + change).square().mean().sqrt().clamp_min(1e-3)
        change.sub_(self.learning_rate * size * update / update.square().mean().sqrt().clamp_min(1))
        with torch.no_grad():
            leaf.copy_(site.kind.to_weight(site, base + change).view_as(leaf))

    def result(self, batches: int) -> dict[str, Observed]:
        """Return the change of each weight."""
        return {path: Observed(change=change.cpu()) for path, change in self.changes.items()}


class _Directions(Probe):
    """Collects the covariance of vectors as a few rows (incremental principal components, Ross et al. 2008)."""

    def __init__(self, sites: Sequence[Site], components: int = 256) -> None:
        super().__init__(sites, components)
        self.seen: dict[str, Observed] = {}

    def add(self, path: str, x: Tensor) -> None:
        """Take vectors ``(count, width)`` of a site in."""
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

    def result(self, batches: int) -> dict[str, Observed]:
        """Return what was seen of each site."""
        for site in self.sites:
            if site.path not in self.seen:
                raise SiteError(f"'{site.path}' saw no input in calibration.")
        return self.seen

    def check_linear(self) -> None:
        """Raise `SiteError` for a site whose input is no sequence of vectors."""
        for site in self.sites:
            if site.kind.name != "linear":
                raise SiteError(f"'{site.path}' is a {site.kind.name} site; inputs are observed at linear sites only.")


def _tokens(adapter: Adapter, x: Tensor) -> Tensor:
    """Return the vectors of all real tokens, ``(count, width)`` in float32."""
    mask = adapter.state.context.padding_mask
    kept = x[mask.to(x.device)] if mask is not None and mask.shape == x.shape[:-1] else x
    return kept.detach().reshape(-1, kept.shape[-1]).float()


@register_probe("input")
class Inputs(_Directions):
    """Collects the covariance of each site's inputs; padding that a context tells of is left out."""

    backward: ClassVar[bool] = False

    @contextmanager
    def watching(self, adapter: Adapter) -> Iterator[None]:
        """Watch while the context lasts."""
        self.check_linear()
        handles = []
        for site in self.sites:

            def hook(module: nn.Module, args: Any, kwargs: Any, site: Site = site) -> None:
                x = args[0] if args else next(iter(kwargs.values()))
                self.add(site.path, _tokens(adapter, x))

            handles.append(site.owner.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@register_probe("output gradient")
class OutputGradients(_Directions):
    """Collects the covariance of the gradients of each site's outputs (`Observed.inputs` are directions of them)."""

    @contextmanager
    def watching(self, adapter: Adapter) -> Iterator[None]:
        """Watch while the context lasts."""
        self.check_linear()
        handles = []
        for site in self.sites:

            def hook(module: nn.Module, args: Any, output: Tensor, site: Site = site) -> Tensor:
                # the base is frozen: before the first site there is nothing that asks for a gradient
                output = output if output.requires_grad else output.detach().requires_grad_()
                output.register_hook(lambda gradient: self.add(site.path, _tokens(adapter, gradient)))
                return output

            handles.append(site.owner.register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
