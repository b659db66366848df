"""Where attention can be seen: transformers' attention interface, and torch's functions inside a module's forward.

transformers. Every attention module asks the interface for the function that its configuration names. While a watch is
open anywhere, the interface's method is one that hands out a wrapped function inside watched modules and the plain one
everywhere else. The configuration keeps its name: modules and mask builders compare it with "sdpa" and "eager" in
dozens of places, so that a name of Lorry's own would change what they compute.

Everything else (diffusers' processors of all generations, torch's own multi-head attention, models that call torch's
product themselves) ends in torch functions, which a mode of the running thread sees inside the module's forward:
the fused product, or a matrix product whose softmax meets another matrix product.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lorry.attention.call import AttentionError, Product
from lorry.attention.frames import Frame, current_frame

_LOCK = threading.Lock()
#: How many open watches need the interface of a class, and its own method.
_WRAPPED: dict[type, list[Any]] = {}


def watch_interface(registry: object) -> type:
    """Let the attention interface hand out wrapped functions, until `leave_interface` is called as often.

    Parameters
    ----------
    registry
        transformers' ``ALL_ATTENTION_FUNCTIONS`` as a module sees it.

    Raises
    ------
    AttentionError
        It is of a transformers version without ``get_interface``.
    """
    owner = next((cls for cls in type(registry).__mro__ if "get_interface" in vars(cls)), None)
    if owner is None:
        raise AttentionError(
            f"{type(registry).__module__}.{type(registry).__name__} has no method get_interface, through which "
            "attention is watched; install a transformers version that has it (5.0 or later)."
        )
    with _LOCK:
        if owner not in _WRAPPED:
            own = vars(owner)["get_interface"]
            _WRAPPED[owner] = [0, own]
            owner.get_interface = _interface(own)  # type: ignore[attr-defined]
        _WRAPPED[owner][0] += 1
    return owner


def leave_interface(owner: type) -> None:
    """Undo one `watch_interface`."""
    with _LOCK:
        _WRAPPED[owner][0] -= 1
        if not _WRAPPED[owner][0]:
            owner.get_interface = _WRAPPED.pop(owner)[1]  # type: ignore[attr-defined]


def _interface(own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def get_interface(self: Any, attn_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        function = own(self, attn_implementation, default)
        frame = current_frame()
        if frame is None or frame.site is None:
            return function
        return _wrapped(function, attn_implementation, function is default, frame)

    return get_interface


def _wrapped(function: Callable[..., Any], name: str, eager: bool, frame: Frame) -> Callable[..., Any]:
    """Return transformers' attention function with readers and editors around it."""

    @functools.wraps(function)
    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        # the mask is positional in most modules and named in some
        mask, rest = (rest[0], rest[1:]) if rest else (options.pop("attention_mask", None), ())
        product = _product(module, query, key, value, mask, options, "eager" if eager else name)
        native: list[Any] = []

        def compute(given: Product) -> Tensor:
            used, chosen = mask, options
            if given.mask is not product.mask or given.causal != product.causal:
                used, chosen = _edited_mask(given.mask, given.q, eager, name), dict(options)
                if not eager:
                    chosen["is_causal"] = False
            result = function(module, given.q, given.k, given.v, used, *rest, **chosen)
            native.append(result[1:])
            given.weights = result[1] if len(result) > 1 else None
            return result[0]

        output, given = frame.perform(product, compute, _swapped, lambda t: _swapped(t).contiguous())
        if given.replaced is not None or not native:
            return output, given.replaced
        return output, *native[0]

    return attend


def _swapped(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2)


def _product(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: dict[str, Any], name: str
) -> Product:
    """Return what a call of the interface is about to compute."""
    scaling = options.get("scaling")
    dropout = float(options.get("dropout") or 0.0)
    product = Product(
        query,
        key,
        value,
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        softcap=options.get("softcap"),
        sinks=options.get("s_aux"),
        bias=options.get("position_bias"),
        # eager functions drop in training only; the fused product is told a rate of 0 otherwise
        dropout=dropout if module.training or name != "eager" else 0.0,
    )
    if options.get("cache") is not None:
        product.refusal = "the keys and values lie in a paged cache"
    elif name == "eager":
        product.mask = mask
    elif name == "sdpa":
        told = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if told is None else told
        product.mask, product.causal = mask, bool(causal) and mask is None and query.shape[2] > 1
    elif name == "flex_attention":
        product.mask = _dense(mask, query, key)
    else:
        product.refusal = (
            f"the implementation '{name}' does not say what it masks; load the model with attn_implementation='sdpa' "
            "or 'eager'"
        )
    return product


def _dense(mask: Any, query: Tensor, key: Tensor) -> Tensor | None:
    """Return flex attention's mask as a tensor."""
    if mask is None or isinstance(mask, Tensor):
        return mask
    from torch.nn.attention.flex_attention import create_mask

    return create_mask(
        mask.mask_mod, query.shape[0], query.shape[1], query.shape[2], key.shape[2], device=str(query.device)
    )


def _edited_mask(mask: Tensor | None, query: Tensor, eager: bool, name: str) -> Tensor | None:
    """Return an editor's mask in the form that the function takes."""
    if not eager and name != "sdpa":
        raise AttentionError(
            f"The implementation '{name}' takes masks in a form of its own; to edit the mask, load the model with "
            "attn_implementation='sdpa' or 'eager'."
        )
    if eager and mask is not None and mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, lowest)
    return mask


@dataclass
class _Logits:
    """A product q k^T on its way through a softmax to the values."""

    tensor: Tensor
    q: Tensor
    k: Tensor
    mask: Tensor | None
    scaling: float
    normal: bool = False
    dropout: float = 0.0


