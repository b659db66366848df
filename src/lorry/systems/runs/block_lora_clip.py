"""Block-LoRA on CLIP: few shots of each class, against zero shots, a linear probe and LoRA, and on new classes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lorry.core.errors import OptionError
from lorry.multimodal.clip import (
    Pictures,
    Recipe,
    accuracy,
    adapt,
    halves,
    linear_probe,
    load_base,
    read_folder,
    shots_of,
)
from lorry.pocket import clip
from lorry.pocket.vision.albums import write_album
from lorry.systems.catalogue import Outcome, Run, system

SHOTS = (1, 2, 4, 8, 16)
#: Pictures of each class that are read, and of all that are judged.
MOST, JUDGED = 40, 200
RANK, BLOCKS = 2, 2
#: Words of a prompt on the small model's own pictures, and on others.
TEMPLATES = {True: "a {}", False: "a photo of a {}"}
#: Steps of a training at each number of shots, pictures of a step, and the rate; on a real CLIP those of CLIP-LoRA.
STEPS, ROWS, RATE = 100, 16, 1e-2
REAL_STEPS, REAL_ROWS, REAL_RATE = 500, 32, 2e-4


def methods() -> dict[str, Mapping[str, Any]]:
    """The contenders, all with the scale that CLIP-LoRA has at the whole rank."""
    alpha = 1.0
    return {
        f"LoRA r={RANK}": {"method": "lora", "rank": RANK, "alpha": alpha * math.sqrt(RANK), "dropout": 0.25},
        f"Block-LoRA r={RANK}, {BLOCKS} blocks": {
            "method": "block-lora",
            "rank": RANK,
            "blocks": BLOCKS,
            "alpha": alpha,
            "dropout": 0.25,
        },
    }


def recipe_of(given: Run, method: Mapping[str, Any], shots: int) -> Recipe:
    """How a contender is trained on so many shots."""
    template = TEMPLATES[given.data is None]
    if given.base is None:
        return Recipe(method, template, given.scaled(STEPS, 1), ROWS, RATE)
    return Recipe(method, template, given.scaled(REAL_STEPS * shots, 1), REAL_ROWS, REAL_RATE)


def opened(given: Run) -> tuple[Any, Any]:
    """A fresh copy of the model, and its processor."""
    return clip.load() if given.base is None else load_base(given.base)


def folder_of(given: Run) -> Path:
    """The folder of pictures that was given, or one of shapes, made in the run's folder."""
    if given.data is not None:
        return given.data
    return write_album("shapes", given.out / "shapes", MOST, given.seed)


def judged(data: Pictures, most: int, seed: int) -> Pictures:
    """Return pictures to judge by, at most so many."""
    return data.rows(torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:most])


def learned(given: Run, train: Pictures, test: Pictures, shots: int, method: Mapping[str, Any]) -> float:
    """The accuracy of a contender after training on some shots."""
    model, processor = opened(given)
    recipe = recipe_of(given, method, shots)
    adapt(model, processor, train, recipe, seed=given.seed)
    return accuracy(model, processor, test, recipe.template)


def base_to_new(given: Run, data: Pictures, shots: int, method: Mapping[str, Any] | None) -> tuple[float, float, float]:
    """Accuracies on base classes, of which shots were learned, and on new ones, and their harmonic mean."""
    base, new = halves(data.names)
    train, rest = shots_of(data.of_classes(base), shots, given.seed)
    model, processor = opened(given)
    recipe = recipe_of(given, method or {}, shots)  # its prompt alone, where nothing is learned
    if method is not None:
        adapt(model, processor, train, recipe, seed=given.seed)
    found = [
        accuracy(model, processor, judged(part, given.scaled(JUDGED, 10), given.seed), recipe.template)
        for part in (rest, data.of_classes(new))
    ]
    return found[0], found[1], 2 * found[0] * found[1] / max(sum(found), 1e-9)


def draw(curves: Mapping[str, list[float]], shots: tuple[int, ...], path: Path) -> None:
    """Draw accuracy over shots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in curves.items():
        axes.plot(shots, values, "--" if name == "zero shots" else "o-", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(shots, [str(one) for one in shots])
    axes.set_xlabel("shots of each class")
    axes.set_ylabel("accuracy")
    axes.legend()
    figure.savefig(path)


@system(
    "block-lora-clip",
    title="Few-shot adaptation of CLIP whose blocks of LoRA share one down-projection.",
    source="arXiv 2501.16720",
)
def run(given: Run) -> Outcome:
    """Adapt CLIP to the classes of a folder of pictures with 1 to 16 shots of each."""
    folder = folder_of(given)
    model, processor = opened(given)
    data = read_folder(folder, processor, MOST, given.seed)
    least = int(torch.bincount(data.labels).min())
    shots = tuple(one for one in SHOTS if one < least and (given.effort >= 0.2 or one <= 2))
    if not shots:
        raise OptionError(f"The smallest class of {folder} has {least} picture: expected two of each class or more.")
    contenders = methods()
    curves: dict[str, list[float]] = {name: [] for name in ("zero shots", "linear probe", *contenders)}
    for place, one in enumerate(shots):
        given.step("shots", place, len(shots))
        train, rest = shots_of(data, one, given.seed)
        test = judged(rest, given.scaled(JUDGED, 10), given.seed)
        curves["zero shots"].append(accuracy(model, processor, test, TEMPLATES[given.data is None]))
        curves["linear probe"].append(linear_probe(model, train, test))
        for name, method in contenders.items():
            curves[name].append(learned(given, train, test, one, method))
    given.step("shots", len(shots), len(shots))
    draw(curves, shots, given.out / "shots.png")
    half = shots[-1]
    rows: list[list[str | float]] = []
    for name, values in curves.items():
        rows.append([name, *(round(value, 3) for value in values)])
        if name == "linear probe":
            rows[-1] += ["", "", ""]
            continue
        rows[-1] += [round(value, 3) for value in base_to_new(given, data, half, contenders.get(name))]
    own = curves[next(name for name in contenders if name.startswith("Block"))][-1]
    return Outcome(
        f"With {half} shots of each class Block-LoRA reaches {own:.3f}, from {curves['zero shots'][-1]:.3f} without.",
        ("", *(f"{one} shots" for one in shots), "base", "new", "harmonic"),
        rows,
        ("shots.png",),
        (
            f"{len(data.names)} classes: {', '.join(data.names)}. Base to new: the first half is learned with {half} "
            "shots, the second half is only named.",
            "A probe has no output for classes that it was not shown.",
        ),
    )
