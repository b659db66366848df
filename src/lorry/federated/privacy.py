"""Differential privacy of one client: clipped rows, Gaussian noise, and Opacus' accountants over all rounds.

Each client protects its own examples (add or remove one of them): it draws each step's batch by Poisson sampling, clips
the gradient of each example over exactly the tensors that are trained, and adds noise before the optimizer sees it
(Abadi et al., arXiv 1607.00133, algorithm 1). What it sends is made of such steps alone, so it spends what they spend.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from lorry.core.errors import LorryError, OptionError
from lorry.core.options import check_options, option


class PrivacyError(LorryError):
    """A step would spend more than the client's budget."""


@dataclass(frozen=True)
class Privacy:
    """The privacy that each client keeps, over all rounds.

    Raises
    ------
    OptionError
        Neither or both of a budget and a noise.
    """

    epsilon: float | None = option(None, "Budget of a client over all rounds; the noise follows from it.", above=0)
    delta: float = option(1e-5, "Chance that the bound does not hold; below one over the examples.", above=0, below=1)
    max_grad_norm: float = option(1.0, "Largest norm of one example's gradient, over all trained tensors.", above=0)
    noise_multiplier: float | None = option(None, "Noise over max_grad_norm, in place of epsilon.", at_least=0)
    accountant: str = option("rdp", "Opacus' accountant.", choices=("rdp", "prv", "gdp"))

    def __post_init__(self) -> None:
        """Check each option, and that exactly one says how much noise there is."""
        check_options(self)
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise OptionError("Privacy: give epsilon (the noise follows) or noise_multiplier, one of them.")

    def check_data(self, examples: int, batch: int) -> None:
        """Raise `OptionError` where the number of examples does not allow what is asked for."""
        if batch > examples:
            raise OptionError(
                f"Privacy: batches of {batch} cannot be drawn from {examples} examples; use a batch_size of at most "
                f"{examples}."
            )
        if self.delta >= 1 / examples:
            raise OptionError(
                f"Privacy: delta is {self.delta}, which for {examples} examples allows one of them to be published; "
                f"use less than {1 / examples:.2g}."
            )

    def noise(self, sample_rate: float, steps: int) -> float:
        """Return the noise multiplier with which all steps together keep the budget.

        Raises
        ------
        OptionError
            There is none.
        """
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        assert self.epsilon is not None
        try:
            return _noise(self.epsilon, self.delta, sample_rate, steps, self.accountant)
        except (ValueError, RuntimeError, OverflowError) as error:
            raise OptionError(
                f"Privacy: epsilon {self.epsilon} at delta {self.delta} cannot be met in {steps} steps at a sampling "
                f"rate of {sample_rate:.3g} ({error}). Allow a larger epsilon, fewer rounds or local_steps, or a "
                "smaller batch_size."
            ) from error


@dataclass
class Ledger:
    """What a client has spent: runs of steps with one noise and one sampling rate, as Opacus' accountants keep them.

    Attributes
    ----------
    privacy
        The budget.
    history
        ``(noise multiplier, sampling rate, steps)``.
    path
        File that remembers the history; None keeps it in memory.
    """

    privacy: Privacy
    history: list[tuple[float, float, int]]
    path: Path | None = None

    @classmethod
    def open(cls, privacy: Privacy, path: Path | None) -> Ledger:
        """Return the ledger in a file, or a new one."""
        history = []
        if path is not None and path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))["history"]
                history = [(float(noise), float(rate), int(steps)) for noise, rate, steps in found]
            except (ValueError, KeyError, TypeError) as error:
                raise OptionError(
                    f"{path} is no record of what was spent ({error}). Restore it from a copy; without it nobody knows "
                    "what is left of the budget."
                ) from error
        return cls(privacy, history, path)

    def spend(self, noise: float, sample_rate: float, steps: int) -> float:
        """Count steps before they are done, and return what is spent then.

        Raises
        ------
        PrivacyError
            They would go beyond the budget; nothing is counted.
        """
        history = list(self.history)
        if history and history[-1][:2] == (noise, sample_rate):
            history[-1] = (noise, sample_rate, history[-1][2] + steps)
        else:
            history.append((noise, sample_rate, steps))
        after = epsilon(self.privacy, history)
        if self.privacy.epsilon is not None and after > self.privacy.epsilon * (1 + 1e-6):
            raise PrivacyError(
                f"{steps} more steps would spend epsilon {after:.4g} of {self.privacy.epsilon} at delta "
                f"{self.privacy.delta}: the client takes no part any more. End the run, or agree on a larger epsilon."
            )
        self.history = history
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            temporary.write_text(json.dumps({"history": history}), encoding="utf-8")
            temporary.replace(self.path)
        return after

    def facts(self) -> dict[str, Any]:
        """Return what is spent, as plain data for a receipt; an epsilon that is not finite becomes None."""
        spent = epsilon(self.privacy, self.history)
        return {
            "epsilon": spent if math.isfinite(spent) else None,
            "delta": self.privacy.delta,
            "steps": sum(steps for _, _, steps in self.history),
            "noise_multiplier": max((noise for noise, _, _ in self.history), default=None),
            "max_grad_norm": self.privacy.max_grad_norm,
            "accountant": self.privacy.accountant,
        }


