"""Tensor parallelism for a base and many adapters at once: every matrix lies in parts on the devices of a mesh.

The base is split as Megatron-LM does it: the outputs of q, k, v, gate and up, and the inputs of o and down. The factors
of adapters follow them (S-LoRA, arXiv 2311.03285, section 6): beside an output-split layer each device has a part of
the ranks of A, gathers the units U, and has the rows of B for its own outputs; beside an input-split layer it has the
columns of A for its own inputs, sums U, and adds B's part into its own columns of the partial sum before that is summed
once. Embeddings, norms and the head are on every device.

For T tokens with rank r on N devices a block's attention sends ``2 (N - 1) T h / N`` numbers from each device for the
base, and ``5 (N - 1) T r / N`` for the adapters (rings); rows without an adapter send nothing for one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lorry.core.errors import AdapterError, OptionError, SiteError, near_misses
from lorry.formats.file import AdapterFile
from lorry.formats.reader import open_adapter

#: What is split together in one module: by its outputs, and by its inputs.
GROUPS = ((("q_proj", "k_proj", "v_proj"), "o_proj"), (("gate_proj", "up_proj"), "down_proj"))


@dataclass(frozen=True)
class Segment:
    """Tokens of a batch that have an adapter.

    Attributes
    ----------
    name, weight
        The adapter, and its weight there.
    tokens
        Which tokens.
    """

    name: str
    weight: float
    tokens: Tensor


class TensorParallel:
    """A model of transformers whose layers lie in parts on the devices of a mesh; every process runs it alike.

    Parameters
    ----------
    model
        The whole model, equal on all processes, in the naming of Llama: ``q_proj``, ``k_proj``, ``v_proj`` and
        ``o_proj`` in attention, ``gate_proj``, ``up_proj`` and ``down_proj`` beside it. It is changed in place and
        keeps this process's parts alone.
    mesh
        Of one dimension, over all processes that hold a part.

    Raises
    ------
    OptionError
        The mesh has more dimensions, the model has no such layers, or its heads or widths cannot be dealt out evenly.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh) -> None:
        if mesh.ndim != 1:
            raise OptionError(f"Tensor parallelism takes a mesh of one dimension, found {mesh.ndim}; give mesh['tp'].")
        self.model, self.mesh = model, mesh
        self.size, self.rank = mesh.size(), mesh.get_local_rank()
        self.names: set[str] = set()
        self._rows: tuple[Mapping[str, float], ...] = ()
        self._lengths: tuple[int, ...] | None = None
        self._segments: dict[int, list[Segment]] = {}
        self.layers = self._split()

    def load(self, name: str, source: Path | str | AdapterFile) -> None:
        """Take this process's parts of an adapter; to be called by every process.

        Raises
        ------
        AdapterError
            The name is taken, or an update is no constant low-rank one.
        SiteError
            The adapter sits elsewhere than on layers that are split.
        CheckpointError
            As for `lorry.open`.
        """
        if name in self.names:
            raise AdapterError(f"An adapter '{name}' is loaded already; unload it first.")
        file = open_adapter(source)
        elsewhere = next((path for path in file if path not in self.layers), None)
        if elsewhere is not None:
            raise SiteError(
                f"'{file.where}' has an update at '{elsewhere}', which is not split over devices; expected sites among "
                "q, k, v, o, gate, up and down. Fuse it into the base beforehand, or serve it on one device."
            )
        parts = {path: file.factors(path) for path in file}
        for path, (a, b, _) in parts.items():
            self.layers[path].take(name, a, b)
        self.names.add(name)

    def unload(self, name: str) -> None:
        """Forget an adapter.

        Raises
        ------
        AdapterError
            An unknown name.
        """
        self._check(name)
        for layer in self.layers.values():
            layer.factors.pop(name, None)
        self.names.discard(name)

    @contextmanager
    def rows(self, rows: Sequence[Mapping[str, float] | str | None], lengths: Sequence[int] | None = None
             ) -> Iterator[nn.Module]:  # fmt: skip
        """Give the model with a composition for each row; None is the bare base.

        Parameters
        ----------
        rows
            A name, names with weights, or None for each row; the same on every process.
        lengths
            Tokens of each row where all lie in one ``(1, tokens)`` batch; None for ``(rows, length)``.

        Raises
        ------
        AdapterError
            An unknown name.
        """
        named = tuple({} if row is None else {row: 1.0} if isinstance(row, str) else dict(row) for row in rows)
        for row in named:
            for name in row:
                self._check(name)
        before = self._rows, self._lengths, self._segments
        self._rows, self._lengths, self._segments = named, None if lengths is None else tuple(lengths), {}
        try:
            yield self.model
        finally:
            self._rows, self._lengths, self._segments = before

    def segments(self, tokens: int) -> list[Segment]:
        """Return which of a batch's tokens have which adapter, in the order of names; worked out once for a batch."""
        if tokens not in self._segments:
            self._segments[tokens] = self._found(tokens)
        return self._segments[tokens]

    def _found(self, tokens: int) -> list[Segment]:
        count = len(self._rows)
        if not count:
            return []
        lengths = self._lengths or (tokens // count,) * count
        if sum(lengths) != tokens:
            raise AdapterError(f"{count} rows of {sum(lengths)} tokens were named, but a layer sees {tokens} tokens.")
        places: dict[tuple[str, float], list[range]] = {}
        start = 0
        for row, length in zip(self._rows, lengths, strict=True):
            for part in row.items():
                places.setdefault(part, []).append(range(start, start + length))
            start += length
        device = next(self.model.parameters()).device
        return [
            Segment(name, weight, torch.tensor([place for run in runs for place in run], device=device))
            for (name, weight), runs in sorted(places.items())
        ]

    def _check(self, name: str) -> None:
        if name not in self.names:
            raise AdapterError(f"There is no adapter '{name}'.{near_misses(name, self.names)}")

    def _split(self) -> dict[str, SplitLinear]:
        found: dict[str, SplitLinear] = {}
        for path, module in list(self.model.named_modules()):
            for columns, row in GROUPS:
                layers = [getattr(module, name, None) for name in (*columns, row)]
                if not all(isinstance(layer, nn.Linear) for layer in layers):
                    continue
                self._check_widths(path, module, layers)
                for name, layer in zip((*columns, row), layers, strict=True):
                    assert isinstance(layer, nn.Linear)
                    split = (InputSplit if name == row else OutputSplit)(layer, self)
                    setattr(module, name, split)
                    found[f"{path}.{name}" if path else name] = split
        if not found:
            names = ", ".join(name for columns, row in GROUPS for name in (*columns, row))
            raise OptionError(f"{type(self.model).__name__} has no layers that can be split: expected {names}.")
        return found

    def _check_widths(self, path: str, module: nn.Module, layers: Sequence[object]) -> None:
        """Raise `OptionError` unless each device gets as many heads, or columns, as the others."""
        unit = getattr(module, "head_dim", 1)
        for layer in layers[:-1]:
            assert isinstance(layer, nn.Linear)
            if layer.out_features % (self.size * unit):
                raise OptionError(
                    f"'{path}' has a layer of {layer.out_features // unit} {'heads' if unit > 1 else 'columns'}, which "
                    f"cannot be dealt out to {self.size} devices; take a number of devices that divides it."
                )


class SplitLinear(nn.Module):
    """The part of a linear layer that this process has, and of the factors of adapters there.

    Attributes
    ----------
    factors
        Name -> A and B as this process has them, the scale folded into B.
    """

    weight: Tensor
    bias: Tensor | None
    #: The dimension of the weight that is split.
    dim = 0

    def __init__(self, whole: nn.Linear, owner: TensorParallel) -> None:
        super().__init__()
        self.owner = [owner]  # in a list, since the owner holds the model that holds this
        self.width = whole.out_features
        # copies, so that the whole can be freed
        self.register_buffer("weight", self.part(whole.weight.detach(), self.dim).clone(), persistent=False)
        bias = None if whole.bias is None else whole.bias.detach()
        self.register_buffer("bias", bias if bias is None else self.own_bias(bias).clone(), persistent=False)
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}

    def part(self, whole: Tensor, dim: int) -> Tensor:
        """Return this process's part of a tensor."""
        return whole.tensor_split(self.owner[0].size, dim)[self.owner[0].rank]

    def own_bias(self, bias: Tensor) -> Tensor:
        """Return what this process adds of the bias."""
        raise NotImplementedError

    def take(self, name: str, a: Tensor, b: Tensor) -> None:
        """Keep this process's parts of A ``(rank, in)`` and B ``(out, rank)``."""
        raise NotImplementedError

    def keep(self, name: str, a: Tensor, b: Tensor) -> None:
        """Keep parts as they are to be multiplied with."""
        self.factors[name] = (a.to(self.weight, copy=True), b.to(self.weight, copy=True))

    def here(self, tokens: int) -> list[Segment]:
        """Return the segments of a batch that have an update at this layer."""
        return [segment for segment in self.owner[0].segments(tokens) if segment.name in self.factors]

    def shrunk(self, x: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Return this process's part of all segments' units, one after the other in one flat tensor."""
        return torch.cat([(x[s.tokens] @ self.factors[s.name][0].t()).mul_(s.weight).reshape(-1) for s in segments])


class OutputSplit(SplitLinear):
    """A layer with a part of its outputs: q, k, v, gate or up."""

    def own_bias(self, bias: Tensor) -> Tensor:
        """Return the bias of this process's outputs."""
        return self.part(bias, 0)

    def take(self, name: str, a: Tensor, b: Tensor) -> None:
        """Keep some ranks of A, as many on each process (zeros fill up), and the rows of B for the own outputs."""
        size, rank = self.owner[0].size, a.shape[0]
        more = -rank % size
        self.keep(name, self.part(nn.functional.pad(a, (0, 0, 0, more)), 0), self.part(b, 0))

    def forward(self, x: Tensor) -> Tensor:
        """Return this process's outputs ``(*, out / N)`` for inputs ``(*, in)``."""
        out = nn.functional.linear(x, self.weight, self.bias)
        flat = x.reshape(-1, x.shape[-1])
        segments = self.here(len(flat))
        if not segments:
            return out
        own = self.shrunk(flat, segments)
        owner = self.owner[0]
        every = own.new_empty(owner.size, own.numel())
        dist.all_gather_into_tensor(every.view(-1), own, group=owner.mesh.get_group())
        found, start = out.view(-1, out.shape[-1]), 0
        for segment in segments:
            a, b = self.factors[segment.name]
            size = len(segment.tokens) * len(a)
            units = every[:, start : start + size].view(owner.size, -1, len(a)).transpose(0, 1).flatten(1)
            found.index_add_(0, segment.tokens, units[:, : b.shape[1]] @ b.t())
            start += size
        return out


class InputSplit(SplitLinear):
    """A layer with a part of its inputs: o or down."""

    dim = 1

    def own_bias(self, bias: Tensor) -> Tensor:
        """Return all of it: it is added when the parts have been summed."""
        return bias

    def take(self, name: str, a: Tensor, b: Tensor) -> None:
        """Keep the columns of A for the own inputs, and some rows of B."""
        self.keep(name, self.part(a, 1), self.part(b, 0))

    def forward(self, x: Tensor) -> Tensor:
        """Return the whole outputs ``(*, out)`` for this process's inputs ``(*, in / N)``."""
        out = nn.functional.linear(x, self.weight)
        flat = x.reshape(-1, x.shape[-1])
        group, segments = self.owner[0].mesh.get_group(), self.here(len(flat))
        if segments:
            units = self.shrunk(flat, segments)
            dist.all_reduce(units, group=group)
            own, start = self.part(out.view(-1, self.width), 1), 0
            for segment in segments:
                a, b = self.factors[segment.name]
                size = len(segment.tokens) * len(a)
                own.index_add_(0, segment.tokens, units[start : start + size].view(-1, len(a)) @ b.t())
                start += size
        dist.all_reduce(out, group=group)
        return out if self.bias is None else out.add_(self.bias)
