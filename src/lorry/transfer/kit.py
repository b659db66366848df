"""The kit that goes with an adapter: what another base needs to learn the same, and no more of the data than the seeds.

A folder of ``kit.json``, ``seeds.jsonl``, ``adapter/`` and ``discriminator/``. The data themselves stay behind.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lorry.core.errors import CheckpointError, OptionError
from lorry.core.life.adapter import Adapter
from lorry.core.options import check_options, option
from lorry.training import DataError, Job, train
from lorry.training.task import Setting

from .generate import Generator
from .membership import QUESTION, Membership

VERSION = 1
#: How often a generator is asked for negatives.
ROUNDS = 8


@dataclass(frozen=True, eq=False)
class Base:
    """A base model with its tokenizer, and what it is called."""

    model: nn.Module
    tokenizer: Any
    name: str = ""


@dataclass(frozen=True)
class KitOptions:
    """How a kit is made; defaults are the paper's where it has one."""

    seeds: int = option(5, "Examples of the data that go into the kit.", at_least=1)
    rank: int = option(8, "Rank of the discriminator's LoRA.", at_least=1)
    targets: Any = option("all-linear", "Where the discriminator's LoRA sits.")
    steps: int = option(200, "Steps of its training.", at_least=1)
    batch_size: int = option(16, "Rows of a step.", at_least=1)
    learning_rate: float = option(2e-3, "At its highest; a cosine takes it down.", above=0)
    hold_out: float = option(0.2, "Share of the data on which the rate of yes is measured.", at_least=0, below=1)
    negatives: float = option(1.0, "Generated inputs for each one of the data.", above=0)
    question: str = option(QUESTION, "Text around an input, with {input} and {name}.")
    yes: str = option("yes", "The answer for inputs of the data.")
    no: str = option("no", "The answer for others.")

    def __post_init__(self) -> None:
        """Check the options."""
        check_options(self)


@dataclass(frozen=True)
class Kit:
    """A kit on disk.

    Attributes
    ----------
    folder
        Where it lies.
    name
        What the question calls the data.
    count
        How many examples the data had: as many are made for another base.
    base
        What the source is called.
    seeds
        Records with ``prompt`` and ``completion``.
    question
        Fields of `Membership`.
    facts
        How the discriminator was trained, and its rates of yes on held-out inputs and on generated ones.
    """

    folder: Path
    name: str
    count: int
    base: str
    seeds: tuple[Mapping[str, str], ...]
    question: Mapping[str, Any]
    facts: Mapping[str, float] = field(default_factory=dict)

    @property
    def adapter(self) -> Path:
        """Folder of the adapter."""
        return self.folder / "adapter"

    @property
    def discriminator(self) -> Path:
        """Folder of the discriminator's LoRA."""
        return self.folder / "discriminator"

    @property
    def prompts(self) -> list[str]:
        """The inputs of the seeds."""
        return [seed["prompt"] for seed in self.seeds]

    def membership(self) -> Membership:
        """Return what the discriminator is asked."""
        return Membership(dataset=self.name, **self.question)

    @classmethod
    def open(cls, folder: str | Path) -> Kit:
        """Read a kit.

        Raises
        ------
        CheckpointError
            Something of it is missing or damaged, or it is of a newer version.
        """
        path = Path(folder)
        wanted = ("kit.json", "seeds.jsonl", "adapter", "discriminator")
        missing = [name for name in wanted if not (path / name).exists()]
        if missing:
            raise CheckpointError(f"{path} is no kit: it lacks {', '.join(missing)}. `lorry kit` makes one.")
        try:
            values = json.loads((path / "kit.json").read_text(encoding="utf-8"))
            seeds = [json.loads(line) for line in (path / "seeds.jsonl").read_text(encoding="utf-8").splitlines()]
            if values.pop("version") > VERSION:
                raise CheckpointError(f"{path} is a kit of a newer version; update Lorry.")
            return cls(folder=path, seeds=tuple(seeds), **values)
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} is no kit that can be read: {error}. Make it again.") from error

    def _write(self) -> None:
        lines = "".join(json.dumps(dict(seed), ensure_ascii=False) + "\n" for seed in self.seeds)
        plain = {k: v for k, v in dataclasses.asdict(self).items() if k not in ("folder", "seeds")}
        for name, text in (("seeds.jsonl", lines), ("kit.json", json.dumps({"version": VERSION, **plain}, indent=2))):
            aside = self.folder / f".{name}.{os.getpid()}"
            aside.write_text(text, encoding="utf-8")
            aside.replace(self.folder / name)


