"""The parts of ICM-Fusion: LoRA checkpoints as vectors, the conditional VAE over them, its meta-training.

The paper's own network is not public; this is the small multilayer form with group norm, and Equations 8 to 14 as its
sheet gives them. Everything is float64-free: the VAE is a network, its result is rounded like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from lorry.core.errors import AdapterError, OptionError
from lorry.core.life.adapter import Adapter
from lorry.merging.factors import Factors
from lorry.merging.inputs import Candidate
from lorry.merging.methods.lora_lego import in_gauge
from lorry.merging.output import trial_adapter
from lorry.merging.sources import AdapterLike, open_source


@dataclass
class Task:
    """What ICM-Fusion knows of a task.

    Attributes
    ----------
    checkpoints
        Saved or live adapters from the training of this task, of the same start (A from one seed) as the other tasks'.
    loss
        Mean loss on the task's support examples, differentiable in the adapter: a function of the model that carries
        it, or of its factors where the merge has no model. None leaves out the inner loop and the few-shot mode.
    vector
        What describes the task, ``(c,)``: see `hidden_state_vector`. None for a fixed random projection of its mean
        checkpoint.
    """

    checkpoints: Sequence[AdapterLike]
    loss: Callable[[Any], Tensor] | None = None
    vector: Tensor | None = None


def hidden_state_vector(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Return a task vector ``(width,)``: the last layer's hidden state at the last token of each row, averaged.

    Parameters
    ----------
    model
        A Hugging Face model that carries the task's adapter.
    batches
        ``input_ids`` and, where rows are padded, ``attention_mask``.
    """
    found = []
    with torch.no_grad():
        for batch in batches:
            states = model(**batch, output_hidden_states=True).hidden_states[-1]
            mask = batch.get("attention_mask")
            if mask is None:
                last = torch.full((states.shape[0],), states.shape[1] - 1, device=states.device)
            else:
                places = torch.arange(mask.shape[1], device=mask.device)
                last = (places * mask).argmax(dim=1)
            found.append(states[torch.arange(states.shape[0], device=states.device), last].float())
    return torch.cat(found).mean(0).cpu()


