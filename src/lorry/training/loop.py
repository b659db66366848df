"""What a training loop of one's own owes to methods beside their gradients, in two lines.

companion = Companion(model, total=steps)
...
loss = companion.loss(model(**batch).loss)
loss.backward()
companion.step(optimizer)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lorry.core.errors import AdapterError
from lorry.core.life import duties
from lorry.core.life.adapter import Adapter
from lorry.core.life.api import adapters, auxiliary_loss
from lorry.core.life.calibrate import finish_step
from lorry.core.life.state import state_of
from lorry.core.method.context import Context

Records = dict[str, dict[tuple[str, str], Tensor]]


class Companion:
    """Adds the auxiliary losses of all adapters in training to a loss, and applies their rules after a step.

    Parameters
    ----------
    model
        Carries the adapters.
    total
        Optimizer steps that are planned, for methods that follow a schedule (a rank budget).
    step
        Steps that were done before, where a run is resumed.

    Raises
    ------
    AdapterError
        No adapter of the model is in training.
    """

    def __init__(self, model: nn.Module, total: int = 1, step: int = 0) -> None:
        self.model = model
        self.total = total
        self.steps = step
        self.records: Records = {}
        if not self.adapters:
            raise AdapterError(
                "No adapter of this model is in training; attach one with lorry.attach, or call adapter.train()."
            )
        for adapter in self.adapters.values():
            duties.watch(adapter)
            duties.attend(adapter, duties.LOSSES, duties.RULES)

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The adapters in training by name."""
        return {name: a for name, a in adapters(self.model).items() if a.trainable}

    def loss(self, loss: Tensor, share: float = 1.0, context: Context | None = None) -> Tensor:
        """Return a loss with the auxiliary losses of the pass that it was made of; to be called once for each pass.

        Parameters
        ----------
        loss
            The loss of the last pass.
        share
            Factor of the auxiliary losses: one over the micro-batches of a step.
        context
            The context of the pass, where `lorry.context` gave it one of its own; the model's present one otherwise.
        """
        kept = state_of(self.model).context if context is None else context
        for (name, path, key), value in kept.records.items():
            records = self.records.setdefault(name, {})
            records[path, key] = records[path, key] + value if (path, key) in records else value
        kept.records.clear()
        for name in self.adapters:
            auxiliary = auxiliary_loss(self.model, name)
            if auxiliary is not None:
                loss = loss + auxiliary.to(loss) * share
        return loss

    def step(self, optimizer: Any) -> None:
        """Step an optimizer, and apply the rules of the methods after it; gradients are cleared by the caller."""
        optimizer.step()
        self.after_step()

    def after_step(self) -> None:
        """Apply the rules after a step that the optimizer has done already, while its gradients are there."""
        self.steps += 1
        for name, adapter in self.adapters.items():
            by_site: dict[str, dict[str, Tensor]] = {}
            for (path, key), value in self.records.get(name, {}).items():
                by_site.setdefault(path, {})[key] = value
            finish_step(adapter, self.steps, max(self.total, self.steps), by_site)
        self.records.clear()
        state_of(self.model).context.clear()


def facts_of(batch: Mapping[str, Any], pop: Callable[[str], Any]) -> dict[str, Any]:
    """Return what `lorry.context` may be told of a batch of a Hugging Face collator; task ids are taken out of it."""
    facts = {}
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        facts["padding_mask"] = mask.bool()
    tasks = pop("task_ids")
    if tasks is not None:
        facts["task_ids"] = tasks
    return facts
