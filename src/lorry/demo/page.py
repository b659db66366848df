"""The demo's pages: a report for people (Markdown), one for programs (JSON), and the pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from lorry.demo import drawing
from lorry.demo.job import ALPHA, BATCH, PAIR, RANK, RATE, TEST_ROWS, Demo


def write(demo: Demo) -> Path:
    """Write ``report.json`` and ``report.md`` and return the latter; pictures are drawn by the caller
    beforehand.
    """
    _put(demo.folder / "report.json", json.dumps(demo.to_dict(), indent=2) + "\n")
    page = demo.folder / "report.md"
    _put(page, text(demo))
    return page


def text(demo: Demo) -> str:
    """Return the report as Markdown."""
    training = demo.facts.get("training", {})
    jobs = {job["name"]: job for job in training.get("jobs", ())}
    steps = max((job["steps"] for job in jobs.values()), default=0)
    parts = [
        "# Lorry demo",
        f"Four LoRA adapters (rank {RANK}, alpha {ALPHA:g}, all linear layers) were trained at once on one frozen "
        f"pocket model: {steps} steps of {BATCH} lines each at rate {RATE:g}, every job with its own data, optimizer, "
        f"schedule and seed. Everything on this page was measured in one run of {demo.seconds:.0f} seconds; exact "
        f"match is over {demo.facts.get('test_rows', TEST_ROWS)} test words for each skill; none was trained on.",
        "## Before and after",
        _table(
            ("adapter", "example", "before", "after", "loss at the start", "loss at the end", "parameters"),
            (
                (
                    row["name"],
                    f"`{demo.facts['examples'][row['name']]}`",
                    f"{row['before']:.1%}",
                    f"{row['after']:.1%}",
                    f"{jobs[row['name']]['first_loss']:.3f}",
                    f"{jobs[row['name']]['last_loss']:.3f}",
                    f"{jobs[row['name']]['parameters']:,}",
                )
                for row in demo.adapters
            ),
        ),
        "![exact match before and after](before-after.png)",
        "![training loss of the four jobs](losses.png)",
        f"Training took {training.get('seconds', 0):.1f} seconds for all four jobs together.",
        *_mixed(demo),
        *_fuse(demo),
        *_files(demo),
        "## What was learned, site by site",
        f"Frobenius norm of the update and singular values of the adapter `{demo.adapters[0]['name']}`, "
        "worked out from its factors.",
        "![norms and singular values](heat-map.png)",
        *pictures(demo),
    ]
    return "\n\n".join(parts) + "\n"


def _mixed(demo: Demo) -> list[str]:
    rows = ((r["adapter"], f"`{r['prompt']}`", f"`{r['answer']}`", f"`{r['expected']}`") for r in demo.mixed)
    return [
        "## One batch, an adapter of its own in every row",
        f"{demo.facts.get('mixed_rows', 0)} prompts went through the model in one batch, neighbouring "
        "rows with different adapters. "
        f"{demo.mixed_exact:.1%} were answered exactly; the first rows:",
        _table(("row's adapter", "prompt", "answer", "expected"), rows),
    ]


def _fuse(demo: Demo) -> list[str]:
    fuse = demo.fuse
    scores = fuse["exact_match"]
    rows = ((n, *(f"{scores[n][k]:.1%}" for k in ("alone", "composed", "fused"))) for n in PAIR)
    receipts = "\n".join(str(r) for r in demo.receipts if r.action in ("fuse", "unfuse"))
    back = "bit for bit what it was" if fuse["base_restored"] else "NOT what it was"
    return [
        "## Two adapters fused into the base",
        f"`{fuse['composition']}`: composed without fusing (`lorry.activate(model, {{a: 1, b: 1}})`), then fused "
        "into the base weights. Largest difference of logits between the two: "
        f"{fuse['max_difference_fused_composed']:.1e}. After unfusing, the base was {back}.",
        _table(("skill", "its adapter alone", "both composed", "both fused"), rows),
        "Fusing is exact; what two skills do to each other in so small a model is another matter. Adding "
        "two updates that were trained apart lets them interfere, as the table shows; giving each "
        "row its own adapter, as above, does not.",
        f"```\n{receipts}\n```",
    ]


def _files(demo: Demo) -> list[str]:
    receipts = "\n".join(str(r) for r in demo.receipts if r.action not in ("fuse", "unfuse"))
    if demo.peft_max_difference is None:
        peft = "peft is not installed here, so loading into it was not tried"
    else:
        peft = f"loaded by peft into another one, {demo.peft_max_difference:.1e}"
    return [
        "## Saved and loaded",
        "Every adapter was saved, and loaded into a fresh copy of the base: the logits differ by "
        f"{demo.reload_max_difference:.1e} at most; {peft}.",
        f"```\n{receipts}\n```",
    ]


def pictures(demo: Demo) -> list[str]:
    """Return the report's part on pictures, or on why there are none."""
    drawn = demo.pictures
    if isinstance(drawn, str):
        return ["## Pictures", f"Left out: {drawn}"]
    meant = " and ".join(f"`{trigger}` for {word}" for trigger, _, word in drawing.TAUGHT.values())
    rows = ((f"`{prompt}`", *(seen[row] for seen in drawn.seen.values())) for row, prompt in enumerate(drawn.prompts))
    return [
        "## Pictures",
        f"Two adapters of `{drawing.BASE}` learned a word each, trained at once: {meant} ({drawn.steps} steps of "
        f"{drawing.BATCH} pictures). A row is one prompt and one seed, a column one composition; the file holds the "
        f"recipe of every picture. It took {drawn.seconds:.0f} seconds.",
        "![pictures without adapters, with each, and with both](pictures.png)",
        "What a judge of the pocket world, which tells lime from green, reads in them:",
        _table(("prompt", *drawn.seen), rows),
    ]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _put(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
