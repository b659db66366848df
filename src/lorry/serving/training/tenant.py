"""One client's model: an adapter on the shared base, its gradient and its optimizer."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorry.core.errors import LorryError
from lorry.core.life.api import attach
from lorry.serving.training.errors import Refused
from lorry.serving.training.folders import read_adapter, read_optimizer, save_training
from lorry.serving.training.names import folder_name
from lorry.serving.training.states import read_state
from lorry.training.optim import clip_gradients, gradients, load_optimizer, rate_groups, set_rate


@dataclass(frozen=True)
class LoraChoice:
    """What a client wants trained.

    Attributes
    ----------
    rank, alpha, seed
        Of the adapter.
    attention, mlp, unembed
        Which layers have one.
    """

    rank: int
    alpha: float
    seed: int
    attention: bool = True
    mlp: bool = True
    unembed: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)

    def targets(self, model: nn.Module) -> list[str]:
        """Return what `lorry.attach` calls these layers; raise `Refused` if there are none."""
        found = [name for name, wanted in (("attention", self.attention), ("mlp", self.mlp)) if wanted]
        if self.unembed:
            getter = getattr(model, "get_output_embeddings", None)
            head = getter() if callable(getter) else None
            found += [path for path, module in model.named_modules() if module is head]
        if not found:
            raise Refused("Nothing is to be trained: set train_attn, train_mlp or train_unembed.")
        return found


@dataclass(frozen=True)
class Adam:
    """The numbers of one optimizer step."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0

    def check(self) -> Adam:
        """Return it; raise `Refused` for numbers that AdamW does not take."""
        for name, value in asdict(self).items():
            if not math.isfinite(value) or value < 0:
                raise Refused(f"{name} must be a finite number of at least 0, found {value!r}.")
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise Refused(f"{name} must be below 1, found {getattr(self, name)!r}.")
        return self


class Tenant:
    """A model that is being trained.

    Parameters
    ----------
    model
        The shared base.
    id
        The model's id.
    choice
        What is trained.
    owner
        Whose it is.

    Attributes
    ----------
    spoiled
        Why the gradient that is being collected must not be used; None if it may.
    unwritten
        The numbers of the requests that changed the weights since these were written last.
    writing
        The write that is under way.
    """

    def __init__(self, model: nn.Module, id: str, choice: LoraChoice, owner: str = "") -> None:
        self.id, self.choice, self.owner = id, choice, owner
        method = {"method": "lora", "rank": choice.rank, "alpha": choice.alpha}
        try:
            self.adapter = attach(
                model, method, targets=choice.targets(model), name=f"train-{folder_name(id)}", seed=choice.seed,
                activate=False,
            )  # fmt: skip
        except LorryError as error:
            raise Refused(f"This base cannot have such an adapter: {error}") from error
        groups = [{"params": [p for _, p in named], "factor": f} for f, named in rate_groups(self.adapter).items()]
        fused = all(p.device.type in ("cpu", "cuda") for p in self.adapter.parameters())
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=fused)
        self.spoiled: str | None = None
        self.unwritten: deque[int] = deque()
        self.writing: Future[bool] | None = None

    @property
    def collecting(self) -> bool:
        """Whether there is a gradient that no step has used."""
        return self.spoiled is not None or bool(gradients(self.optimizer))

    def step(self, adam: Adam) -> dict[str, float]:
        """Change the weights by the gradient collected so far; returns the gradient's norm before clipping.

        Raises
        ------
        Refused
            A pass of this step failed, or the gradient is not finite; it is forgotten, and the weights stay.
        """
        spoiled, grads = self.spoiled, gradients(self.optimizer)
        if spoiled is not None:
            self._forget()
            raise Refused(
                f"The gradient of this step is incomplete and was dropped, since one of its passes failed: {spoiled}"
            )
        norm = clip_gradients(grads, adam.grad_clip_norm or None)
        if not math.isfinite(norm):
            self._forget()
            raise Refused(f"The gradient's norm became {norm}. It was dropped; lower the learning rate or the weights.")
        for group in self.optimizer.param_groups:
            group.update(betas=(adam.beta1, adam.beta2), eps=adam.eps, weight_decay=adam.weight_decay)
        set_rate(self.optimizer, adam.learning_rate)
        self.optimizer.step()
        self._forget()
        return {"grad_norm": norm}

    def save(self, folder: Path, facts: Mapping[str, Any]) -> int:
        """Write weights and optimizer; returns the size in bytes."""
        return save_training(self.adapter, self.optimizer, {"lora": self.choice.as_dict(), **facts}, folder)

    def load(self, path: Path, optimizer: bool) -> None:
        """Take over a checkpoint, or a state in a file; the optimizer begins anew unless its state is wanted too."""
        if path.is_dir():
            state = read_optimizer(path) if optimizer else {}
            read_adapter(self.adapter, path)
        else:
            state = read_state(self.adapter, path)
        self.optimizer.state.clear()
        load_optimizer(self.optimizer, self.adapter, state)
        self._forget()

    def leave(self) -> None:
        """Take the adapter off the base."""
        self._forget()
        self.adapter.detach()

    def _forget(self) -> None:
        self.spoiled = None
        self.optimizer.zero_grad(set_to_none=True)
