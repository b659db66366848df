"""The mode ``prompt_token``: an adapter's own words behind the prompt, so that it works without its trigger.

The encoder's result is as wide as the text and stands behind the embedding of the prompt; it is trained with the
ordinary loss of diffusion on pictures of the adapters, under a prompt that names none of them. Adapters and base stay
as they are. Released with DiffSynth-Studio beside the retriever.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import lorry
from lorry.core.options import check_options, option
from lorry.depot.encoder import AdapterEncoder, EncoderShape, Factors, taken, with_tokens
from lorry.depot.index import shapes_of
from lorry.diffusion import Step, family_of
from lorry.diffusion.errors import DiffusionError
from lorry.diffusion.task import Diffusion
from lorry.systems.autolora.pool import Pool, as_image
from lorry.training.task import Batch, Setting

#: The prompt that names nothing.
PLAIN = "a shape"


@dataclass(frozen=True)
class TokenTraining:
    """How the encoder is trained; with networks of full size the released rate is 1e-5.

    Raises
    ------
    OptionError
        A value out of its range.
    """

    steps: int = option(150, "Optimizer steps.", at_least=1)
    rows: int = option(8, "Pictures of a step, each of an adapter that is drawn.", at_least=1)
    pictures: int = option(4, "Pictures of each adapter's concept.", at_least=1)
    rate: float = option(2e-3, "Learning rate of AdamW, falling by a cosine.", above=0)
    scale: float = option(1.0, "Factor of the tokens.", at_least=0, at_most=2)

    def __post_init__(self) -> None:
        """Check every option against its range."""
        check_options(self)


def train_tokens(
    pipeline: Any,
    pool: Pool,
    adapters: Mapping[str, Factors],
    settings: TokenTraining | None = None,
    *,
    shape: EncoderShape | None = None,
    seed: int = 0,
) -> tuple[AdapterEncoder, list[float]]:
    """Train an encoder whose tokens stand behind the prompt.

    Parameters
    ----------
    pipeline
        Of diffusers, with the adapters on its network.
    pool
        Their concepts, of which pictures are drawn.
    adapters
        Name -> its factors.
    settings
        How.
    shape
        Of the encoder; its `out` is replaced by the width of the text.
    seed
        Of the start, pictures, noise and draws.

    Returns
    -------
    AdapterEncoder
        Trained, in eval mode.
    list of float
        The loss of each step.
    """
    settings, names = settings or TokenTraining(), list(adapters)
    task, place = Diffusion(), Setting(pipeline.unet, pipeline)
    g = torch.Generator().manual_seed(seed)
    data = _pictures(pool, names, settings.pictures, seed)
    examples = task.examples(place, data)
    shape = shape or EncoderShape(width=48, heads=4)
    width = examples[0].conditions["text"].shape[-1]
    wide = EncoderShape(shape.width, shape.probes, shape.blocks, shape.special, shape.heads, width)
    encoder = AdapterEncoder(shapes_of(adapters[names[0]]), wide, seed)
    together = encoder.stacked([adapters[name] for name in names])
    optimizer = torch.optim.AdamW(encoder.parameters(), settings.rate)
    course = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    losses = []
    for _ in range(settings.steps):
        chosen = torch.randint(len(names), (settings.rows,), generator=g).tolist()
        which = torch.randint(settings.pictures, (settings.rows,), generator=g).tolist()
        rows = examples.take([n * settings.pictures + k for n, k in zip(chosen, which, strict=True)])
        batch = task.collate(place, task.draw(rows, g, place, ""))
        tokens = encoder.encode(taken(together, chosen))
        loss = _loss(pipeline, task, batch, [names[n] for n in chosen], tokens, settings.scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        course.step()
        losses.append(float(loss.detach()))
    return encoder.eval(), losses


def _pictures(pool: Pool, names: Sequence[str], each: int, seed: int) -> list[dict[str, Any]]:
    """Return pictures of each adapter's concept, one after the other, under the prompt that names nothing."""
    rng = random.Random(f"tokens {seed}")
    return [{"image": as_image(pool.concepts[n].scene(rng)), "text": PLAIN} for n in names for _ in range(each)]


def _loss(pipeline: Any, task: Diffusion, batch: Batch, names: Sequence[str], tokens: Tensor, scale: float) -> Tensor:
    """Return the mean loss of pictures under one adapter each, with its tokens behind the prompt."""
    inputs = batch.inputs
    told = inputs["conditions"].with_(text=with_tokens(inputs["conditions"]["text"], tokens, scale))
    with lorry.context(pipeline.unet, **batch.facts), lorry.rows(pipeline.unet, list(names)):
        made = family_of(pipeline).predict(pipeline.unet, inputs["latents"], inputs["times"], told)
    return task.weighed(made, batch.targets).mean()


def own_words(encoder: AdapterEncoder, adapters: Mapping[str, Factors], scale: float = 1.0) -> Callable[[Step], Tensor]:
    """Return what `lorry.diffusion.sample` takes as `predict`: each picture's adapter speaks behind its prompt.

    Parameters
    ----------
    encoder
        From `train_tokens`.
    adapters
        Name -> its factors, of all adapters that pictures are made with.
    scale
        Factor of the tokens.
    """
    kept: dict[str, Tensor] = {}

    def predict(step: Step) -> Tensor:
        tokens = torch.stack([_of(name) for name in _names(step)])
        text = with_tokens(step.conditions["text"], tokens, scale)
        return step.guided(step.conditions.with_(text=text))

    def _of(name: str) -> Tensor:
        if name not in kept:
            with torch.no_grad():
                kept[name] = encoder([adapters[name]])[0]
        return kept[name]

    return predict


def _names(step: Step) -> Sequence[str]:
    """Return the one adapter of each picture."""
    found = []
    for composition in step.compositions or [None]:
        names = [composition] if isinstance(composition, str) else list(composition or ())
        if len(names) != 1 or not isinstance(names[0], str):
            raise DiffusionError(f"Tokens behind the prompt are of one adapter for each picture, found {names}.")
        found.append(names[0])
    return found