_SOFTMAX = {torch.softmax, Tensor.softmax, F.softmax}
_CASTS = {Tensor.to, Tensor.float, Tensor.type}
_PRODUCTS = {torch.bmm, Tensor.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__}


def _followed(found: _Logits, func: Any, args: Any, kwargs: Any, result: Any) -> _Logits | None:
    """Return what is known of logits after one more function was called on them; None if nothing is."""
    if func in _SOFTMAX:
        if found.normal or kwargs.get("dim", args[1] if len(args) > 1 else None) not in (-1, found.tensor.ndim - 1):
            return None
        return replace(found, tensor=result, normal=True)
    if func is F.dropout and found.normal:
        training = kwargs.get("training", args[2] if len(args) > 2 else True)
        rate = float(kwargs.get("p", args[1] if len(args) > 1 else 0.5)) if training else 0.0
        return replace(found, tensor=result, dropout=rate)
    if func in _CASTS:
        return replace(found, tensor=result)
    # questions and copies leave them as they are; what is written into them is not known
    return None if result is found.tensor or func is Tensor.__setitem__ else found


class Functions(TorchFunctionMode):
    """Sees torch's functions inside one forward of a watched module, in its thread only."""

    def __init__(self, frame: Frame) -> None:
        super().__init__()
        self.frame = frame
        self._logits: _Logits | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let every function pass but those that are attention."""
        kwargs = kwargs or {}
        frame = self.frame
        if frame.site is None or current_frame() is not frame:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._fused(func, *args, **kwargs)
        if func is F.multi_head_attention_forward:
            with self:
                return _multi_head_body()(*args, **kwargs)
        if func in _PRODUCTS or func is torch.baddbmm:
            return self._matrix_product(func, args, kwargs)
        result = func(*args, **kwargs)
        found = self._logits
        if found is not None and args and args[0] is found.tensor:
            self._logits = _followed(found, func, args, kwargs, result)
        return result

    def _fused(
        self,
        func: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if query.ndim not in (3, 4):
            raise AttentionError(
                f"'{self._path}' attends with queries of shape {tuple(query.shape)}; expected (batch, heads, length, "
                "width) or (batch, length, width). Leave this site out of the watch."
            )
        flat = query.ndim == 3
        lift: Callable[[Tensor], Tensor] = (lambda t: t.unsqueeze(1)) if flat else (lambda t: t)
        lower: Callable[[Tensor], Tensor] = (lambda t: t.squeeze(1)) if flat else (lambda t: t)
        product = Product(
            lift(query),
            lift(key),
            lift(value),
            mask=attn_mask.unsqueeze(1) if flat and attn_mask is not None and attn_mask.ndim == 3 else attn_mask,
            causal=is_causal,
            scaling=query.shape[-1] ** -0.5 if scale is None else scale,
            dropout=dropout_p,
        )

        def compute(given: Product) -> Tensor:
            if given is product:
                return func(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
            return lower(_plain(func, given, enable_gqa))

        return self.frame.perform(product, compute, lift, lower)[0]

    def _matrix_product(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        found = self._logits
        if found is not None and found.normal and args[0] is found.tensor:
            self._logits = None
            return self._explicit(func, found, args, kwargs)
        result: Tensor = func(*args, **kwargs)
        mask, left, right = args if func is torch.baddbmm else (None, *args)
        if left.ndim == 3 and right.ndim == 3:
            if kwargs.get("beta", 1) == 0:
                mask = None
            self._logits = _Logits(result, left, right.transpose(-1, -2), mask, float(kwargs.get("alpha", 1)))
        return result

    def _explicit(self, func: Any, found: _Logits, args: Any, kwargs: Any) -> Tensor:
        """Run an attention whose logits, softmax and output are three operations on (batch * heads, ...)."""
        heads = self.frame.site.heads if self.frame.site else None
        if not heads or len(found.q) % heads:
            raise AttentionError(
                f"'{self._path}' attends on {len(found.q)} rows, which are no whole number of batches of its {heads} "
                "heads; leave this site out of the watch."
            )

        def lift(tensor: Tensor) -> Tensor:
            return tensor.unflatten(0, (-1, heads))

        mask, q, scaling = found.mask, found.q, found.scaling
        if self.frame.site and self.frame.site.interface == "torch":
            # torch's multi-head attention scales its queries beforehand
            scaling = q.shape[-1] ** -0.5
            q = q / scaling
        product = Product(
            lift(q),
            lift(found.k),
            lift(args[1]),
            mask=mask if mask is None or len(mask) == 1 or mask.ndim == 2 else lift(mask),
            scaling=scaling,
            dropout=found.dropout,
        )

        def compute(given: Product) -> Tensor:
            if given is product:
                return func(*args, **kwargs)
            return _plain(F.scaled_dot_product_attention, given, False).flatten(0, 1)

        return self.frame.perform(product, compute, lift, lambda t: t.flatten(0, 1))[0]

    @property
    def _path(self) -> str:
        return self.frame.site.path if self.frame.site else ""


def _plain(func: Any, given: Product, enable_gqa: bool) -> Tensor:
    grouped = enable_gqa or given.k.shape[1] != given.q.shape[1]
    return func(
        given.q,
        given.k,
        given.v,
        given.mask,
        given.dropout,
        given.causal,
        scale=given.scaling,
        enable_gqa=grouped,
    )


@functools.cache
def _multi_head_body() -> FunctionType:
    """Return torch's multi-head attention without its question whether a mode wants it, which it would ask for ever.

    It is the same code under a dictionary of globals in which the answer is no; the operations inside are then seen
    one by one.
    """
    own = F.multi_head_attention_forward
    names = {**own.__globals__, "has_torch_function": lambda tensors: False}
    body = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    body.__kwdefaults__ = own.__kwdefaults__
    return body
