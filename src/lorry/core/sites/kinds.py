"""Kinds of sites: how `down`, `up` and a dense update are applied in each sort of layer, each written once.

Inside, rank units lie in the last dimension whatever the layer's own layout is, so that what happens between `down`
and `up` (scale, gates, masks) is the same code for all kinds.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorry.core.errors import SiteError
from lorry.core.sites.site import Site
from lorry.kernels.thin import thin_linear


class Kind(ABC):
    """Arithmetic of one sort of layer. Stateless; there is one instance of each."""

    name: str
    #: Whether ``forward(x)`` can be followed by ``+ up(down(x))``; otherwise the weight itself is exchanged.
    additive: bool = True
    #: Whether each position of the output comes from the same position of the input, features last.
    position_wise: bool = True
    #: Whether the kernel for low-rank updates of linear layers serves it.
    folds: bool = False
    #: Whether a site is a whole module, without a weight of its own.
    whole: bool = False

    @abstractmethod
    def sites(self, path: str, module: nn.Module) -> Iterator[Site]:
        """Yield the sites of this kind that `module` owns."""

    def factors_apply(self, site: Site) -> bool:
        """Whether the update can be applied through its factors (a grouped convolution needs it dense)."""
        return self.additive

    def down(self, site: Site, x: Tensor, a: Tensor) -> Tensor:
        """Return ``h`` of shape ``(..., rank)`` for the layer input `x` and `a` of shape ``(rank, in)``."""
        raise SiteError(f"{site}: a {self.name} site has no down-projection of its own.")

    def up(self, site: Site, h: Tensor, b: Tensor) -> Tensor:
        """Return the update of the layer's output for ``h`` ``(..., rank)`` and `b` ``(out, rank)``."""
        return thin_linear(h, b)

    def dense(self, site: Site, x: Tensor, matrix: Tensor) -> Tensor:
        """Return what the layer would give for input `x` with `matrix` as weight and no bias."""
        raise SiteError(f"{site}: a {self.name} site has no dense form of its own.")

    def to_matrix(self, site: Site, weight: Tensor) -> Tensor:
        """Return the natively laid out `weight` as ``(*lead, out, in)``."""
        return weight

    def to_weight(self, site: Site, matrix: Tensor) -> Tensor:
        """Return a matrix ``(*lead, out, in)`` in the layer's native layout."""
        return matrix

    def channels_last(self, site: Site, y: Tensor) -> Tensor:
        """Return a view of the layer's output with its channels in the last dimension."""
        return y

    def bias(self, site: Site) -> Tensor | None:
        """Return the bias that the layer adds to its output, if any."""
        return getattr(site.owner, "bias", None)


class LinearKind(Kind):
    """``nn.Linear`` and its subclasses, any storage."""

    name = "linear"
    folds = True

    def sites(self, path: str, module: nn.Module) -> Iterator[Site]:
        """Yield the module itself."""
        if isinstance(module, nn.Linear):
            yield Site(path, self, module, module, "weight", module.out_features, module.in_features)

    def down(self, site: Site, x: Tensor, a: Tensor) -> Tensor:
        """Return ``x Aᵀ``."""
        return thin_linear(x, a)

    def dense(self, site: Site, x: Tensor, matrix: Tensor) -> Tensor:
        """Return ``x Wᵀ``."""
        return F.linear(x, matrix)


class TransposedLinearKind(LinearKind):
    """Transformers' ``Conv1D``: a linear layer whose weight is stored as ``(in, out)``."""

    name = "linear"

    def sites(self, path: str, module: nn.Module) -> Iterator[Site]:
        """Yield the module itself. It is recognised by its shape, so that transformers need not be imported."""
        weight = getattr(module, "weight", None)
        if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and hasattr(module, "nf"):
            yield Site(path, self, module, module, "weight", weight.shape[1], weight.shape[0])

    def to_matrix(self, site: Site, weight: Tensor) -> Tensor:
        """Transpose."""
        return weight.t()

    def to_weight(self, site: Site, matrix: Tensor) -> Tensor:
        """Transpose."""
        return matrix.t()


