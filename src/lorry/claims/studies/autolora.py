"""Claims of AutoLoRA: adapters found by words from their weights, and several at once behind a gate."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lorry.depot.encoder import EncoderShape, Factors
from lorry.depot.index import read_depot, shapes_of
from lorry.depot.retriever import BagOfWords, Retriever, RetrieverTraining, train_retriever
from lorry.systems.autolora.baselines import (
    FlatEncoder,
    expected_recall,
    names_of,
    regauged,
    scores_of_names,
    split,
)
from lorry.systems.autolora.pool import Concept, PoolTraining, build, concepts

from ..ledger import Finding, Panel, Setting, claim
from ..verdicts import compare, together

#: The encoder, and how it and the network on flattened weights are trained.
SHAPE = EncoderShape(width=48, probes=4, out=32)
TRAINING = RetrieverTraining(steps=150, rows=128, rate=5e-3, weight_decay=0.5)
FLAT_TRAINING = RetrieverTraining(steps=150, rows=128, rate=1e-3, weight_decay=0.5)
ENCODED, FLAT, NAMES = "encoder of updates", "flattened A and B", "names of files"
FAR, FAR_FLAT = "encoder of updates, another gauge", "flattened A and B, another gauge"


@claim(
    "autolora",
    "retrieval",
    says="Adapters are found by a text from their weights alone, by an encoder trained by contrast.",
    source="arXiv 2508.02107, abstract",
    trial="204 LoRAs of rank 4 on the pocket SDXL, 60 steps on 16 pictures each, trained by fleets: every base shape "
    "in every colour and texture, on every background and in every novel style, each under one of six trigger words. A "
    "fifth of each family is held out, combinations whose words are known from others; one pool, three splits and "
    "starts. The query is the concept in words (`a red striped square`), the candidates are the held-out adapters; "
    "recall among all 204 is reported beside it. Against: the mean recall@1 is not above that of the same training on "
    "flattened factors and that of names of files, of which a third says nothing, a third one word, and a third has a "
    "wrong word.",
)
def retrieval(setting: Setting) -> Finding:
    """Recall of held-out adapters by words."""
    wanted = concepts(setting.much(204, 24))
    with tempfile.TemporaryDirectory() as folder:
        pool = build(Path(folder), wanted, PoolTraining(steps=setting.much(60, 2)))
        names, factors, _ = read_depot(folder)
    known = {name: pool.concepts[name] for name in names}
    found: dict[str, list[dict[str, float]]] = {}
    sizes: list[int] = []
    for seed in setting.seeds:
        learned, held = split(known, 0.2, seed)
        sizes.append(len(held))
        for contender, values in _recalls(known, dict(zip(names, factors, strict=True)), learned, held, seed, setting):
            found.setdefault(contender, []).append(values)
    mean = {one: {k: statistics.fmean(row[k] for row in rows) for k in rows[0]} for one, rows in found.items()}
    gains = [
        [a["at 1"] - b["at 1"] for a, b in zip(found[ENCODED], found[other], strict=True)] for other in (FLAT, NAMES)
    ]
    return Finding(
        together([compare(values) for values in gains]),
        f"Recall@1 of {ENCODED} {mean[ENCODED]['at 1']:.3f} (@5 {mean[ENCODED]['at 5']:.3f}), "
        f"{FLAT} {mean[FLAT]['at 1']:.3f} ({mean[FLAT]['at 5']:.3f}), {NAMES} {mean[NAMES]['at 1']:.3f} "
        f"({mean[NAMES]['at 5']:.3f}), chance {statistics.fmean(1 / n for n in sizes):.3f}; after a change of gauge "
        f"{mean[FAR]['at 1']:.3f} and {mean[FAR_FLAT]['at 1']:.3f}.",
        [
            Panel(
                f"Held-out adapters, {title}", "recall", {one: [[r[key] for r in rows]] for one, rows in found.items()}
            )
            for title, key in (("first", "at 1"), ("among the first five", "at 5"), ("first of the whole pool", "all"))
        ],
        notes=[
            f"{', '.join(map(str, sizes))} adapters held out; of those that were learned from, the encoder finds "
            f"{mean[ENCODED]['learned']:.1%} first, the network on flattened factors {mean[FLAT]['learned']:.1%}.",
            "The encoder's width, rate (0.005) and weight decay were chosen on the split of seed 0 from six runs; the "
            "network on flattened factors was run at its rate of 0.001 alone. Names that tie count in expectation.",
        ],
    )


def _recalls(
    known: Mapping[str, Concept],
    factors: Mapping[str, Factors],
    learned: Sequence[str],
    held: Sequence[str],
    seed: int,
    setting: Setting,
) -> list[tuple[str, dict[str, float]]]:
    """What each contender finds of one split."""
    queries = [known[name].text for name in held]
    words = BagOfWords.of([text for name in learned for text in known[name].captions])
    shapes = shapes_of(factors[learned[0]])
    rank = max(a.shape[0] for a, _ in factors[learned[0]].values())
    turned = [regauged(factors[name], 1000 * seed + i) for i, name in enumerate(held)]
    rows = []
    for name, far, encoder, how in (
        (ENCODED, FAR, None, TRAINING),
        (FLAT, FAR_FLAT, FlatEncoder(shapes, rank, SHAPE.out, seed=seed), FLAT_TRAINING),
    ):
        retriever = Retriever(shapes, SHAPE, len(words.words), seed, encoder=encoder)
        settings = RetrieverTraining(setting.much(how.steps, 2), how.rows, how.rate, how.weight_decay)
        listed = [factors[n] for n in learned]
        train_retriever(retriever, listed, [known[n].captions for n in learned], words, settings, seed)
        with torch.no_grad():
            asked = retriever.of_texts(words(queries))
            own, others = retriever.of_adapters([factors[n] for n in held]), retriever.of_adapters(listed)
            again = retriever.of_texts(words([known[n].text for n in learned])) @ others.mT
            rows += [
                (name, {**_measured(asked @ own.mT, asked @ others.mT), "learned": expected_recall(again)}),
                (far, _measured(asked @ retriever.of_adapters(turned).mT, asked @ others.mT)),
            ]
    both = [*held, *learned]
    scores = scores_of_names(queries, names_of([known[n] for n in both], seed))
    rows.append((NAMES, _measured(scores[:, : len(held)], scores[:, len(held) :])))
    return rows


def _measured(own: torch.Tensor, others: torch.Tensor) -> dict[str, float]:
    """Recall among the held-out adapters, and among all."""
    return {
        "at 1": expected_recall(own),
        "at 5": expected_recall(own, 5),
        "all": expected_recall(torch.cat([own, others], 1)),
    }
