"""FFA-LoRA: a frozen A in federations of unlike clients, with and without differential privacy."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch

import lorry
from lorry.claims import digits
from lorry.claims.ledger import Finding, Panel, Setting, claim
from lorry.claims.tensor_task import TensorClasses
from lorry.claims.verdicts import Rows, Trial, chosen, compare, together, widened
from lorry.federated.client import Client
from lorry.federated.options import Federation
from lorry.federated.server import FederationError, Server
from lorry.federated.transport import InProcess
from lorry.methods.lora import LoRA
from lorry.training.task import Examples, PlainReport
from lorry.training.task import Setting as Place

from . import _digit_jobs as jobs

RANK = 8
CLIENTS, ROUNDS, LOCAL_STEPS, BATCH = 3, 10, 10, 16
RATES = (0.02, 0.1, 0.5, 2.0, 5.0)
#: Noise multipliers: no privacy at all, and strong privacy.
NOISES = (0.0, 8.0)
#: What counts as a usable rate: this share of the contender's best mean accuracy.
USABLE = 0.9
#: Contender -> the factor that is neither trained nor sent.
CONTENDERS = {"LoRA": "none", "FFA-LoRA": "A"}
TRIAL = (
    "A perceptron 64 - 64 - 10 trained on digits, a network for each seed; adapters of rank 8 on both layers learn "
    f"turned digits at {CLIENTS} clients, each of which has nine tenths of the rows of its own labels; {ROUNDS} rounds "
    f"of {LOCAL_STEPS} steps of gradient descent on {BATCH} rows, and an average of what is trained: both factors "
    "(LoRA) or B, with one A for all (FFA-LoRA). Without privacy, and with gradients of rows clipped to 1 and a noise "
    f"multiplier of {NOISES[-1]:g}; rates {', '.join(f'{rate:g}' for rate in RATES)}, each contender's own for each "
    "noise. A federation that diverges has an accuracy of 0. "
)


def _examples() -> Examples[Any]:
    rows = jobs.records(digits.task("rotate").train)
    made = tuple((row["x"], row["label"]) for row in rows)
    return Examples(made, PlainReport(len(rows), len(made)))


def federate(freeze: str, noise: float, rounds: int, rate: float, seed: int) -> dict[str, float]:
    """Run a federation and return validation and test accuracy.

    Parameters
    ----------
    freeze
        The factor that is neither trained nor sent: A, or none.
    noise
        Noise multiplier; 0 trains without privacy.
    rounds
        Of training and averaging.
    rate
        Of all clients.
    seed
        Of the network, the start, what each client gets, and the noise.
    """
    model, tried = digits.base(seed, width=64, hidden=1), digits.task("rotate")
    job = {
        "data": _examples(),
        "objective": TensorClasses(),
        "method": LoRA(rank=RANK),
        "optimizer": "sgd",
        "learning_rate": rate,
        "batch_size": BATCH,
        "max_grad_norm": None,
    }
    privacy = {"noise_multiplier": noise, "max_grad_norm": 1.0} if noise else None
    place = Place(model)
    with tempfile.TemporaryDirectory() as folder:
        options = Federation(
            base="none",
            out=folder,
            job=job,
            clients=CLIENTS,
            rounds=rounds,
            local_steps=LOCAL_STEPS,
            freeze=freeze,
            split={"split": "dominant", "share": 0.9},
            privacy=privacy,
            weights="equal",
            seed=seed,
        )
        draws = [torch.Generator().manual_seed(1000 * seed + i) for i in range(CLIENTS)]
        clients = {
            name: Client(options, name, place, noise=draw) for name, draw in zip(options.names(), draws, strict=True)
        }
        server = Server(options, place, InProcess({name: client.answer for name, client in clients.items()}))
        try:
            server.run()
        except FederationError:
            return {"validation": 0.0, "test": 0.0}
        with server.adapter() as adapter:
            lorry.activate(model, adapter.name)
            model.eval()
            return {**digits.scores(model, tried)}


@cache
def _grids(setting: Setting) -> dict[float, dict[str, dict[float, Rows]]]:
    """Both claims look at the same runs: noise -> contender -> rate -> metrics of each seed."""
    rounds = setting.much(ROUNDS)

    def rows(freeze: str, noise: float, rate: float) -> Rows:
        return [federate(freeze, noise, rounds, rate, seed) for seed in setting.seeds]

    return {
        noise: {name: widened(partial(rows, freeze, noise), RATES) for name, freeze in CONTENDERS.items()}
        for noise in NOISES
    }


def _trials(setting: Setting) -> dict[float, Trial]:
    return {noise: chosen(grid) for noise, grid in _grids(setting).items()}


def _named(noise: float) -> str:
    return f"noise {noise:g}" if noise else "no privacy"


@claim(
    "ffa-lora",
    "noise",
    says="Under differential privacy and unlike clients it is more consistent than LoRA, since noise enters linearly.",
    source="arXiv 2403.12313, abstract",
    trial=f"{TRIAL}Statements: the noise costs FFA-LoRA less accuracy than LoRA; and with noise it is above LoRA.",
)
def noise(setting: Setting) -> Finding:
    """Compare what noise costs."""
    trials = _trials(setting)
    free, private = (trials[noise] for noise in NOISES)
    ahead = private.gain("FFA-LoRA", "LoRA")
    slower = [a - b for a, b in zip(ahead, free.gain("FFA-LoRA", "LoRA"), strict=True)]
    said = "; ".join(
        f"{_named(noise)}: " + ", ".join(f"{name} {trial.mean(name):.3f}" for name in CONTENDERS)
        for noise, trial in trials.items()
    )
    return Finding(
        verdict=together([compare(slower), compare(ahead)]),
        summary=f"Test accuracy, {said}.",
        panels=[Panel(_named(noise), "test accuracy", trial.of()) for noise, trial in trials.items()],
        rates={f"{name}, {_named(n)}": rate for n, trial in trials.items() for name, rate in trial.rates.items()},
        notes=[f"{_named(noise).capitalize()}: {note}" for noise, trial in trials.items() for note in trial.notes],
    )


def usable(by_rate: Mapping[float, Rows], seed: int) -> float:
    """The highest rate of the common grid that keeps `USABLE` of its best accuracy."""
    found = {rate: by_rate[rate][seed]["test"] for rate in RATES}
    return max(rate for rate, value in found.items() if value >= USABLE * max(found.values()))


@claim(
    "ffa-lora",
    "rates",
    says="It has fewer hyper-parameters to tune: with a frozen A training is stable over a wide range of rates.",
    source="arXiv 2403.12313, abstract and reviews: smoothness, and no dependence on alpha",
    trial=f"{TRIAL}Statements, with and without noise: the highest rate that keeps nine tenths of the best accuracy is "
    "above LoRA's.",
)
def rates(setting: Setting) -> Finding:
    """Compare the curves over rates."""
    grids = _grids(setting)
    found = {
        (noise, name): [usable(grid[name], seed) for seed in range(len(setting.seeds))]
        for noise, grid in grids.items()
        for name in CONTENDERS
    }
    verdicts = [
        compare([a - b for a, b in zip(found[noise, "FFA-LoRA"], found[noise, "LoRA"], strict=True)])
        for noise in NOISES
    ]
    said = "; ".join(
        f"{_named(noise)}: " + ", ".join(f"{name} {statistics.fmean(found[noise, name]):.3g}" for name in CONTENDERS)
        for noise in NOISES
    )
    curves = {
        noise: {name: [[row["test"] for row in grid[name][rate]] for rate in RATES] for name in CONTENDERS}
        for noise, grid in grids.items()
    }
    return Finding(
        verdict=together(verdicts),
        summary=f"Highest usable rate, mean of the seeds, {said}.",
        panels=[
            Panel(_named(noise), "test accuracy", series, RATES, "rate", log_x=True) for noise, series in curves.items()
        ],
    )
