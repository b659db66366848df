"""The link of an adapted module: it finds what applies, and hands the call to the path that computes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.errors import AdapterError
from lorry.core.forward import additive, compiled, exchanged, fused
from lorry.core.forward.active import Active, Terms
from lorry.core.forward.adapted import adapted_class
from lorry.core.forward.entry import Member
from lorry.core.forward.layer import Base, Layer, Now
from lorry.core.forward.orientation import check_first, rows_second, without_rows
from lorry.core.forward.runtime import Runtime, Runtimes
from lorry.core.method.context import Context
from lorry.core.method.layout import Pass
from lorry.core.sites.site import Site


class Link(Layer):
    """An adapted module and the runtimes of the model that it belongs to."""

    def __init__(self, owner: nn.Module, sites: list[Site], adapters: Mapping[str, Member], runtimes: Runtimes) -> None:
        super().__init__(owner, sites, adapters)
        self.runtimes = runtimes
        owner.__dict__["_lorry_link"] = self
        owner.__class__ = adapted_class(type(owner))

    def remove(self) -> None:
        """Give the module its own class and forward back."""
        owner = self.owner
        del owner.__dict__["_lorry_link"]
        owner.__class__ = self.original
        if self.own_forward is not None:
            owner.__dict__["forward"] = self.own_forward

    def forward(self, base: Base, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module with what applies."""
        base = self.own_forward or base
        if torch.compiler.is_compiling():
            return self._traced(base, args, kwargs)
        runtime = self.runtimes.current()
        now: Now = runtime
        active = runtime.active if runtime.inside is None else runtime.inside
        if torch._C._current_graph_task_id() != -1 and runtime.inside is None:  # a recomputation, or a hook in backward
            now = self.runtimes.moment()
            active = now.active
        if active is None and not runtime.taps:
            return base(*args, **kwargs)
        if now.passing is not None:
            now.passing.called.add(self.path)
        if active is not None and len(args) == 1 and not kwargs and not runtime.taps and not torch.is_grad_enabled():
            found = fused.ready(self, active, args[0])
            if found is not None:
                return found
        if self.sites[0].kind.additive:
            return self._additive(base, active, now, runtime, args, kwargs)
        return base(*args, **kwargs) if active is None else self._exchanged(base, active, now, runtime, args, kwargs)

    def _exchanged(self, base: Base, active: Active, now: Now, runtime: Runtime, args: Any, kwargs: Any) -> Any:
        """Run a module that uses its weights itself, or that a method runs as a whole."""
        if self.sites[0].kind.whole:
            return exchanged.by_rows(self, active, now, self._block(base, now, runtime), args, kwargs)

        def run(group: Active, of: exchanged.Of, args: Any, kwargs: Any) -> Any:
            return exchanged.with_weights(self, base, group, now, args, kwargs)

        return exchanged.by_rows(self, active, now, run, args, kwargs)

    def _additive(
        self,
        base: Base,
        active: Active | None,
        now: Now,
        runtime: Runtime,
        args: Any,
        kwargs: dict[str, Any],
        rows_first: bool = False,
    ) -> Any:
        path, x = self.sites[0].path, self.input(args, kwargs)
        tapped = path in runtime.taps
        if active is not None and not rows_first and self._swapped(active, x, now):
            return self._as_rows_first(base, active, now, runtime, x, args, kwargs)
        if active is None:
            if not tapped:
                return base(*args, **kwargs)
            return additive.apart(self, base, None, now, runtime.taps[path], x, additive.NOTHING, args, kwargs)
        if active.layout is not None and not x.is_floating_point() and len(x) == 1 < active.layout.entries:
            if active.layout.lengths is None and not without_rows(path):
                x = x.expand(active.layout.entries, *x.shape[1:])  # positions, looked up once for all rows
                args, kwargs = self.with_input(x, args, kwargs)
        if not tapped:
            found = fused.stacked(self, base, active, x, args, kwargs)
            if found is not None:
                return found
        terms = self._terms(active, x, now.context, now.passing)
        if not terms.each and not tapped:
            return base(*args, **kwargs)
        if not tapped:
            found = fused.fused(self, base, active, terms, x, args, kwargs)
            if found is not None:
                return found
        return additive.apart(self, base, active, now, runtime.taps.get(path, ()), x, terms, args, kwargs)

    def _terms(self, active: Active, x: Tensor, context: Context, seen: Pass | None) -> Terms:
        """Return what adapters add, after a check of where the rows lie."""
        site, layout = self.sites[0], active.layout
        if layout is not None and not x.is_floating_point() and without_rows(site.path):
            return active.for_all_rows(site, x.device)
        terms = active.terms(site, x, context, seen)
        if layout is not None and terms.each:
            check_first(x, layout, site.path, seen)
        return terms

    def _swapped(self, active: Active, x: Tensor, now: Now) -> bool:
        """Return whether rows or tokens are told apart, and the input has the positions before the rows."""
        layout, seen, context = active.layout, now.passing, now.context
        if layout is None and not active.by_kind and not context.by_row():
            return False
        entries = layout.entries if layout is not None else seen.batch if seen is not None else 0
        if not entries or (layout is not None and (layout.lengths is not None or layout.counted(self.sites[0].path))):
            return False
        found = rows_second(x, entries, self.length_first, seen)
        self.length_first |= found
        return found

    def _as_rows_first(
        self, base: Base, active: Active, now: Now, runtime: Runtime, x: Tensor, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Run a layer that sees positions before rows as one that sees rows first: it treats all of them alike."""

        def swapped(*args: Any, **kwargs: Any) -> Any:
            there = self.with_input(self.input(args, kwargs).transpose(0, 1).contiguous(), args, kwargs)
            return base(*there[0], **there[1]).transpose(0, 1)

        args, kwargs = self.with_input(x.transpose(0, 1).contiguous(), args, kwargs)
        result = self._additive(swapped, active, now, runtime, args, kwargs, rows_first=True)
        return result.transpose(0, 1).contiguous()

    def _block(self, base: Base, now: Now, runtime: Runtime) -> exchanged.Run:
        def run(group: Active, of: exchanged.Of, args: Any, kwargs: Any) -> Any:
            outer = runtime.inside
            # layers inside see the rows of this group alone, so what applies to them is the group's composition
            runtime.inside = outer if of is None else group
            try:
                return exchanged.as_block(self, base, group, of, now, args, kwargs)
            finally:
                runtime.inside = outer

        return run

    def _traced(self, base: Base, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module in a graph that is being compiled: what applies is what was chosen last."""
        runtime = self.runtimes.traced
        active = runtime.active
        if active is None:
            return base(*args, **kwargs)
        site = self.sites[0]
        if site.kind.additive:
            uniform = compiled.UNIFORM.get(self.runtimes.number)
            x = args[0] if args else kwargs[self.input_name]
            if uniform is not None:
                output = base(*args, **kwargs)
                return compiled.uniform_forward(site, output, x, uniform.get(site.path), self.owner.training)
        return self._untraced(base, active, runtime, args, kwargs)

    def _untraced(self, base: Base, active: Active, runtime: Runtime, args: Any, kwargs: Any) -> Any:
        """Run a composition that has no uniform form: its own code is traced."""
        site = self.sites[0]
        if not site.kind.additive:
            return self._exchanged(base, active, runtime, runtime, args, kwargs)
        x: Tensor = args[0] if args else kwargs[self.input_name]
        if self._swapped(active, x, runtime):
            raise AdapterError(
                f"'{site.path}' sees positions before rows; rows with adapters of their own are not compiled there. "
                "Use the model uncompiled."
            )
        terms = self._terms(active, x, runtime.context, None)
        if not terms.each:
            return base(*args, **kwargs)
        return additive.apart(self, base, active, runtime, (), x, terms, args, kwargs)