def epsilon(privacy: Privacy, history: Sequence[tuple[float, float, int]]) -> float:
    """Return the epsilon of runs of steps by Opacus' accountant; infinite where a step has no noise."""
    if not history:
        return 0.0
    if any(noise == 0 for noise, _, _ in history):
        return math.inf
    return _epsilon(privacy.accountant, privacy.delta, tuple(history))


# An accountant takes a tenth of a second to seconds, and clients with as much data ask the same.
@lru_cache(maxsize=1024)
def _epsilon(name: str, delta: float, history: tuple[tuple[float, float, int], ...]) -> float:
    accountant = _opacus().create_accountant(name)
    accountant.history = list(history)
    with _quiet():
        return float(accountant.get_epsilon(delta=delta))


@lru_cache(maxsize=1024)
def _noise(target: float, delta: float, sample_rate: float, steps: int, name: str) -> float:
    utils = _opacus().utils
    with _quiet():
        found = utils.get_noise_multiplier(
            target_epsilon=target, target_delta=delta, sample_rate=sample_rate, steps=steps, accountant=name
        )
    return float(found)


def private_sum(rows: Mapping[str, Tensor], largest: float) -> dict[str, Tensor]:
    """Return the sum of gradients of examples, each clipped to a norm over all tensors together.

    Parameters
    ----------
    rows
        Parameter -> ``(examples, *shape)``.
    largest
        Norm that no example's gradient exceeds. One that is not finite counts as zero, so that the bound holds.
    """
    norms = torch.stack([g.flatten(1).float().square().sum(1) for g in rows.values()]).sum(0).sqrt()
    factors = torch.where(norms.isfinite(), largest / norms.clamp_min(largest), torch.zeros_like(norms))
    clean = {n: torch.where(norms.isfinite().view(-1, *[1] * (g.dim() - 1)), g, 0.0) for n, g in rows.items()}
    return {n: torch.einsum("n,n...->...", factors.to(g.dtype), g) for n, g in clean.items()}


def noised(sums: Mapping[str, Tensor], deviation: float, generator: Generator) -> dict[str, Tensor]:
    """Return tensors with Gaussian noise of a standard deviation added to every element."""
    if not deviation:
        return dict(sums)
    return {n: t + deviation * torch.randn(t.shape, generator=generator).to(t) for n, t in sums.items()}


def poisson(examples: int, sample_rate: float, generator: Generator) -> list[int]:
    """Return the positions of a batch to which each example belongs with the same chance, on its own."""
    drawn = torch.rand(examples, generator=generator, dtype=torch.float64) < sample_rate
    return drawn.nonzero().flatten().tolist()


def secret_generator() -> Generator:
    """Return a generator that starts from the operating system's entropy: noise that others could repeat hides
    nothing.
    """
    return torch.Generator().manual_seed(int.from_bytes(os.urandom(8), "little") >> 1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Opacus' advice on its grid of orders off the terminal: the bound holds; a finer grid might lower it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order is the")
        yield


def _opacus() -> Any:
    try:
        from opacus import accountants
    except ImportError as error:
        raise OptionError("Privacy needs Opacus' accountants: pip install 'lorry[federated]'.") from error
    import opacus.accountants.utils  # noqa: F401  not imported by its package

    return accountants
