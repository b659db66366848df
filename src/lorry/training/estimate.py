"""What training or serving will take, before it is tried: memory by its parts, floating-point operations, time.

Nothing is allocated and no weight is read: the real model with the real adapters runs on the meta device
(`lorry.training.trace`), on rows of the length that was asked for.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.errors import OptionError
from lorry.core.life.adapter import Adapter
from lorry.core.life.api import auxiliary_loss, rows
from lorry.core.life.state import open_state, unwrapped

from .attaching import attach_job
from .jobs import Job
from .joint import Base, Share, forward, grouped
from .machine import Machine
from .objectives import Classification
from .optim import make_optimizer
from .rows import Encoded, EncodedSet, EncodeReport
from .task import Prepared, Setting
from .text_task import TextTask
from .trace import FusedAttention, on_meta, traced


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are for.

    Attributes
    ----------
    weights
        The base, with its buffers.
    adapters
        Tensors of all adapters.
    gradients
        Of what is trained.
    optimizer
        State of the optimizers after their first step.
    activations
        The rest of the highest point of a pass: what the graph keeps, logits and their gradient, what is under way.
    cache
        Keys and values of all requests.
    """

    weights: int
    adapters: int
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    cache: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self))

    def to_dict(self) -> dict[str, int]:
        """Return the parts and the total as plain data."""
        return {**dataclasses.asdict(self), "total": self.total}


@dataclass(frozen=True)
class Work:
    """What is computed and moved: (floating-point operations, bytes) of one operation -> how many there are."""

    operations: Mapping[tuple[int, int], int]

    @property
    def flops(self) -> int:
        """Floating-point operations of all products."""
        return sum(flops * count for (flops, _), count in self.operations.items())

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return sum(moved * count for (_, moved), count in self.operations.items())

    def seconds(self, machine: Machine) -> float:
        """Return the time on a machine: each operation takes as long as its products or its bytes do, if longer."""
        return sum(machine.seconds(flops, moved) * count for (flops, moved), count in self.operations.items())


@dataclass(frozen=True)
class TrainingEstimate:
    """What a fleet takes.

    Attributes
    ----------
    memory
        At the highest point.
    work
        Of one joint pass, forward and backward, in which each job contributes one micro-batch.
    rows, tokens
        Of one joint pass.
    """

    memory: Memory
    work: Work
    rows: int
    tokens: int


@dataclass(frozen=True)
class ServingEstimate:
    """What serving takes.

    Attributes
    ----------
    memory
        With all requests at their full length.
    cache_per_request
        Bytes of keys and values of one request at its full length.
    prefill
        Work of reading one request of full length.
    decode
        Work of one more token for each request.
    requests, length
        As asked for.
    """

    memory: Memory
    cache_per_request: int
    prefill: Work
    decode: Work
    requests: int
    length: int

    @property
    def cache_per_token(self) -> float:
        """Bytes of keys and values for one token of a request."""
        return self.cache_per_request / self.length


def estimate_training(
    model: nn.Module,
    jobs: Sequence[Job | Mapping[str, Any]] | Job | Mapping[str, Any],
    *,
    length: int | None = None,
    dtype: torch.dtype | None = None,
    checkpointing: bool = False,
    padded: bool = True,
    max_pad_ratio: float | None = 2.0,
    max_tokens: int | None = None,
    padding_free: bool = False,
) -> TrainingEstimate:
    """Estimate what `lorry.training.fleet.Fleet` would take; nothing is allocated, and the model stays as it is.

    Parameters
    ----------
    model
        A transformers model without adapters, on any device; on the meta device it needs no weights.
    jobs
        Jobs that learn from text, or mappings with fields of `Job`; ``name`` and ``data`` may be left out, since no
        data are read.
    length
        Tokens of every row; the longest that each job allows if not given.
    dtype
        Of the base; as it is if not given.
    checkpointing
        Recompute each block in the backward pass in place of keeping its activations.
    padded
        Whether rows differ in length, so that attention needs a mask.
    max_pad_ratio, max_tokens
        How passes are shared; see `lorry.training.fleet.Fleet`.
    padding_free
        Whether the rows of all jobs lie one after another in one pass, as the planner ``lorafusion`` has it.

    Raises
    ------
    OptionError
        A job whose rows are no text, a model that cannot checkpoint, or an operation that does not run without data.
    """
    made = [_job(job, i) for i, job in enumerate([jobs] if isinstance(jobs, Job | Mapping) else jobs)]
    base = _bare(model, dtype)
    if checkpointing:
        _checkpoint(base)
    with _understood():
        adapters = [attach_job(base, job) for job in made]
    shares = [_share(job, length) for job in made]
    _accumulate(adapters, made)
    weights, tensors = _weights(base), sum(_bytes(adapter) for adapter in adapters)
    early = _gradients(adapters)
    whole = Base(Setting(base))
    with _understood(), traced(padded) as trace, whole.mode(training=True):
        groups = [_in_one(shares)] if padding_free else grouped(shares, max_pad_ratio, max_tokens)
        for group in groups:
            _pass(whole, group)
    gradients = _gradients(adapters)
    state = sum(_state(job, adapter) for job, adapter in zip(made, adapters, strict=True))
    highest = max(early + trace.most, gradients)
    memory = Memory(weights, tensors, gradients, state, activations=highest - gradients)
    count = sum(share.height for share in shares)
    return TrainingEstimate(memory, Work(Counter(trace.work)), count, sum(s.cost * s.height for s in shares))