@dataclass(frozen=True)
class Layout:
    """Order, shapes and ranks of the tensors in a flat vector: for each site A, then B."""

    shapes: dict[str, tuple[int, int, int]]

    @property
    def sizes(self) -> list[int]:
        """Number of elements of each tensor."""
        return [n for rank, out, inner in self.shapes.values() for n in (rank * inner, out * rank)]

    def flatten(self, candidate: Candidate) -> Tensor:
        """Return the factors of all sites as one vector ``(P,)``, padded to the layout's ranks."""
        pieces = []
        for path, (rank, _, _) in self.shapes.items():
            f = candidate[path].padded(rank)
            pieces += [f.a.flatten(), f.b.flatten()]
        return torch.cat(pieces)

    def unflatten(self, vector: Tensor) -> dict[str, Factors]:
        """Undo `flatten`."""
        found, pieces = {}, iter(vector.split(self.sizes))
        for path, (rank, out, inner) in self.shapes.items():
            found[path] = Factors(next(pieces).reshape(rank, inner), next(pieces).reshape(out, rank))
        return found

    def statistics(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of each tensor, spread over its elements; constant tensors have deviation
        1.
        """
        means, deviations = [], []
        for piece in vector.split(self.sizes):
            deviation = piece.std(unbiased=False)
            means.append(piece.mean().expand(piece.numel()))
            deviations.append(
                torch.where(deviation > 1e-12, deviation, torch.ones_like(deviation)).expand(piece.numel())
            )
        return torch.cat(means), torch.cat(deviations)


@dataclass
class Collection:
    """Checkpoints of all tasks as normalised vectors.

    Attributes
    ----------
    vectors
        Task -> ``(checkpoints, P)``, normalised for each tensor of each checkpoint.
    mean, deviation
        Task -> statistics of its last checkpoint, which a decoded vector is brought back with.
    conditions
        Task -> task vector, scaled to unit RMS over all tasks.
    """

    layout: Layout
    vectors: dict[str, Tensor]
    mean: dict[str, Tensor]
    deviation: dict[str, Tensor]
    conditions: dict[str, Tensor]


def collect(
    tasks: Mapping[str, Task],
    paths: Sequence[str],
    shapes: Mapping[str, tuple[int, int]],
    model: nn.Module | None,
    gauge: str,
    width: int,
) -> Collection:
    """Read all checkpoints.

    Raises
    ------
    OptionError, AdapterError
        A task has no checkpoints, or a checkpoint lacks a site.
    """
    raw: dict[str, list[dict[str, Factors]]] = {}
    for name, task in tasks.items():
        if not task.checkpoints:
            raise OptionError(f"Task '{name}' has no checkpoints to learn from.")
        raw[name] = [_read(item, name, paths, model, gauge) for item in task.checkpoints]
    ranks = {p: max(c[p].rank for own in raw.values() for c in own) for p in paths}
    layout = Layout({p: (ranks[p], *shapes[p]) for p in paths})
    vectors, mean, deviation = {}, {}, {}
    for name, own in raw.items():
        rows = []
        for checkpoint in own:
            flat = layout.flatten(checkpoint)
            mean[name], deviation[name] = layout.statistics(flat)
            rows.append((flat - mean[name]) / deviation[name])
        vectors[name] = torch.stack(rows).float()
    return Collection(layout, vectors, mean, deviation, _conditions(tasks, vectors, width))


def _read(
    item: AdapterLike, name: str, paths: Sequence[str], model: nn.Module | None, gauge: str
) -> dict[str, Factors]:
    with ExitStack() as stack:
        source = open_source(item, name, model, stack)
        missing = [p for p in paths if p not in source.sites]
        if missing:
            raise AdapterError(
                f"A checkpoint of task '{name}' ({source.origin}) lacks {len(missing)} sites, e.g. '{missing[0]}'."
            )
        return {p: in_gauge(Factors(*source.read(p)), gauge) for p in paths}


def _conditions(tasks: Mapping[str, Task], vectors: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    given = [n for n, t in tasks.items() if t.vector is not None]
    if given and len(given) != len(tasks):
        raise OptionError(f"Tasks {given} have a task vector, the others have none. Give all of them one, or none.")
    found = {}
    for name, task in tasks.items():
        if task.vector is not None:
            found[name] = task.vector.detach().float().flatten()
        else:
            mean = vectors[name].mean(0)
            project = torch.randn(width, mean.numel(), generator=Generator().manual_seed(0)) / mean.numel() ** 0.5
            found[name] = project @ mean
    scale = torch.stack(list(found.values())).square().mean().sqrt().clamp_min(1e-12)
    return {n: v / scale for n, v in found.items()}


class FusionVAE(nn.Module):
    """Conditional VAE over flat adapters: encoder ``[l; v] -> (μ, log σ²)``, decoder ``[z; v] -> l``."""

    def __init__(self, size: int, condition: int, latent: int, hidden: int, clamp: float = 10.0) -> None:
        super().__init__()
        self.latent, self.clamp = latent, clamp
        groups = 4 if hidden % 4 == 0 else 1
        self.encoder = nn.Sequential(nn.Linear(size + condition, hidden), nn.GroupNorm(groups, hidden), nn.SiLU())
        self.code = nn.Linear(hidden + condition, 2 * latent)
        self.decoder = nn.Sequential(
            nn.Linear(latent + condition, hidden), nn.GroupNorm(groups, hidden), nn.SiLU(), nn.Linear(hidden, size)
        )

    def encode(self, flat: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance ``(rows, latent)`` for ``flat`` ``(rows, P)`` and ``v`` ``(rows, c)``."""
        hidden = self.encoder(torch.cat([flat, v], dim=1))
        mean, logvar = self.code(torch.cat([hidden, v], dim=1)).chunk(2, dim=1)
        return mean, logvar.clamp(-self.clamp, self.clamp)

    def decode(self, z: Tensor, v: Tensor) -> Tensor:
        """Return the flat adapter ``(rows, P)``."""
        found: Tensor = self.decoder(torch.cat([z, v], dim=1))
        return found


def kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """Return ``KL(N(μ, σ²) || N(0, 1))`` summed over the latent dimensions and averaged over rows (Equation 12)."""
    return (-0.5 * (1 + logvar - mean.square() - logvar.exp())).sum(1).mean()


def initialise(network: nn.Module, generator: Generator) -> None:
    """Draw the start of all linear layers from a generator."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            with torch.no_grad():
                module.weight.uniform_(-bound, bound, generator=generator)
                module.bias.zero_()


@dataclass(frozen=True)
class Training:
    """Knobs of the meta-training; see `lorry.merging.methods.icm_fusion`.

    A step of Equation 8 is taken in the adapter's own numbers, not in the normalised ones. With `inner_relative` its
    rate is `inner_rate · ‖l‖ / ‖∇L‖`, so that a step moves any adapter of any model by that share of its norm;
    otherwise it is `inner_rate` itself.
    """

    epochs: int
    rate: float
    kl_weight: float
    inner_steps: int
    inner_rate: float
    inner_relative: bool
    first_order: bool
    batch: int


@dataclass(frozen=True)
class TaskLoss:
    """A task's loss on raw flat adapters, seen from normalised ones ``x = (l - mean) / deviation``.

    Attributes
    ----------
    raw
        Loss of a raw adapter ``(P,)``.
    mean, deviation
        ``(P,)``.
    """

    raw: Callable[[Tensor], Tensor]
    mean: Tensor
    deviation: Tensor

    def adapted(self, flat: Tensor, how: Training) -> Tensor:
        """Return normalised adapters ``(rows, P)`` after the inner steps ``l <- l - rate ∇L(l)`` (Equation 8).

        With ``how.first_order`` the result is a constant, else the gradient flows through all steps; rates are
        constants.
        """
        point = flat * self.deviation + self.mean
        for _ in range(how.inner_steps):
            if how.first_order:
                point = point.detach().requires_grad_(True)
            total = torch.stack([self.raw(row) for row in point]).sum()
            (gradient,) = torch.autograd.grad(total, point, create_graph=not how.first_order)
            rate = torch.full_like(point[:, :1], how.inner_rate)
            if how.inner_relative:
                size, slope = (x.detach().norm(dim=1, keepdim=True) for x in (point, gradient))
                rate = torch.where(slope > 0, rate * size / slope, 0.0)
            point = point - rate * gradient
        found = (point - self.mean) / self.deviation
        return found.detach() if how.first_order else found


def meta_loss(
    vae: FusionVAE,
    flat: Tensor,
    v: Tensor,
    noise: tuple[Tensor, Tensor],
    loss: TaskLoss | None,
    how: Training,
) -> Tensor:
    """Return ``MSE(l, l_rec) + λ KL`` after the inner loop (Equations 8 to 12).

    Parameters
    ----------
    vae, how
        The network, and the knobs of its training.
    flat, v
        Normalised adapters ``(rows, P)`` and their condition ``(rows, c)``.
    noise
        Two standard normal draws ``(rows, latent)``, for the first and the second posterior.
    loss
        Of the task, or None for no inner loop.
    """
    mean, logvar = vae.encode(flat, v)
    adapted = flat
    if how.inner_steps and loss is not None:
        adapted = vae.decode(mean + noise[0] * (logvar / 2).exp(), v)
        adapted = loss.adapted(adapted, how)
        mean, logvar = vae.encode(adapted, v)
    rebuilt = vae.decode(mean + noise[1] * (logvar / 2).exp(), v)
    return (rebuilt - flat).square().mean() + how.kl_weight * kl(mean, logvar)


def train_vae(
    vae: FusionVAE, data: Collection, losses: Mapping[str, TaskLoss], how: Training, generator: Generator, held_out: int
) -> dict[str, Any]:
    """Train on all checkpoints but the last `held_out` of each task before its final one; return what was reached.

    Tasks without a loss go without the inner loop; for the others ``inner_losses`` says what the loop does to what the
    trained VAE decodes.
    """
    optimizer = torch.optim.Adam(vae.parameters(), lr=how.rate)
    train, left = {}, {}
    for name, rows in data.vectors.items():
        count = min(held_out, max(len(rows) - 2, 0))
        left[name] = rows[len(rows) - 1 - count : len(rows) - 1]
        train[name] = torch.cat([rows[: len(rows) - 1 - count], rows[-1:]])
    history = []
    with torch.enable_grad():
        for _ in range(how.epochs):
            total = 0.0
            for name in data.vectors:
                rows = train[name]
                pick = rows[torch.randint(len(rows), (min(how.batch, len(rows)),), generator=generator)]
                v = data.conditions[name].expand(len(pick), -1)
                noise = tuple(torch.randn(len(pick), vae.latent, generator=generator) for _ in range(2))
                optimizer.zero_grad()
                value = meta_loss(vae, pick, v, noise, losses.get(name), how)  # type: ignore[arg-type]
                value.backward()
                optimizer.step()
                total += float(value.detach())
            history.append(total / len(data.vectors))
    used = losses if how.inner_steps else {}
    return {
        "loss_first": history[0] if history else None,
        "loss_last": history[-1] if history else None,
        "error_train": {n: rebuilt_error(vae, rows, data.conditions[n]) for n, rows in train.items()},
        "error_held_out": {n: rebuilt_error(vae, rows, data.conditions[n]) for n, rows in left.items() if len(rows)},
        "inner_losses": {n: inner_losses(vae, data, n, loss, how) for n, loss in used.items()},
    }


def inner_losses(vae: FusionVAE, data: Collection, name: str, loss: TaskLoss, how: Training) -> tuple[float, float]:
    """Return a task's loss for its rebuilt last checkpoint, before and after the inner loop."""
    v = data.conditions[name][None]
    with torch.no_grad():
        decoded = vae.decode(vae.encode(data.vectors[name][-1:], v)[0], v)
    with torch.enable_grad():
        adapted = loss.adapted(decoded, how).detach()
    before, after = (float(loss.raw((x * loss.deviation + loss.mean)[0]).detach()) for x in (decoded, adapted))
    return before, after


@torch.no_grad()
def rebuilt_error(vae: FusionVAE, rows: Tensor, condition: Tensor) -> float:
    """Return the relative squared error of decoding the mean code."""
    v = condition.expand(len(rows), -1)
    mean, _ = vae.encode(rows, v)
    return float((vae.decode(mean, v) - rows).square().sum() / rows.square().sum())


class _OnModel(torch.autograd.Function):
    """The loss of a model that carries a flat adapter; its gradient comes from the model's own backward pass."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, call: Callable[[Tensor], tuple[float, Tensor]]) -> Tensor:
        value, gradient = call(vector.detach())
        ctx.save_for_backward(gradient)
        return vector.new_tensor(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None


@dataclass
class Support:
    """The task losses as functions of raw flat adapters."""

    layout: Layout
    tasks: Mapping[str, Task]
    model: nn.Module | None
    calls: int = field(default=0)
    _carried: Adapter | None = field(default=None, repr=False)

    def loss(self, name: str, vector: Tensor) -> Tensor:
        """Return a task's loss, differentiable in the vector (once, where a model is in between)."""
        self.calls += 1
        function = self.tasks[name].loss
        assert function is not None
        if self.model is None:
            return function(self.layout.unflatten(vector))

        def call(values: Tensor) -> tuple[float, Tensor]:
            return self._on_model(function, values)

        return _OnModel.apply(vector, call)  # type: ignore[no-untyped-call]

    def task_loss(self, data: Collection, name: str) -> TaskLoss:
        """Return a task's loss for normalised adapters, brought back with the statistics of its last checkpoint."""
        return TaskLoss(partial(self.loss, name), data.mean[name].float(), data.deviation[name].float())

    @contextmanager
    def carried(self) -> Iterator[None]:
        """Let the model keep one adapter for all losses that are asked for meanwhile, instead of one for each."""
        if self.model is None or self._carried is not None:
            yield
            return
        zeros = torch.zeros(sum(self.layout.sizes))
        with trial_adapter(self.model, self._tensors(zeros), trainable=True) as adapter:
            self._carried = adapter
            try:
                yield
            finally:
                self._carried = None

    def _tensors(self, values: Tensor) -> dict[str, dict[str, Tensor]]:
        return {p: {"A": f.a.float(), "B": f.b.float()} for p, f in self.layout.unflatten(values).items()}

    def _on_model(self, function: Callable[[Any], Tensor], values: Tensor) -> tuple[float, Tensor]:
        with self.carried(), torch.enable_grad():
            assert self._carried is not None
            entries = self._carried.entries
            wanted = [entries[p].tensors()[n] for p in self.layout.shapes for n in ("A", "B")]
            fresh = [own[n] for own in self._tensors(values).values() for n in ("A", "B")]
            with torch.no_grad():
                for tensor, value in zip(wanted, fresh, strict=True):
                    tensor.copy_(value)
            loss = function(self.model)
            gradients = torch.autograd.grad(loss, wanted)
            return loss.item(), torch.cat([g.detach().flatten() for g in gradients]).to(values.dtype)

    def known(self) -> list[str]:
        """Return the tasks that have a loss."""
        return [n for n, t in self.tasks.items() if t.loss is not None]

    def total(self, vector: Tensor) -> Tensor:
        """Return the mean loss over the tasks that have one."""
        names = self.known()
        return torch.stack([self.loss(n, vector) for n in names]).sum() / len(names)
