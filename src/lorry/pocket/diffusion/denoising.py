"""Training of the two denoisers with their text encoders, on pictures of base words alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from .judge import Judge, score, unit
from .schedule import held_rate_at
from .tokenizer import TOKENS
from .world import OF_SCENES, OF_THINGS, Attribute, caption, draw, pictures

#: Scenes of a training, half of them with two things.
SCENES = 40_000
#: Share of captions that are left empty, for guidance, and of those that leave attributes out.
EMPTY, PARTIAL = 0.1, 0.25
DECAY = 0.998
#: Steps between two looks at samples, and samples of each kind in a look.
LOOK, LOOKED_AT = 500, 48
#: Steps between two lines of a report.
REPORT = 100


@dataclass(frozen=True)
class Batch:
    """Some pictures' latents, (rows, 4, 16, 16), and the tokens of their captions, (rows, 24) for each tokenizer."""

    latents: Tensor
    tokens: Tensor
    tokens_2: Tensor

    def rows(self, chosen: Tensor) -> Batch:
        """These rows."""
        return Batch(self.latents[chosen], self.tokens[chosen], self.tokens_2[chosen])


Loss = Callable[[Any, Batch, torch.Generator], Tensor]


def training_captions(scenes: list[Any], rng: random.Random) -> list[str]:
    """Captions of scenes, some empty and some that leave attributes out."""
    names: tuple[Attribute, ...] = (*OF_THINGS, *OF_SCENES)
    captions = []
    for scene in scenes:
        kind = rng.random()
        left_out = [name for name in names if rng.random() < 0.35] if kind < EMPTY + PARTIAL else []
        captions.append("" if kind < EMPTY else caption(scene, left_out))
    return captions


@torch.no_grad()
def data(pipeline: Any, seed: int, count: int = SCENES) -> Batch:
    """All training pictures as latents, and their captions as tokens."""
    rng = random.Random(f"denoising {seed}")
    scenes = [draw(rng, things=1 + place % 2) for place in range(count)]
    captions = training_captions(scenes, rng)
    parts = []
    for start in range(0, count, 500):
        shown = 2 * unit(pictures(scenes[start : start + 500])) - 1
        parts.append(pipeline.vae.encode(shown).latent_dist.mean)
    tokens = [
        torch.tensor(one(captions, padding="max_length", max_length=TOKENS, truncation=True)["input_ids"])
        for one in (pipeline.tokenizer, pipeline.tokenizer_2)
    ]
    return Batch(torch.cat(parts), *tokens)


def sdxl_loss(pipeline: Any, batch: Batch, generator: torch.Generator) -> Tensor:
    """Squared error of the v-prediction at uniform times."""
    first = pipeline.text_encoder(batch.tokens, output_hidden_states=True)
    second = pipeline.text_encoder_2(batch.tokens_2, output_hidden_states=True)
    words = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    rows = len(batch.latents)
    noise = torch.randn(batch.latents.shape, generator=generator)
    times = torch.randint(pipeline.scheduler.config.num_train_timesteps, (rows,), generator=generator)
    noisy = pipeline.scheduler.add_noise(batch.latents, noise, times)
    sizes = torch.tensor([[32.0, 32.0, 0.0, 0.0, 32.0, 32.0]]).expand(rows, 6)
    made = pipeline.unet(
        noisy,
        times,
        encoder_hidden_states=words,
        added_cond_kwargs={"text_embeds": second.text_embeds, "time_ids": sizes},
    ).sample
    return mse_loss(made, pipeline.scheduler.get_velocity(batch.latents, noise, times))