def estimate_serving(
    model: nn.Module,
    adapters: Sequence[Job | Mapping[str, Any]] | Job | Mapping[str, Any],
    *,
    requests: int = 1,
    length: int = 2048,
    dtype: torch.dtype | None = None,
) -> ServingEstimate:
    """Estimate what generating with a model and its adapters takes; nothing is allocated, the model stays as it is.

    Parameters
    ----------
    model
        As of `estimate_training`.
    adapters
        What lies beside the base: jobs, or mappings with the fields ``method`` and ``targets``. Requests use them in
        turn.
    requests
        How many are answered at once.
    length
        Tokens of each at its end, prompt included.
    dtype
        Of the base; as it is if not given.
    """
    if requests < 1 or length < 1:
        raise OptionError(f"Numbers of requests and tokens must be at least 1, found {requests} and {length}.")
    made = [_job(job, i) for i, job in enumerate([adapters] if isinstance(adapters, Job | Mapping) else adapters)]
    base = _bare(model, dtype).eval()
    with _understood():
        attached = [attach_job(base, job) for job in made]
    for adapter in attached:
        for parameter in adapter.parameters():
            parameter.requires_grad_(False)
    names = [job.name for job in made]
    with _understood(), torch.no_grad():
        prefill, cache, work = _generate(base, names, 1, length)
        highest, _, decode = _generate(base, names, requests, length, decode=True)
    memory = Memory(
        _weights(base),
        sum(_bytes(adapter) for adapter in attached),
        activations=max(prefill - cache, highest - requests * cache, 0),
        cache=requests * cache,
    )
    return ServingEstimate(memory, cache, work, decode, requests, length)


def largest(memory: Callable[[int], int], limit: int, most: int = 1 << 20) -> int:
    """Return the largest number whose memory is at most `limit`, for memory that grows with the number; 0 if none is.

    Parameters
    ----------
    memory
        Number from 1 -> bytes, e.g. ``lambda n: estimate_training(model, {..., "batch_size": n}).memory.total``. It is
        asked a few times, since it is close to a line.
    limit
        Bytes.
    most
        Largest number that is tried.
    """
    low, high = 0, most + 1
    known = {0: 0}
    guess = 1
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        known[guess] = memory(guess)
        if known[guess] <= limit:
            low = guess
        else:
            high = guess
        a, b = (sorted(known)[1:] or [0])[0], guess  # the line through the first and the last
        slope = (known[b] - known[a]) / (b - a) if b != a else 0.0
        line = a + int((limit - known[a]) / slope) if slope > 0 else 2 * guess
        guess = line if line != guess else guess + (1 if known[guess] <= limit else -1)
    return low


