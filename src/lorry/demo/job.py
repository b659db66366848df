"""Train four adapters at once, mix, fuse, save and load them, and measure every step; then draw pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import lorry
from lorry import pocket
from lorry.core.receipt import Receipt
from lorry.demo import drawing
from lorry.training.fleet import Fleet
from lorry.training.jobs import Job
from lorry.training.report import read_metrics

#: The skills of the demo: held out from the pocket model's training, learned by one adapter each.
SKILLS = ("previous", "even", "unrotate", "star")
#: The two adapters whose mixture is shown, composed and fused.
PAIR = ("even", "star")
RANK, ALPHA, STEPS, BATCH, RATE = 8, 16.0, 100, 32, 5e-3
TRAIN_ROWS, TEST_ROWS = 3200, 200

Say = Callable[[str], None]


@dataclass
class Demo:
    """What the demo did and measured.

    Attributes
    ----------
    adapters
        Name, and exact match before and after training, for each skill.
    curves
        Name -> (step, loss) points.
    mixed
        Rows of one batch: adapter, prompt, answer, expected answer.
    mixed_exact
        Exact match over a batch in which every row has its own adapter.
    fuse
        What fusing two adapters gave: receipts, exact match, whether the base came back.
    peft_max_difference, reload_max_difference
        Largest difference of logits after loading into peft (None without peft) and into a fresh base.
    receipts
        Of saving and loading.
    sites
        Norm and singular values at each site, by adapter.
    pictures
        What was drawn, or why nothing was.
    """

    folder: Path
    adapters: list[dict[str, Any]] = field(default_factory=list)
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    mixed: list[dict[str, str]] = field(default_factory=list)
    mixed_exact: float = 0.0
    fuse: dict[str, Any] = field(default_factory=dict)
    peft_max_difference: float | None = None
    reload_max_difference: float = 0.0
    receipts: list[Receipt] = field(default_factory=list)
    sites: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    pictures: drawing.Drawing | str = "no pictures were asked for"
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return what `report.json` holds."""
        return {
            "adapters": self.adapters,
            "fuse": self.fuse,
            "peft_max_difference": self.peft_max_difference,
            "pictures": None if isinstance(self.pictures, str) else self.pictures.to_dict(),
            "seconds": round(self.seconds, 2),
        }


def run(
    folder: Path,
    *,
    steps: int = STEPS,
    test_rows: int = TEST_ROWS,
    picture_steps: int = drawing.STEPS,
    say: Say = print,
    bars: bool | None = None,
) -> Demo:
    """Run the demo and write adapters and measurements; `lorry.demo.page` makes the pages of it.

    Parameters
    ----------
    folder
        Where adapters and metrics go; what an earlier run left there is replaced.
    steps
        Training steps of each adapter.
    test_rows
        Test words of each skill.
    picture_steps
        Training steps of each adapter for pictures; 0 leaves them out.
    say
        Called with a line at each stage.
    bars
        Whether training shows progress bars; None shows them on a terminal.
    """
    began = time.perf_counter()
    demo = Demo(folder)
    model, tokenizer = pocket.load()
    tests = {name: pocket.examples(name, "test", test_rows, seed=1) for name in SKILLS}
    say(
        f"pocket model: {sum(p.numel() for p in model.parameters()):,} parameters; {test_rows} test words "
        "for each skill"
    )
    before = {name: pocket.exact_match(model, tokenizer, tests[name]) for name in SKILLS}
    demo.facts["test_rows"] = test_rows
    demo.facts["examples"] = {name: tests[name][0].prompt + tests[name][0].answer for name in SKILLS}
    say(f"training {len(SKILLS)} adapters at once on one frozen base: {', '.join(SKILLS)}")
    train(demo, model, tokenizer, steps, bars)
    measure(demo, model, tokenizer, tests, before)
    for row in demo.adapters:
        say(f"  {row['name']:<10} {row['before']:6.1%} -> {row['after']:6.1%}")
    mix(demo, model, tokenizer, tests)
    say(f"one batch, an adapter of its own in every row: {demo.mixed_exact:.1%} exact")
    fuse(demo, model, tokenizer, tests)
    say(f"{demo.fuse['composition']}: {demo.fuse['summary']}")
    reload(demo, model, tokenizer, tests)
    shown = "peft is not installed" if demo.peft_max_difference is None else f"{demo.peft_max_difference:.1e}"
    say(f"saved, loaded into a fresh base (difference {demo.reload_max_difference:.1e}) and into peft ({shown})")
    if picture_steps:
        demo.pictures = drawing.try_grid(folder, picture_steps, say, bars)
    demo.seconds = time.perf_counter() - began
    return demo


def train(demo: Demo, model: Any, tokenizer: Any, steps: int, bars: bool | None) -> None:
    """Train one adapter for each skill, all in the same passes over the base."""
    jobs = [
        Job(
            name=name,
            data=[
                {"prompt": e.prompt, "completion": e.answer} for e in pocket.examples(name, "train", TRAIN_ROWS, seed=0)
            ],
            method={"method": "lora", "rank": RANK, "alpha": ALPHA},
            objective="completion",
            steps=steps,
            batch_size=BATCH,
            learning_rate=RATE,
            seed=index,
        )
        for index, name in enumerate(SKILLS)
    ]
    fleet = Fleet(model, tokenizer, jobs, demo.folder / "training", overwrite=True, progress=bars)
    report = fleet.train().report
    for job in report["jobs"]:
        if job["status"].startswith("failed"):
            raise RuntimeError(f"Training '{job['name']}' {job['status']}.")
        rows = read_metrics(demo.folder / "training" / job["name"] / "metrics.jsonl")
        demo.curves[job["name"]] = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    demo.facts["training"] = report


