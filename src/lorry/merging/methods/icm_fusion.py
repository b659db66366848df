"""ICM-Fusion: learn a conditional VAE over checkpoints of several tasks, add the tasks in its latent space, decode one
adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Generator, Tensor

from lorry.core.errors import OptionError
from lorry.core.method.start import mix_seed
from lorry.merging.factors import Factors
from lorry.merging.inputs import Pool, SiteInput
from lorry.merging.registry import Knob, merge_method

if TYPE_CHECKING:
    from lorry.merging.icm import Collection, Support, Training


@merge_method(
    "icm-fusion",
    space="factor",
    scope="adapter",
    source="arXiv 2508.04153, AAAI 2026",
    plain=None,
    needs=("tasks",),
    note="the result is decoded by a network, so no options give one adapter back exactly; its reconstruction error "
    "is in the facts",
)
def icm_fusion(
    pool: Pool,
    *,
    latent: Annotated[int, Knob("Width of the code.", at_least=1)] = 32,
    hidden: Annotated[int, Knob("Width of the hidden layers.", at_least=4)] = 256,
    epochs: Annotated[int, Knob("Steps of the training, each over all tasks.", at_least=1)] = 500,
    rate: Annotated[float, Knob("Learning rate of the VAE.", above=0)] = 1e-3,
    kl_weight: Annotated[float, Knob("Weight of the KL term.", at_least=0)] = 1e-4,
    batch: Annotated[int, Knob("Checkpoints of a task in one step.", at_least=1)] = 8,
    inner_steps: Annotated[
        int, Knob("Steps of the inner loop on the task's support loss in training, where it has one.", at_least=0)
    ] = 3,
    inner_rate: Annotated[float, Knob("Their rate.", above=0)] = 0.01,
    inner_relative: Annotated[
        bool, Knob("A step moves the adapter by this share of its norm; otherwise the rate is that of Equation 8.")
    ] = True,
    first_order: Annotated[bool, Knob("Leave out the gradient through the inner loop.")] = True,
    few_shot_steps: Annotated[
        int, Knob("Steps that tune the fusion's weights on all support losses through the decoder.", at_least=0)
    ] = 0,
    few_shot_rate: Annotated[float, Knob("Their rate.", above=0)] = 0.05,
    refine_steps: Annotated[
        int, Knob("Steps that refine the decoded adapter itself on all support losses.", at_least=0)
    ] = 0,
    refine_rate: Annotated[float, Knob("Their rate.", above=0)] = 0.01,
    alternatives: Annotated[bool, Knob("Measure the plain alternatives on the same support losses too.")] = True,
    held_out: Annotated[int, Knob("Checkpoints of each task that only judge the VAE.", at_least=0)] = 1,
    gauge: Annotated[
        Literal["none", "svd"], Knob("Checkpoints as they are (one start), or in their singular split.")
    ] = "none",
    seed: Annotated[int, Knob("Of the VAE's start, noise and batches.", at_least=0)] = 0,
) -> Iterator[tuple[str, Factors]]:
    """Fuse tasks in the latent space of a conditional VAE that is trained on their checkpoints.

    ``extras={"tasks": {name: lorry.merging.icm.Task(...)}}`` gives the checkpoints of each input by its name. Weights
    are shares of the codes and task vectors; their sum scales the result. With ``extras["kept"]``, a dictionary, the
    trained VAE stays in it, and merges of the same tasks that differ only in what follows the training take it from
    there.
    """
    from lorry.merging import icm

    sites = list(pool.sites())
    shares, strength = _uniform_weights(pool, sites)
    how = icm.Training(epochs, rate, kl_weight, inner_steps, inner_rate, inner_relative, first_order, batch)
    fusion, support = _learned(pool, sites, how, (latent, hidden), gauge, held_out, seed)
    if (few_shot_steps or refine_steps) and not support.known():
        raise OptionError("Few-shot steps need a loss in each task.")
    with torch.enable_grad():
        weights = fusion.tuned(shares, support, few_shot_steps, few_shot_rate) if few_shot_steps else shares
        flat = fusion.decoded(weights).detach()
        start = flat
        flat = _refined(flat, support, refine_steps, refine_rate)
        pool.facts["weights"] = dict(zip(pool.names, weights.tolist(), strict=True))
        if alternatives and support.known():
            budget = (few_shot_steps, few_shot_rate, refine_steps, refine_rate)
            pool.facts["support_losses"] = _alternatives(fusion, shares, start, flat, support, budget)
    for path, f in support.layout.unflatten(flat.double()).items():
        yield path, f.times(strength)


def _learned(
    pool: Pool, sites: list[SiteInput], how: Training, widths: tuple[int, int], gauge: str, held_out: int, seed: int
) -> tuple[Fusion, Support]:
    """Read the checkpoints, train the VAE on them, and return it ready for fusion, with the task losses."""
    from lorry.merging import icm

    tasks, model = pool.extras["tasks"], pool.extras.get("model")
    if set(tasks) != set(pool.names):
        raise OptionError(
            f"icm-fusion needs one task for each input: inputs are {list(pool.names)}, tasks are {sorted(tasks)}."
        )
    if how.inner_steps and not how.first_order and model is not None:
        raise OptionError(
            "The second-order inner loop needs losses of the factors, not of a model: leave out model, or "
            "first_order=True."
        )
    tasks = {n: tasks[n] for n in pool.names}
    kept = pool.extras.get("kept", {})
    key = (
        tuple(pool.names),
        tuple(pool.paths),
        tuple(id(t) for t in tasks.values()),
        how,
        widths,
        gauge,
        held_out,
        seed,
    )
    if key not in kept:
        data = icm.collect(tasks, pool.paths, {s.path: s.shape for s in sites}, model, gauge, widths[0])
        support = icm.Support(data.layout, tasks, model)
        kept[key] = (*_trained(data, support, how, widths, held_out, seed), support)
    fusion, pool.facts["vae"], support = kept[key]
    return fusion, support


def _trained(
    data: Collection, support: Support, how: Training, widths: tuple[int, int], held_out: int, seed: int
) -> tuple[Fusion, dict[str, Any]]:
    """Return a VAE that was trained on checkpoints, and what it reached."""
    from lorry.merging import icm

    generator = Generator().manual_seed(mix_seed(seed, "icm-fusion"))
    vae = icm.FusionVAE(sum(data.layout.sizes), next(iter(data.conditions.values())).numel(), *widths)
    icm.initialise(vae, generator)
    losses = {n: support.task_loss(data, n) for n in support.known()}
    with support.carried() if losses and how.inner_steps else nullcontext():
        reached = icm.train_vae(vae, data, losses, how, generator, held_out)
    return Fusion(vae, data), reached


def _uniform_weights(pool: Pool, sites: list[Any]) -> tuple[Tensor, float]:
    """Return the shares of the tasks and the strength; they must be the same at all sites, since the code is of whole
    adapters.
    """
    if any(s.weights != sites[0].weights or None in s.factors for s in sites):
        raise OptionError(
            "icm-fusion codes whole adapters: all inputs must have the same sites, and weights that do not vary by "
            "site."
        )
    weights = torch.tensor(sites[0].weights)
    if bool((weights < 0).any()):
        raise OptionError("icm-fusion takes no negative weights: they are shares of codes.")
    return weights / weights.sum(), float(weights.sum())


class Fusion:
    """Latent arithmetic: codes and task vectors are mixed by weights, and decoded with mixed statistics."""

    def __init__(self, vae: Any, data: Any) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.data = data
        names = list(data.vectors)
        self.conditions = torch.stack([data.conditions[n] for n in names])
        last = torch.stack([data.vectors[n][-1] for n in names])
        self.codes, _ = vae.encode(last, self.conditions)
        self.mean = torch.stack([data.mean[n] for n in names]).float()
        self.log_deviation = torch.stack([data.deviation[n] for n in names]).float().log()
        self.adapters = last * self.log_deviation.exp() + self.mean

    def decoded(self, weights: Tensor) -> Tensor:
        """Return the raw flat adapter of ``Σ w μ`` and ``Σ w v``; standard deviations are averaged in the logarithm."""
        vector: Tensor = self.vae.decode((weights @ self.codes)[None], (weights @ self.conditions)[None])[0]
        shares = weights / weights.sum()
        return vector * (shares @ self.log_deviation).exp() + shares @ self.mean

    def tuned(self, weights: Tensor, support: Any, steps: int, rate: float) -> Tensor:
        """Return weights after gradient steps on the mean support loss through the decoder."""
        return _descended(self.decoded, weights, support, steps, rate)


def _descended(make: Callable[[Tensor], Tensor], start: Tensor, support: Any, steps: int, rate: float) -> Tensor:
    """Return the best of the points that Adam visits on ``loss(make(point))``."""
    point = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([point], lr=rate)
    best, lowest = start, float("inf")
    for step in range(steps + 1):
        value = support.total(make(point))
        if value.item() < lowest:
            best, lowest = point.detach().clone(), value.item()
        if step < steps:
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    return best


def _refined(flat: Tensor, support: Any, steps: int, rate: float) -> Tensor:
    return _descended(lambda x: x, flat, support, steps, rate) if steps else flat


def _alternatives(
    fusion: Fusion, shares: Tensor, start: Tensor, result: Tensor, support: Any, budget: tuple[int, float, int, float]
) -> dict[str, float]:
    """Return the mean support loss of the result and of plain ways with the same examples and as many steps."""
    few, few_rate, refine, refine_rate = budget
    layout = fusion.data.layout
    average = shares @ fusion.adapters

    def score(vector: Tensor) -> float:
        return float(support.total(vector.detach()))

    wide = _Stacked(support, layout, len(fusion.adapters))
    found = {"base": score(torch.zeros_like(start)), "latent": score(start), "factor average": score(average)}
    grid = {
        f"{k / 10:.1f}": float(wide.total(_stack(fusion.adapters, shares * len(shares) * k / 10)))
        for k in range(1, 16, 2)
    }
    found["task arithmetic, best common weight"] = min(grid.values())
    if few:
        weights = _descended(lambda w: _stack(fusion.adapters, w), shares, wide, few, few_rate)
        found["task arithmetic, tuned weights"] = float(wide.total(_stack(fusion.adapters, weights)))
    if refine:
        found["latent, refined"] = score(result)
        found["factor average, refined"] = score(_refined(average, support, refine, refine_rate))
    return found


def _stack(adapters: Tensor, weights: Tensor) -> Tensor:
    """Return flat adapters one after the other, followed by their weights."""
    return torch.cat([adapters.flatten(), weights.to(adapters.dtype)])


class _Stacked:
    """Support losses of a weighted sum of updates, exact: the factors of all adapters side by side."""

    def __init__(self, support: Any, layout: Any, count: int) -> None:
        from lorry.merging import icm

        self.layout, self.count = layout, count
        wide = icm.Layout({p: (rank * count, out, inner) for p, (rank, out, inner) in layout.shapes.items()})
        self.support = icm.Support(wide, support.tasks, support.model)

    def total(self, vector: Tensor) -> Tensor:
        """Return the mean loss for adapters and weights as `_stack` gives them."""
        from lorry.merging.factors import stack

        flat, weights = vector[: -self.count], vector[-self.count :]
        parts = [self.layout.unflatten(v) for v in flat.chunk(self.count)]
        joined = {}
        for path in self.layout.shapes:
            f = stack([p[path] for p in parts])
            rank = parts[0][path].rank
            joined[path] = Factors(f.a, f.b * weights.repeat_interleave(rank))
        return self.support.total(self.support.layout.flatten(joined))
