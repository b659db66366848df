"""Tasks that are not plain text: pictures, denoising, pairs of texts to choose from, and a policy with a reward."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import lorry
from lorry.training import Batch, Examples, Setting, Task
from lorry.training.objectives import Causal
from lorry.training.task import PlainReport


@dataclass(frozen=True)
class PictureClasses(Task):
    """Classes of pictures ``(channels, height, width)``."""

    name: ClassVar[str] = "picture-classes"
    best: ClassVar[tuple[str, Any]] = ("loss", "min")
    unit: ClassVar[str] = "pictures"

    def examples(self, setting: Setting, records: Sequence[Any], labels: Any = None) -> Examples[Any]:
        made = tuple((torch.as_tensor(r["picture"]), int(r["label"])) for r in records)
        return Examples(made, PlainReport(len(records), len(made)))

    def collate(self, setting: Setting, examples: Sequence[Any]) -> Batch:
        pictures = torch.stack([picture for picture, _ in examples]).to(setting.device)
        return Batch({"pixel_values": pictures}, torch.tensor([label for _, label in examples]))

    def forward(self, setting: Setting, batch: Batch) -> Tensor:
        return setting.model(**batch.inputs).logits

    def losses(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return F.cross_entropy(outputs, targets, reduction="none"), torch.ones(len(outputs))


@dataclass(frozen=True)
class Margins(PictureClasses):
    """The same classes by another loss, in passes of their own."""

    name: ClassVar[str] = "picture-margins"

    def losses(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return F.multi_margin_loss(outputs, targets, reduction="none"), torch.ones(len(outputs))


@dataclass(frozen=True)
class Denoising(Task):
    """The noise in pictures, ``(1 - t) x + t ε``, where step, place and seed alone decide on t and ε."""

    name: ClassVar[str] = "denoising"
    unit: ClassVar[str] = "pictures"

    def examples(self, setting: Setting, records: Sequence[Any], labels: Any = None) -> Examples[Any]:
        return Examples(tuple(torch.as_tensor(r["picture"]) for r in records), PlainReport(len(records), len(records)))

    def draw(
        self, examples: Sequence[Any], generator: torch.Generator, setting: Setting, adapter: str
    ) -> Sequence[Any]:
        drawn = []
        for clean in examples:
            time = torch.randint(1, 1000, (), generator=generator)
            noise = torch.randn(clean.shape, generator=generator)
            drawn.append((clean * (1 - time / 1000) + noise * (time / 1000), noise, time))
        return drawn

    def collate(self, setting: Setting, examples: Sequence[Any]) -> Batch:
        noisy, noise, times = (torch.stack(column) for column in zip(*examples, strict=True))
        return Batch({"sample": noisy, "timestep": times}, {"noise": noise}, {"timestep": times})

    def forward(self, setting: Setting, batch: Batch) -> Tensor:
        return setting.model(**batch.inputs).sample

    def losses(self, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        return F.mse_loss(outputs, targets["noise"], reduction="none").mean((1, 2, 3)), torch.ones(len(outputs))


@dataclass(frozen=True)
class Preference(Causal):
    """Pairs of rows, of which the first is to be the likelier one (Bradley-Terry on mean log-probabilities)."""

    name: ClassVar[str] = "preference"

    def check(self, setting: Setting, examples: Examples[Any], name: str) -> None:
        return

    def losses(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        shifted = F.cross_entropy(outputs[:, :-1].mT, targets[:, 1:], ignore_index=-100, reduction="none")
        score = -shifted.sum(1) / (targets[:, 1:] != -100).sum(1)
        margin = score.view(-1, 2)
        return -F.logsigmoid(margin[:, 0] - margin[:, 1]), torch.ones(len(margin))

    def loss(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        losses, _ = self.losses(outputs, targets)
        return losses.sum(), len(losses)

    def rows_of(self, example: Any) -> int:
        return 2

    def count(self, example: Any) -> int:
        return 1

    def cost(self, example: Any) -> int:
        return max(map(len, example))

    def fingerprint(self, examples: Sequence[Any]) -> str:
        return super().fingerprint([row for pair in examples for row in pair])


@dataclass(frozen=True)
class EvenPolicy(Causal):
    """REINFORCE for one token: the model continues each prompt with its own adapter, and even tokens are rewarded."""

    name: ClassVar[str] = "even-policy"

    @property
    def family(self) -> str:
        return self.name

    def draw(
        self, examples: Sequence[Any], generator: torch.Generator, setting: Setting, adapter: str
    ) -> Sequence[Any]:
        batch = super().collate(setting, examples)
        with torch.no_grad(), lorry.context(setting.model, **batch.facts):
            with lorry.rows(setting.model, [adapter] * len(examples)):
                logits = super().forward(setting, batch)
        last = torch.tensor([len(e) - 1 for e in examples])
        chances = logits[torch.arange(len(examples)), last].softmax(-1)
        actions = torch.multinomial(chances, 1, generator=generator)[:, 0]
        rewards = (actions % 2 == 0).float()
        return [(e, a, r - rewards.mean()) for e, a, r in zip(examples, actions, rewards, strict=True)]

    def collate(self, setting: Setting, examples: Sequence[Any]) -> Batch:
        batch = super().collate(setting, [e for e, _, _ in examples])
        last = torch.tensor([len(e) - 1 for e, _, _ in examples])
        actions, gains = (torch.stack([e[i] for e in examples]) for i in (1, 2))
        return Batch(batch.inputs, {"last": last, "action": actions, "gain": gains}, batch.facts)

    def losses(self, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        final = outputs[torch.arange(len(outputs)), targets["last"]].log_softmax(-1)
        chosen = final.gather(1, targets["action"][:, None])[:, 0]
        return -targets["gain"] * chosen, torch.ones(len(outputs))

    def loss(self, outputs: Tensor, targets: Any) -> tuple[Tensor, int]:
        return self.losses(outputs, targets)[0].sum(), len(outputs)

    def count(self, example: Any) -> int:
        return 1

    def cost(self, example: Any) -> int:
        return len(example[0]) if isinstance(example, tuple) else len(example)
