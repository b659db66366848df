"""Feed-forward blocks of transformers: which module is one, what its parts are called, and what it computes
between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from lorry.core.errors import SiteError
from lorry.core.kinds import BLOCK, KINDS
from lorry.core.sites import Site

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
_ACTIVATIONS = ("act_fn", "activation_fn", "activation", "act")
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
    """

    inputs: tuple[str, ...]
    output: str
    form: str
    activation: Callable[[Tensor], Tensor] | None
    sites: dict[str, Site]

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


def feed_forward(module: nn.Module, path: str = "") -> FeedForward | None:
    """Return the parts of a feed-forward block, or None if the module is none, or has trained parts besides
    these.

    A block with active dropout of its own between the projections computes without it here; frozen bases have
    none.
    """
    for inputs, output, form in _FORMS:
        names = (*inputs, output)
        children = [getattr(module, name, None) for name in names]
        if not all(isinstance(child, nn.Module) for child in children):
            continue
        sites = {name: s for name, child in zip(names, children, strict=True) for s in _linear(f"{path}.{name}", child)}
        own = {id(p) for child in children for p in child.parameters()}  # type: ignore[union-attr]
        every = {id(p) for n, p in module.named_parameters() if "lorry_" not in n}
        if len(sites) == len(names) and every <= own:
            activation = next((a for n in _ACTIVATIONS if callable(a := getattr(module, n, None))), None)
            return FeedForward(inputs, output, form, activation, sites)
    return None


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
        whole = site.kind.name == "block"
        path = site.path if whole else site.path.rpartition(".")[0]
        block = site.owner if whole else root.get_submodule(path)
        parts = feed_forward(block, path)
        if not whole and (parts is None or site.name not in parts.names):
            placed[site.path] = (site, None)
            continue
        names = () if parts is None else parts.names if whole else (site.name,)
        found = placed.get(path) or (next(iter(BLOCK.sites(path, block))), ())
        placed[path] = (found[0], (*(found[1] or ()), *names))
    return list(placed.values())


def _linear(path: str, module: nn.Module | None) -> list[Site]:
    assert module is not None
    for kind in KINDS:
        sites = list(kind.sites(path, module))
        if sites:
            return sites if kind.name == "linear" else []
    return []
