"""Training a codec (stage 1): first that messages are read at all, then that they are not seen."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lorry.core.options import check_options, option
from lorry.protection.codec import Codec
from lorry.protection.distortions import chosen

#: Phases: the message alone on an empty picture, with the perceptual term, with all terms.
MESSAGE, PERCEIVED, ALL = 0, 1, 2
_WINDOW = 10


@dataclass(frozen=True)
class CodecTraining:
    """How a codec is trained.

    Raises
    ------
    OptionError
        A value out of its range, or an unknown distortion.
    """

    steps: int = option(2000, "Optimizer steps.", at_least=1)
    rows: int = option(32, "Pictures of a step.", at_least=1)
    rate: float = option(1e-3, "Learning rate of AdamW.", above=0)
    weight_decay: float = option(1e-4, "Its weight decay.", at_least=0)
    perceptual: float = option(5.0, "Weight of the perceptual distance.", at_least=0)
    variation: float = option(1.5, "Weight of the largest regional change.", at_least=0)
    region: int = option(8, "Side of a region of that, in pixels.", at_least=1)
    read_below: float = option(0.1, "Mean of ten message losses at which a phase ends.", above=0)
    zero_rate: float = option(
        0.1, "Share of pictures without residual that must read as the zero message.", at_least=0, below=1
    )
    distortions: tuple[str, ...] = option(("noise", "blur", "crop", "colour", "jpeg"), "What pictures go through.")

    def __post_init__(self) -> None:
        """Check the options."""
        check_options(self)
        chosen(self.distortions)


def train_codec(
    codec: Codec,
    latents: Tensor,
    settings: CodecTraining,
    seed: int,
    *,
    decode: Callable[[Tensor], Tensor] = lambda latents: latents,
    perceptual: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train a codec in place and return the message loss of each step.

    Parameters
    ----------
    codec
        A fresh one.
    latents
        What pictures are made of, ``(n, channels, h, w)``.
    settings
        How.
    seed
        Of the draws of pictures, messages and distortions.
    decode
        Latents to pictures from -1 to 1: a VAE's decoder, with gradients; pictures themselves if not given.
    perceptual
        Distance of two batches of pictures, a scalar; LPIPS in the paper, the mean square if not given.
    report
        Called after each step with its number and message loss.
    """
    g, losses, recent = Generator().manual_seed(seed), [], deque[float](maxlen=_WINDOW)
    optimizer = torch.optim.AdamW(codec.parameters(), settings.rate, weight_decay=settings.weight_decay)
    turns, phase = chosen(settings.distortions), MESSAGE
    codec.train()
    for step in range(settings.steps):
        message, marked = _messages(codec, settings, g)
        picked = latents[torch.randint(len(latents), (settings.rows,), generator=g)]
        if phase == MESSAGE:
            # any constant will do, and nothing hides the residual
            picked = torch.where(marked.view(-1, 1, 1, 1), torch.zeros_like(picked), picked)
        residual = codec.residual(message, (latents.shape[-2], latents.shape[-1])) * marked.view(-1, 1, 1, 1)
        before, after = decode(picked), decode(picked + residual)
        seen = after
        if phase != MESSAGE and turns:
            seen = turns[int(torch.randint(len(turns), (), generator=g))](after, g)
        loss = read = message_loss(codec.logits(seen), message)
        if phase >= PERCEIVED:
            loss = loss + settings.perceptual * perceptual(after, before)
        if phase >= ALL:
            loss = loss + settings.variation * peak_variation(after - before, settings.region)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(read.detach()))
        recent.append(losses[-1])
        if phase < ALL and len(recent) == _WINDOW and sum(recent) / _WINDOW < settings.read_below:
            phase += 1
            recent.clear()
        report(step, losses[-1])
    codec.eval()
    return losses


def _messages(codec: Codec, settings: CodecTraining, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw messages ``(rows, bits)``, and which rows ``(rows,)`` carry a residual."""
    message = torch.randint(2, (settings.rows, codec.shape.bits), generator=generator)
    marked = torch.rand(settings.rows, generator=generator) >= settings.zero_rate
    return message * marked.unsqueeze(1), marked


def message_loss(logits: Tensor, message: Tensor) -> Tensor:
    """Return the binary cross-entropy of scores ``(rows, bits, 2)`` and the one-hot bits of ``(rows, bits)``."""
    wanted = F.one_hot(message.long(), 2).to(logits)
    return nn.functional.binary_cross_entropy_with_logits(logits, wanted)


def peak_variation(change: Tensor, region: int) -> Tensor:
    """Return the mean over pictures of the largest mean change of a region, so that no place stands out."""
    side = min(region, *change.shape[-2:])
    means = F.avg_pool2d(change.abs().mean(1, keepdim=True), side, stride=max(1, side // 2))
    return means.flatten(1).max(1).values.mean()
