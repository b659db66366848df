"""What a network is to predict of a noisy picture, which times are drawn, and how much each of them weighs.

Two sorts of noise. *Diffusion* (`Diffused`): ``x_t = sqrt(a_t) x + sqrt(1 - a_t) e`` at one of the scheduler's whole
times; the target is ``e`` (epsilon), ``sqrt(a_t) e - sqrt(1 - a_t) x`` (v_prediction) or ``x`` (sample); the weights
min-SNR (arXiv 2303.09556) are ``min(snr, gamma) / snr`` for epsilon, over ``snr + 1`` for v, where
``snr = a_t / (1 - a_t)``. *Flow* (`Flowing`): ``x_s = (1 - s) x + s e``, target ``e - x``, the noise level ``s`` drawn
as in SD3 (arXiv 2403.03206): uniform, logit-normal, or by its mode; weights 1, ``s ** -2`` or cosmap. Both are what
diffusers' training examples do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

DENSITIES = ("uniform", "logit-normal", "mode")
WEIGHTINGS = ("none", "min-snr", "sigma-sqrt", "cosmap")


@dataclass(frozen=True)
class Times:
    """How times are drawn and weighed.

    Attributes
    ----------
    density
        One of `DENSITIES`: of the noise level, from 0 to 1.
    mean, std
        Of the normal distribution behind ``logit-normal``.
    mode_scale
        Of ``mode``.
    weighting
        One of `WEIGHTINGS`.
    gamma
        Of ``min-snr``.
    low, high
        Times drawn, from `low` to below `high`, on the scheduler's scale.
    """

    density: str = "uniform"
    mean: float = 0.0
    std: float = 1.0
    mode_scale: float = 1.29
    weighting: str = "none"
    gamma: float = 5.0
    low: float = 0.0
    high: float = math.inf

    def level(self, generator: Generator) -> float:
        """Draw a number from 0 to 1, a share of all noise."""
        if self.density == "logit-normal":
            value = torch.randn((), generator=generator) * self.std + self.mean
            return float(torch.sigmoid(value))
        value = torch.rand((), generator=generator)
        if self.density == "mode":
            value = 1 - value - self.mode_scale * (torch.cos(math.pi * value / 2) ** 2 - 1 + value)
        return float(value)


class Diffused:
    """The noise of a diffusion.

    Parameters
    ----------
    scheduler
        Of a pipeline, for its ``alphas_cumprod``.
    prediction
        ``epsilon``, ``v_prediction`` or ``sample``; the scheduler's own if not given.
    """

    def __init__(self, scheduler: Any, prediction: str | None = None) -> None:
        self.alphas: Tensor = scheduler.alphas_cumprod.detach().to("cpu", torch.float32)
        self.prediction = prediction or str(scheduler.config.prediction_type)

    @property
    def count(self) -> int:
        """Number of times."""
        return len(self.alphas)

    def draw(self, times: Times, generator: Generator) -> float:
        """Draw a time: a whole number."""
        low, high = max(0, math.ceil(times.low)), math.ceil(min(times.high, self.count))
        if times.density == "uniform":
            return float(torch.randint(low, high, (), generator=generator))
        while True:
            found = min(int(times.level(generator) * self.count), self.count - 1)
            if low <= found < high:
                return float(found)

    def mixed(self, picture: Tensor, noise: Tensor, time: float) -> tuple[Tensor, Tensor]:
        """Return the noisy picture at a time, and what is to be predicted of it."""
        alpha = self.alphas[int(time)]
        signal, rest = (alpha**0.5).to(picture.dtype), ((1 - alpha) ** 0.5).to(picture.dtype)
        noisy = signal * picture + rest * noise
        if self.prediction == "v_prediction":
            return noisy, signal * noise - rest * picture
        return noisy, picture if self.prediction == "sample" else noise

    def weight(self, times: Times, time: float) -> float:
        """Return how much a time weighs."""
        if times.weighting != "min-snr":
            return 1.0
        alpha = float(self.alphas[int(time)])
        snr = alpha / (1 - alpha)
        kept = min(snr, times.gamma)
        if self.prediction == "v_prediction":
            return kept / (snr + 1)
        return kept if self.prediction == "sample" else kept / snr


class Flowing:
    """The noise of a flow from picture to noise.

    Parameters
    ----------
    scheduler
        Of a pipeline, at its beginning: its noise levels and times, from the noisiest down.
    """

    prediction = "flow"

    def __init__(self, scheduler: Any) -> None:
        fresh = type(scheduler).from_config(scheduler.config)
        self.levels: Tensor = fresh.sigmas.detach().to("cpu", torch.float32)
        self.times: Tensor = fresh.timesteps.detach().to("cpu", torch.float32)

    @property
    def count(self) -> int:
        """Number of times."""
        return len(self.times)

    def draw(self, times: Times, generator: Generator) -> float:
        """Draw one of the scheduler's times."""
        while True:
            index = min(int(times.level(generator) * self.count), self.count - 1)
            found = float(self.times[index])
            if times.low <= found < times.high:
                return found

    def level(self, time: float) -> Tensor:
        """Return the noise level at a time, a scalar."""
        return self.levels[int((self.times - time).abs().argmin())]

    def mixed(self, picture: Tensor, noise: Tensor, time: float) -> tuple[Tensor, Tensor]:
        """Return the noisy picture at a time, and the flow."""
        level = self.level(time).to(picture.dtype)
        return (1.0 - level) * picture + level * noise, noise - picture

    def weight(self, times: Times, time: float) -> float:
        """Return how much a time weighs."""
        level = float(self.level(time))
        if times.weighting == "sigma-sqrt":
            return level**-2.0
        if times.weighting == "cosmap":
            return 2 / (math.pi * (1 - 2 * level + 2 * level**2))
        return 1.0
