"""How tuners of PEFT's become methods: options and tensors read off PEFT's own layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lorry.core.errors import CheckpointError
from lorry.core.forward.entry import Entry

#: What PEFT calls the adapter that it opens.
NAME = "default"


@dataclass(frozen=True)
class Tuner:
    """How a tuner of PEFT's becomes a method.

    Attributes
    ----------
    method
        Slug.
    options
        Given PEFT's config, the method's options; ``method`` among them takes the place of the slug.
    site
        Given PEFT's layer, the options that differ from site to site.
    tensors
        Given PEFT's layer and the site's entry, tensors by Lorry's names.
    shared
        Given PEFT's model, tensors that the sites share.
    update
        Given PEFT's layer, what it adds to its weight, to hold Lorry's update against; None where PEFT's layer gives
        none apart from its weight.
    """

    method: str
    options: Callable[[Any], dict[str, Any]]
    site: Callable[[Any], dict[str, Any]]
    tensors: Callable[[Any, Entry], dict[str, Tensor]]
    shared: Callable[[Any], dict[str, Tensor]] = lambda model: {}
    update: Callable[[Any], Tensor] | None = lambda layer: layer.get_delta_weight(NAME)


def plain(**names: str) -> Callable[[Any, Entry], dict[str, Tensor]]:
    """Return a reader of tensors by their attribute at PEFT's layer."""
    return lambda layer, entry: {ours: getattr(layer, theirs)[NAME].detach() for ours, theirs in names.items()}


def turned(**names: str) -> Callable[[Any, Entry], dict[str, Tensor]]:
    """Return a reader of matrices that PEFT keeps transposed."""
    return lambda layer, entry: {ours: getattr(layer, theirs)[NAME].detach().mT for ours, theirs in names.items()}


def no_options(layer: Any) -> dict[str, Any]:
    """Return nothing: all sites have the options of the whole."""
    return {}


def rank_and_alpha(layer: Any) -> dict[str, Any]:
    """Return rank and alpha of a layer."""
    return {"rank": layer.r[NAME], "alpha": float(layer.alpha[NAME])}


def _oft_site(layer: Any) -> dict[str, Any]:
    if NAME not in layer.oft_R:
        raise CheckpointError("PEFT's OFT of an embedding turns its output, which Lorry's OFT does not; leave it out.")
    block = layer.oft_R[NAME]
    base = layer.get_base_layer()
    if math.prod(getattr(base, "kernel_size", ())) > 1:
        raise CheckpointError(
            f"PEFT's OFT of a convolution with a window of {tuple(base.kernel_size)} turns overlapping patches of its "
            "input and adds them up, which no update of the weight does. Merge it in PEFT (merge_and_unload) and use "
            "the merged model."
        )
    terms = block.num_cayley_neumann_terms if block.use_cayley_neumann else 0
    return {
        "block_size": block.block_size,
        "share": block.block_share,
        "terms": 4 if terms == 3 else terms,  # with 3 PEFT adds the cube as with 4
        "limit": float(block.eps) if block.coft else None,
    }


def _oft(layer: Any, entry: Entry) -> dict[str, Tensor]:
    return {"skew": layer.oft_R[NAME].weight.detach()}


def _boft(layer: Any, entry: Entry) -> dict[str, Tensor]:
    matrix = layer.boft_R[NAME].detach()
    if len(matrix) != 1:
        raise CheckpointError(
            f"The BOFT at '{entry.site.path}' has {len(matrix)} butterfly factors; Lorry carries one. Merge it in PEFT "
            "(merge_and_unload) and use the merged model."
        )
    return {"matrix": matrix, "gain": layer.boft_s[NAME].detach()}


def _randlora_shared(model: Any) -> dict[str, Tensor]:
    """Return the bases, cut to what the sites use."""
    layers = [m for m in model.modules() if NAME in getattr(m, "randlora_lambda", {})]
    widths = [sorted((m.in_features, m.out_features)) for m in layers]
    narrow, wide = max(w[0] for w in widths), max(w[1] for w in widths)
    count = max(m.num_bases for m in layers)
    a, b = model.randlora_A[NAME], model.randlora_B[NAME]
    return {"basis_A": a[:, 0, :narrow], "basis_B": b[:wide, :count]}


def _randlora_tensors(layer: Any, entry: Entry) -> dict[str, Tensor]:
    return {"lambda": layer.randlora_lambda[NAME].detach(), "gamma": layer.randlora_gamma[NAME].detach()}


def _miss_options(config: Any) -> dict[str, Any]:
    return {"method": "bat" if config.init_weights == "bat" else "miss", "rank": config.r}


def _miss_site(layer: Any) -> dict[str, Any]:
    mini = {"width": layer.miss_mini_r[NAME]} if layer.miss_fn == "mini" else {}
    return {"rank": layer.miss_r[NAME], **mini}


def _miss(layer: Any, entry: Entry) -> dict[str, Tensor]:
    block = layer.miss_block[NAME].detach()
    return {"D": block if layer.miss_fn == "bat" else block.mT}


def _fourierft(layer: Any, entry: Entry) -> dict[str, Tensor]:
    rows, columns = layer.indices[NAME]
    return {"spectrum": layer.fourierft_spectrum[NAME].detach(), "index": rows * layer.in_features + columns}


#: Tuners whose layers say everything themselves.
TUNERS: dict[str, Tuner] = {
    "BOFT": Tuner("boft", lambda c: {}, lambda m: {"block_size": max(m.boft_block_size[NAME], 2)}, _boft, update=None),
    "C3A": Tuner("c3a", lambda c: {}, lambda m: {"block_size": m.block_size[NAME]}, plain(kernel="c3a_kernel")),
    "DELORA": Tuner(
        "delora",
        lambda c: {"rank": c.r},
        lambda m: {"rank": m.r[NAME]},
        plain(A="delora_A", B="delora_B", strength="delora_lambda", columns="delora_w_norm"),
    ),
    "FOURIERFT": Tuner(
        "fourierft",
        lambda c: {"scale": float(c.scaling)},
        lambda m: {"count": m.fourierft_n_frequency[NAME]},
        _fourierft,
    ),
    "HRA": Tuner(
        "hra",
        lambda c: {"rank": c.r, "orthogonal": c.apply_GS},
        lambda m: {"rank": m.hra_r[NAME]},
        turned(u="hra_u"),
        update=None,
    ),
    "IA3": Tuner("ia3", lambda c: {}, lambda m: {"inputs": m.is_feedforward}, plain(gain="ia3_l"), update=None),
    "MISS": Tuner("miss", _miss_options, _miss_site, _miss, update=None),
    "OFT": Tuner("oft", lambda c: {}, _oft_site, _oft, update=None),
    "RANDLORA": Tuner(
        "randlora",
        lambda c: {"rank": c.r, "alpha": float(c.randlora_alpha), "save_projection": True},
        no_options,
        _randlora_tensors,
        _randlora_shared,
    ),
}