def flux_loss(pipeline: Any, batch: Batch, generator: torch.Generator) -> Tensor:
    """Squared error of the flow at logit-normal times."""
    pooled = pipeline.text_encoder(batch.tokens).pooler_output
    words = pipeline.text_encoder_2(batch.tokens_2)[0]
    rows, channels, height, width = batch.latents.shape
    clean = pipeline._pack_latents(batch.latents, rows, channels, height, width)
    noise = torch.randn(clean.shape, generator=generator)
    times = torch.randn(rows, generator=generator).sigmoid()
    share = times[:, None, None]
    made = pipeline.transformer(
        hidden_states=(1 - share) * clean + share * noise,
        encoder_hidden_states=words,
        pooled_projections=pooled,
        timestep=times,
        img_ids=pipeline._prepare_latent_image_ids(rows, height // 2, width // 2, "cpu", torch.float32),
        txt_ids=torch.zeros(TOKENS, 3),
    ).sample
    return mse_loss(made, noise - clean)


def trained_parts(pipeline: Any) -> list[nn.Module]:
    """The networks of a pipeline apart from its autoencoder."""
    return [one for name, one in pipeline.components.items() if isinstance(one, nn.Module) and name != "vae"]


def samples_right(
    pipeline: Any, judge: Judge, recipe: dict[str, Any], things: int, count: int, seed: int
) -> Mapping[str, float]:
    """What the judge says of samples for random scenes of base words.

    Parameters
    ----------
    pipeline
        Either of the two.
    judge
        A trained one.
    recipe
        Arguments of the pipeline's call.
    things
        1 or 2.
    count
        How many samples.
    seed
        Of the scenes and of the noise.

    Returns
    -------
    mapping
        As of :func:`lorry.pocket.diffusion.judge.score`.
    """
    rng = random.Random(f"samples {seed}")
    scenes = [draw(rng, things=things) for _ in range(count)]
    pipeline.set_progress_bar_config(disable=True)
    given = dict(recipe)
    if "negative_prompt" in given:
        given["negative_prompt"] = [given["negative_prompt"]] * count
    made = pipeline(
        [caption(scene) for scene in scenes],
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
        **given,
    ).images
    return score(judge, made, scenes)


class _Average:
    """The moving average of weights, which can stand in their place for a while."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self.weights = weights
        self.values = [one.detach().clone() for one in weights]

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Move towards the weights after this step, faster at the start."""
        torch._foreach_lerp_(self.values, list[Tensor](self.weights), 1 - min(DECAY, (step + 1) / (step + 10)))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights and their averages."""
        for weight, value in zip(self.weights, self.values, strict=True):
            held = weight.clone()
            weight.copy_(value)
            value.copy_(held)


def _optimizer(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW that decays matrices alone."""
    matrices = [one for one in weights if one.ndim > 1]
    others = [one for one in weights if one.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def train(
    pipeline: Any,
    loss_of: Loss,
    steps: int,
    seed: int,
    report: Callable[[int, str], None],
    look: Callable[[int], None],
    rows: int = 32,
    rate: float = 1.2e-3,
) -> None:
    """Train a pipeline's denoiser and text encoders together, and leave the moving average of their weights in them.

    Parameters
    ----------
    pipeline
        With a trained autoencoder, which stays as it is.
    loss_of
        :func:`sdxl_loss` or :func:`flux_loss`.
    steps
        Of AdamW.
    seed
        Of scenes, captions, times and noise.
    report
        Called with the step and a line of figures.
    look
        Called every so often with the step, while the averaged weights are in place.
    rows
        Pictures in a batch.
    rate
        Peak learning rate.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = nn.ModuleList(trained_parts(pipeline)).train().requires_grad_(True)
    weights = list(parts.parameters())
    everything = data(pipeline, seed)
    report(0, f"{len(everything.latents)} scenes, {sum(one.numel() for one in weights):,} weights")
    optimizer, average = _optimizer(weights), _Average(weights)
    recent = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = held_rate_at(step, steps, rate)
        chosen = torch.randint(len(everything.latents), (rows,), generator=generator)
        loss = loss_of(pipeline, everything.rows(chosen), generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        average.follow(step)
        recent += (0.02 if step else 1.0) * (loss.item() - recent)
        if (step + 1) % REPORT == 0:
            report(step + 1, f"loss {recent:.4f}")
        if (step + 1) % LOOK == 0 and step + 1 < steps:
            average.swap()
            look(step + 1)
            average.swap()
    average.swap()
    parts.eval().requires_grad_(False)
    look(steps)
