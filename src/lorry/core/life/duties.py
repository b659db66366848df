"""What an adapter needs in training beside its gradient, and whether somebody sees to it.

The training engine, `lorry.training.loop.Companion` and `with_adapters` do; a loop of one's own may forget. So a watch
on every optimizer's step, which is sure to run, says once for each adapter what is missing.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lorry.core.method.base import Method

CALIBRATION, LOSSES, RULES, DRAWS = "calibration", "auxiliary losses", "rules after a step", "draws"
_HOW = {
    CALIBRATION: "its method wants to see calibration batches before training (lorry.core.life.calibrate.calibrate)",
    LOSSES: "its layers left auxiliary losses that were not added to the loss",
    RULES: "its method changes tensors after each optimizer step, which was not done",
    DRAWS: "its routes are learned from several draws of each row, which were not made",
}


class Trained(Protocol):
    """What a watch reads of an adapter, so that the adapter itself may ask for one."""

    name: str
    method: Method
    metadata: dict[str, Any]
    state: Any

    @property
    def entries(self) -> Mapping[str, Any]:
        """Site path -> the adapter at that site."""

    @property
    def row_draws(self) -> int:
        """How many copies of each row a training step needs."""

    def parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters."""

    def joint_losses(self, left: Any) -> list[Tensor]:
        """Return the losses that are made of what sites left together."""

    def penalties(self) -> list[Tensor]:
        """Return the losses on the tensors themselves."""


class UnattendedWarning(UserWarning):
    """An adapter is trained without something that its method needs."""


class _Watch:
    """What is known of one adapter in training."""

    def __init__(self) -> None:
        self.attended: set[str] = set()
        self.left = False
        self.steps = 0


_WATCHED: weakref.WeakKeyDictionary[Trained, _Watch] = weakref.WeakKeyDictionary()
_HOOKS: list[Any] = []


def attend(adapter: Trained, *duties: str) -> None:
    """Say that these duties of an adapter are seen to from now on."""
    watch = _WATCHED.get(adapter)
    if watch is not None:
        watch.attended.update(duties)


def attend_all(adapter: Trained) -> None:
    """Say that an engine sees to everything that the adapter needs; it is watched no longer."""
    _WATCHED.pop(adapter, None)


def note_left(adapter: Trained) -> None:
    """Say that layers left auxiliary losses of an adapter in a pass whose context is over."""
    watch = _WATCHED.get(adapter)
    if watch is not None:
        watch.left = True


def watch(adapter: Trained) -> None:
    """Look at the first steps of any optimizer that trains an adapter; to be called when its training begins."""
    _WATCHED.setdefault(adapter, _Watch())
    if not _HOOKS:
        _HOOKS.append(register_optimizer_step_pre_hook(_before_step))


def missing(adapter: Trained) -> list[str]:
    """Return the duties that nobody has seen to so far, before the optimizer step that comes now."""
    found = _WATCHED[adapter]
    needed = []
    if "calibration" not in adapter.metadata and any(e.method.calibration != "none" for e in adapter.entries.values()):
        needed.append(CALIBRATION)
    if found.left or _left_losses(adapter):
        needed.append(LOSSES)
    # the first step has to be over before something could be done after it
    if found.steps > 1 and any(_has_rules(e.method) for e in adapter.entries.values()):
        needed.append(RULES)
    if adapter.row_draws > 1:
        needed.append(DRAWS)
    return [duty for duty in needed if duty not in found.attended]


def _has_rules(method: Method) -> bool:
    kind = type(method)
    return kind.after_step is not Method.after_step or kind.adjust is not Method.adjust


def _left_losses(adapter: Trained) -> bool:
    context = adapter.state.context
    if any(owner == adapter.name for owner, _, _ in context.losses):
        return True
    mine = any(owner == adapter.name for owner, _, _ in context.left)
    with torch.no_grad():
        return bool(mine and adapter.joint_losses(context.left)) or bool(adapter.penalties())


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not _WATCHED:
        return
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for adapter, found in list(_WATCHED.items()):
        if not any(id(p) in own for p in adapter.parameters()):
            continue
        found.steps += 1
        lacking = missing(adapter)
        if found.steps > 1 or lacking:
            del _WATCHED[adapter]  # said once, and nothing is looked at for long
        if lacking:
            warnings.warn(_text(adapter, lacking), UnattendedWarning, stacklevel=4)


def _text(adapter: Trained, lacking: list[str]) -> str:
    reasons = "; ".join(_HOW[duty] for duty in lacking)
    return (
        f"Adapter '{adapter.name}' ({adapter.method.info.slug}) is trained without all that it needs: {reasons}. Train "
        "it with lorry.training.train or with_adapters(Trainer), or make a lorry.training.loop.Companion(model), use "
        "its loss(...) around your loss, and its step(optimizer) in place of optimizer.step()."
    )
