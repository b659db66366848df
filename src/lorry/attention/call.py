"""What a reader or an editor gets of one call of one attention site, and the exact softmax behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lorry.attention.sites import AttentionSite
from lorry.core.errors import LorryError, near_misses

#: What a call can give; all but the last by default.
FIELDS = ("q", "k", "v", "probabilities", "output", "gradient")
#: What an editor may put in the place of the layer's own.
EDITS = ("q", "k", "v", "mask", "probabilities", "output")


class AttentionError(LorryError):
    """Attention that was to be watched or edited cannot be."""


@dataclass
class Product:
    """One attention product as a layer is about to compute it: tensors are ``(batch, heads, length, width)``.

    Attributes
    ----------
    q, k, v
        Queries ``(batch, heads, length, width)``, keys and values ``(batch, kv_heads, keys, width)``.
    mask
        What broadcasts to ``(batch, heads, length, keys)``: boolean (True attends) or additive; None for none.
    causal
        Whether query i sees keys 0 to i only, besides the mask.
    scaling
        Factor of the logits.
    softcap
        Logits are ``softcap * tanh(logits / softcap)``; None for no cap.
    sinks
        Logits ``(heads,)`` that take part in the softmax without a value; None for none.
    bias
        What is added to the scaled logits (relative positions); None for none.
    dropout
        Probability with which the layer drops probabilities in this call.
    refusal
        Why the probabilities of this call are not known; None if they are.
    output
        What the layer computed, ``(batch, heads, length, width of v)``; None before the product.
    weights
        Probabilities that the layer itself returned, after dropout; None if it returns none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scaling: float
    mask: Tensor | None = None
    causal: bool = False
    softcap: float | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    dropout: float = 0.0
    refusal: str | None = None
    output: Tensor | None = None
    weights: Tensor | None = None
    replaced: Tensor | None = None  # probabilities that an editor gave
    explained: bool = False  # whether the probabilities gave the output, or cannot be held against it
    kept: Tensor | None = None  # probabilities already computed

    def probabilities(self, path: str) -> Tensor:
        """Return the probabilities ``(batch, heads, length, keys)`` before dropout, in float32 or better.

        Raises
        ------
        AttentionError
            They are not known, or they do not explain the layer's output.
        """
        if self.replaced is not None:
            return self.replaced
        if self.refusal is not None:
            raise AttentionError(f"The attention probabilities of '{path}' are not known: {self.refusal}.")
        # a tensor kept without a graph serves nobody who wants a gradient
        wants_graph = torch.is_grad_enabled() and (self.q.requires_grad or self.k.requires_grad)
        if self.kept is None or (wants_graph and not self.kept.requires_grad):
            self.kept = softmax(self)
        if not self.explained and self.output is not None and self.dropout == 0:
            self._check(path, self.kept)
            self.explained = True
        return self.kept

    def _check(self, path: str, found: Tensor) -> None:
        """Compare found @ v with what the layer computed; take the layer's own weights if only they explain it."""
        if self._explains(found):
            return
        if self.weights is not None and self.weights.shape == found.shape and self._explains(self.weights):
            self.kept = self.weights.to(found.dtype)
            return
        raise AttentionError(
            f"The attention probabilities of '{path}' are not known: softmax(q k^T) of its queries, keys and mask does "
            "not give its output, so that it computes something of its own. Ask for q, k, v and output only."
        )

    @torch.no_grad()
    def _explains(self, found: Tensor) -> bool:
        assert self.output is not None
        wide = found.detach()
        values = expanded(self.v, wide.shape[1]).detach().to(wide.dtype)
        if wide.shape[-1] != values.shape[-2]:
            return False
        output = self.output.detach().to(wide.dtype)
        # some layers compute NaN where a query of padding sees nothing
        with torch.autocast(wide.device.type, enabled=False):
            apart = torch.where(output.isnan(), 0.0, wide @ values - output).abs().max()
        # rounding of the logits moves probabilities in proportion, so that the bound grows with their size
        logits = largest_logit(self.q, self.k, self.scaling)
        return bool(apart <= 64 * _precision(self.q, self.output) * (1 + logits) * values.abs().max())


