"""Every merge method on pocket skills, each tuned with the same number of tries."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from torch import Tensor, nn

import lorry
from lorry import pocket

from ..ledger import Finding, Setting, claim
from ..merged import Scene, Try, contest, finding, train_together, tries

SKILLS = ("previous", "even", "unrotate", "ends", "opens", "star")
MIXTURES = (("previous", "even", "opens"), ("unrotate", "ends", "star"), ("even", "star"))
SAYS = "Each of these methods merges adapters with less interference than adding their updates does."


@contextmanager
def pocket_scene(setting: Setting, seed: int) -> Iterator[Scene]:
    """Six skills on the pocket model, rank 4 on all linear layers, from one start."""
    model, tokenizer = pocket.load()
    steps, rows, count = setting.much(150, 5), 16, setting.much(60, 4)
    lines = {s: pocket.examples(s, "train", steps * rows, seed) for s in SKILLS}
    held = {s: pocket.examples(s, "test", 2 * count, seed=1) for s in SKILLS}

    def loss(step: int, names: Sequence[str]) -> Tensor:
        taken = [line for s in names for line in lines[s][step * rows : (step + 1) * rows]]
        with lorry.rows(model, [s for s in names for _ in range(rows)]):
            return len(names) * model(**pocket.batch(tokenizer, taken)).loss

    def scores(tasks: Sequence[str], validation: bool) -> dict[str, float]:
        asked = {t: held[t][count:] if validation else held[t][:count] for t in tasks}
        flat = [line for t in tasks for line in asked[t]]
        found = pocket.answer(model, tokenizer, [line.prompt for line in flat], 10, batch_size=256)
        right = [float(text == line.answer) for text, line in zip(found, flat, strict=True)]
        return {t: sum(right[i * count : (i + 1) * count]) / count for i, t in enumerate(tasks)}

    def support(task: str, carrier: nn.Module) -> Tensor:
        value: Tensor = carrier(**pocket.batch(tokenizer, lines[task][:8])).loss
        return value

    with tempfile.TemporaryDirectory() as folder:
        method = {"method": "lora", "rank": 4, "alpha": 8}
        adapters, checkpoints = train_together(
            model, SKILLS, method, "all-linear", loss, steps, 3e-3, seed, Path(folder)
        )
        yield Scene(model, adapters, scores, {s: partial(support, s) for s in SKILLS}, checkpoints)


@claim(
    "merging",
    "pocket-skills",
    says=SAYS,
    source="arXiv 2306.01708, 2311.03099, 2410.19735, 2307.13269 and the other methods' papers",
    trial="Six skills on the pocket model (LoRA rank 4 on all linear layers, 150 steps of 16 lines), merged by every "
    "method; six settings each, chosen on validation words of the first seed's adapters, then tried on test words with "
    "the adapters of all seeds, and on three smaller mixtures that nothing was tuned on. Counts against a method: no "
    "gain over task arithmetic of tuned strength.",
)
def pocket_skills(setting: Setting, listed: Mapping[str, Sequence[Try]] | None = None) -> Finding:
    """Exact match of all merges."""
    result = contest(partial(pocket_scene, setting), MIXTURES, setting.seeds, listed or tries())
    notes = [f"Skills: {', '.join(SKILLS)}; mixtures: {'; '.join(', '.join(m) for m in MIXTURES)}."]
    return finding(result, "exact match", notes)
