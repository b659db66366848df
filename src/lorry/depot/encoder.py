"""An adapter as a vector, from its weights alone (AutoLoRA's encoder)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorry.core.errors import AdapterError, some
from lorry.core.options import check_options, option

#: Site path -> A ``(rank, in)`` and B ``(out, rank)`` with the scale folded in.
Factors = Mapping[str, tuple[Tensor, Tensor]]
#: Site path -> ``(out, in)``.
Shapes = Mapping[str, tuple[int, int]]
#: Site path -> A ``(adapters, rank, in)`` and B ``(adapters, out, rank)`` of several adapters side by side.
Stack = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class EncoderShape:
    """Sizes of an encoder; those of the released code are 4096, 16, 1, 1 and 32 heads.

    Raises
    ------
    OptionError
        A value out of its range.
    """

    width: int = option(64, "Width D of tokens.", at_least=4)
    probes: int = option(4, "Probes L at each site.", at_least=1)
    blocks: int = option(1, "Transformer blocks.", at_least=1)
    special: int = option(1, "Special tokens, of which the result is read.", at_least=1)
    heads: int = option(4, "Heads of attention; they divide the width.", at_least=1)
    out: int = option(64, "Width of the result.", at_least=2)

    def __post_init__(self) -> None:
        """Check every option against its range."""
        check_options(self)


class QuickGELU(nn.Module):
    """``x σ(1.702 x)``."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation."""
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """A pre-norm Transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.inner = nn.Sequential(nn.Linear(width, 2 * width), QuickGELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(rows, tokens, width)``."""
        h = self.norms[0](x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        found: Tensor = x + self.inner(self.norms[1](x))
        return found


class AdapterEncoder(nn.Module):
    """Encodes plain LoRAs on the same sites of one base.

    Every site has learned probes X; what the update answers them, ``LayerNorm(X Aᵀ Bᵀ)``, becomes tokens by a linear
    layer that sites of one type (the last part of the path, and the width) share. A Transformer reads them together
    with special tokens. Only ``B A`` enters, so ``(G⁻¹ A, B G)`` is the same adapter; and the norm of the answer
    drops how large the update is.

    Parameters
    ----------
    shapes
        The sites.
    shape
        Sizes.
    seed
        Of the start.
    """

    def __init__(self, shapes: Shapes, shape: EncoderShape, seed: int = 0) -> None:
        super().__init__()
        self.shapes, self.shape = dict(shapes), shape
        self.types = {path: f"{path.rpartition('.')[2]}:{out}" for path, (out, _) in shapes.items()}
        kinds = {kind: shapes[path][0] for path, kind in self.types.items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.probes = nn.ParameterList(
                nn.Parameter(torch.randn(shape.probes, inner) / inner**0.5) for _, inner in shapes.values()
            )
            self.norms = nn.ModuleList(nn.LayerNorm(out, eps=1e-12) for out, _ in shapes.values())
            self.to_tokens = nn.ModuleList(nn.Linear(out, shape.width) for out in kinds.values())
            self.special = nn.Parameter(torch.randn(shape.special, shape.width) * 0.02)
            self.blocks = nn.ModuleList(Block(shape.width, shape.heads) for _ in range(shape.blocks))
            self.last = nn.Sequential(nn.LayerNorm(shape.width), nn.Linear(shape.width, shape.out))
        self.order = list(kinds)

    def stacked(self, adapters: Sequence[Factors]) -> Stack:
        """Return adapters side by side, so that a pass over many takes no longer than over one; ranks may differ.

        Raises
        ------
        AdapterError
            An adapter sits on other sites, or on sites of another shape.
        """
        for factors in adapters:
            check_sites(factors, self.shapes)
        return stack(adapters, self.shapes)

    def encode(self, stack: Stack) -> Tensor:
        """Return what the special tokens became for adapters of `stacked`, ``(adapters, special, out)``."""
        blocks = []
        for number, path in enumerate(self.shapes):
            a, b = (t.to(self.special) for t in stack[path])
            answers = self.probes[number] @ a.mT @ b.mT
            linear = self.to_tokens[self.order.index(self.types[path])]
            blocks.append(linear(self.norms[number](answers)))
        special = self.special.expand(len(blocks[0]), -1, -1)
        x = torch.cat([special, *blocks], 1)
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.last(x[:, : self.shape.special])
        return found

    def forward(self, adapters: Sequence[Factors]) -> Tensor:
        """Return what the special tokens became, ``(adapters, special, out)``; errors as in `stacked`."""
        return self.encode(self.stacked(adapters))


def stack(adapters: Sequence[Factors], paths: Iterable[str]) -> Stack:
    """Return A ``(adapters, rank, in)`` and B ``(adapters, out, rank)`` of each site; smaller ranks are filled up."""
    found = {}
    for path in paths:
        pairs = [factors[path] for factors in adapters]
        most = max(a.shape[0] for a, _ in pairs)
        short = [most - a.shape[0] for a, _ in pairs]
        found[path] = (
            torch.stack([F.pad(a, (0, 0, 0, less)) for (a, _), less in zip(pairs, short, strict=True)]),
            torch.stack([F.pad(b, (0, less)) for (_, b), less in zip(pairs, short, strict=True)]),
        )
    return found


def taken(stack: Stack, rows: Sequence[int]) -> Stack:
    """Return some of the adapters that lie side by side."""
    chosen = torch.tensor(list(rows))
    return {path: (a[chosen], b[chosen]) for path, (a, b) in stack.items()}


def check_sites(factors: Factors, shapes: Shapes) -> None:
    """Raise `AdapterError` if an adapter sits on other sites than an encoder was made for."""
    if set(factors) != set(shapes):
        raise AdapterError(
            f"The encoder was made for {len(shapes)} sites ({some(shapes)}), the adapter has {len(factors)} "
            f"({some(factors)}). Search adapters of one base with the same targets."
        )
    for path, wanted in shapes.items():
        a, b = factors[path]
        if (b.shape[0], a.shape[1]) != tuple(wanted):
            raise AdapterError(
                f"'{path}' is {tuple(wanted)} for the encoder, ({b.shape[0]}, {a.shape[1]}) here. Search adapters of "
                "one base."
            )


def with_tokens(prompt: Tensor, tokens: Tensor, scale: float = 1.0) -> Tensor:
    """Return a prompt's embedding with an adapter's tokens behind it, so that it works without trigger words.

    Parameters
    ----------
    prompt
        ``(rows, length, width)``.
    tokens
        Of `AdapterEncoder` with ``out`` the width of the prompt: ``(special, width)``, or one for each row.
    scale
        Factor of the tokens.

    Returns
    -------
    Tensor
        ``(rows, length + special, width)``; the tokens have position 0 where positions are told.

    Raises
    ------
    AdapterError
        The widths differ.
    """
    if prompt.shape[-1] != tokens.shape[-1]:
        raise AdapterError(
            f"The prompt has a width of {prompt.shape[-1]}, the adapter's tokens of {tokens.shape[-1]}. Make the "
            "encoder with out equal to the prompt's width."
        )
    each = tokens.expand(len(prompt), *tokens.shape[-2:])
    return torch.cat([prompt, scale * each.to(prompt)], 1)
