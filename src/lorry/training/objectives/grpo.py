"""Learning from rewards of the model's own answers."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor

from lorry.core.life.state import unwrapped
from lorry.training.data import Record
from lorry.training.data_errors import DataError
from lorry.training.encode import special_prefix, tokenize
from lorry.training.reference import ask, asking, continued, row_sums, token_log_probabilities
from lorry.training.rows import IGNORE, Encoded, ints
from lorry.training.tallies import Means
from lorry.training.task import Batch, Examples, PlainReport, Setting, digest, register_task

from ._answers import Answers


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt with its record, of which the reward may use every column."""

    rows: tuple[Encoded, ...]
    text: str
    record: Record


@dataclass(frozen=True, eq=False)
class Rollouts:
    """The answers to one prompt.

    Attributes
    ----------
    rows
        Prompt and answer, for each answer.
    advantages, rewards
        ``(answers,)``.
    reference
        The reference's log-probability of each token of each answer, where it counts.
    """

    rows: tuple[Encoded, ...]
    advantages: Tensor
    rewards: Tensor
    reference: tuple[Tensor, ...]


@register_task
@dataclass(frozen=True)
class GRPO(Answers):
    """Group relative policy optimization: of several answers to a prompt, those with more reward become likelier.

    Shao et al. 2024, equation 3. The answers to all prompts of a micro-batch are drawn in one batch, with the job's
    adapter. Each is learned from once, so that the ratio of new and old policy is 1 and clipping never acts. The
    reference is the base without the adapter, and is asked only if `beta` is not 0.
    """

    name: ClassVar[str] = "grpo"
    best: ClassVar[tuple[str, Literal["min", "max"]]] = ("reward", "max")
    reward: Any = None
    """A function ``(prompts, completions, **columns)`` that gives a number for each answer; in YAML
    ``FILE.py:NAME``."""
    group_size: int = 8
    """Answers to each prompt."""
    max_new_tokens: int = 64
    """Most tokens of an answer."""
    temperature: float = 1.0
    """Divides the logits, in drawing and in learning."""
    beta: float = 0.0
    """Weight of the divergence from the base."""
    unbiased: bool = True
    """Give the divergence the gradient of its expectation (DeepSeek-V3.2, as TRL does); false is equation 4."""
    scale_rewards: bool = True
    """Divide advantages by the spread of the rewards of a group."""
    form: Literal["grpo", "dr_grpo", "bnpo"] = "grpo"
    """How tokens are weighed: the mean of each answer, the sum over `max_new_tokens` (which does not favour short
    ones), or the mean over all tokens of a micro-batch."""

    def __post_init__(self) -> None:
        """Refuse groups that have nothing to compare."""
        if self.group_size < 2:
            raise DataError(
                f"The option group_size must be at least 2, since answers are compared; found {self.group_size}."
            )
        if self.temperature <= 0:
            raise DataError(
                f"The option temperature must be above 0, since answers are drawn; found {self.temperature}."
            )

    @property
    def family(self) -> str:
        """Rows with an advantage."""
        return "text, causal-lm, rewarded"

    def encode(
        self, tokenizer: Any, records: Sequence[Record], *, labels: Sequence[str] | None = None
    ) -> Examples[Any]:
        """Encode the prompts."""
        self.rewarded()  # a reward that cannot be found is refused before anything is drawn
        texts, prefix = self.prompts(records), special_prefix(tokenizer)
        found = []
        for text, record, ids in zip(texts, records, tokenize(tokenizer, texts), strict=True):
            row = Encoded(ints([*prefix, *ids]), ints([IGNORE] * (len(prefix) + len(ids))))
            found.append(
                Prompt((row,), text, record) if 0 < len(row) <= self.max_length - self.max_new_tokens else None
            )
        if not any(found):
            raise DataError(
                f"No prompt leaves room for an answer: prompt and {self.max_new_tokens} new tokens must fit into "
                f"max_length {self.max_length}."
            )
        examples = tuple(e for e in found if e is not None)
        return Examples(examples, PlainReport(len(records), len(examples)))

    def rewarded(self) -> Callable[..., Any]:
        """Return the reward function.

        Raises
        ------
        DataError
            There is none.
        """
        if callable(self.reward):
            return self.reward
        path, _, name = str(self.reward or "").rpartition(":")
        if not path or not Path(path).is_file():
            raise DataError(
                f"GRPO needs a reward: a function, or FILE.py:NAME of one; found {self.reward!r}. It is called with "
                "prompts, completions and the columns of the data, and gives a number for each completion."
            )
        found = runpy.run_path(path).get(name)
        if not callable(found):
            raise DataError(f"The file {path} has no function {name!r} to be the reward.")
        return found

    def fingerprint(self, examples: Sequence[Any]) -> str:
        """Return a hash of the prompts and their records."""
        return digest([(e.text, e.record) for e in examples])

    def draw(self, examples: Sequence[Prompt], generator: Generator, setting: Setting, adapter: str) -> Sequence[Any]:
        """Draw a group of answers to each prompt, and reward them."""
        prompts = [e.rows[0].input_ids for e in examples for _ in range(self.group_size)]
        with asking(setting.model, adapter, len(prompts)):
            found = continued(
                unwrapped(setting.model),
                setting.processor,
                prompts,
                generator=generator,
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
            )
        rows = [Encoded(torch.cat([p, a]), torch.cat([torch.full_like(p, IGNORE), a])) for p, a in found]
        rewards = self._rewards(examples, [a for _, a in found], setting).view(-1, self.group_size)
        advantages = rewards - rewards.mean(1, keepdim=True)
        if self.scale_rewards:
            advantages = advantages / (rewards.std(1, keepdim=True) + 1e-4)
        reference: list[Tensor] = [torch.zeros(len(a)) for _, a in found]
        if self.beta:
            values, _ = token_log_probabilities(*ask(self, setting, rows, None), self.temperature)
            reference = list(values.split([len(a) for _, a in found]))
        size = self.group_size
        return [
            Rollouts(tuple(rows[i * size :][:size]), advantages[i], rewards[i], tuple(reference[i * size :][:size]))
            for i in range(len(examples))
        ]

    def _rewards(self, examples: Sequence[Prompt], answers: Sequence[Tensor], setting: Setting) -> Tensor:
        texts = setting.processor.batch_decode([a.tolist() for a in answers], skip_special_tokens=True)
        owners = [e for e in examples for _ in range(self.group_size)]
        reserved = ("prompts", "completions")
        columns = {n: [e.record.get(n) for e in owners] for n in examples[0].record if n not in reserved}
        given = self.rewarded()(prompts=[e.text for e in owners], completions=texts, **columns)
        found = torch.as_tensor([float(value) for value in given])
        if found.shape != (len(texts),) or not bool(found.isfinite().all()):
            raise ValueError(
                f"The reward gave {list(given)!r} for {len(texts)} answers; one finite number each is needed."
            )
        return found

    def collate(self, setting: Setting, examples: Sequence[Rollouts]) -> Batch:
        """Pad the rows; the targets are labels, advantages, rewards, and the reference's log-probabilities."""
        batch = super().collate(setting, examples)
        reference = torch.nn.utils.rnn.pad_sequence([r for e in examples for r in e.reference], batch_first=True)
        targets = {
            "labels": batch.targets,
            "reference": reference.to(setting.device),
            "advantages": torch.cat([e.advantages for e in examples]).to(setting.device),
            "rewards": torch.cat([e.rewards for e in examples]).to(setting.device),
        }
        return replace(batch, targets=targets)

    def losses(self, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        """Return the loss of each prompt: the mean over its answers."""
        values, row = token_log_probabilities(outputs, targets["labels"], self.temperature)
        counts = torch.bincount(row, minlength=len(outputs))
        ratio = torch.exp(values - values.detach())  # 1, with the gradient of the log-probability
        each = -ratio * targets["advantages"].to(values)[row]
        if self.beta:
            filled = torch.arange(targets["reference"].shape[1], device=counts.device) < counts[:, None]
            apart = targets["reference"][filled] - values
            divergence = torch.exp(apart) - apart - 1
            each = each + self.beta * (divergence * ratio if self.unbiased else divergence)
        sums = row_sums(each, row, len(outputs))
        if self.form == "grpo":
            sums = sums / counts.clamp(min=1)
        elif self.form == "dr_grpo":
            sums = sums / self.max_new_tokens
        else:
            sums = sums * len(outputs) / counts.sum().clamp(min=1)
        losses = sums.view(-1, self.group_size).mean(1)
        return losses, torch.ones_like(losses)

    def tally(self, outputs: Tensor, targets: Any) -> Means:
        """Return the sums for loss, reward, and length of the answers in tokens."""
        rewards = targets["rewards"].view(-1, self.group_size).mean(1)
        lengths = (targets["labels"] != IGNORE).sum(1).view(-1, self.group_size).double().mean(1)
        return Means.of(loss=self.losses(outputs, targets)[0], reward=rewards, length=lengths)