def make_kit(
    source: Base,
    adapter: Adapter,
    records: Sequence[Mapping[str, Any]],
    out: str | Path,
    *,
    name: str,
    generator: Generator,
    options: KitOptions | None = None,
    seed: int = 0,
) -> Kit:
    """Train the discriminator beside an adapter, and write both with a few seeds (stage 1 of the paper).

    Parameters
    ----------
    source
        The base that carries the adapter.
    adapter
        The adapter on the source.
    records
        The data, each with ``prompt`` and ``completion``; only the seeds of them are written.
    out
        A folder that is not there, or is empty.
    name
        What the question calls the data.
    generator
        Writes negatives, as the source would; see `lorry.transfer.generate.Prompted`.
    options
        See `KitOptions`.
    seed
        Of all draws.

    Raises
    ------
    OptionError
        A folder that is in use, or fewer records than twice the seeds.
    DataError
        Records without these columns, or a generator that writes nothing new.
    """
    how, folder = options or KitOptions(), Path(out)
    inputs = _inputs(records)
    if folder.exists() and any(folder.iterdir()):
        raise OptionError(f"{folder} is not empty. Choose another folder for the kit.")
    if len(inputs) < 2 * how.seeds:
        raise OptionError(f"{len(inputs)} different inputs are too few for {how.seeds} seeds; give twice as many.")
    draw = random.Random(seed)
    chosen = draw.sample(range(len(records)), how.seeds)
    seeds = tuple({k: str(records[i][k]) for k in ("prompt", "completion")} for i in chosen)
    wanted = max(1, round(len(inputs) * how.negatives))
    negatives = _negatives(generator, [s["prompt"] for s in seeds], set(inputs), wanted, seed)
    question = {key: getattr(how, key) for key in ("question", "yes", "no")}
    kit = Kit(folder, name, len(records), source.name, seeds, question)
    draw.shuffle(inputs)
    held = round(len(inputs) * how.hold_out)
    facts = _discriminate(source, kit, inputs[held:], inputs[:held], negatives, how, seed)
    adapter.save(kit.adapter)
    made = dataclasses.replace(kit, facts=facts)
    made._write()
    return made


def _negatives(generator: Generator, seeds: list[str], known: set[str], wanted: int, seed: int) -> list[str]:
    """Return inputs that are not in the data, as many as wanted or as eight rounds give."""
    found: dict[str, None] = {}
    for turn in range(ROUNDS):
        if len(found) < wanted:
            found |= dict.fromkeys(text for text in generator(seeds, wanted, seed + turn) if text not in known)
    if not found:
        raise DataError("The generator wrote nothing that is not in the data; give it another temperature or style.")
    return list(found)[:wanted]


def _inputs(records: Sequence[Mapping[str, Any]]) -> list[str]:
    for index, record in enumerate(records):
        if not record.get("prompt") or record.get("completion") is None:
            raise DataError(f"Record {index} has the columns {sorted(record)}; expected 'prompt' and 'completion'.")
    return list(dict.fromkeys(str(record["prompt"]) for record in records))


def _discriminate(
    source: Base, kit: Kit, real: list[str], held: list[str], negatives: list[str], how: KitOptions, seed: int
) -> dict[str, float]:
    """Train the discriminator, write it, and return its rates of yes."""
    task = kit.membership()
    rows = [{"prompt": text, "real": True} for text in real] + [{"prompt": text, "real": False} for text in negatives]
    with tempfile.TemporaryDirectory() as scratch:
        job = Job(
            "discriminator",
            rows,
            {"method": "lora", "rank": how.rank, "alpha": 2 * how.rank},
            targets=how.targets,
            objective=task,
            steps=how.steps,
            batch_size=how.batch_size,
            learning_rate=how.learning_rate,
            schedule="cosine",
            seed=seed,
        )
        result = train(source.model, source.tokenizer, [job], scratch, progress=False)
        if not result.ok:
            raise DataError(f"The discriminator could not be trained: {result['discriminator']['status']}.")
        found = result.adapters["discriminator"]
        setting = Setting(source.model, source.tokenizer)
        rates = {
            label: float((task.margins(setting, found.name, texts) > 0).double().mean())
            for label, texts in (("yes_train", real), ("yes_held_out", held), ("yes_generated", negatives))
            if texts
        }
        found.save(kit.discriminator)
        found.detach()
    return {**rates, "negatives": float(len(negatives)), "steps": float(how.steps)}
