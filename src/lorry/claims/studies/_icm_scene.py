"""What the studies of ICM-Fusion look at: adapters with checkpoints and few-shot rows, and a VAE trained on them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

import lorry
from lorry.core.life.adapter import Adapter
from lorry.core.method.start import mix_seed
from lorry.merging import icm, merge_method_named
from lorry.merging.methods.icm_fusion import Fusion
from lorry.merging.output import trial_adapter

from ..digits import Split, accuracy, base, loss_of, task
from ..fitting import train
from ..ledger import Setting
from ._digit_merges import RATE, STEPS, VIEWS, Pool

WIDTH, CHECKPOINTS, SUPPORT, EPOCHS = 64, 20, 40, 500


@dataclass(frozen=True)
class Scene:
    """Adapters, their checkpoints as tasks of ICM-Fusion, and a few rows of each task that they were not trained on."""

    pool: Pool
    tasks: dict[str, icm.Task]
    support: dict[str, Split]


@contextmanager
def scene(seed: int, setting: Setting) -> Iterator[Scene]:
    """Train the adapters of a seed; checkpoints lie in a folder while the context lasts."""
    network, tasks, adapters, learned, support = base(seed, WIDTH), {}, {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for view in VIEWS:
            whole = task(view, seed)
            x, y = whole.validation.x, whole.validation.y
            support[view] = Split(x[:SUPPORT], y[:SUPPORT])
            tasks[view] = replace(whole, validation=Split(x[SUPPORT:], y[SUPPORT:]))
            adapter = lorry.attach(network, {"method": "lora", "rank": 4}, name=view, seed=seed)
            paths = _trained(network, adapter, whole.train, setting.much(STEPS, 4), seed, Path(folder))
            adapters[view] = adapter.train(False)
            learned[view] = icm.Task(paths, _loss(support[view]), _hidden_state(network, whole.train.x[:30]))
        lorry.activate(network, None)
        yield Scene(Pool(network, tasks, adapters, seed), learned, support)


def _trained(network: nn.Module, adapter: Adapter, data: Split, steps: int, seed: int, folder: Path) -> list[Path]:
    """Train, and save the adapter after evenly spaced steps of the second half."""
    kept = {round(steps * (1 + place / CHECKPOINTS) / 2) - 1 for place in range(1, CHECKPOINTS + 1)}
    paths: list[Path] = []

    def after(step: int, entered: Any) -> None:
        if step in kept:
            paths.append(folder / f"{adapter.name}-{step}")
            adapter.save(paths[-1])

    train(adapter.parameters(), loss_of(network, data, seed), steps, RATE, after=after)
    return paths


def _loss(rows: Split) -> Callable[[nn.Module], Tensor]:
    def loss(carrier: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(carrier(rows.x), rows.y)

    return loss


def _hidden_state(network: nn.Module, x: Tensor) -> Tensor:
    """The mean input of the last layer, with the active adapter."""
    states: list[Tensor] = []
    last = list(network.children())[-1]
    handle = last.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0].detach()))
    try:
        with torch.no_grad():
            network(x)
    finally:
        handle.remove()
    return states[0].mean(0)


@dataclass(frozen=True)
class Coder:
    """A trained VAE and what it was trained on."""

    vae: icm.FusionVAE
    data: icm.Collection
    facts: Mapping[str, Any]

    def rebuilt(self, name: str, row: int = -1, condition: Tensor | None = None) -> dict[str, dict[str, Tensor]]:
        """Decode the mean code of a checkpoint, under its own or another condition."""
        mine = self.data.conditions[name]
        with torch.no_grad():
            code, _ = self.vae.encode(self.data.vectors[name][row][None], mine[None])
            flat = self.vae.decode(code, (mine if condition is None else condition)[None])[0]
        return self.tensors(flat * self.data.deviation[name] + self.data.mean[name])

    def tensors(self, flat: Tensor) -> dict[str, dict[str, Tensor]]:
        """The factors of a flat adapter."""
        return {p: {"A": f.a.float(), "B": f.b.float()} for p, f in self.data.layout.unflatten(flat).items()}

    @property
    def fusion(self) -> Fusion:
        """Arithmetic on its codes."""
        return Fusion(self.vae, self.data)


def coder(one: Scene, setting: Setting, vectors: bool = True, inner: bool = True) -> Coder:
    """Train a VAE as the merge does by default, to look at what it decodes.

    Parameters
    ----------
    one, setting
        What it is trained on, and how much.
    vectors
        Use the tasks' vectors of hidden states; projections of the weights otherwise.
    inner
        Train with the inner loop.
    """
    tasks = one.tasks if vectors else {n: replace(t, vector=None) for n, t in one.tasks.items()}
    sites = {path: entry.site for path, entry in next(iter(one.pool.adapters.values())).entries.items()}
    shapes = {path: (site.out_features, site.in_features) for path, site in sites.items()}
    data = icm.collect(tasks, list(sites), shapes, None, "none", 32)
    options = merge_method_named("icm-fusion").parse({} if inner else {"inner_steps": 0})
    knobs = {field.name: options[field.name] for field in fields(icm.Training)}
    how = icm.Training(**{**knobs, "epochs": setting.much(EPOCHS, 2)})
    generator = Generator().manual_seed(mix_seed(one.pool.seed, "icm-fusion"))
    width = next(iter(data.conditions.values())).numel()
    vae = icm.FusionVAE(sum(data.layout.sizes), width, options["latent"], options["hidden"])
    icm.initialise(vae, generator)
    support = icm.Support(data.layout, tasks, one.pool.network)
    losses = {name: support.task_loss(data, name) for name in support.known()}
    with support.carried():
        facts = icm.train_vae(vae, data, losses, how, generator, options["held_out"])
    return Coder(vae.eval(), data, facts)


def score(one: Scene, view: str, tensors: Mapping[str, Mapping[str, Tensor]]) -> float:
    """Test accuracy of factors on a task."""
    with trial_adapter(one.pool.network, tensors):
        return accuracy(one.pool.network, one.pool.tasks[view].test)