def softmax(product: Product) -> Tensor:
    """Return the exact probabilities of a product, ``(batch, heads, length, keys)``, in float32 or better."""
    logits = _products(product.q, product.k) * product.scaling
    wide = logits.dtype
    if product.softcap is not None:
        logits = product.softcap * torch.tanh(logits / product.softcap)
    if product.bias is not None:
        logits = logits + product.bias[..., : logits.shape[-1]].to(wide)
    seen = None
    if product.mask is not None:
        mask = product.mask[..., : logits.shape[-1]] if product.mask.shape[-1] > 1 else product.mask
        if mask.dtype == torch.bool:
            seen = mask
        else:
            logits = logits + mask.to(wide)
    if product.causal:
        below = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
        seen = below if seen is None else seen & below
    if seen is not None:
        logits = logits.masked_fill(~seen, float("-inf"))
    if product.sinks is not None:
        sink = product.sinks.to(wide).reshape(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        return torch.cat([logits, sink], dim=-1).softmax(dim=-1)[..., :-1]
    if seen is not None:
        # a query that sees nothing gets nothing, as in torch's product; softmax alone would give NaN
        empty = ~seen.any(dim=-1, keepdim=True)
        return logits.masked_fill(empty, 0.0).softmax(dim=-1).masked_fill(empty, 0.0)
    return logits.softmax(dim=-1)


def expanded(tensor: Tensor, heads: int) -> Tensor:
    """Return keys or values ``(batch, kv_heads, keys, width)`` with each head repeated for its group of queries."""
    times = heads // tensor.shape[1]
    return tensor if times == 1 else tensor.repeat_interleave(times, dim=1)


@torch.no_grad()
def largest_logit(q: Tensor, k: Tensor, scaling: float) -> float:
    """Return max |q k^T| * scaling over all heads, queries and keys, masked ones too."""
    return float(_products(q, k).abs().max()) * abs(scaling)


def _products(q: Tensor, k: Tensor) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    # mixed precision would round the products of a reader that is called inside of it
    with torch.autocast(q.device.type, enabled=False):
        return q.to(wide) @ expanded(k, q.shape[1]).to(wide).transpose(-1, -2)


def _precision(*tensors: Tensor) -> float:
    """Return the relative step with which the coarsest of these was computed."""
    # models in float64 take their softmax in float32 here and there
    step = max(torch.finfo(dtype).eps for dtype in (torch.float32, *(tensor.dtype for tensor in tensors)))
    coarse = tensors[0].is_cuda and torch.get_float32_matmul_precision() != "highest"
    return max(step, 1e-3) if coarse else step


class AttentionCall:
    """One call of one attention site.

    Tensors are those that the layer computed with (or views of them), in its graph: gradients flow through everything
    made of them, back to weights and inputs. An adapter on a projection is in them. For the gradient that comes from
    the model's own loss ask for `gradient`: what is seen of the output is a view, which the model does not go on with.

    Attributes
    ----------
    site
        Where.
    part
        Number of this product within one forward of the site (image prompts make a second one).
    recomputation
        Whether a checkpointed segment is computed again, inside a backward pass.
    training
        Whether the module is in training mode.
    """

    def __init__(
        self,
        site: AttentionSite,
        product: Product,
        want: frozenset[str],
        *,
        part: int,
        recomputation: bool,
        training: bool,
        output: Tensor | None = None,
    ) -> None:
        self.site = site
        self.part = part
        self.recomputation = recomputation
        self.training = training
        self._want = want
        # a call that somebody keeps for its gradient alone keeps no activations alive
        alone = want == {"gradient"}
        self._product = None if alone else product
        self._output = None if alone else output
        self._scaling = product.scaling
        self._gradient: Tensor | None = None

    @property
    def q(self) -> Tensor:
        """Queries ``(batch, heads, length, head_dim)`` after norms and rotation."""
        return self._of("q").q

    @property
    def k(self) -> Tensor:
        """Keys ``(batch, kv_heads, keys, head_dim)``, those of the cache included."""
        return self._of("k").k

    @property
    def v(self) -> Tensor:
        """Values ``(batch, kv_heads, keys, width)``, those of the cache included."""
        return self._of("v").v

    @property
    def mask(self) -> Tensor | None:
        """What the layer masks with, besides `causal`: boolean (True attends) or additive; None for none."""
        return self._of().mask

    @property
    def causal(self) -> bool:
        """Whether query i sees keys 0 to i only, besides the mask."""
        return self._of().causal

    @property
    def scaling(self) -> float:
        """Factor of the logits."""
        return self._scaling

    @property
    def extras(self) -> tuple[str, ...]:
        """What the product has besides scaling and masks: ``softcap``, ``sinks``, ``bias``, ``dropout``, ``hidden``.

        ``hidden`` says that the implementation does not tell its mask.
        """
        p = self._of()
        held = {
            "softcap": p.softcap,
            "sinks": p.sinks,
            "bias": p.bias,
            "dropout": p.dropout or None,
            "hidden": p.refusal,
        }
        return tuple(name for name, value in held.items() if value is not None)

    @property
    def probabilities(self) -> Tensor:
        """Probabilities ``(batch, heads, length, keys)`` before dropout, float32 or better; computed when asked for.

        Raises
        ------
        AttentionError
            The implementation does not tell its mask, or the layer computes something else than a masked softmax.
        """
        return self._of("probabilities").probabilities(self.site.path)

    @property
    def output(self) -> Tensor:
        """Output ``(batch, heads, length, width)`` before the output projection; not known to an editor."""
        self._of("output")
        if self._output is None:
            raise AttentionError("The output is not known before the product; give a reader, which is called after it.")
        return self._output

    @property
    def gradient(self) -> Tensor:
        """Gradient of the loss with respect to the output, ``(batch, heads, length, width)``, after the backward pass.

        Raises
        ------
        AttentionError
            No gradient has come.
        """
        self._asked("gradient")
        if self._gradient is None:
            raise AttentionError(
                f"No gradient has reached the output of '{self.site.path}'. Expected a backward pass through it before "
                "this is read; a pass under no_grad has none, and with reentrant checkpointing only a watch with "
                "recomputation=True sees the pass that has one."
            )
        return self._gradient

    def expand(self, tensor: Tensor) -> Tensor:
        """Return keys or values with each head repeated for the queries of its group, ``(batch, heads, ...)``."""
        return expanded(tensor, self._of().q.shape[1])

    def receive(self, gradient: Tensor) -> None:
        """Keep the gradient of the output; gradients of several backward passes add up, as in ``Tensor.grad``."""
        gradient = gradient.detach()
        self._gradient = gradient if self._gradient is None else self._gradient + gradient

    def _of(self, name: str | None = None) -> Product:
        if name is not None:
            self._asked(name)
        if self._product is None:
            raise AttentionError("This watch keeps the gradient only; name what else to keep in want=.")
        return self._product

    def _asked(self, name: str) -> None:
        if name not in self._want:
            raise AttentionError(f"'{name}' was not asked for; add it to want=, which names {sorted(self._want)}.")


def check_want(want: str | Sequence[str]) -> frozenset[str]:
    """Return what is wanted.

    Raises
    ------
    AttentionError
        A name that a call does not have.
    """
    names = (want,) if isinstance(want, str) else tuple(want)
    for name in names:
        if name not in FIELDS:
            raise AttentionError(f"A call has no '{name}'.{near_misses(name, FIELDS)} It has: {', '.join(FIELDS)}.")
    return frozenset(names)


def edited(product: Product, changes: Any, path: str) -> Product:
    """Return the product with what an editor gave in place of the layer's own.

    Raises
    ------
    AttentionError
        Something else than a mapping of `EDITS`, or tensors that do not fit each other.
    """
    if not hasattr(changes, "items"):
        raise AttentionError(
            f"An editor returns None or a mapping such as {{'v': tensor}}, but the one at '{path}' returned "
            f"{type(changes).__name__}."
        )
    values = dict(changes.items())
    for name, value in values.items():
        if name not in EDITS:
            raise AttentionError(f"An editor cannot replace '{name}'.{near_misses(name, EDITS)}")
        if not isinstance(value, Tensor) and not (name == "mask" and value is None):
            raise AttentionError(f"An editor's '{name}' must be a tensor, but found {type(value).__name__}.")
    fresh = {name: values[name] for name in ("q", "k", "v", "output") if name in values}
    if "mask" in values:
        fresh.update(mask=values["mask"], causal=False)
    # probabilities given by an earlier editor hold until somebody changes what they are made of
    replaced = values.get("probabilities", None if {"q", "k", "mask"} & values.keys() else product.replaced)
    new = replace(product, **fresh, replaced=replaced, kept=None, explained="output" in values)
    _check_shapes(new, path)
    return new


def _check_shapes(product: Product, path: str) -> None:
    q, k, v = product.q, product.k, product.v
    expect: list[tuple[str, Tensor, tuple[int, ...]]] = [
        ("k", k, (q.shape[0], k.shape[1], v.shape[-2], q.shape[-1])),
        ("v", v, (q.shape[0], k.shape[1], k.shape[-2], v.shape[-1])),
    ]
    if product.replaced is not None:
        expect = [("probabilities", product.replaced, (*q.shape[:3], v.shape[-2]))]
    if product.output is not None:
        expect.append(("output", product.output, (*q.shape[:3], v.shape[-1])))
    for name, tensor, shape in expect:
        if tuple(tensor.shape) != shape:
            raise AttentionError(
                f"What an editor gave at '{path}' does not fit: expected {name} of shape {shape}, found "
                f"{tuple(tensor.shape)}."
            )
    mask = product.mask
    if product.replaced is None and mask is not None and mask.shape[-1] not in (1, k.shape[-2]) and mask.ndim:
        if mask.shape[-1] < k.shape[-2]:
            raise AttentionError(
                f"An editor gave {k.shape[-2]} keys at '{path}', but the mask is for {mask.shape[-1]}; give a 'mask' "
                "that broadcasts to (batch, heads, length, keys), or None for none."
            )


Reader = Callable[[AttentionCall], Tensor | None]
Editor = Callable[[AttentionCall], Any]
