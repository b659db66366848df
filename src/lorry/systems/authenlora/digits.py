"""A small denoiser of scikit-learn's digits, as base of adapters that draw in another style and sign what they draw."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from lorry.protection.signing_latents import TIMES, alphas

WIDTH, SIDE = 192, 8
SCHEDULE = "cosine"
#: Digits that are kept for tests.
TESTED = 360


class Denoiser(nn.Module):
    """A perceptron with residual layers that predicts the noise in pictures ``(rows, 1, 8, 8)`` at times ``(rows,)``.

    Parameters
    ----------
    seed
        Of its start.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Linear(SIDE**2, WIDTH)
            self.time = nn.Linear(16, WIDTH)
            self.inner = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
            self.last = nn.Linear(WIDTH, SIDE**2)

    def forward(self, noisy: Tensor, times: Tensor) -> Tensor:
        """Return the noise, in the shape of `noisy`."""
        waves = 2.0 ** torch.arange(8)
        angle = times.float().view(-1, 1) / TIMES * waves
        when = self.time(torch.cat([angle.sin(), angle.cos()], 1))
        h = self.first(noisy.flatten(1))
        for layer in self.inner:
            h = h + torch.nn.functional.silu(layer(h + when))
        found: Tensor = self.last(torch.nn.functional.silu(h))
        return found.view_as(noisy)


@cache
def _digits() -> Tensor:
    """Return all 1,797 digits ``(rows, 1, 8, 8)`` from -1 to 1, in an order that is always the same."""
    from sklearn.datasets import load_digits

    found = torch.tensor(load_digits().images, dtype=torch.float32).view(-1, 1, SIDE, SIDE) / 8 - 1
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))]


def pictures(part: str = "train", inverted: bool = False) -> Tensor:
    """Return the digits of a part, ``train`` (1,437) or ``test`` (360), as ``(rows, 1, 8, 8)`` from -1 to 1."""
    every = _digits()
    found = every[: len(every) - TESTED] if part == "train" else every[len(every) - TESTED :]
    return -found if inverted else found


def noised(x: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """Return pictures with as much noise as belongs to their times."""
    share = alphas(SCHEDULE)[times].to(x).view(-1, 1, 1, 1)
    return share.sqrt() * x + (1 - share).sqrt() * noise


@cache
def _trained(seed: int, steps: int) -> dict[str, Tensor]:
    model, data, g = Denoiser(seed), pictures(), torch.Generator().manual_seed(seed)

    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    course = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x = data[torch.randint(len(data), (128,), generator=g)]
        times, noise = torch.randint(TIMES, (128,), generator=g), torch.randn(128, 1, SIDE, SIDE, generator=g)
        loss = nn.functional.mse_loss(model(noised(x, noise, times), times), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        course.step()
    return model.state_dict()


def base(seed: int, steps: int) -> Denoiser:
    """Return a denoiser that was trained on the digits for `steps` steps, a new copy at each call."""
    model = Denoiser(seed)
    model.load_state_dict(_trained(seed, steps))
    return model.eval()


@torch.no_grad()
def sample(model: nn.Module, count: int, seed: int, steps: int = 20) -> Tensor:
    """Return pictures ``(count, 1, 8, 8)`` by DDIM without noise of its own, with whatever adapters are active."""
    x = torch.randn(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    share = alphas(SCHEDULE).float()
    course = torch.linspace(TIMES - 1, 0, steps + 1).long().tolist()
    for now, later in zip(course, course[1:], strict=False):
        noise = model(x, torch.full((count,), now))
        clean = ((x - (1 - share[now]).sqrt() * noise) / share[now].sqrt().clamp_min(1e-3)).clamp(-1.5, 1.5)
        noise = (x - share[now].sqrt() * clean) / (1 - share[now]).sqrt()
        x = share[later].sqrt() * clean + (1 - share[later]).sqrt() * noise
    return x.clamp(-1, 1)
