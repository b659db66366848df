"""What clients' examples are to a joint pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorry.serving.training.datum import Datum
from lorry.serving.training.losses import Loss
from lorry.training.data import Record
from lorry.training.task import Batch, Examples, Setting, Task


@dataclass(frozen=True, eq=False)
class DatumTask(Task):
    """The examples of one request, with its loss.

    Attributes
    ----------
    examples_given
        In the order of their rows.
    kind, config
        The loss and its numbers.
    found
        Filled in by the pass: the log-probabilities of the targets of each example, and its loss.
    """

    name: ClassVar[str] = "served"
    unit: ClassVar[str] = "tokens"

    examples_given: Sequence[Datum]
    kind: Loss
    config: Mapping[str, float]
    found: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def examples(
        self, setting: Setting, records: Sequence[Record], labels: Sequence[str] | None = None
    ) -> Examples[Any]:
        """Refuse records: a request brings examples."""
        raise NotImplementedError

    def cost(self, example: Datum) -> int:
        """Return the number of tokens."""
        return len(example)

    def collate(self, setting: Setting, examples: Sequence[Datum]) -> Batch:
        """Pad rows on the right."""
        longest = max(map(len, examples))
        ids = torch.zeros(len(examples), longest, dtype=torch.long)
        mask = torch.zeros(len(examples), longest, dtype=torch.long)
        for row, example in enumerate(examples):
            ids[row, : len(example)] = example.tokens
            mask[row, : len(example)] = 1
        device = setting.device
        mask = mask.to(device)
        inputs = {"input_ids": ids.to(device), "attention_mask": mask, "use_cache": False}
        return Batch(inputs, torch.arange(len(examples)), {"padding_mask": mask.bool()})

    def forward(self, setting: Setting, batch: Batch) -> Tensor:
        """Return the model's logits."""
        logits: Tensor = setting.model(**batch.inputs).logits
        return logits

    def losses(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each example, and how many tokens it has; notes what is answered."""
        self.found.clear()
        every = []
        for logits, datum in zip(outputs, self.examples_given, strict=True):
            inputs = {name: value.to(logits.device) for name, value in datum.inputs.items()}
            p = log_probabilities(logits[: len(datum)], inputs["target_tokens"])
            loss = self.kind.compute(p, inputs, self.config)
            every.append(loss)
            self.found.append((p.detach().to("cpu", torch.float32), loss.detach()))
        return torch.stack(every), torch.tensor([len(datum) for datum in self.examples_given])


def log_probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the log-probability of targets ``(L,)`` or ``(L, K)`` under logits ``(L, V)``, in float32 or better."""
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wide = targets if targets.ndim == 2 else targets[:, None]
    found = exact.gather(-1, wide) - exact.logsumexp(-1, keepdim=True)
    return found if targets.ndim == 2 else found[:, 0]
