"""Feed-forward blocks of transformers: which module is one, what its parts are called, and what it computes
between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lorry.core.errors import SiteError
from lorry.core.forward.exchange import exchanged
from lorry.core.sites.kinds import sites_in
from lorry.core.sites.kinds.block import BLOCK
from lorry.core.sites.site import Site

#: Names of the projections that read the input, and of the one that gives the output; "fused" is gate and up.
_FORMS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("gate_proj", "up_proj"), "down_proj", "gated"),  # Llama, Mistral, Qwen, Gemma
    (("gate_up_proj",), "down_proj", "fused"),  # Phi-3
    (("w1", "w3"), "w2", "gated"),
    (("wi_0", "wi_1"), "wo", "gated"),  # T5 1.1
    (("wi",), "wo", "plain"),  # T5
    (("fc1",), "fc2", "plain"),  # Phi, CLIP, ViT
    (("up_proj",), "down_proj", "plain"),
    (("dense_h_to_4h",), "dense_4h_to_h", "plain"),  # GPT-NeoX, Falcon
    (("c_fc",), "c_proj", "plain"),  # GPT-2, StarCoder
    (("lin1",), "lin2", "plain"),  # DistilBERT
)
#: Blocks that a larger module spreads over two of its children, each with one projection: BERT, RoBERTa, ViT.
_HALVES: tuple[tuple[str, str], ...] = (("intermediate", "output"),)
_SPREAD = "dense"
_ACTIVATIONS = ("act_fn", "activation_fn", "activation", "act", "intermediate_act_fn")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True)
class FeedForward:
    """The parts of a feed-forward block.

    Attributes
    ----------
    inputs
        Names of the projections that read the block's input.
    output
        Name of the projection that gives its output.
    form
        ``gated`` (gate and up apart), ``fused`` (both in one matrix, gate first), ``plain`` (two matrices).
    activation
        The module's own activation; None if it was not found.
    sites
        Each projection by name as a site.
    opening
        Where the block is spread over parts of a larger module: the one that goes from its input to the output
        projection's. None if the block is a module of its own.
    """

    inputs: tuple[str, ...]
    output: str
    form: str
    activation: Callable[[Tensor], Tensor] | None
    sites: dict[str, Site]
    opening: nn.Module | None = None

    def activate(self, name: str = "own") -> Callable[[Tensor], Tensor]:
        """Return the activation of this name, or the module's own."""
        found = self.activation if name == "own" else ACTIVATIONS[name]
        assert found is not None  # `parts_of` was asked for it
        return found

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all projections."""
        return (*self.inputs, self.output)

    def between(self, parts: Sequence[Tensor], activation: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the input of the output projection, given what the input projections gave."""
        if self.form == "plain":
            return activation(parts[0])
        gate, up = parts if self.form == "gated" else parts[0].chunk(2, dim=-1)
        return activation(gate) * up

    def run(self, name: str, x: Tensor) -> Tensor:
        """Return the output of a projection, with whatever else is active there."""
        result = self.sites[name].owner(x)
        assert isinstance(result, Tensor)
        return result

    def replaced(self, base: Callable[..., Any], instead: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        """Return the module's output with ``instead(x)`` in the place of the block's, x being the block's input.

        Of a larger module the rest (attention, norms, residual) runs as it is: its opening part gives the result, and
        the output projection lets that pass.
        """
        if self.opening is None:
            return instead(args[0] if args else next(iter(kwargs.values())))
        closing = self.sites[self.output].owner
        project, passing = closing.forward, False

        def whole(x: Tensor) -> Tensor:
            nonlocal passing
            result = instead(x)  # which projects by the module that is to pass its result on
            passing = True
            return result

        def onwards(x: Tensor) -> Tensor:
            nonlocal passing
            passed, passing = passing, False
            return x if passed else project(x)

        with exchanged([(self.opening, "forward", whole), (closing, "forward", onwards)]):
            return base(*args, **kwargs)


def feed_forward(module: nn.Module, path: str = "") -> FeedForward | None:
    """Return the parts of a feed-forward block, or None if the module is none, or has trained parts besides
    these.

    A block with active dropout of its own between the projections computes without it here; frozen bases have
    none.
    """
    for inputs, output, form in _FORMS:
        sites = _sites({name: f"{path}.{name}" for name in (*inputs, output)}, module, path)
        if not sites:
            continue
        every = {id(p) for n, p in module.named_parameters() if "lorry_" not in n}
        if every <= {id(p) for s in sites.values() for p in s.owner.parameters()}:
            return FeedForward(inputs, output, form, _activation(module), sites)
    for first, last in _HALVES:
        sites = _sites({name: f"{path}.{name}.{_SPREAD}" for name in (first, last)}, module, path)
        if sites:
            opening = module.get_submodule(first)
            return FeedForward((first,), last, "plain", _activation(opening), sites, opening)
    return None


def _activation(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    return next((a for n in _ACTIVATIONS if callable(a := getattr(module, n, None))), None)


def _sites(paths: dict[str, str], module: nn.Module, path: str) -> dict[str, Site]:
    """Return the linear layers at `paths`, by name; none if one is missing."""
    found = {}
    for name, full in paths.items():
        try:
            child = module.get_submodule(full[len(path) + 1 :])
        except AttributeError:
            return {}
        sites = sites_in(full, child)
        if len(sites) != 1 or not sites[0].kind.plain_product:
            return {}
        found[name] = sites[0]
    return found


def parts_of(site: Site, names: Sequence[str] = (), activation: bool = False) -> FeedForward:
    """Return the parts of the feed-forward block that `site` is.

    Raises
    ------
    SiteError
        It is none, it lacks projections of these names, or the activation that is asked for was not found.
    """
    parts = feed_forward(site.owner, site.path)
    if parts is None or (activation and parts.activation is None):
        raise SiteError(
            f"'{site.path}' ({type(site.owner).__name__}) is no feed-forward block that Lorry knows: it needs "
            "projections such as gate_proj, up_proj, down_proj or fc1, fc2, nothing trained besides, and an activation."
        )
    missing = sorted(set(names) - set(parts.names))
    if missing:
        raise SiteError(f"'{site.path}' has the projections {list(parts.names)}, not {missing}.")
    return parts


def with_blocks(sites: Sequence[Site], root: nn.Module) -> list[tuple[Site, tuple[str, ...] | None]]:
    """Return sites with feed-forward blocks in the place of their projections.

    A block comes with the names of those of its projections that were among the sites (or all, if the block
    itself was); other sites come with None.
    """
    placed: dict[str, tuple[Site, tuple[str, ...] | None]] = {}
    for site in sites:
        path, names = (site.path, _names(site.owner, site.path)) if site.kind.whole else _block_of(site, root)
        if not site.kind.whole and not names:
            placed[site.path] = (site, None)
            continue
        found = placed.get(path) or (BLOCK.site(path, root.get_submodule(path)), ())
        placed[path] = (found[0], (*(found[1] or ()), *names))
    return list(placed.values())


def _names(block: nn.Module, path: str) -> tuple[str, ...]:
    parts = feed_forward(block, path)
    return () if parts is None else parts.names


def _block_of(projection: Site, root: nn.Module) -> tuple[str, tuple[str, ...]]:
    """Return path and name at the feed-forward block that a layer is a projection of; no name if there is none."""
    path = projection.path
    for _ in range(2):  # the block is one level up, or two where it is spread
        path = path.rpartition(".")[0]
        parts = feed_forward(root.get_submodule(path), path)
        names = [n for n, s in parts.sites.items() if s.path == projection.path] if parts else []
        if parts and names:
            return path, (names[0],)
    return "", ()
