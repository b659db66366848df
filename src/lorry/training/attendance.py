"""What methods need in a Hugging Face Trainer beside their gradients, and how it is seen to."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.errors import AdapterError
from lorry.core.life import duties
from lorry.core.life.adapter import Adapter
from lorry.core.life.api import context
from lorry.core.life.calibrate import calibrate, needs_calibration, past_of
from lorry.core.life.state import state_of
from lorry.core.method.context import Context

from .loop import Companion, facts_of
from .objectives import Causal, Classification
from .routing import policy_loss, repeated
from .starts import Start, apply_start

#: Batches that methods see before training.
_CALIBRATION = 8


class Attendance:
    """Sees to what the adapters of a trainer's model need: calibration, draws, auxiliary losses, rules after a step.

    Auxiliary losses are added to the loss, rules are applied after each step, methods that want to see calibration
    batches get the first eight, and rows whose routes are drawn go through the model once for each draw. Methods are
    told of the padding by ``attention_mask``, and of the task of each row by a column ``task_ids``.

    Parameters
    ----------
    trainer
        A ``transformers.Trainer`` whose model carries adapters in training.
    start
        How their tensors begin; None for the methods' own way.
    """

    def __init__(self, trainer: Any, start: Start | None = None) -> None:
        self.trainer = trainer
        self.start = start
        self.companion = Companion(trainer.model)
        self._inside = self._started = False

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The adapters in training by name."""
        return self.companion.adapters

    def callback(self) -> Any:
        """Return the callback that applies rules after each step of the optimizer."""
        from transformers import TrainerCallback

        companion = self.companion

        class AfterStep(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                companion.total, companion.steps = state.max_steps, state.global_step

            def on_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                companion.after_step()

        return AfterStep()

    def calibrate(self, compute_loss: Callable[..., Any]) -> None:
        """Show the first batches to methods and a start that want to see some; the same ones when a run is resumed."""
        for adapter in self.adapters.values():
            duties.attend(adapter, duties.CALIBRATION, duties.DRAWS)
        waiting = [a for a in self.adapters.values() if needs_calibration(a)]
        starting = self._starting()
        if not waiting and not starting:
            return
        # ranks may move, so that parameters are others than an optimizer was made for
        if self.trainer.optimizer is not None:
            raise AdapterError(
                "Calibration comes before the optimizer; do not give the trainer an optimizer of your own for adapters "
                f"that want to see batches first ({', '.join(a.name for a in waiting or starting)}), or calibrate them "
                "before."
            )
        with torch.random.fork_rng(devices=[]):  # the order of the data in training stays what it is
            torch.manual_seed(self.trainer.args.seed)
            batches = list(itertools.islice(self.trainer.get_train_dataloader(), _CALIBRATION))

        def loss(model: nn.Module, batch: Any) -> Tensor:
            with self.told(dict(self.trainer._prepare_inputs(batch))) as (rest, _):
                found: Tensor = compute_loss(model, rest)
                return found

        for adapter in waiting:
            calibrate(adapter, batches, loss, again=True)
        for adapter in starting:
            assert self.start is not None
            apply_start(self.start, adapter, batches, loss, self.trainer.args.seed)

    def _starting(self) -> list[Adapter]:
        """Return the adapters whose start is yet to be made, which must be fresh."""
        if self.start is None or self._started:
            return []
        self._started = True
        for adapter in self.adapters.values():
            past = "has begun with a start already" if "start" in adapter.metadata else past_of(adapter)
            if past is not None:
                raise AdapterError(
                    f"Adapter '{adapter.name}' {past}, and the start '{self.start.name}' would set its tensors anew. "
                    "Attach a fresh adapter, or make the trainer without a start."
                )
        return list(self.adapters.values())

    @contextmanager
    def told(self, inputs: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Context]]:
        """Tell methods what a batch says of its rows while the context lasts; gives the model's inputs."""
        facts = facts_of(inputs, lambda name: inputs.pop(name, None))
        if self._inside:  # an evaluation step computes a loss
            yield inputs, state_of(self.trainer.model).context
            return
        self._inside = True
        try:
            with context(self.trainer.model, **facts) as kept:
                yield inputs, kept
        finally:
            self._inside = False

    def loss(
        self,
        compute_loss: Callable[..., Any],
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool,
        **more: Any,
    ) -> Any:
        """Return the trainer's loss of a batch with what the methods add to it."""
        training = model.training and torch.is_grad_enabled()
        drawing = self._drawing() if training else None
        if drawing is not None:
            inputs = repeated(inputs, drawing.row_draws)
        with self.told(inputs) as (rest, kept):
            if drawing is not None:
                kept.values["draws"] = {drawing.name: drawing.row_draws}
            labels = rest.get("labels")
            found = compute_loss(model, rest, return_outputs=return_outputs or drawing is not None, **more)
            loss, outputs = found if return_outputs or drawing is not None else (found, None)
            if drawing is not None:
                loss = self._policy(drawing, outputs, labels, more.get("num_items_in_batch"))
            if training:
                loss = self.companion.loss(loss, self._share(more.get("num_items_in_batch")), kept)
        return (loss, outputs) if return_outputs else loss

    def _share(self, items: Any) -> float:
        """Return the factor of auxiliary losses: the trainer divides the loss by its micro-batches itself, or not."""
        trainer = self.trainer
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None
        count = getattr(trainer, "current_gradient_accumulation_steps", 1)
        return 1.0 / count if scaled else 1.0

    def _drawing(self) -> Adapter | None:
        """Return the adapter that learns from several draws of each row, if there is one."""
        found = [a for a in self.adapters.values() if a.row_draws > 1]
        active = state_of(self.trainer.model).active
        parts = [] if active is None else [p.adapter for p in active.portions]
        found = [a for a in found if any(p is a for p in parts)]
        if not found:
            return None
        trainer = self.trainer
        if len(parts) > 1 or trainer.compute_loss_func is not None or trainer.label_smoother is not None:
            raise AdapterError(
                f"Adapter '{found[0].name}' ({found[0].method.info.slug}) learns its routes from "
                f"{found[0].row_draws} draws of each row; a Trainer can do so for one active adapter and the model's "
                "own loss, without label smoothing or compute_loss_func. Train it with lorry.training.train, or "
                "override compute_loss with lorry.training.routing's repeated and policy_loss."
            )
        return found[0]

    def _policy(self, adapter: Adapter, outputs: Any, labels: Any, items: Any) -> Tensor:
        """Return the loss of rows that went through the model once for each draw."""
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[1]
        if not isinstance(labels, Tensor) or logits.dim() != labels.dim() + 1 or labels.dim() > 2:
            raise AdapterError(
                f"Adapter '{adapter.name}' learns its routes from the loss of each row, which a Trainer can tell for "
                "labels of tokens or of classes; train it with lorry.training.train, or override compute_loss."
            )
        task = Causal() if labels.dim() == 2 else Classification()
        losses, counts = task.losses(logits, labels)
        rows = len(losses) // adapter.row_draws
        total = items if items is not None else counts[:rows].sum()
        return policy_loss(self.trainer.model, adapter.name, losses, adapter.row_draws) * rows / total
