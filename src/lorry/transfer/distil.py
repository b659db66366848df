"""The target's side of a transfer: generate, filter, let the source answer, learn (stage 2 of arXiv 2405.17258)."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lorry.core.errors import OptionError
from lorry.core.life.adapter import Adapter
from lorry.core.life.api import adapters
from lorry.core.options import check_options, option
from lorry.formats.load import load
from lorry.training import DataError, Job, train
from lorry.training.reference import continued
from lorry.training.task import Setting

from .generate import Generator, Prompted, quietly
from .kit import Base, Kit

#: Inputs asked of a generator at once.
ROUND = 256


@dataclass(frozen=True)
class TransferOptions:
    """How an adapter is transferred; defaults are the paper's where it has one."""

    method: Any = option("lora", "Method of the target's adapter: a slug, or {method: slug, **options}.")
    targets: Any = option("all-linear", "Which of the target's layers get it.")
    start: Any = option(None, "How it starts, as in a job.")
    count: int | None = option(None, "Inputs to make; as many as the data had if not given.", at_least=1)
    filtered: bool = option(True, "Keep only inputs that the discriminator takes for the data.")
    max_attempts: int = option(50, "Inputs tried for each one wanted, before giving up.", at_least=1)
    max_new_tokens: int = option(64, "Most tokens of the source's answer.", at_least=1)
    epochs: int | None = option(None, "Passes over the inputs; 20 if neither epochs nor steps are given.", at_least=1)
    steps: int | None = option(None, "Optimizer steps, in place of epochs.", at_least=1)
    batch_size: int = option(8, "Rows of a step.", at_least=1)
    learning_rate: float = option(2e-4, "At its highest.", above=0)
    schedule: str = option("linear", "Course of the learning rate.")

    def __post_init__(self) -> None:
        """Check the options."""
        check_options(self)
        if self.epochs is not None and self.steps is not None:
            raise OptionError(f"Give epochs or steps, not both (found {self.epochs} and {self.steps}).")


@dataclass(frozen=True)
class Sampled:
    """Inputs that were made for a transfer.

    Attributes
    ----------
    inputs
        Those kept, all different.
    margins
        ``log p(yes) - log p(no)`` of each of them; empty without the filter.
    attempts
        How many were written.
    repeated
        How many were seeds, or there already.
    """

    inputs: tuple[str, ...]
    margins: tuple[float, ...]
    attempts: int
    repeated: int

    @property
    def rate(self) -> float:
        """The share of different inputs that was kept."""
        return len(self.inputs) / max(1, self.attempts - self.repeated)


@contextmanager
def carrying(base: Base, folder: Path, role: str, check_base: bool = True) -> Iterator[str]:
    """Have an adapter on a base, not active, for the length of a block; yields its name there."""
    taken, number = adapters(base.model), 0
    while f"{role}-{number}" in taken:
        number += 1
    adapter = load(base.model, folder, name=f"{role}-{number}", activate=False, check_base=check_base)
    try:
        yield adapter.name
    finally:
        adapter.detach()


def sample(kit: Kit, source: Base, generator: Generator, options: TransferOptions, seed: int = 0) -> Sampled:
    """Write inputs until as many are accepted as wanted (rejection sampling).

    Raises
    ------
    DataError
        Too few were accepted among `max_attempts` for each one, with the rate.
    """
    wanted = options.count or kit.count
    with carrying(source, kit.discriminator, "discriminator") as name:
        setting, task = Setting(source.model, source.tokenizer), kit.membership()
        seen = set(kit.prompts)
        kept: list[str] = []
        margins: list[float] = []
        attempts = repeated = turn = 0
        limit = wanted * options.max_attempts
        while len(kept) < wanted and attempts < limit:
            asked = min(ROUND, limit - attempts)
            written = generator(kit.prompts, asked, seed * 1_000_003 + turn)
            attempts, turn = attempts + asked, turn + 1
            new = [text for text in dict.fromkeys(written) if text not in seen]
            repeated += len(written) - len(new)
            seen.update(new)
            if options.filtered and new:
                scores = task.margins(setting, name, new).tolist()
                both = [(text, score) for text, score in zip(new, scores, strict=True) if score > 0]
                new, margins = [text for text, _ in both], [*margins, *(score for _, score in both)]
            kept += new
    if len(kept) < wanted:
        raise DataError(
            f"{len(kept)} inputs of {wanted} were accepted among {attempts} that were written ({repeated} of them "
            "repeated). Give another generator or more seeds, raise max_attempts, or ask for fewer with count."
        )
    return Sampled(tuple(kept[:wanted]), tuple(margins[:wanted]), attempts, repeated)