def measure(demo: Demo, model: Any, tokenizer: Any, tests: dict[str, Any], before: dict[str, float]) -> None:
    """Take the exact match of each adapter on its own skill, and the shape of its update."""
    for name in SKILLS:
        lorry.activate(model, name)
        after = pocket.exact_match(model, tokenizer, tests[name])
        demo.adapters.append({"name": name, "before": before[name], "after": after})
    lorry.activate(model, None)


def mix(demo: Demo, model: Any, tokenizer: Any, tests: dict[str, Any]) -> None:
    """Answer one list of prompts in which neighbouring rows belong to different adapters."""
    each = min(50, *(len(t) for t in tests.values()))
    lines = [(name, tests[name][i]) for i in range(each) for name in SKILLS]
    names = [name for name, _ in lines]
    examples = [example for _, example in lines]
    longest = max(len(e.answer) for e in examples) + 2
    answers = pocket.answer(
        model,
        tokenizer,
        [e.prompt for e in examples],
        longest,
        batch_size=len(lines),
        rows=lambda start, stop: lorry.rows(model, names[start:stop]),
    )
    demo.facts["mixed_rows"] = len(lines)
    demo.mixed_exact = sum(a == e.answer for a, e in zip(answers, examples, strict=True)) / len(lines)
    shown = zip(names[: 2 * len(SKILLS)], examples, answers, strict=False)
    demo.mixed = [{"adapter": n, "prompt": e.prompt, "answer": a, "expected": e.answer} for n, e, a in shown]


def fuse(demo: Demo, model: Any, tokenizer: Any, tests: dict[str, Any]) -> None:
    """Compose two adapters, fuse them into the base with a receipt, and take it out again."""
    first, second = PAIR
    lorry.activate(model, {first: 1.0, second: 1.0})
    composed = {name: pocket.exact_match(model, tokenizer, tests[name]) for name in PAIR}
    pair = f"{first}+{second}"
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if "lorry_" not in name}
    adapters = lorry.adapters(model)
    together = logits(model, tokenizer, tests, PAIR)
    receipts = [adapters[name].fuse() for name in PAIR]
    fused = logits(model, tokenizer, tests, PAIR)
    baked = {name: pocket.exact_match(model, tokenizer, tests[name]) for name in PAIR}
    for name in reversed(PAIR):
        adapters[name].unfuse()
    restored = all(torch.equal(weights[n], p) for n, p in model.named_parameters() if n in weights)
    lorry.activate(model, None)
    alone = {row["name"]: row["after"] for row in demo.adapters}
    demo.fuse = {
        "composition": pair,
        "exact_match": {n: {"alone": alone[n], "composed": composed[n], "fused": baked[n]} for n in PAIR},
        "max_difference_fused_composed": float((fused - together).abs().max()),
        "receipts": [r.to_dict() for r in receipts],
        "base_restored": restored,
        "summary": f"fused into the base, both skills at {', '.join(f'{v:.1%}' for v in baked.values())}; "
        + ("every byte of the base came back" if restored else "the base did NOT come back"),
    }
    demo.receipts += receipts


def reload(demo: Demo, model: Any, tokenizer: Any, tests: dict[str, Any]) -> None:
    """Load every saved adapter into a fresh base and into peft, and compare the logits."""
    differences, by_peft = [], []
    for name in SKILLS:
        lorry.activate(model, name)
        expected = logits(model, tokenizer, tests, [name])
        path = demo.folder / "adapters" / name
        demo.receipts.append(lorry.adapters(model)[name].save(path))
        fresh, _ = pocket.load()
        loaded = lorry.load(fresh, path, name=name)
        demo.receipts.append(loaded.receipt)
        differences.append(float((logits(fresh, tokenizer, tests, [name]) - expected).abs().max()))
        peer = _peft(path)
        if peer is not None:
            by_peft.append(float((logits(peer, tokenizer, tests, [name]) - expected).abs().max()))
    lorry.activate(model, None)
    demo.reload_max_difference = max(differences)
    demo.peft_max_difference = max(by_peft) if by_peft else None


def _peft(path: Path) -> Any:
    """Return the pocket model with an adapter loaded by peft, or None where peft is not installed."""
    try:
        import peft
    except ImportError:
        return None
    import warnings

    fresh, _ = pocket.load()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of peft's use of transformers
        return peft.PeftModel.from_pretrained(fresh, str(path)).eval()


def logits(model: Any, tokenizer: Any, tests: dict[str, Any], names: Sequence[str]) -> torch.Tensor:
    """Return the model's logits on a few whole test lines."""
    lines = [e.prompt + e.answer for name in names for e in tests[name][:32]]
    batch = tokenizer(lines, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return torch.where(batch["attention_mask"].bool()[..., None], out, torch.zeros(()))