class ConvKind(Kind):
    """``nn.Conv1d/2d/3d``; A is a convolution to `rank` channels, B a pointwise one."""

    name = "conv"
    position_wise = False

    def sites(self, path: str, module: nn.Module) -> Iterator[Site]:
        """Yield the module itself (transposed convolutions are not carried)."""
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            fan_in = module.in_channels // module.groups * math.prod(module.kernel_size)
            yield Site(path, self, module, module, "weight", module.out_channels, fan_in)

    def factors_apply(self, site: Site) -> bool:
        """Cheaply only without groups: every group sees other channels."""
        return _conv(site).groups == 1

    def _convolve(self, site: Site, x: Tensor, weight: Tensor) -> Tensor:
        result = site.owner._conv_forward(x, weight, None)  # type: ignore[operator]
        assert isinstance(result, Tensor)
        return result

    def _kernel(self, site: Site) -> tuple[int, ...]:
        conv = _conv(site)
        return (conv.in_channels // conv.groups, *conv.kernel_size)

    def down(self, site: Site, x: Tensor, a: Tensor) -> Tensor:
        """Convolve with A and move the rank units to the end; with groups, each group has its own:
        ``(..., groups, rank)``.
        """
        groups = int(site.owner.groups)  # type: ignore[arg-type]
        kernel = a.reshape(a.shape[0], *self._kernel(site))
        if groups == 1:
            return self._convolve(site, x, kernel).movedim(1, -1)
        units = self._convolve(site, x, kernel.repeat(groups, *[1] * (kernel.ndim - 1))).movedim(1, -1)
        return units.unflatten(-1, (groups, a.shape[0]))

    def up(self, site: Site, h: Tensor, b: Tensor) -> Tensor:
        """Mix the rank units at each position and move the channels back."""
        groups = int(site.owner.groups)  # type: ignore[arg-type]
        if groups > 1:
            return torch.einsum("...gr,gor->...go", h, b.unflatten(0, (groups, -1))).flatten(-2).movedim(-1, 1)
        return thin_linear(h, b).movedim(-1, 1)

    def dense(self, site: Site, x: Tensor, matrix: Tensor) -> Tensor:
        """Convolve with the matrix as kernel."""
        return self._convolve(site, x, self.to_weight(site, matrix))

    def to_matrix(self, site: Site, weight: Tensor) -> Tensor:
        """Flatten input channels and kernel."""
        return weight.flatten(1)

    def to_weight(self, site: Site, matrix: Tensor) -> Tensor:
        """Unflatten input channels and kernel."""
        return matrix.reshape(matrix.shape[0], *self._kernel(site))

    def channels_last(self, site: Site, y: Tensor) -> Tensor:
        """Move the channels to the end."""
        return y.movedim(1, -1)


def _conv(site: Site) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
    assert isinstance(site.owner, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return site.owner


class EmbeddingKind(Kind):
    """``nn.Embedding``: its weight ``(vocabulary, width)`` is the transpose of the matrix, x is token indices."""

    name = "embedding"

    def sites(self, path: str, module: nn.Module) -> Iterator[Site]:
        """Yield the module itself."""
        if isinstance(module, nn.Embedding):
            yield Site(path, self, module, module, "weight", module.embedding_dim, module.num_embeddings)

    def _factor(self, site: Site) -> Tensor | float:
        """Some models (Gemma) scale the looked-up rows inside the module; the update is scaled likewise."""
        factor: Tensor | float = getattr(site.owner, "embed_scale", 1.0)
        return factor

    def down(self, site: Site, x: Tensor, a: Tensor) -> Tensor:
        """Look up the columns of A; that of the padding token is not trained, as the module's own row is not."""
        return F.embedding(x, a.t(), padding_idx=site.owner.padding_idx)  # type: ignore[arg-type]

    def up(self, site: Site, h: Tensor, b: Tensor) -> Tensor:
        """Return ``h Bᵀ``, scaled as the module scales its own rows."""
        factor = self._factor(site)
        delta = thin_linear(h, b)
        return delta if isinstance(factor, float) and factor == 1.0 else delta * factor

    def dense(self, site: Site, x: Tensor, matrix: Tensor) -> Tensor:
        """Look up the rows of the transposed matrix."""
        rows = F.embedding(x, matrix.t(), padding_idx=site.owner.padding_idx)  # type: ignore[arg-type]
        return rows * self._factor(site)

    def to_matrix(self, site: Site, weight: Tensor) -> Tensor:
        """Transpose."""
        return weight.t()

    def to_weight(self, site: Site, matrix: Tensor) -> Tensor:
        """Transpose."""
        return matrix.t()

    def bias(self, site: Site) -> Tensor | None:
        """Return None: an embedding has no bias."""
        return None


class ParameterKind(Kind):
    """Weights that a larger module uses itself; they are exchanged for ``W + ΔW`` while that module runs."""

    additive = False

    def bias(self, site: Site) -> Tensor | None:
        """Return None: the owner's biases do not belong to this weight."""
        return None


class PackedKind(ParameterKind):
    """The packed q/k/v matrix and the output projection of ``nn.MultiheadAttention``, which never calls its
    children.
    """

    name = "packed"

    def sites(self, path: str, module: nn.Module) -> Iterator[Site]:
        """Yield ``in_proj_weight`` (or the three separate matrices) and ``out_proj``."""
        if not isinstance(module, nn.MultiheadAttention):
            return
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            weight = getattr(module, name)
            if weight is not None:
                yield Site(f"{path}.{name}", self, module, module, name, *weight.shape)
        out = module.out_proj
        yield Site(f"{path}.out_proj", self, module, out, "weight", out.out_features, out.in_features)


class ExpertsKind(ParameterKind):
    """Expert banks: three-dimensional parameters ``(experts, out, in)``, or ``(experts, in, out)`` where the module
    says so.
    """

    name = "experts"

    def sites(self, path: str, module: nn.Module) -> Iterator[Site]:
        """Yield every floating three-dimensional parameter of a module that is named or typed as experts."""
        if "expert" not in type(module).__name__.lower():
            return
        for name, weight in module.named_parameters(recurse=False):
            if weight.ndim == 3 and not name.startswith("lorry_"):
                experts, rows, columns = weight.shape
                out, inner = (columns, rows) if self._transposed(module) else (rows, columns)
                yield Site(f"{path}.{name}", self, module, module, name, out, inner, lead=(experts,))

    @staticmethod
    def _transposed(module: nn.Module) -> bool:
        return bool(getattr(module, "is_transposed", False))

    def to_matrix(self, site: Site, weight: Tensor) -> Tensor:
        """Transpose each expert's matrix if the bank stores ``(in, out)``."""
        return weight.transpose(-1, -2) if self._transposed(site.owner) else weight

    def to_weight(self, site: Site, matrix: Tensor) -> Tensor:
        """Undo `to_matrix`."""
        return matrix.transpose(-1, -2) if self._transposed(site.owner) else matrix


class BlockKind(Kind):
    """A whole module whose forward a method replaces or surrounds."""

    name = "block"
    additive = False
    whole = True

    def sites(self, path: str, module: nn.Module) -> Iterator[Site]:
        """Yield the module itself, whatever it is."""
        yield Site(path, self, module, module, "", 0, 0)


BLOCK = BlockKind()
#: In the order in which they are asked: the first kind that finds a site in a module takes it.
KINDS: tuple[Kind, ...] = (
    PackedKind(),
    ExpertsKind(),
    TransposedLinearKind(),
    LinearKind(),
    ConvKind(),
    EmbeddingKind(),
)
KIND_NAMES: tuple[str, ...] = ("linear", "conv", "embedding", "packed", "experts", "block")


def catalogue(model: nn.Module) -> dict[str, Site]:
    """Return every site of `model` by path, in module order; parts of a packed site are not listed twice."""
    found: dict[str, Site] = {}
    taken: set[int] = set()
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for path, module in model.named_modules():
        if id(module) in taken:
            continue
        for kind in KINDS:
            sites = list(kind.sites(path, module))
            for site in sites:
                taken.add(id(site.holder))
                found[site.path] = _with_ties(site, names, path)
            if sites:
                break
    return found


def _with_ties(site: Site, names: dict[int, list[str]], path: str) -> Site:
    """Note which other parameters share the site's tensor."""
    weight = getattr(site.holder, site.parameter)
    own = f"{path}.{site.parameter}" if path else site.parameter
    others = tuple(n for n in names.get(id(weight), ()) if n != own and site.holder is site.owner)
    if len(others) and torch.is_tensor(weight):
        object.__setattr__(site, "tied", others)
    return site
