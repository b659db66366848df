"""Digits for federations: a small network, its classes as a task, and clients with their parts of the data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorry.federated import Client, Federation, InProcess, Server
from lorry.training import Batch, Examples, Setting, Task
from lorry.training.task import MeanTally, PlainReport


@dataclass(frozen=True)
class Classes(Task):
    """The class of a vector; an example is ``(vector, class)``."""

    name: ClassVar[str] = "federated-test-classes"

    def examples(self, setting: Setting, records: Sequence[Any], labels: Any = None) -> Examples[Any]:
        made = tuple((torch.as_tensor(r["x"]), int(r["y"])) for r in records)
        return Examples(made, PlainReport(len(records), len(made)))

    def collate(self, setting: Setting, examples: Sequence[Any]) -> Batch:
        x = torch.stack([x for x, _ in examples])
        return Batch({"input": x.to(setting.device)}, torch.tensor([y for _, y in examples]))

    def forward(self, setting: Setting, batch: Batch) -> Tensor:
        return setting.model(batch.inputs["input"])

    def losses(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return F.cross_entropy(outputs, targets, reduction="none"), torch.ones(len(outputs))

    def tally(self, outputs: Any, targets: Any) -> MeanTally:
        return MeanTally(float(self.losses(outputs, targets)[0].sum()), len(targets))


def network(width: int = 16, classes: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, classes)).to(dtype)


def examples(count: int, seed: int = 0, width: int = 16, classes: int = 4) -> Examples[Any]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    y = torch.randint(classes, (count,), generator=generator)
    x = centres[y] + 0.5 * torch.randn(count, width, generator=generator)
    return Examples(tuple((x[i], int(y[i])) for i in range(count)), PlainReport(count, count))


def federation(out: Any, *, job: Any = None, **options: Any) -> Federation:
    """A federation over the first layer, which is square; plain SGD without clipping."""
    own = {
        "data": examples(96),
        "objective": Classes(),
        "method": {"method": "lora", "rank": 4, "alpha": 8},
        "optimizer": "sgd",
        "learning_rate": 0.1,
        "batch_size": 8,
        "max_grad_norm": None,
        "targets": "0",
        **(job or {}),
    }
    values = {"base": "none", "out": str(out), "rounds": 2, "local_steps": 3, **options}
    return Federation(job=own, **values)


def clients_of(options: Federation, model: nn.Module, **more: Any) -> dict[str, Client]:
    return {name: Client(options, name, Setting(model), **more) for name in options.names()}


def server_of(options: Federation, model: nn.Module | None = None, **more: Any) -> Server:
    model = network() if model is None else model
    found = clients_of(options, model)
    return Server(options, Setting(model), InProcess({n: c.answer for n, c in found.items()}), **more)
