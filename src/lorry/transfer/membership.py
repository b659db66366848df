"""The discriminator: an adapter on the source that says of an input whether it belongs to the task's data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lorry.core.options import check_options, option
from lorry.training.data import Record
from lorry.training.data_errors import DataError
from lorry.training.encode import completion_rows
from lorry.training.reference import asking, label_logits
from lorry.training.rows import IGNORE, Builder, EncodedSet
from lorry.training.tallies import Means
from lorry.training.task import Batch, Setting, register_task
from lorry.training.text_task import TextTask

#: What is asked of every input; both classes get the same text.
QUESTION = "{input}\nIs the above question from the dataset {name}?\n"


@register_task
@dataclass(frozen=True)
class Membership(TextTask):
    """Yes or no to "is this input from the dataset": binary cross-entropy on the first tokens of the two answers.

    arXiv 2405.17258, section 3. A record has ``prompt``, the input without its answer, and ``real``, whether it is of
    the data.
    """

    name: ClassVar[str] = "membership"
    task: ClassVar[str | None] = "causal-lm"

    dataset: str = option("task", "What the question calls the data.")
    question: str = option(QUESTION, "Text around an input, with {input} and {name}.")
    yes: str = option("yes", "The answer for inputs of the data.")
    no: str = option("no", "The answer for others.")
    max_length: int = option(512, "Tokens of a row.", at_least=2)

    def __post_init__(self) -> None:
        """Check the options."""
        check_options(self)
        if "{input}" not in self.question:
            raise DataError(f"The question must hold {{input}}, found {self.question!r}.")

    @property
    def family(self) -> str:
        """Rows of tokens."""
        return "text, causal-lm, asked"

    def text(self, prompt: str) -> str:
        """Return what is asked of an input."""
        return self.question.replace("{name}", self.dataset).replace("{input}", prompt)

    def answers(self, tokenizer: Any) -> tuple[int, int]:
        """Return the first tokens of yes and no behind the question.

        Raises
        ------
        DataError
            They are the same token, so that nothing could be learned.
        """
        rows = completion_rows(
            tokenizer, [(self.text("?"), w) for w in (self.yes, self.no)], max_length=self.max_length
        )
        found = [int(r.labels[r.labels != IGNORE][0]) for r in rows if r is not None and r.labels is not None]
        if len(found) != 2 or found[0] == found[1]:
            raise DataError(
                f"The answers {self.yes!r} and {self.no!r} begin with the same token in this tokenizer; name others."
            )
        return found[0], found[1]

    def encode(self, tokenizer: Any, records: Sequence[Record], *, labels: Sequence[str] | None = None) -> EncodedSet:
        """Encode questions; the only label of a row is the first token of its answer."""
        tokens = self.answers(tokenizer)
        builder = Builder(self.max_length, "drop")
        pairs = [(self.text(str(r["prompt"])), self.yes) for r in records]
        for record, row in zip(records, completion_rows(tokenizer, pairs, max_length=1 << 20), strict=True):
            assert row is not None and row.labels is not None
            start = int((row.labels != IGNORE).nonzero()[0, 0])
            ids = [*row.input_ids[:start].tolist(), tokens[0 if record["real"] else 1]]
            builder.add(ids, [IGNORE] * start + ids[-1:])
        return builder.finish()

    def collate(self, setting: Setting, examples: Sequence[Any]) -> Batch:
        """Pad the rows; the targets are labels, and the two tokens that are compared, for each row."""
        batch = super().collate(setting, examples)
        pair = torch.tensor([self.answers(setting.processor)] * len(batch.targets), device=setting.device)
        return replace(batch, targets={"labels": batch.targets, "pair": pair})

    def compared(self, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        """Return ``log p(yes) - log p(no)`` of each row ``(n,)``, and 1 where yes is right, else 0."""
        chosen, wanted, row = label_logits(outputs, targets["labels"])
        two = chosen.gather(1, targets["pair"][row])
        return two[:, 0] - two[:, 1], (wanted == targets["pair"][row, 0]).to(two)

    def losses(self, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        """Return the binary cross-entropy of each row, and one prediction for each."""
        margin, real = self.compared(outputs, targets)
        return F.binary_cross_entropy_with_logits(margin, real, reduction="none"), torch.ones_like(margin)

    def loss(self, outputs: Tensor, targets: Any) -> tuple[Tensor, int]:
        """Return the summed loss, and the number of rows."""
        each, _ = self.losses(outputs, targets)
        return each.sum(), len(each)

    def tally(self, outputs: Tensor, targets: Any) -> Means:
        """Return the sums of loss and accuracy."""
        margin, real = self.compared(outputs, targets)
        each, _ = self.losses(outputs, targets)
        return Means.of(loss=each, accuracy=((margin > 0) == (real > 0)).float())

    def margins(self, setting: Setting, adapter: str | None, inputs: Sequence[str], batch: int = 32) -> Tensor:
        """Return ``log p(yes) - log p(no)`` of each input ``(n,)``, under an adapter or the bare base (None)."""
        examples = self.encode(setting.processor, [{"prompt": text, "real": True} for text in inputs]).examples
        if len(examples) != len(inputs):
            raise DataError(f"{len(inputs) - len(examples)} inputs are longer than {self.max_length} tokens.")
        found = []
        for start in range(0, len(examples), batch):
            part = self.collate(setting, examples[start : start + batch])
            with asking(setting.model, adapter, batch if start + batch <= len(examples) else len(examples) - start):
                found.append(self.compared(self.forward(setting, part), part.targets)[0])
        return torch.cat(found)
