"""What ScaleZero's dynamic parameter scaling saves, and what is forgotten, on six tasks of rising difficulty."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorry.training import Batch, Examples, Job, Task, train
from lorry.training import Setting as Place
from lorry.training.report import read_metrics
from lorry.training.task import PlainReport

from ..ledger import Finding, Panel, Setting, claim
from ..verdicts import compare, together, tune

TASKS, WIDTH, ROWS, HELD, BATCH = 6, 64, 400, 100, 48
STEPS, EVERY, GOAL = 600, 25, 0.03
RATES = (3e-3, 1e-2, 3e-2)
JOINT, DPS, DROPPED = "joint training", "DPS", "dropping alone"
#: A curriculum whose stage 0 trains the whole weight: the model is trained from scratch.
METHOD = {"method": "curriculum-lora", "updates": 0, "dense": True, "bias": True, "rank": 16, "alpha": 16.0}
GROWTH: Mapping[str, Mapping[str, Any]] = {
    JOINT: {"stages": 1, "drop": False},
    DPS: {"stages": 5, "min_stage0": 100, "max_stage": 300},
    DROPPED: {"stages": 1},
}


class Network(nn.Module):
    """A perceptron that is told the task beside its two inputs."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(2 + TASKS, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.third = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(rows,)``."""
        hidden = self.third(self.second(self.first(x).relu()).relu()).relu()
        return self.head(hidden).squeeze(-1)