def answers(
    base: Base, adapter: str | None, inputs: Sequence[str], max_new_tokens: int = 64, batch: int = 32
) -> list[str]:
    """Return what a base says to inputs under an adapter (None: bare), greedily, without its end of text."""
    generator, found = torch.Generator().manual_seed(0), []
    for start in range(0, len(inputs), batch):
        chunk = list(inputs[start : start + batch])
        with quietly(base.model, adapter, len(chunk)):
            made = continued(
                base.model,
                base.tokenizer,
                chunk,
                generator=generator,
                max_new_tokens=max_new_tokens,
                temperature=0.0,
            )
        found += base.tokenizer.batch_decode([new.tolist() for _, new in made], skip_special_tokens=True)
    return found


def learn(
    target: Base, pairs: Sequence[tuple[str, str]], options: TransferOptions, name: str, seed: int = 0
) -> tuple[Adapter, float]:
    """Train an adapter on pairs of input and answer; returns it, active on the target, and its last loss."""
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in pairs if answer]
    if not rows:
        raise DataError("The source answered nothing to any input, so there is nothing to learn.")
    job = Job(
        name,
        rows,
        options.method,
        targets=options.targets,
        start=options.start,
        objective={"objective": "completion", "separator": ""},
        epochs=options.epochs or (None if options.steps else 20),
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        schedule=options.schedule,
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as scratch:
        result = train(target.model, target.tokenizer, [job], scratch, progress=False)
    if not result.ok:
        raise DataError(f"The target could not be trained: {result[name]['status']}.")
    return result.adapters[name], float(result[name]["last_loss"])


def transfer(
    kit: Kit,
    source: Base,
    target: Base,
    *,
    out: str | Path | None = None,
    generator: Generator | None = None,
    teacher: tuple[Base, Path] | None = None,
    options: TransferOptions | None = None,
    name: str = "transferred",
    seed: int = 0,
) -> tuple[Adapter, dict[str, Any]]:
    """Move the adapter of a kit to another base; the data that it was trained on are not needed.

    Parameters
    ----------
    kit, source, target
        The kit, its base, which judges inputs and answers them, and the base that learns.
    out
        Folder for ``adapter/`` and ``transfer.json``; nothing is written if not given.
    generator
        Writes inputs; the target, shown the seeds, if not given.
    teacher
        Another base and adapter that answer in place of the kit's: the result of an earlier hop.
    options
        See `TransferOptions`.
    name, seed
        Of the new adapter; of all draws.

    Returns
    -------
    tuple
        The adapter on the target, and the facts: counts, rate of acceptance, loss.

    Raises
    ------
    OptionError, DataError, FingerprintError
        `out` is in use, too few inputs are accepted, or the source is not the kit's base.
    """
    how, folder = options or TransferOptions(), None if out is None else Path(out)
    if folder is not None and folder.exists() and any(folder.iterdir()):
        raise OptionError(f"{folder} is not empty. Choose another folder for the result.")
    drawn = sample(kit, source, generator or Prompted(target.model, target.tokenizer), how, seed)
    asked, path = teacher or (source, kit.adapter)
    with carrying(asked, path, "teacher") as role:
        said = answers(asked, role, drawn.inputs, how.max_new_tokens)
    adapter, loss = learn(target, list(zip(drawn.inputs, said, strict=True)), how, name, seed)
    facts = {
        **_counts(drawn, said, how),
        "kit": kit.name,
        "source": source.name or kit.base,
        "target": target.name,
        "teacher": asked.name,
        "final_loss": loss,
        "seed": seed,
    }
    adapter.metadata["transfer"] = facts
    if folder is not None:
        _write(adapter, facts, folder)
    return adapter, facts


def _counts(drawn: Sampled, said: Sequence[str], how: TransferOptions) -> dict[str, Any]:
    return {
        "inputs": len(drawn.inputs),
        "unanswered": sum(not text for text in said),
        "attempts": drawn.attempts,
        "repeated": drawn.repeated,
        "accepted": drawn.rate if how.filtered else None,
        "options": {k: v if isinstance(v, int | float | str | None) else str(v) for k, v in asdict(how).items()},
    }


def _write(adapter: Adapter, facts: dict[str, Any], folder: Path) -> None:
    adapter.save(folder / "adapter")
    aside = folder / f".transfer.{os.getpid()}"
    aside.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    aside.replace(folder / "transfer.json")
