"""Learning from a teacher: from all that it says of each token, or from the answers that it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from lorry.training.columns import COMPLETION_COLUMNS, find_column, texts_of
from lorry.training.data import Record
from lorry.training.data_errors import DataError
from lorry.training.reference import continued, label_logits, row_sums
from lorry.training.rows import Encoded, EncodedSet
from lorry.training.tallies import Means
from lorry.training.task import Batch, Examples, Setting, register_task
from lorry.training.teacher import Teacher

from ._answers import Answers
from .text import Completion


@dataclass(frozen=True, eq=False)
class Taught:
    """A row with the teacher's logits of its labels, ``(labels, V)``."""

    rows: tuple[Encoded, ...]
    logits: Tensor


@register_task
@dataclass(frozen=True)
class Distillation(Answers):
    """Distillation of logits: the adapter learns the teacher's distribution over each token of an answer.

    Hinton et al. 2015; `skew` goes from the forward to the reverse divergence as Agarwal et al. 2024 do. The teacher is
    an adapter on the same base, another model of the same vocabulary, or the base itself that is shown more than the
    student (`teacher_prompt_column`), which moves an instruction into the weights.
    """

    name: ClassVar[str] = "distillation"
    teacher: Any = None
    """An adapter's folder, the name of an adapter on the model, a model's folder, or a model; the base if not given."""
    completion_column: str | None = None
    """Column of the answer on which both are compared; guessed if not named."""
    teacher_prompt_column: str | None = None
    """Column of the prompt that the teacher sees in place of the student's."""
    temperature: float = 1.0
    """Divides the logits of both; the loss is multiplied by its square."""
    skew: float = 0.0
    """0 is the divergence of the student from the teacher, 1 the reverse, between them that of both from a mixture."""
    labels_weight: float = 0.0
    """Share of the plain loss on the answer, from 0 to 1."""

    @property
    def family(self) -> str:
        """Rows with a teacher's logits."""
        return "text, causal-lm, taught"

    def examples(
        self, setting: Setting, records: Sequence[Record], labels: Sequence[str] | None = None
    ) -> Examples[Any]:
        """Encode records; an example is the student's row and the teacher's."""
        if self.teacher is None and self.teacher_prompt_column is None:
            raise DataError(
                "Distillation needs a teacher: an adapter, a model, or teacher_prompt_column, by which the base sees "
                "more than the student."
            )
        Teacher.of(setting, self.teacher)
        return super().examples(setting, records, labels)

    def encode(
        self, tokenizer: Any, records: Sequence[Record], *, labels: Sequence[str] | None = None
    ) -> Examples[Any]:
        """Encode prompts with answers, as the student and as the teacher sees them."""
        answer = find_column(records, self.completion_column, COMPLETION_COLUMNS, "answer", "completion_column")
        answers = texts_of(records, answer)
        mine = self.answered(tokenizer, self.prompts(records), answers)
        theirs = mine
        if self.teacher_prompt_column is not None:
            shown = replace(self, prompt_column=self.teacher_prompt_column)
            theirs = self.answered(tokenizer, shown.prompts(records), answers)
        pairs = zip(mine, theirs, strict=True)
        # an answer that was cut differently cannot be compared
        return self.kept(
            [(a, b) if a is not None and b is not None and a.label_count == b.label_count else None for a, b in pairs]
        )

    def rows_of(self, example: Any) -> int:
        """Return 1; the teacher's row goes through a pass of its own."""
        return 1

    def count(self, example: Any) -> int:
        """Return the number of tokens of the answer."""
        return int((example[0] if isinstance(example, tuple) else example.rows[0]).label_count)

    def draw(self, examples: Sequence[Any], generator: Generator, setting: Setting, adapter: str) -> Sequence[Taught]:
        """Return the student's rows with what the teacher says of their labels."""
        logits, labels = Teacher.of(setting, self.teacher).ask(self, setting, [theirs for _, theirs in examples])
        chosen, _, _ = label_logits(logits, labels)
        parts = chosen.split([self.count(e) for e in examples])
        return [Taught((mine,), part) for (mine, _), part in zip(examples, parts, strict=True)]

    def collate(self, setting: Setting, examples: Sequence[Taught]) -> Batch:
        """Pad the rows; the targets are labels, and the teacher's logits padded to the most labels of a row."""
        batch = super().collate(setting, examples)
        logits = torch.nn.utils.rnn.pad_sequence([e.logits for e in examples], batch_first=True).to(setting.device)
        return replace(batch, targets={"labels": batch.targets, "logits": logits})

    def losses(self, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        """Return the loss of each row, summed over its labels, and how many they are."""
        mine, wanted, row = label_logits(outputs, targets["labels"])
        counts = torch.bincount(row, minlength=len(outputs))
        filled = torch.arange(targets["logits"].shape[1], device=counts.device) < counts[:, None]
        theirs = targets["logits"][filled]
        if mine.shape != theirs.shape:
            raise ValueError(
                f"The teacher has {theirs.shape[-1]} tokens and the student {mine.shape[-1]}; both need one vocabulary."
            )
        each = _divergence(mine / self.temperature, theirs / self.temperature, self.skew) * self.temperature**2
        if self.labels_weight:
            plain = F.cross_entropy(mine, wanted, reduction="none")
            each = (1 - self.labels_weight) * each + self.labels_weight * plain
        return row_sums(each, row, len(outputs)), counts

    def loss(self, outputs: Any, targets: Any) -> tuple[Tensor, int]:
        """Return the summed loss, and the number of labels."""
        losses, counts = self.losses(outputs, targets)
        return losses.sum(), int(counts.sum())

    def tally(self, outputs: Tensor, targets: Any) -> Means:
        """Return the sums for loss, and for the share of tokens that student and teacher agree on."""
        losses, counts = self.losses(outputs, targets)
        mine, _, _ = label_logits(outputs, targets["labels"])
        filled = torch.arange(targets["logits"].shape[1], device=counts.device) < counts[:, None]
        agreed = mine.argmax(-1) == targets["logits"][filled].argmax(-1)
        return Means(int(counts.sum()), {"loss": float(losses.double().sum()), "agreement": float(agreed.sum())})


@register_task
@dataclass(frozen=True)
class SequenceDistillation(Completion):
    """Distillation of sequences: the adapter learns the answers that a teacher gives to prompts.

    Kim and Rush 2016. The teacher answers once, before training; records need no answers.
    """

    name: ClassVar[str] = "sequence-distillation"
    teacher: Any = None
    """An adapter's folder, the name of an adapter on the model, a model's folder, or a model."""
    max_new_tokens: int = 64
    """Most tokens of an answer."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; above, answers are drawn."""
    seed: int = 0
    """By which answers are drawn."""

    def examples(
        self, setting: Setting, records: Sequence[Record], labels: Sequence[str] | None = None
    ) -> Examples[Any]:
        """Let the teacher answer the prompts, and encode what it says."""
        if self.teacher is None:
            raise DataError("Sequence distillation needs a teacher: give an adapter or a model as `teacher`.")
        if setting.processor is None:
            raise DataError("Text needs a tokenizer; give one.")
        teacher = Teacher.of(setting, self.teacher)
        prompts = self._prompts(records)
        generator = torch.Generator().manual_seed(self.seed)
        answers: list[str] = []
        for start in range(0, len(prompts), 16):
            with teacher.asked(setting, len(prompts[start : start + 16])) as model:
                found = continued(
                    model,
                    setting.processor,
                    prompts[start : start + 16],
                    generator=generator,
                    max_new_tokens=self.max_new_tokens,
                    temperature=self.temperature,
                )
            answers += setting.processor.batch_decode([a.tolist() for _, a in found], skip_special_tokens=True)
        pairs = [{"prompt": p, "completion": a} for p, a in zip(prompts, answers, strict=True)]
        plain = Completion(
            max_length=self.max_length, separator="", packing=self.packing, truncation=self.truncation,
            add_eos=self.add_eos,
        )  # fmt: skip
        made: EncodedSet = plain.encode(setting.processor, pairs)
        return made


def _divergence(mine: Tensor, theirs: Tensor, skew: float) -> Tensor:
    """Return the divergence of each token's distribution, ``(k,)``."""
    student, teacher = mine.log_softmax(-1), theirs.log_softmax(-1)

    def divergence(p: Tensor, q: Tensor) -> Tensor:
        return (p.exp() * (p - q)).sum(-1)

    if skew <= 0:
        return divergence(teacher, student)
    if skew >= 1:
        return divergence(student, teacher)
    weight = torch.tensor(skew, dtype=student.dtype, device=student.device)
    mixture = torch.logaddexp(student + torch.log1p(-weight), teacher + torch.log(weight))
    return skew * divergence(teacher, mixture) + (1 - skew) * divergence(student, mixture)
