"""Training of the pocket VLM: several questions about each picture, of which the answers are learned.

Before and beside that, what the language model is given of each patch learns to say what is there: of a character its
embedding, of a thing its words, by heads that are thrown away.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..tokenizer import END, IGNORED
from ..train import rate_at
from .contrast import Report, optimizer_of
from .evaluate import exact_match
from .networks import IMAGE, pixels, vlm_network, vlm_processor
from .questions import Question, questions, skills
from .world import FILLS, GRID, LINE, SHAPES, TINTS, Page, Picture, Scene, draw_page, draw_scene, pictures

#: Share of pages among the pictures, and questions about each picture.
PAGE_SHARE, ASKED = 0.45, 4
#: How often a scene has 1, 2, 3 and 4 things.
CROWDS = (4, 3, 2, 1)
#: Share of the steps that only teach patches to say what is there, and the weight of that lesson afterwards.
PATCH_STEPS, PATCH_WEIGHT = 0.2, 0.3


def coded(processor: Any, rows: Sequence[Sequence[Question]]) -> dict[str, Tensor]:
    """One batch padded at the right, in which only answers and their ends are learned.

    Parameters
    ----------
    processor
        Of the VLM.
    rows
        In each row one or more questions about the picture of its first.

    Returns
    -------
    dict
        ``input_ids``, ``attention_mask`` and ``labels`` (rows, tokens), and ``pixel_values`` (rows, 3, 48, 48).
    """
    tokenizer = processor.tokenizer
    end, image = tokenizer.convert_tokens_to_ids(END), tokenizer.convert_tokens_to_ids(IMAGE)
    patches = (processor.image_processor.crop_size["height"] // processor.patch_size) ** 2
    made: list[tuple[list[int], list[int]]] = []
    for row in rows:
        ids, labels = [image] * patches, [IGNORED] * patches
        for one in row:
            prompt = tokenizer.encode(one.prompt, add_special_tokens=False)
            answer = [*tokenizer.encode(one.answer, add_special_tokens=False), end]
            ids += prompt + answer
            labels += [IGNORED] * len(prompt) + answer
        made.append((ids, labels))
    width = max(len(ids) for ids, _ in made)
    found = {
        name: torch.full((len(rows), width), fill)
        for name, fill in (("input_ids", tokenizer.pad_token_id), ("attention_mask", 0), ("labels", IGNORED))
    }
    for place, (ids, labels) in enumerate(made):
        found["input_ids"][place, : len(ids)] = torch.tensor(ids)
        found["attention_mask"][place, : len(ids)] = 1
        found["labels"][place, : len(ids)] = torch.tensor(labels)
    return {**found, "pixel_values": pixels(pictures(row[0].picture for row in rows))}


def asked(rng: random.Random) -> list[Question]:
    """A picture of the training with questions of the base skills."""
    page = rng.random() < PAGE_SHARE
    picture: Picture = draw_page(rng) if page else draw_scene(rng, rng.choices((1, 2, 3, 4), CROWDS)[0])
    fitting = [one for one in skills("base") if one.pages == page]
    return [rng.choice(fitting).question(rng, picture) for _ in range(ASKED)]


class PatchHeads(nn.Module):
    """Heads that read the words of a thing from each patch of its place; thrown away after the training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(width, len(words) + 1) for words in (SHAPES, TINTS, FILLS)])

    def forward(self, patches: Tensor, shown: Sequence[Scene]) -> Tensor:
        """The mean cross-entropy of the words at each patch, (scenes, patches, width); a patch without is nothing."""
        total = patches.new_zeros(())
        for head, words, kind in zip(self.heads, (SHAPES, TINTS, FILLS), ("shape", "colour", "texture"), strict=True):
            there = torch.full((len(shown), GRID, GRID), len(words))
            for row, scene in enumerate(shown):
                for thing in scene.things:
                    there[row, thing.row, thing.column] = words.index(getattr(thing, kind))
            each = LINE // GRID
            wanted = there.repeat_interleave(each, 1).repeat_interleave(each, 2).flatten(1)
            total = total + nn.functional.cross_entropy(head(patches).flatten(0, 1), wanted.flatten())
        return total


def patch_loss(model: Any, heads: PatchHeads, tokenizer: Any, shown: Sequence[Picture]) -> Tensor:
    """How far what the language model is given of patches is from saying what is there."""
    given = torch.stack(list(model.model.get_image_features(pixels(pictures(shown))).pooler_output))
    is_page = torch.tensor([isinstance(one, Page) for one in shown])
    total = given.new_zeros(())
    pages = [one for one in shown if isinstance(one, Page)]
    if pages:
        texts = ["".join(f"{text:<{LINE}}" for text in one.texts).ljust(LINE * LINE) for one in pages]
        wanted = torch.tensor([tokenizer.encode(text, add_special_tokens=False) for text in texts])
        logits = given[is_page] @ model.get_input_embeddings().weight.detach().T
        total = total + nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
    scenes = [one for one in shown if isinstance(one, Scene)]
    if scenes:
        total = total + heads(given[~is_page], scenes)
    return total


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The mean cross-entropy of the learned tokens."""
    labels = batch["labels"][:, 1:]
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits
    learned = labels != IGNORED
    return nn.functional.cross_entropy(logits[:, :-1][learned], labels[learned])


def right(model: Any, processor: Any, count: int, seed: int) -> dict[str, float]:
    """The share of right answers for each skill, about pictures of the test split."""
    return {one.name: exact_match(model, processor, questions(one, "test", count, seed)) for one in skills()}


def train_vlm(
    clip: Any,
    language: Any,
    steps: int,
    rows: int,
    seed: int,
    report: Report,
    every: int = 100,
    rate: float = 1e-3,
) -> Any:
    """Train a VLM that starts from a CLIP's tower and a language model; all of it is trained.

    Parameters
    ----------
    clip, language
        ``CLIPModel`` and ``LlamaForCausalLM``.
    steps, rows
        Optimizer steps, and pictures of each.
    seed
        Of what is new, and of the pictures.
    report
        Told the step and figures.
    every
        Steps between reports.
    rate
        Peak learning rate.

    Returns
    -------
    LlavaForConditionalGeneration
        In float32 and eval mode.
    """
    model, processor = vlm_network(clip, language, seed).train(), vlm_processor()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = PatchHeads(model.config.text_config.hidden_size)
    optimizer = optimizer_of(nn.ModuleList([model, heads]), rate)
    rng = random.Random(f"vlm {seed}")
    base = [one.name for one in skills("base")]
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps, rate)
        about = [asked(rng) for _ in range(rows)]
        first = step < PATCH_STEPS * steps
        lesson = patch_loss(model, heads, processor.tokenizer, [row[0].picture for row in about])
        loss = lesson if first else loss_of(model, coded(processor, about)) + PATCH_WEIGHT * lesson
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % every == 0 or step + 1 == steps:
            shares = {name: exact_match(model, processor, questions(name, "test", 32, seed)) for name in base}
            figures = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
            report(step + 1, f"patches {lesson.item():.3f}, loss {loss.item():.3f}, {figures}")
    return model.eval()
