"""Training of the judge and of the autoencoder, on pictures with base and novel words alike."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate, l1_loss, mse_loss

from .judge import WORDS, Judge, targets, unit
from .networks import LATENT_CHANNELS, autoencoder
from .schedule import rate_at
from .world import BASE, NOVEL, Attribute, Scene, draw, pictures

Report = Callable[[int, str], None]
#: Steps between two lines of a report.
EVERY = 100
#: Weight of the divergence beside the squared error.
DIVERGENCE = 1e-4
#: Standard deviation of the noise on latents with which the decoder learns to cope.
LEFT_NOISE = 0.05


def scenes_of_all(count: int, seed: int) -> list[Scene]:
    """Scenes with base and novel words: of each attribute the novel ones in four scenes of ten."""
    rng = random.Random(f"foundations {seed}")
    scenes = []
    for _ in range(count):
        choices: dict[Attribute, tuple[str, ...]] = {"shape": WORDS["shape"]}
        for name in ("colour", "texture", "background", "style"):
            choices[name] = NOVEL[name] if rng.random() < 0.4 else BASE[name]
        if rng.random() < 0.5:
            choices["colour"] = WORDS["colour"]
            choices["texture"] = WORDS["texture"]
        scenes.append(draw(rng, choices=choices))
    return scenes


def _worn(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures as a network may make them: a little noise, blur and another brightness."""
    rows = (len(batch), 1, 1, 1)
    blurred = interpolate(
        interpolate(batch, scale_factor=0.75, mode="bilinear"), size=batch.shape[-2:], mode="bilinear"
    )
    share = torch.rand(rows, generator=generator) * (torch.rand(rows, generator=generator) < 0.4)
    batch = batch + share * (blurred - batch)
    noise = 0.05 * torch.rand(rows, generator=generator) * torch.randn(batch.shape, generator=generator)
    return (batch + noise + 0.06 * (torch.rand(rows, generator=generator) - 0.5)).clamp(0, 1)


def train_judge(steps: int, seed: int, report: Report, rows: int = 64, rate: float = 2e-3) -> Judge:
    """Train a judge from nothing.

    Parameters
    ----------
    steps
        Of AdamW.
    seed
        Of weights, pictures and wear.
    report
        Called with the step and a line of figures.
    rows
        Pictures in a batch.
    rate
        Peak learning rate.

    Returns
    -------
    Judge
        In eval mode.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge()
    scenes = scenes_of_all(50_000, seed)
    shown, labels = pictures(scenes), targets(scenes)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=rate, weight_decay=0.02)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate_at(step, steps, rate)
        chosen = torch.randint(len(shown), (rows,), generator=generator)
        logits = judge(_worn(unit(shown[chosen]), generator))
        loss = torch.stack([cross_entropy(logits[head], labels[head][chosen]) for head in logits]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % EVERY == 0:
            report(step + 1, f"loss {loss.item():.4f}")
    return judge.eval()


def train_autoencoder(
    steps: int, seed: int, report: Report, keep: Callable[[Any], None], rows: int = 32, rate: float = 3e-3
) -> Any:
    """Train an ``AutoencoderKL`` from nothing: squared and absolute error, a little Kullback-Leibler divergence.

    After a quarter of the steps the encoder stays as it is, so that denoisers can be trained on its latents meanwhile;
    the decoder goes on, on latents with the noise that a denoiser leaves.

    Parameters
    ----------
    steps
        Of AdamW.
    seed
        Of weights, pictures and noise.
    report
        Called with the step and a line of figures.
    keep
        Called with the model when the encoder is done.
    rows
        Pictures in a batch.
    rate
        Peak learning rate of both parts of the training.

    Returns
    -------
    AutoencoderKL
        In eval mode; its latents have mean 0 and variance 1 in each channel.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = autoencoder()
    with torch.no_grad():  # latents that start with little noise are learnt much faster
        model.quant_conv.weight[LATENT_CHANNELS:] = 0
        model.quant_conv.bias[LATENT_CHANNELS:] = -6
    model.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    shown = pictures(scenes_of_all(20_000, seed))
    joint = steps // 4
    _fit(model, shown, range(joint), rows, rate, generator, report, noise=0.0)
    with torch.no_grad():
        normalise(model, model.encode(2 * unit(shown[:1000]) - 1).latent_dist.mean)
    model.encoder.requires_grad_(False)
    model.quant_conv.requires_grad_(False)
    keep(model)
    _fit(model, shown, range(joint, steps), rows, rate, generator, report, noise=LEFT_NOISE)
    return model.eval()


def _fit(
    model: Any,
    shown: Tensor,
    course: range,
    rows: int,
    rate: float,
    generator: torch.Generator,
    report: Report,
    noise: float,
) -> None:
    """Train what of an autoencoder wants gradients, over these steps."""
    weights = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=1e-3, betas=(0.9, 0.95))
    for step in course:
        optimizer.param_groups[0]["lr"] = rate_at(step - course.start, len(course), rate)
        wanted = 2 * unit(shown[torch.randint(len(shown), (rows,), generator=generator)]) - 1
        latents = model.encode(wanted).latent_dist
        drawn = latents.sample(generator)
        made = model.decode(drawn + noise * torch.randn(drawn.shape, generator=generator)).sample
        error = mse_loss(made, wanted)
        divergence = latents.kl().mean() / wanted[0].numel()
        loss = error + 0.2 * l1_loss(made, wanted) + DIVERGENCE * divergence
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if (step + 1) % EVERY == 0:
            report(step + 1, f"squared error {error.item():.5f}, divergence {divergence.item():.3f}")


@torch.no_grad()
def normalise(model: Any, latents: Tensor) -> None:
    """Put the mean and the spread of latents into the convolutions beside them, so that pipelines need not know them.

    Parameters
    ----------
    model
        An ``AutoencoderKL`` with ``quant_conv`` and ``post_quant_conv``, changed in place.
    latents
        Means of its latents for some pictures, (pictures, channels, height, width).
    """
    mean, spread = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    inward, outward = model.quant_conv, model.post_quant_conv
    outward.bias += outward.weight[:, :, 0, 0] @ mean
    outward.weight *= spread[None, :, None, None]
    count = len(mean)
    inward.bias[:count] -= mean
    inward.bias[:count] /= spread
    inward.weight[:count] /= spread[:, None, None, None]
    inward.bias[count:] -= 2 * spread.log()
