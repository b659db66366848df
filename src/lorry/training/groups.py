"""The parameters of an optimizer by name, in groups that may change while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.errors import AdapterError
from lorry.core.life.adapter import Adapter
from lorry.core.life.calibrate import replace_entry
from lorry.core.method.base import Method

#: Makes the optimizer's state of a changed parameter from its name, the state's name, what it was, and the parameter.
Resize = Callable[[str, str, Tensor, Tensor], Tensor | None]


class ParameterGroups:
    """The trained parameters of an adapter in the groups of its optimizer.

    Whatever is changed here leaves the optimizer's state of all other parameters as it is, goes into checkpoints, and
    is there again when a run is resumed. A parameter's name is ``PATH.TENSOR``, as in `Adapter.named_tensors`.

    Attributes
    ----------
    optimizer, adapter
        What is grouped.
    resting
        Frozen parameters: name -> the optimizer's state and the group's options when they were frozen.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, adapter: Adapter) -> None:
        self.optimizer = optimizer
        self.adapter = adapter
        self.resting: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}

    def names(self, pattern: str = "*") -> list[str]:
        """Return the names of the parameters in the optimizer, in its order, that match a shell pattern."""
        return [name for name, _, _ in self._members() if fnmatchcase(name, pattern)]

    def options(self, name: str) -> dict[str, Any]:
        """Return the options of the group that a parameter is in.

        Raises
        ------
        AdapterError
            It is in none.
        """
        group = next((g for n, _, g in self._members() if n == name), None)
        if group is None:
            raise AdapterError(
                f"Parameter '{name}' of adapter '{self.adapter.name}' is in no group of the optimizer; it is frozen, "
                "or not trained."
            )
        return {k: v for k, v in group.items() if k != "params"}

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients that there are, by name."""
        return {name: p.grad for name, p, _ in self._members() if p.grad is not None}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters in the optimizer, by name."""
        return {name: p for name, p, _ in self._members()}

    def move(self, names: Iterable[str], **options: Any) -> None:
        """Give parameters other options than their group has (``factor`` of the learning rate, ``weight_decay``)."""
        for name in list(names):
            now = self.options(name)
            if any(now.get(k) != v for k, v in options.items()):
                parameter = self._take(name)
                self._put(parameter, {**now, **options})

    def freeze(self, names: Iterable[str]) -> None:
        """Train parameters no longer; what the optimizer knows of them is kept for `thaw`."""
        for name in list(names):
            options = self.options(name)
            parameter = self._take(name)
            parameter.requires_grad_(False)
            parameter.grad = None
            self.resting[name] = (self.optimizer.state.pop(parameter, {}), options)

    def thaw(self, names: Iterable[str]) -> None:
        """Train frozen parameters again, from where they stood.

        Raises
        ------
        AdapterError
            A parameter that was not frozen here.
        """
        for name in list(names):
            if name not in self.resting:
                raise AdapterError(f"Parameter '{name}' of adapter '{self.adapter.name}' was not frozen.")
            state, options = self.resting.pop(name)
            parameter = self._all()[name]
            parameter.requires_grad_(True)
            self._put(parameter, options)
            if state:
                self.optimizer.state[parameter] = state

    def replace(self, path: str, method: Method, tensors: Mapping[str, Tensor], resize: Resize | None = None) -> None:
        """Put other tensors in the place of an adapter's at one site: more rank, or less.

        Parameters
        ----------
        path
            The site.
        method
            The method there from now on, with the options that fit (`Method.with_options`).
        tensors
            A value for every tensor of that method at the site; a name that was trained before stays in its group.
        resize
            The optimizer's state of a tensor whose shape changes; without it, what was there keeps its place and the
            rest starts at zero.
        """
        before = dict(self.adapter.entries[path].home.tensors())
        slots = {name: (p, g) for name, p, g in self._members() if name.rpartition(".")[0] == path}
        replace_entry(self.adapter, path, method, tensors)
        for key, tensor in self.adapter.entries[path].home.tensors().items():
            name = f"{path}.{key}"
            if name in self.resting:
                tensor.requires_grad_(False)
                state, options = self.resting[name]
                self.resting[name] = (_resized(name, state, before[key], tensor, resize), options)
            elif name in slots and isinstance(tensor, nn.Parameter):
                old, group = slots.pop(name)
                index = next(i for i, p in enumerate(group["params"]) if p is old)
                group["params"][index] = tensor
                state = _resized(name, self.optimizer.state.pop(old, {}), old, tensor, resize)
                if state:
                    self.optimizer.state[tensor] = state
            elif isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                factor = float(method.rate_factors.get(key, 1.0))
                self._put(tensor, {**self.optimizer.defaults, "factor": factor})
        for old, _ in slots.values():  # tensors that the new method does not have
            self._drop(old)
            self.optimizer.state.pop(old, None)

    # -- checkpoints

    def describe(self) -> dict[str, Any]:
        """Return the groups as plain data: which parameters with which options, and which are frozen."""
        found: list[dict[str, Any]] = []
        names = self._names()
        for group in self.optimizer.param_groups:
            options = {k: _plain(v) for k, v in group.items() if k != "params"}
            found.append({"names": [names[id(p)] for p in group["params"]], "options": options})
        frozen = {name: {k: _plain(v) for k, v in options.items()} for name, (_, options) in self.resting.items()}
        return {"groups": found, "frozen": frozen}

    def restore(self, described: Mapping[str, Any], frozen: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Group the parameters as `describe` said; `frozen` is the optimizer's state of those that were frozen."""
        by_name = self._all()
        for name, options in described["frozen"].items():
            by_name[name].requires_grad_(False)
            self.resting[name] = (dict(frozen.get(name, {})), self._options(options))
        rebuilt = []
        for group in described["groups"]:
            parameters = [by_name[name].requires_grad_(True) for name in group["names"]]
            rebuilt.append({**self.optimizer.defaults, **self._options(group["options"]), "params": parameters})
        self.optimizer.param_groups[:] = rebuilt

    def _options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return options as the optimizer has them, which JSON made lists of tuples."""
        return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}

    # -- inside

    def _names(self) -> dict[int, str]:
        return {id(tensor): name for name, tensor, _ in self.adapter.named_tensors()}

    def _all(self) -> dict[str, nn.Parameter]:
        return {n: t for n, t, s in self.adapter.named_tensors() if s.trained and isinstance(t, nn.Parameter)}

    def _members(self) -> Iterator[tuple[str, nn.Parameter, dict[str, Any]]]:
        names = self._names()
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                yield names[id(parameter)], parameter, group

    def _take(self, name: str) -> nn.Parameter:
        parameter = self._all()[name]
        self._drop(parameter)
        return parameter

    def _drop(self, parameter: nn.Parameter) -> None:
        for group in self.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p is not parameter]
        self.optimizer.param_groups[:] = [g for g in self.optimizer.param_groups if g["params"]]

    def _put(self, parameter: nn.Parameter, options: Mapping[str, Any]) -> None:
        for group in self.optimizer.param_groups:
            if all(group.get(k) == v for k, v in options.items() if k != "lr"):
                group["params"].append(parameter)
                return
        state = self.optimizer.state.pop(parameter, None)  # add_param_group wants nothing of it
        self.optimizer.add_param_group({**options, "params": [parameter]})
        if state is not None:
            self.optimizer.state[parameter] = state


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _resized(name: str, state: Mapping[str, Any], old: Tensor, new: Tensor, resize: Resize | None) -> dict[str, Any]:
    """Return the optimizer's state for a tensor in the place of another."""
    found: dict[str, Any] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.shape != old.shape:
            found[key] = value  # a step count
            continue
        made = _kept_corner(value, new) if resize is None else resize(name, key, value, new)
        if made is not None:
            found[key] = made
    return found


def _kept_corner(value: Tensor, new: Tensor) -> Tensor:
    """Return a tensor shaped like `new` with `value` where both have a place, and zeros elsewhere."""
    made = torch.zeros_like(new, dtype=value.dtype, requires_grad=False)
    corner = tuple(slice(0, min(a, b)) for a, b in zip(value.shape, new.shape, strict=True))
    made[corner] = value[corner]
    return made