@contextmanager
def _understood() -> Iterator[None]:
    """Say plainly that an operation does not run without data; warnings about the training itself are not meant."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except NotImplementedError as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"This model or method cannot be estimated without its data: {reason}") from error


def _job(given: Job | Mapping[str, Any], number: int) -> Job:
    job = given if isinstance(given, Job) else Job.from_dict({"name": f"job-{number}", "data": [], **given})
    task = job.make_objective()
    if not isinstance(task, TextTask) or type(task).collate is not TextTask.collate or task.outputs is not None:
        raise OptionError(f"Job '{job.name}' does not learn from plain rows of tokens; only those can be estimated.")
    return job


def _bare(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    if open_state(model).adapters:
        raise OptionError("The model has adapters already; estimate on the bare base.")
    return on_meta(unwrapped(model), dtype)


def _checkpoint(base: nn.Module) -> None:
    if not getattr(base, "supports_gradient_checkpointing", False):
        raise OptionError(f"{type(base).__name__} has no gradient checkpointing.")
    # there is no generator of random numbers to keep; and a backward pass leaves the mode that its caller entered
    how = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": lambda: (nullcontext(), FusedAttention())}
    model: Any = base
    if hasattr(base, "activation_checkpointing_enable"):  # its later name
        model.activation_checkpointing_enable(how)
    else:
        model.gradient_checkpointing_enable(how)


def _share(job: Job, length: int | None) -> Share:
    """Return a micro-batch of the job's rows, each as long as it may be."""
    task = job.make_objective()
    size = length or int(getattr(task, "max_length", None) or 512)
    zeros = torch.zeros(size, dtype=torch.int32)
    row = Encoded(zeros, label=0) if isinstance(task, Classification) else Encoded(zeros, zeros)
    rows = (row,) * job.batch_size
    examples = EncodedSet(rows, EncodeReport(len(rows), len(rows), len(rows), {}, 0, size, size))
    tags = [0] * len(rows) if job.task_ids is not None else None
    return Share(job.name, Prepared(task, examples), rows, tags)


def _in_one(shares: Sequence[Share]) -> list[Share]:
    return [dataclasses.replace(share, padding_free=True) for share in shares]


def _accumulate(adapters: Sequence[Adapter], jobs: Sequence[Job]) -> None:
    """Give the adapters of jobs that accumulate the gradients of the micro-batches before."""
    for adapter, job in zip(adapters, jobs, strict=True):
        if job.gradient_accumulation_steps > 1:
            for parameter in adapter.parameters():
                parameter.grad = torch.zeros_like(parameter)


def _pass(base: Base, shares: Sequence[Share]) -> None:
    """Run a joint pass as training does, without reading any loss."""
    with forward(base, shares, {share.name: share.seed for share in shares}) as outcome:
        losses = []
        for share, (own, targets) in zip(shares, outcome.parts, strict=True):
            total = share.task.loss(own, targets)[0] * share.weight
            penalty = auxiliary_loss(base.model, share.name)
            losses.append(total if penalty is None else total + penalty)
        torch.stack(losses).sum().backward()


def _state(job: Job, adapter: Adapter) -> int:
    """Return the bytes of the optimizer's state, by letting it make a step."""
    optimizer = make_optimizer(job, adapter)
    for parameter in adapter.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return sum(_size(v) for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor))


def _generate(
    base: nn.Module, names: Sequence[str], requests: int, length: int, decode: bool = False
) -> tuple[int, int, Work]:
    """Return the highest point and the work of reading requests, or of one more token after that, and their cache."""
    ids = torch.zeros(requests, length, dtype=torch.long, device="meta")
    whose = [names[i % len(names)] if names else None for i in range(requests)]
    last = {"logits_to_keep": 1} if _accepts(base, "logits_to_keep") else {}
    cached = {"use_cache": True} if _accepts(base, "use_cache") else {}
    with traced(padded=requests > 1) as trace, rows(base, whose):
        made: Any = base(input_ids=ids, attention_mask=torch.ones_like(ids), **cached, **last)
        cache = made.get("past_key_values")
        kept = _cached(cache)
        if decode and cache is not None:
            del made
            trace.restart()
            mask = torch.ones(requests, length + 1, dtype=torch.long, device="meta")
            made = base(input_ids=ids[:, :1], attention_mask=mask, past_key_values=cache, **cached, **last)
    return trace.most, kept // requests, Work(Counter(trace.work))


def _cached(cache: Any) -> int:
    """Return the bytes of the keys, values and states that a cache of transformers holds."""
    found: dict[int, int] = {}
    layers = getattr(cache, "layers", cache) or ()
    for layer in layers:
        values = layer if isinstance(layer, tuple | list) else vars(layer).values()
        for value in values:
            if isinstance(value, Tensor):
                found[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
    return sum(found.values())


def _accepts(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _weights(base: nn.Module) -> int:
    """Return the bytes of a base's parameters and buffers, shared ones once, without its adapters'."""
    held = {id(p): _size(p) for n, p in base.named_parameters() if "lorry_" not in n}
    held |= {id(b): _size(b) for n, b in base.named_buffers() if "lorry_" not in n}
    return sum(held.values())


def _gradients(adapters: Sequence[Adapter]) -> int:
    return sum(_size(p.grad) for adapter in adapters for p in adapter.parameters())


def _bytes(adapter: Adapter) -> int:
    return sum(_size(t) for _, home in adapter.homes() for t in home.tensors().values())


def _size(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()