@dataclass(frozen=True)
class Waves(Task):
    """The value of a wave; an example is inputs with the task, and the value."""

    name: ClassVar[str] = "waves"

    def examples(self, setting: Place, records: Sequence[Any], labels: Any = None) -> Examples[Any]:
        """Return records as they are."""
        return Examples(tuple(records), PlainReport(len(records), len(records)))

    def collate(self, setting: Place, examples: Sequence[Any]) -> Batch:
        """Stack inputs and values."""
        x, y = (torch.stack(column) for column in zip(*examples, strict=True))
        return Batch({"x": x}, y)

    def forward(self, setting: Place, batch: Batch) -> Tensor:
        """Run the network."""
        found: Tensor = setting.model(**batch.inputs)
        return found

    def losses(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return squared errors."""
        return F.mse_loss(outputs, targets, reduction="none"), torch.ones(len(outputs))


@cache
def waves(seed: int, count: int, part: int) -> Examples[Any]:
    """Return `count` rows of each task: ``sin(frequency · (u · x))``, each with a direction u of its own."""
    generator = torch.Generator().manual_seed(7919 * seed + part)
    directions = torch.Generator().manual_seed(seed)
    rows: list[Any] = []
    for task in range(TASKS):
        u = F.normalize(torch.randn(2, generator=directions), dim=0)
        x = torch.rand(count, 2, generator=generator) * 2 - 1
        told = F.one_hot(torch.full((count,), task), TASKS).float()
        values = torch.sin((task + 1) * (x @ u))
        rows += zip(torch.cat([x, told], 1), values, strict=True)
    ids = tuple(task for task in range(TASKS) for _ in range(count))
    return Examples(tuple(rows), PlainReport(len(rows), len(rows)), ids)


def run(contender: str, rate: float, seed: int, steps: int) -> dict[str, float]:
    """Train until all tasks are solved, or for `steps`.

    Returns
    -------
    dict
        ``draws`` until every task was solved once (those of all steps if one never was), ``solved`` tasks, ``kept``
        (minus the mean logarithm of the final loss of the first half of the tasks over the target), and ``validation``.
    """
    job = Job(
        "tasks",
        waves(seed, ROWS, 1),
        METHOD,
        targets=["second", "third"],
        modules_to_save=["first", "head"],
        objective=Waves(),
        eval_data=waves(seed, HELD, 2),
        eval_batch_size=HELD,
        eval_every=EVERY,
        steps=steps,
        batch_size=BATCH,
        learning_rate=rate,
        betas=(0.9, 0.95),
        seed=seed,
        dynamics=[{"dynamics": "dps", "target": GOAL, **GROWTH[contender]}],
    )
    with tempfile.TemporaryDirectory() as folder:
        train(Network(seed), None, job, folder, progress=False)
        return measured(read_metrics(Path(folder) / "tasks" / "metrics.jsonl"))


def measured(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return what the metrics of a run say; see `run`."""
    first: dict[int, int] = {}
    drawn, last = 0, rows[0]
    for row in rows:
        drawn = row.get("examples", drawn)
        if "eval_loss" in row and row["step"]:
            last = row
            for task in range(TASKS):
                if row[f"eval_loss/{task}"] is not None and row[f"eval_loss/{task}"] <= GOAL:
                    first.setdefault(task, drawn)
    draws = max(first.values()) if len(first) == TASKS else drawn
    early = [last[f"eval_loss/{task}"] for task in range(TASKS // 2)]
    kept = -statistics.fmean(math.log(max(loss, 1e-9) / GOAL) for loss in early)
    solved = float(len(first))
    return {"draws": float(draws), "solved": solved, "kept": kept, "validation": solved - draws / 1e6}


#: By how much less counts: draws as a share, losses as a logarithm.
FEWER, LESS = 0.15, 0.1


@claim(
    "scalezero-dps",
    "draws",
    says="Dropping solved tasks and growing by frozen stages reaches all targets with fewer draws, and forgets less "
    "than dropping alone.",
    source="arXiv 2509.07945 (ICLR 2026): the same performance on 18 tasks of DMControl with 71.5 % of the steps",
    trial=f"{TASKS} waves of rising frequency by a perceptron of width {WIDTH} from scratch, {ROWS} rows each; a task "
    f"is solved when its held-out squared error is at most {GOAL}, judged every {EVERY} steps; AdamW, at most {STEPS} "
    f"steps of {BATCH} rows less those of dropped tasks. Joint training goes on with all tasks; DPS has 5 stages (at "
    "least 100 steps for the dense stage 0, at most 300 for any) with updates of rank 16; dropping alone trains the "
    "dense weights. Encoder and head train throughout. Rates tuned for each by the fewest draws. Against: not 15 % "
    "fewer draws than joint training, or a final loss of the three easiest tasks that is not a tenth below that of "
    "dropping alone, as a logarithm.",
)
def draws(setting: Setting) -> Finding:
    """Draws until all tasks were solved, and what is left of the easiest."""
    steps = setting.much(STEPS, EVERY)

    def contender(name: str) -> Callable[[float, int], dict[str, float]]:
        return lambda rate, seed: run(name, rate, seed, steps)

    trial = tune({name: contender(name) for name in GROWTH}, RATES, setting.seeds)
    needed = {name: trial.metrics[name]["draws"] for name in GROWTH}
    saved = [1 - ours / joint for ours, joint in zip(needed[DPS], needed[JOINT], strict=True)]
    less = trial.gain(DPS, DROPPED, "kept")
    means = {name: statistics.fmean(values) for name, values in needed.items()}
    losses = {name: GOAL * math.exp(-trial.mean(name, "kept")) for name in GROWTH}
    return Finding(
        together([compare(saved, FEWER), compare(less, LESS)]),
        f"DPS needs {means[DPS]:,.0f} draws, joint training {means[JOINT]:,.0f} and dropping alone "
        f"{means[DROPPED]:,.0f}: {statistics.fmean(saved):.0%} saved. The easiest tasks end at a loss of "
        f"{losses[DPS]:.3f}, {losses[JOINT]:.3f} and {losses[DROPPED]:.3f}; the target was {GOAL}.",
        [
            Panel("Until all tasks were solved", "draws", trial.of("draws")),
            Panel("Easiest tasks at the end", "ln(target / loss), higher is better", trial.of("kept")),
        ],
        dict(trial.rates),
        [
            "Solved: " + ", ".join(f"{name} {trial.mean(name, 'solved'):.1f}" for name in GROWTH) + f" of {TASKS}.",
            "Solved tasks are neither trained nor protected: later updates, scales, encoder and head act on them, too.",
            *trial.notes,
        ],
    )
