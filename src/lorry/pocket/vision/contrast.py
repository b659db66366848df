"""Training of the pocket CLIP: pictures and captions that belong together are brought close."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.shapes import DIGITS
from ..train import rate_at
from .networks import clip_network, clip_processor, pixels
from .world import (
    BACKGROUNDS,
    COLUMNS,
    FILLS,
    ROWS,
    SHAPES,
    TINTS,
    Scene,
    Written,
    caption,
    draw_scene,
    draw_written,
    pictures,
)

#: Share of written digits, and of scenes of one thing among the rest.
DIGIT_SHARE, SINGLE_SHARE = 0.15, 0.5
#: The temperature cannot fall below one hundredth.
MOST_SCALE = 4.6052
Report = Callable[[int, str], None]


def drawn(rng: random.Random) -> Scene | Written:
    """A picture of the training."""
    if rng.random() < DIGIT_SHARE:
        return draw_written(rng)
    return draw_scene(rng, 1 if rng.random() < SINGLE_SHARE else 2)


def optimizer_of(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """AdamW that lets matrices decay, and nothing else."""
    matrices = [one for one in model.parameters() if one.ndim > 1 and one.requires_grad]
    others = [one for one in model.parameters() if one.ndim <= 1 and one.requires_grad]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))


def contrastive(logits: Tensor, texts: Sequence[str]) -> Tensor:
    """The mean cross-entropy in both directions; equal captions are not held against each other."""
    places = {text: place for place, text in enumerate(texts)}
    kind = torch.tensor([places[text] for text in texts])
    same = (kind[:, None] == kind[None, :]) & ~torch.eye(len(texts), dtype=torch.bool)
    logits = logits.masked_fill(same, float("-inf"))
    right = torch.arange(len(texts))
    return (nn.functional.cross_entropy(logits, right) + nn.functional.cross_entropy(logits.T, right)) / 2


def classes() -> dict[str, list[tuple[str, str]]]:
    """For each property of single things its words, each with the caption that names it alone."""
    cells = [f"{row} {column}" for row in ROWS for column in COLUMNS]
    return {
        "shape": [(one, f"a {one}") for one in SHAPES],
        "colour": [(one, f"a {one} circle") for one in TINTS],
        "texture": [(one, f"a {one} circle") for one in FILLS],
        "place": [(one, f"a circle at the {one}") for one in cells],
        "background": [(one, f"a circle on a {one} background") for one in BACKGROUNDS],
        "digit": [(one, f"a digit {one}") for one in DIGITS],
    }


def _example(rng: random.Random, name: str) -> tuple[Scene | Written, str]:
    """A picture that was not in the training, and its word for a property; what is not asked is as in the captions."""
    if name == "digit":
        written = draw_written(rng, "test")
        return written, DIGITS[written.digit]
    scene = draw_scene(rng, 1, shapes=SHAPES if name == "shape" else ("circle",))
    thing = scene.things[0]
    values = {
        "shape": thing.shape,
        "colour": thing.colour,
        "texture": thing.texture,
        "place": f"{ROWS[thing.row]} {COLUMNS[thing.column]}",
        "background": scene.background,
    }
    return scene, values[name]


@torch.no_grad()
def zero_shot(model: Any, processor: Any, count: int, seed: int) -> dict[str, float]:
    """The share of pictures whose own word has the nearest caption, for each property.

    Parameters
    ----------
    model, processor
        A ``CLIPModel`` and its processor.
    count
        Pictures of each property, drawn apart from those of training.
    seed
        Of the draw.
    """
    rng = random.Random(f"zero shot {seed}")
    found = {}
    for name, words in classes().items():
        shown, values = zip(*(_example(rng, name) for _ in range(count)), strict=True)
        right = torch.tensor([[word for word, _ in words].index(value) for value in values])
        texts = [text for _, text in words]
        coded = processor.tokenizer(texts, padding=True, return_tensors="pt")
        logits = model(**coded, pixel_values=pixels(pictures(shown)).to(model.dtype)).logits_per_image
        found[name] = float((logits.argmax(-1) == right).float().mean())
    return found


def train_clip(steps: int, rows: int, seed: int, report: Report, every: int = 100, rate: float = 1e-3) -> Any:
    """Train a CLIP from nothing.

    Parameters
    ----------
    steps, rows
        Optimizer steps, and pictures of each.
    seed
        Of weights and pictures.
    report
        Told the step and figures.
    every
        Steps between reports.
    rate
        Peak learning rate.

    Returns
    -------
    CLIPModel
        In float32 and eval mode.
    """
    model, processor = clip_network(seed).train(), clip_processor()
    optimizer = optimizer_of(model, rate)
    rng = random.Random(f"clip {seed}")
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps, rate)
        shown = [drawn(rng) for _ in range(rows)]
        texts = [caption(rng, one) for one in shown]
        coded = processor.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        logits = model(**coded, pixel_values=pixels(pictures(shown))).logits_per_image
        loss = contrastive(logits, texts)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=MOST_SCALE)
        if (step + 1) % every == 0 or step + 1 == steps:
            model.eval()
            right = ", ".join(f"{name} {share:.0%}" for name, share in zero_shot(model, processor, 100, seed).items())
            report(step + 1, f"loss {loss.item():.3f}, {right}")
            model.train()
    return model.eval()
