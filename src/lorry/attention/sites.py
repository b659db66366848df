"""Where a model attends: every module whose softmax attention goes through a function that can be seen from outside.

Found by what the code of a module's ``forward`` (or of its diffusers processor) calls, not by class names, so that
models of tomorrow are found, too.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from lorry.core.errors import SiteError, near_misses, some
from lorry.core.sites.targets import matches

KINDS = ("self", "cross", "joint", "temporal")

#: What transformers' modules look their attention function up in.
REGISTRY = "ALL_ATTENTION_FUNCTIONS"
#: What everything else ends in; get_attention_scores is diffusers' own softmax, seen operation by operation.
_PRODUCTS = frozenset({"scaled_dot_product_attention", "dispatch_attention_fn", "get_attention_scores"})
_CROSS = re.compile(r"cross_?att|encoder_?decoder|enc_?dec_?att|encoder_attn|image_attn|multihead_attn", re.IGNORECASE)
_TEMPORAL = re.compile(r"temporal|motion", re.IGNORECASE)


@dataclass(frozen=True)
class AttentionSite:
    """One module that attends.

    Attributes
    ----------
    path
        Path of the module in the model; empty if the model itself is the attention module.
    kind
        ``self``; ``cross`` (keys come from another sequence); ``joint`` (two streams with own projections attend as
        one sequence); ``temporal`` (over the frames of a video). ``self`` where the model does not tell.
    heads, kv_heads
        Number of query heads, and of key and value heads; None where the module does not say (a call always does).
    head_dim
        Width of a query or key head; None as above.
    owner
        Path of the module that contains this one (a block, a layer).
    interface
        What is seen: ``transformers`` (attention interface), ``diffusers`` (the call of its processor), ``torch``
        (`torch.nn.MultiheadAttention`), or ``product`` (a module that calls torch's attention product itself).
    """

    path: str
    kind: str
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    owner: str
    interface: str


def attention_sites(model: nn.Module) -> dict[str, AttentionSite]:
    """Return every attention site of a model by path, in the model's order.

    Modules whose attention has no softmax over keys (linear attention, state spaces) or goes through a kernel that
    cannot be seen (xformers' processors) are not sites.

    Parameters
    ----------
    model
        Any module: a transformers or diffusers model, one with `torch.nn.MultiheadAttention`, or one that calls
        `torch.nn.functional.scaled_dot_product_attention` itself.
    """
    return {site.path: site for site, _ in found_sites(model)}


def found_sites(model: nn.Module) -> Iterator[tuple[AttentionSite, nn.Module]]:
    """Yield every attention site with its module."""
    modules = dict(model.named_modules())
    inside: set[int] = set()
    for path, module in modules.items():
        # what a site contains (processors that are modules themselves) attends on its behalf
        if id(module) in inside:
            continue
        interface = _interface(module)
        if interface is None:
            continue
        if interface in ("diffusers", "torch"):
            inside.update(id(child) for child in module.modules() if child is not module)
        owner = path.rpartition(".")[0]
        yield _describe(path, module, owner, interface, modules), module


def chosen_sites(
    model: nn.Module, targets: str | Sequence[str] | None, kinds: str | Iterable[str] | None
) -> list[tuple[AttentionSite, nn.Module]]:
    """Return the sites that patterns and kinds choose, with their modules.

    Raises
    ------
    SiteError
        The model has no attention site, a pattern or a kind matches none, or nothing is left.
    """
    every = list(found_sites(model))
    if not every:
        raise SiteError(
            f"{type(model).__name__} has no attention that can be watched. Expected a module that uses transformers' "
            "attention interface, a diffusers processor on torch's attention product, torch.nn.MultiheadAttention, or "
            "torch.nn.functional.scaled_dot_product_attention."
        )
    paths = [site.path for site, _ in every]
    wanted = [targets] if isinstance(targets, str) else targets
    if wanted is not None:
        for pattern in wanted:
            if not any(matches(path, pattern) for path in paths):
                raise SiteError(
                    f"No attention site matches '{pattern}'.{near_misses(pattern, paths)} Sites: {some(paths)}."
                )
        every = [(s, m) for s, m in every if any(matches(s.path, pattern) for pattern in wanted)]
    if kinds is not None:
        asked = {kinds} if isinstance(kinds, str) else set(kinds)
        for kind in sorted(asked - set(KINDS)):
            raise SiteError(
                f"There is no kind of attention '{kind}'.{near_misses(kind, KINDS)} Kinds: {', '.join(KINDS)}."
            )
        there = sorted({site.kind for site, _ in every})
        every = [(s, m) for s, m in every if s.kind in asked]
        if not every:
            raise SiteError(
                f"No chosen attention site is of kind {some(sorted(asked))}; the sites that the targets name are of "
                f"kind {some(there)}."
            )
    if not every:
        raise SiteError("No targets were given. Leave targets out to watch every attention site.")
    return every


def _interface(module: nn.Module) -> str | None:
    """Return through what a module's attention can be seen; None if it has none."""
    if isinstance(module, nn.MultiheadAttention):
        return "torch"
    processor = getattr(module, "processor", None)
    if callable(processor):
        # processors that are modules (image prompts) have a call of their own, not a forward
        own = type(processor).__call__ is not nn.Module.__call__
        call = type(processor).__call__ if own else type(processor).forward
        if _PRODUCTS & _names(type(processor), call):
            return "diffusers"
    names = _names(type(module), type(module).forward)
    if REGISTRY in names:
        return "transformers"
    return "product" if _PRODUCTS & names else None


def _names(owner: type, function: Callable[..., Any]) -> set[str]:
    """Return the names that a function uses, with those of its owner's methods that it names."""
    seen: set[str] = set()
    pending, done = [function], set[int]()
    while pending:
        current = inspect.unwrap(pending.pop())
        current = getattr(current, "__func__", current)
        if not isinstance(current, FunctionType) or id(current) in done:
            continue
        done.add(id(current))
        for name in _code_names(current.__code__) - seen:
            seen.add(name)
            method = inspect.getattr_static(owner, name, None)
            # torch's own methods of every module (``__call__``, ``to``) lead nowhere
            if method is not None and not hasattr(nn.Module, name):
                pending.append(getattr(method, "__func__", method))
    return seen


def _code_names(code: CodeType) -> set[str]:
    inner = [_code_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)


def _describe(
    path: str, module: nn.Module, owner: str, interface: str, modules: Mapping[str, nn.Module]
) -> AttentionSite:
    heads = _number(module, "num_heads", "heads", "num_attention_heads", "n_heads", "n_head")
    kv_heads = _number(module, "num_key_value_heads", "num_kv_heads", "kv_heads")
    groups = _number(module, "num_key_value_groups")
    head_dim = _number(module, "head_dim", "attention_head_size", "key_value_proj_dim", "dim_head", "qk_head_dim")
    width = _number(module, "inner_dim", "embed_dim")
    if heads is None and width and head_dim and width % head_dim == 0:
        heads = width // head_dim
    if head_dim is None and heads and width:
        head_dim = width // heads
    if kv_heads is None and heads:
        kv_width = _number(module, "inner_kv_dim")
        kv_heads = heads // groups if groups else kv_width // head_dim if kv_width and head_dim else heads
    return AttentionSite(path, _kind(path, module, modules), heads, kv_heads, head_dim, owner, interface)


def _number(module: nn.Module, *names: str) -> int | None:
    """Return the first of these that the module, then its configuration, gives as a whole number."""
    for holder in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _kind(path: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    parts = path.split(".")
    above = (modules.get(".".join(parts[:end])) for end in range(1, len(parts)))
    if any(_TEMPORAL.search(type(m).__name__) for m in above if m is not None) or _TEMPORAL.search(path):
        return "temporal"
    if isinstance(getattr(module, "add_q_proj", None), nn.Module):
        return "joint"
    told = getattr(module, "is_cross_attention", None)
    if isinstance(told, bool):
        return "cross" if told else "self"
    name = f"{parts[-2] if len(parts) > 1 else ''}.{parts[-1]}.{type(module).__name__}"
    return "cross" if _CROSS.search(name) else "self"


def is_compiled(model: nn.Module) -> str | None:
    """Return the path of a module that `torch.compile` has taken over; None if there is none."""
    # without dynamo nothing can have been compiled, and importing it takes a second
    dynamo = sys.modules.get("torch._dynamo")
    for path, module in model.named_modules():
        if getattr(module, "_compiled_call_impl", None) is not None:
            return path
        if dynamo is not None and isinstance(module, dynamo.OptimizedModule):
            return path
    return None
