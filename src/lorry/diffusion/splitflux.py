"""SplitFlux: content and style of one picture as two adapters on the single-stream blocks of Flux (arXiv 2511.15258).

Content sits on the first single blocks with two branches that are mixed token by token, on two boundary blocks with a
constrained rank, style on the blocks behind them. Each is an adapter of its own: either alone, both, or the content's
main branch alone (`without_rest`) in a new scene.

    contents = attach(transformer, "content"); styles = attach(transformer, "style")
    with gated(transformer):
        ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorry.core.errors import OptionError, SiteError
from lorry.core.life import api
from lorry.core.life.adapter import Adapter
from lorry.core.options import check_options, option
from lorry.diffusion.prompting import given_text, with_text
from lorry.methods.parts import saliency
from lorry.methods.splitflux import SplitFlux

Part = Literal["content", "style"]
PROJECTIONS = ("to_q", "to_k", "to_v")


@dataclass(frozen=True)
class Split:
    """Which single blocks carry what, and how; the defaults are those of Flux.1 with its 38 single blocks.

    Attributes
    ----------
    content, boundary, style
        Numbers of single blocks, from 0. Other networks must be probed for them.
    rank, residual
        Of each layer, and of the content's second branch.
    constraint
        The boundary's rank is ``rank / constraint``, its scale is `constraint`; 1 is plain LoRA there.
    complement
        Weight of the loss that keeps the content's branches apart.
    branches
        Whether content has two branches; a plain LoRA otherwise.
    """

    content: Sequence[int] = tuple(range(10))
    boundary: Sequence[int] = (10, 11)
    style: Sequence[int] = tuple(range(12, 38))
    rank: int = option(64, "Rank of each layer's update.", at_least=2)
    residual: int = option(16, "Of these, rank units of the content's second branch.", at_least=1)
    constraint: int = option(2, "Divides the boundary's rank and multiplies its scale.", at_least=1)
    complement: float = option(0.1, "Weight of the loss that keeps the content's branches apart.", at_least=0)
    branches: bool = option(True, "Two branches for content, in place of a plain LoRA.")

    def __post_init__(self) -> None:
        """Refuse blocks with two parts, and ranks that cannot be divided."""
        check_options(self)
        every = [*self.content, *self.boundary, *self.style]
        twice = sorted({k for k in every if every.count(k) > 1})
        if twice:
            raise OptionError(f"Block {twice[0]} stands for two of content, boundary and style; give it one part.")
        if self.rank % self.constraint:
            raise OptionError(f"rank must be a multiple of constraint, found {self.rank} and {self.constraint}.")
        if self.residual >= self.rank:
            raise OptionError(f"residual must be below rank, found {self.residual} and {self.rank}.")

    def blocks(self, part: Part) -> list[int]:
        """Return the blocks that carry a part; those of the boundary belong to the content."""
        return [*self.content, *self.boundary] if part == "content" else list(self.style)

    def parameters(self, width: int) -> int:
        """Return the number of trained values of both parts on a network of this width."""
        whole, narrow = len(self.content) + len(self.style), len(self.boundary)
        return len(PROJECTIONS) * 2 * width * (whole * self.rank + narrow * self.rank // self.constraint)


def attach(
    transformer: nn.Module, part: Part, split: Split | None = None, *, name: str | None = None, seed: int = 0
) -> Adapter:
    """Attach a fresh adapter for the content or the style of a picture.

    Parameters
    ----------
    transformer
        A ``FluxTransformer2DModel``, or another with ``single_transformer_blocks`` of its shape.
    part
        ``content`` or ``style``; also the adapter's name if none is given.
    split
        Which blocks carry what.

    Raises
    ------
    SiteError, OptionError
        The network has no such blocks, or they are too narrow.
    """
    split = split or Split()
    _check(transformer, split)
    plain = {"method": "lora", "rank": split.rank}
    method: dict[str, Any] = plain
    if part == "content" and split.branches:
        method = {
            "method": "splitflux",
            "rank": split.rank,
            "residual": split.residual,
            "complement": split.complement,
        }
    narrow: dict[str, Any] = {"rank": split.rank // split.constraint, "alpha": float(split.rank)}
    if method is not plain:
        narrow |= {"residual": 0, "gate": "none"}
    constrained = {f"single_transformer_blocks.{k}.attn.*": narrow for k in split.boundary if part == "content"}
    return api.attach(
        transformer,
        method,
        targets=[f"single_transformer_blocks.{k}.attn.{p}" for k in split.blocks(part) for p in PROJECTIONS],
        site_options=constrained or None,
        name=name or part,
        seed=seed,
    )


def without_rest(content: Adapter, name: str) -> Adapter:
    """Return a copy of a content adapter that has the main branch alone, to be put into a new scene.

    The gate still weighs the main branch; blocks without branches are copied as they are.
    """
    options, kept = {}, {}
    for path, entry in content.entries.items():
        method = entry.method
        if not isinstance(method, SplitFlux):
            raise SiteError(f"'{content.name}' has {type(method).__name__} at '{path}', which has no second branch.")
        main = method.rank - method.residual
        options[path] = {**method.to_dict(), "rank": main, "residual": 0, "alpha": main * method.scale(entry.site)}
        options[path].pop("method")
        tensors = entry.tensors()
        kept[path] = {"A": tensors["A"][:main], "B": tensors["B"][:, :main]}
    paths = list(options)
    first = {"method": "splitflux", **options[paths[0]]}
    copy = api.attach(content.state.root, first, targets=paths, site_options=options, name=name, activate=False)
    with torch.no_grad():
        for path, values in kept.items():
            for key, tensor in copy.entries[path].tensors().items():
                tensor.copy_(values[key])
    return copy.train(False)


@contextmanager
def gated(transformer: nn.Module) -> Iterator[None]:
    """Let every single block tell its layers how much each image token stands out, while the context lasts."""
    with saliency.gated(_blocks(transformer)):
        yield


class _Caught(Exception):
    """Ends a run of the network where its text stream was caught."""


@contextmanager
def text_from(transformer: nn.Module, block: int, run: Callable[[], object]) -> Iterator[None]:
    """Let single blocks from `block` on read the text of another prompt while the context lasts.

    Parameters
    ----------
    transformer
        The network.
    block
        The first single block that sees the other text (the first style block).
    run
        Runs the network for the same latents and times with the other prompt, usually without adapters; it is stopped
        where the block begins.
    """
    place = _blocks(transformer)[block]
    caught: list[Tensor] = []

    def catch(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        caught.append(given_text(arguments, named))
        raise _Caught

    def replace(
        module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return with_text(arguments, named, caught[0])

    hook = place.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        run()
    except _Caught:
        pass
    finally:
        hook.remove()
    if not caught:
        raise SiteError(f"Single block {block} did not run for the other prompt, so there is no text to take from it.")
    hook = place.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _blocks(transformer: nn.Module) -> nn.ModuleList:
    found = getattr(transformer, "single_transformer_blocks", None)
    if not isinstance(found, nn.ModuleList) or not len(found):
        raise SiteError(
            f"{type(transformer).__name__} has no single_transformer_blocks; SplitFlux is for Flux and networks of its "
            "shape."
        )
    return found


def _check(transformer: nn.Module, split: Split) -> None:
    count = len(_blocks(transformer))
    far = [k for part in ("content", "style") for k in split.blocks(part) if not 0 <= k < count]
    if far:
        raise SiteError(
            f"The network has {count} single blocks, but the split names block {far[0]}. The defaults are those of "
            "Flux.1; give Split(content=..., boundary=..., style=...) for this one, found by probing."
        )
