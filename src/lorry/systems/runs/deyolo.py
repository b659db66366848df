"""DEYOLO whole: pairs on disk, six detectors, missing modalities, a LoRA for another camera, pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from lorry.core.errors import OptionError
from lorry.systems.catalogue import Outcome, Run, system
from lorry.systems.deyolo import (
    Options,
    Pairs,
    Plan,
    adapted,
    detector,
    draw,
    fit,
    found,
    load,
    precision,
    read,
    save,
    write,
)
from lorry.systems.deyolo import toy as toy_pairs
from lorry.systems.deyolo.compare import CONTENDERS, DEA, FLIP, INFRARED, RGB, measured
from lorry.systems.deyolo.model import WIDTHS

PAIRS, HELD_OUT, STEPS, ADAPTER_STEPS = 600, 200, 500, 200
RATE, ADAPTER_RATE, RANK = 2e-2, 1e-2, 4
#: Up to this side pairs are searched by the small network of the generated set.
SMALL = 128
COLUMNS = ("detector", "parameters", "mAP50", "mAP50-95", "mAP50 without RGB", "mAP50 without IR")


@system(
    "deyolo",
    title="Detection in aligned RGB and infrared pictures, fused feature by feature on torchvision's FCOS.",
    source="arXiv 2412.04931",
)
def run(given: Run) -> Outcome:
    """Train and measure all contenders; see `lorry.systems.deyolo`."""
    train, test = _data(given)
    plan = Plan(given.scaled(STEPS, 4), RATE, flip=0.5 if given.data else FLIP)
    rows: list[Sequence[str | float | int]] = []
    scores: dict[str, dict[str, float]] = {}
    models: dict[str, nn.Module] = {}
    for name in CONTENDERS:
        options = _options(train, name)
        models[name] = detector(options, given.seed)
        if given.base and name == DEA:
            models[name], options = _based(Path(given.base), train)
        fit(models[name], train, plan, given.seed, _told(given, name, plan))
        scores[name] = measured(models[name], test)
        rows.append((name, _count(models[name]), *_cells(scores[name])))
        if name == DEA:
            save(models[name], options, given.out / "model")
    files = ["boxes.png", "precision.png"]
    draw(test, found(models[DEA], test), given.out / "boxes.png")
    _plot(scores, given.out / "precision.png")
    rows += _other_camera(models[DEA], train, test, given)
    fused, single = scores[DEA]["map50"], max(scores[RGB]["map50"], scores[INFRARED]["map50"])
    says = f"The fused detector reaches {fused:.2f} mAP50, the better single modality {single:.2f}."
    notes = (
        "Pairs are generated: each object is visible in one modality, so a single one finds about half."
        if given.data is None
        else f"Pairs of {given.data}.",
        "All is trained from scratch; the LoRA rows are an addition of ours, for a camera whose infrared is inverted.",
    )
    return Outcome(says, COLUMNS, rows, [*files, "model", "adapter"], notes)


def _data(given: Run) -> tuple[Pairs, Pairs]:
    """Read pairs to learn from and pairs to measure on; generated ones go through both formats on disk."""
    if given.data is not None:
        held_out = next((given.data / n for n in ("val", "test") if (given.data / n).is_dir()), None)
        if held_out is None or not (given.data / "train").is_dir():
            raise OptionError(f"{given.data} is no data set of pairs: expected the folders train and val (or test).")
        train, test = read(given.data / "train"), read(held_out)
        if train.classes != test.classes:
            raise OptionError(f"The classes of train, {list(train.classes)}, and {held_out.name} differ.")
        return train, test
    folder = given.out / "data"
    write(toy_pairs(given.scaled(PAIRS, 8), given.seed), folder / "train", "coco")
    write(toy_pairs(given.scaled(HELD_OUT, 4), given.seed, held_out=True), folder / "val", "yolo")
    return read(folder / "train"), read(folder / "val")


def _options(pairs: Pairs, name: str) -> Options:
    """Return the small network for small pictures, else the published widths of size n at 640 pixels."""
    side = max(max(each.shape[-2:]) for each in pairs.pictures)
    fusion = CONTENDERS[name]
    if side <= SMALL:
        return Options(pairs.classes, size=64 if side <= 64 else SMALL, **fusion)
    return Options(
        pairs.classes, size=640, widths=WIDTHS["n"], levels=3, steps=(5, 4), reduction=16, neck=64, head=2, **fusion
    )


def _based(folder: Path, pairs: Pairs) -> tuple[nn.Module, Options]:
    model, options = load(folder)
    if options.classes != pairs.classes:
        raise OptionError(f"The detector in {folder} finds {options.classes}, the pairs have {pairs.classes}.")
    return model, options


def _inverted(pairs: Pairs) -> Pairs:
    """Return pairs whose infrared camera shows what is warm as dark."""

    def one(picture: Tensor) -> Tensor:
        picture = picture.clone()
        picture[3:] = 255 - picture[3:]
        return picture

    return replace(pairs, pictures=[one(each) for each in pairs.pictures])


def _other_camera(model: nn.Module, train: Pairs, test: Pairs, given: Run) -> list[Sequence[str | float | int]]:
    """Measure a trained detector behind another camera, then with a LoRA trained there."""
    dark = _inverted(test)
    before = precision(dark, found(model, dark))
    plan = Plan(given.scaled(ADAPTER_STEPS, 4), ADAPTER_RATE, flip=0.5 if given.data else FLIP)
    adapter = adapted(model, RANK, 2.0 * RANK, seed=given.seed)
    fit(model, _inverted(train), plan, given.seed, _told(given, "LoRA", plan))
    after = precision(dark, found(model, dark))
    adapter.save(given.out / "adapter")
    count = adapter.count()
    adapter.detach()
    return [
        (f"{DEA}, infrared inverted", _count(model), *_cells(before)),
        (f"{DEA}, infrared inverted, LoRA r={RANK}", count, *_cells(after)),
    ]


def _told(given: Run, what: str, plan: Plan) -> Callable[[int, float], None]:
    """Return what tells the run of each step."""
    return lambda step, loss: given.step(what, step, plan.steps)


def _count(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())


def _cells(score: dict[str, float]) -> tuple[str | float, ...]:
    return tuple(round(score[key], 3) if key in score else "" for key in ("map50", "map", "no rgb", "no ir"))


def _plot(scores: dict[str, dict[str, float]], path: Path) -> None:
    """Draw a bar for each contender with both modalities, and with either one missing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    parts = {"map50": "both pictures", "no rgb": "without RGB", "no ir": "without infrared"}
    for i, (key, label) in enumerate(parts.items()):
        places = [k + 0.27 * (i - 1) for k in range(len(scores))]
        axes.bar(places, [score[key] for score in scores.values()], 0.27, label=label)
    axes.set_xticks(range(len(scores)), list(scores), fontsize=8)
    axes.set_ylabel("mAP50 on held-out pairs")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, format="png")
