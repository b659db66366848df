"""AutoLoRA from a pool of adapters to a picture: retrieve by words, fuse behind a gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lorry.core.errors import OptionError
from lorry.depot.encoder import EncoderShape
from lorry.depot.index import CAPTIONS, INDEX, Index, build_index
from lorry.depot.retriever import RetrieverTraining
from lorry.pocket.diffusion import load, load_judge
from lorry.systems.autolora.baselines import expected_recall, names_of, scores_of_names, split
from lorry.systems.autolora.fusing import GATE, GateTraining, all_ways, drawn, on_network, shown, train_gates, triples
from lorry.systems.autolora.pool import Pool, PoolTraining, build, concepts
from lorry.systems.catalogue import Outcome, Run, system

QUERY = "a red striped square"
#: Ways that stand beside each other in the picture.
SHOWN: tuple[tuple[str, Any], ...] = (
    ("right alone", (1.0, 0.0)),
    ("sum", (1.0, 1.0)),
    ("sum, a third", (1 / 3, 1 / 3)),
    ("gate", GATE),
)


@system(
    "autolora",
    title="Adapters found by words from their weights alone, and several at once behind a learned gate.",
    source="arXiv 2508.02107",
)
def run(given: Run) -> Outcome:
    """Train a small pool, a retriever on most of it, and a gate; search; draw."""
    if given.base is not None:
        raise OptionError(
            "AutoLoRA's pool is of the pocket world, whose concepts a judge can count; leave out --base. A folder of "
            "adapters of another base is searched by `lorry search TEXT FOLDER`, and a job with members trains a gate."
        )
    pool = build(
        given.out / "pool",
        concepts(given.scaled(96, 16), given.seed),
        PoolTraining(steps=given.scaled(60, 2)),
        seed=given.seed,
        step=given.step,
    )
    rows, index, held = _searched(given, pool)
    hits = index.search(QUERY, 3)
    fused = _fused(given, pool, held)
    best = max((row for row in fused if row[0].startswith("sum")), key=lambda row: row[1])
    ours = next(row for row in fused if row[0] == GATE)
    return Outcome(
        f"Of {len(held)} adapters that the retriever never saw, it finds {rows[0][1]:.0%} first by their concepts in "
        f"words (names of files: {rows[1][1]:.0%}). With two wrong adapters active beside the right one, pictures show "
        f"{ours[1]:.0%} of its words behind the gate, {best[1]:.0%} under the {best[0]}.",
        ("what", "share"),
        [(name, round(value, 3)) for name, value in (*rows, *fused)],
        ("fusing.png", "pool", "gate"),
        [
            f"'{QUERY}' finds " + ", ".join(f"{hit.name} ({pool.concepts[hit.name].text})" for hit in hits) + ".",
            f"lorry search '{QUERY}' {given.out / 'pool'} asks the index that was written.",
        ],
    )


def _searched(given: Run, pool: Pool) -> tuple[list[tuple[str, float]], Index, list[str]]:
    """Index the pool by a retriever that knows the captions of four fifths; return recall of the others."""
    _, held = split(pool.concepts, 0.2, given.seed)
    hidden = {name: (pool.path(name) / CAPTIONS).read_bytes() for name in held}
    given.step("training the retriever", 0, 1)
    try:
        for name in held:  # what has no captions is indexed and not learned from
            (pool.path(name) / CAPTIONS).unlink()
        index = build_index(
            pool.folder,
            shape=EncoderShape(width=48, probes=4, out=32),
            settings=RetrieverTraining(steps=given.scaled(150, 2), rows=128, rate=5e-3, weight_decay=0.5),
            seed=given.seed,
        )
    finally:
        for name, text in hidden.items():
            (pool.path(name) / CAPTIONS).write_bytes(text)
    index.save(pool.folder / INDEX)
    given.step("training the retriever", 1, 1)
    queries = [pool.concepts[name].text for name in held]
    own = index.vectors[[index.names.index(name) for name in held]]
    with torch.no_grad():
        scores = index.retriever.of_texts(index.words(queries)) @ own.mT
    named = scores_of_names(queries, names_of([pool.concepts[name] for name in held], given.seed))
    found = [
        ("held-out adapters found first, by weights", expected_recall(scores)),
        ("held-out adapters found first, by names", expected_recall(named)),
        ("held-out adapters among the first 5, by weights", expected_recall(scores, 5)),
        ("held-out adapters among the first 5, by names", expected_recall(named, 5)),
    ]
    return found, index, held


def _fused(given: Run, pool: Pool, held: list[str]) -> list[tuple[str, float]]:
    """Train a gate over some adapters, and count and draw what pictures show of the right one."""
    pipeline, judge = load(), load_judge()
    things = [name for name, one in pool.concepts.items() if one.family == "thing" and name not in held]
    things = things[: given.scaled(20, 6)]
    given.step("training the gate", 0, 1)
    settings = GateTraining(steps=given.scaled(160, 2))
    gates = train_gates(pipeline, pool, things, given.out / "fleet", settings, seed=given.seed)
    gates[GATE].save(given.out / "gate", overwrite=True)
    given.step("training the gate", 1, 1)
    on_network(pipeline, pool, things)
    wanted = triples(pool, things, 1, given.seed)
    steps = given.scaled(8, 2)
    found = [(name, share) for name, share in all_ways(pipeline, judge, pool, wanted, [GATE], steps=steps).items()]
    _picture(given.out / "fusing.png", pipeline, pool, wanted[:8], steps)
    return found


def _picture(path: Path, pipeline: Any, pool: Pool, wanted: list[Any], steps: int) -> None:
    """Draw a row for each way and a column for each right concept."""
    from matplotlib.figure import Figure

    made = [(name, drawn(pipeline, pool, wanted, way, steps=steps).pixels) for name, way in SHOWN]
    figure = Figure(figsize=(1.35 * len(wanted), 1.5 * len(made)), layout="constrained")
    grid = figure.subplots(len(made), len(wanted), squeeze=False)
    judge = load_judge()
    for axes, (name, pixels) in zip(grid, made, strict=True):
        for axis, picture, one in zip(axes, pixels, wanted, strict=True):
            axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_xlabel(f"{shown(judge, pool, [one], picture[None]):.2f}", fontsize=7)
        axes[0].set_ylabel(name, fontsize=8)
    for axis, one in zip(grid[0], wanted, strict=True):
        words = pool.concepts[one.right].words
        axis.set_title("\n".join(words.values()), fontsize=7)
    figure.suptitle(
        "A right adapter and two wrong ones; below each picture the share of the right words that are seen", fontsize=8
    )
    figure.savefig(path, dpi=110)
