"""Which sites a user means: by name, suffix, pattern, kind or preset, and what is left out and why."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from lorry.core.errors import SiteError, near_misses, some
from lorry.core.sites.attending import ATTENTIONS, attention_kind
from lorry.core.sites.kinds import current_name, kind_named, kinds_in_order
from lorry.core.sites.site import Kind, Site
from lorry.core.sites.stacks import Stacks, find_stacks

Targets = str | Sequence[str]
#: Indices of blocks of the main stack, or path (or suffix of it) of a stack -> indices of its blocks.
Layers = Sequence[int] | Mapping[str, Sequence[int]]
_ATTENTION = re.compile(r"(^|[._])(attn\d*|attention|self_attn|cross_attn|selfattention)([._]|$)", re.IGNORECASE)
_MLP = re.compile(r"(^|[._])(mlp|ffn?|feed_?forward|intermediate|output\.dense|fc[12]|experts?)([._]|$)", re.IGNORECASE)
_HEADS = re.compile(r"(^|\.)(lm_head|score|classifier|embed_out|output_projection|head)$")
#: The preset of the kinds that `attention` and `mlp` choose from by the names of the modules around them.
_LINEAR = "all-linear"


@dataclass(frozen=True)
class Selection:
    """The sites that were chosen, and those left out with the reason."""

    sites: tuple[Site, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)


def preset_names() -> list[str]:
    """Return the presets: those that kinds declare, those by place in the model, and ``all``."""
    declared = dict.fromkeys(preset for kind in kinds_in_order() for preset in kind.presets)
    kinds = (f"attention:{kind}" for kind in ATTENTIONS)
    return [_LINEAR, "attention", *kinds, "mlp", *sorted(declared.keys() - {_LINEAR}), "all"]


def select(
    model: nn.Module,
    catalogue: Mapping[str, Site],
    targets: Targets,
    *,
    kinds: Iterable[str],
    exclude: Targets = (),
    layers: Layers | None = None,
) -> Selection:
    """Choose sites.

    Parameters
    ----------
    model, catalogue
        The model, and all its sites by path.
    targets
        A preset (`preset_names`), ``kind:NAME``, ``re:REGEX`` (a full match of the path), a pattern with ``*``, a path,
        a suffix of a path (``mlp.down_proj``), a block (the path of a module: its linear layers), ``TARGET in BLOCK``
        (``attention:cross in mid_block``), or a list of these.
    kinds
        The kinds that the method can sit on.
    exclude
        Sites to leave out, written like targets; a block means all of its sites.
    layers
        Blocks to keep (None keeps all sites): indices in the model's main stack of blocks, or stack -> indices, as in
        ``{"down_blocks": [0, 1]}``, for a model that has several. Sites outside of these stacks are left out.

    Raises
    ------
    SiteError
        Nothing matches a pattern (with near misses), everything that matches is left out (with reasons), `layers` are
        indices and the model has no single main stack, or they name a stack that it lacks.
    """
    allowed = [kind_named(name) for name in kinds]
    if not (wanted := _listed(targets)):
        raise SiteError(
            "No targets were given. Try targets='all-linear', or a list of names such as ['q_proj', 'v_proj']."
        )
    stacks = find_stacks(catalogue, model)
    keep = None if layers is None else _blocks(layers, stacks, model)
    head = _head(model, catalogue)
    chosen: dict[str, Site] = {}
    for pattern in wanted:
        found = _matching(model, catalogue, pattern, head, allowed, stacks)
        if not found:
            raise _nothing(pattern, catalogue, model)
        chosen.update(found)
    excluded = _left_out(model, catalogue, chosen, _listed(exclude), head, allowed, stacks)
    left_out = {p: "the output head; name it to adapt it" if p == head else "not targeted" for p in catalogue}
    reasons = {path: _reason(site, allowed, excluded, keep, stacks) for path, site in chosen.items()}
    left_out = {p: why for p, why in left_out.items() if p not in chosen} | {p: w for p, w in reasons.items() if w}
    order = {path: i for i, path in enumerate(catalogue)}
    kept = sorted((s for p, s in chosen.items() if not reasons[p]), key=lambda s: order.get(s.path, len(order)))
    if kept:
        return Selection(tuple(kept), left_out)
    why = "; ".join(sorted({str(reason) for reason in reasons.values()}))
    raise SiteError(f"Targets {wanted} match {len(chosen)} sites, but all are left out: {why}.")


def _listed(patterns: Targets) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def matches(path: str, pattern: str) -> bool:
    """Whether a path is meant by a pattern: a regex after ``re:``, a pattern with ``*``, the path itself, or a suffix
    of it.
    """
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], path) is not None
        except re.error as problem:
            raise SiteError(f"'{pattern[3:]}' is not a regular expression: {problem}.") from None
    if "*" in pattern or "?" in pattern:
        return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"*.{pattern}")
    return path == pattern or path.endswith(f".{pattern}")


def _blocks(layers: Layers, stacks: Stacks, model: nn.Module) -> dict[str, set[int]]:
    """Return stack -> indices of the blocks to keep."""
    name = type(model).__name__
    if isinstance(layers, Mapping):
        chosen: dict[str, set[int]] = {}
        for pattern, numbers in layers.items():
            found = [path for path in stacks.lengths if matches(path, pattern)]
            if not found:
                hint = near_misses(pattern, stacks.lengths)
                raise SiteError(f"layers: {name} has no stack of blocks '{pattern}'.{hint} It has: {stacks or 'none'}.")
            for path in found:
                chosen.setdefault(path, set()).update(numbers)
        return chosen
    if stacks.main is not None:
        return {stacks.main: set(layers)}
    if not stacks.lengths:
        raise SiteError(f"layers={list(layers)}: {name} has no stack of blocks. Choose its sites by targets instead.")
    first = next(iter(stacks.lengths))
    raise SiteError(
        f"layers={list(layers)} does not say which blocks of {name} are meant, for it has several stacks: {stacks}. "
        f"Name the stack, as in layers={{'{first}': {list(layers)}}}, or give targets a pattern such as '{first}.0.*'."
    )


def _matching(
    model: nn.Module,
    catalogue: Mapping[str, Site],
    pattern: str,
    head: str | None,
    allowed: Sequence[Kind],
    stacks: Stacks,
) -> dict[str, Site]:
    what, within, block = pattern.partition(" in ")
    if within:
        inside = _inside(model, catalogue, block.strip(), head, linear=False)
        found_there = _matching(model, catalogue, what.strip(), head, allowed, stacks)
        return {p: s for p, s in found_there.items() if p in inside}
    if pattern in preset_names():
        return {p: s for p, s in catalogue.items() if p != head and _in_preset(s, pattern, catalogue)}
    if pattern.startswith("kind:"):
        kind = kind_named(pattern[5:])
        return {p: s for p, s in catalogue.items() if s.kind is kind}
    found: dict[str, Site] = {}
    for kind in (kind for kind in allowed if kind.whole):
        # a method that sits on nothing but whole modules takes single layers as such, too
        layers_too = all(other.whole for other in allowed)
        for path, module in model.named_modules():
            if path and (layers_too or path not in catalogue) and matches(path, pattern):
                found.update({s.path: replace(s, layer=stacks.layer(s.path)) for s in kind.sites(path, module)})
    found = found or {p: s for p, s in catalogue.items() if matches(p, pattern)}
    return found or _inside(model, catalogue, pattern, head, linear=True)


def _inside(
    model: nn.Module, catalogue: Mapping[str, Site], block: str, head: str | None, *, linear: bool
) -> dict[str, Site]:
    """Return the sites inside the modules that a pattern means; linear layers alone, or all."""
    starts = tuple(f"{path}." for path, _ in model.named_modules() if path and matches(path, block))
    inside = {p: s for p, s in catalogue.items() if starts and p.startswith(starts) and p != head}
    return {p: s for p, s in inside.items() if not linear or _in_preset(s, _LINEAR, catalogue)}


def _in_preset(site: Site, name: str, catalogue: Mapping[str, Site]) -> bool:
    linear = _LINEAR in site.kind.presets and not _HEADS.search(site.path)
    parent = site.path.rpartition(".")[0]
    if name == "all":
        return site.kind.in_all
    if name == "attention":
        return linear and bool(_ATTENTION.search(parent))
    if name.startswith("attention:"):
        module = parent.removesuffix(".to_out")
        return linear and bool(_ATTENTION.search(parent)) and attention_kind(module, catalogue) == name[10:]
    if name == "mlp":
        return linear and not _ATTENTION.search(parent) and bool(_MLP.search(site.path))
    return linear if name == _LINEAR else name in site.kind.presets


def _reason(
    site: Site,
    allowed: Sequence[Kind],
    excluded: set[str],
    keep: Mapping[str, set[int]] | None,
    stacks: Stacks,
) -> str | None:
    """Return why a chosen site is left out, or None."""
    if site.kind not in allowed:
        return f"the method does not sit on {site.kind.name} sites (only {', '.join(kind.name for kind in allowed)})"
    if site.path in excluded:
        return "excluded"
    if keep is None:
        return None
    place = stacks.place(site.path)
    if place is None or place[0] not in keep:
        return f"outside the blocks of {some(keep)}"
    return None if place[1] in keep[place[0]] else "in another layer"


def _left_out(
    model: nn.Module,
    catalogue: Mapping[str, Site],
    chosen: Mapping[str, Site],
    patterns: Sequence[str],
    head: str | None,
    allowed: Sequence[Kind],
    stacks: Stacks,
) -> set[str]:
    """Return the paths of the sites that patterns leave out: of a block all sites, not its linear layers alone."""
    every = {**catalogue, **chosen}
    found: set[str] = set()
    for pattern in patterns:
        if pattern.startswith("kind:"):
            kind = current_name(pattern[5:])
            here = {p for p, s in every.items() if s.kind.name == kind}
        else:
            here = {p for p in every if matches(p, pattern)}
        if not here and (pattern in preset_names() or " in " in pattern):
            here = set(_matching(model, catalogue, pattern, head, allowed, stacks))
        if not here:
            starts = tuple(f"{path}." for path, _ in model.named_modules() if path and matches(path, pattern))
            here = {p for p in every if starts and p.startswith(starts)}
        if not here:
            raise SiteError(f"exclude: {_nothing(pattern, catalogue, model)}")
        found |= here
    return found


def _head(model: nn.Module, catalogue: Mapping[str, Site]) -> str | None:
    """Return the path of the output head, which presets leave alone."""
    getter = getattr(model, "get_output_embeddings", None)
    try:
        head = getter() if callable(getter) else None
    except (NotImplementedError, AttributeError):
        head = None
    if head is None:
        return next((p for p in catalogue if _HEADS.search(p)), None)
    return next((p for p, s in catalogue.items() if s.owner is head), None)


def _nothing(pattern: str, catalogue: Mapping[str, Site], model: nn.Module) -> SiteError:
    names, presets = sorted({s.name for s in catalogue.values()}), preset_names()
    hint = near_misses(pattern, [*names, *presets, *catalogue])
    if not catalogue:
        return SiteError(f"{type(model).__name__} has no layer that an adapter can sit on.")
    # what 'all-linear' leaves out is easily overlooked where the weights lie in banks
    banks = [p for p, s in catalogue.items() if s.lead]
    more = f" Its expert banks are {some(banks, 2)}; target them by name or with 'experts'." if banks else ""
    return SiteError(
        f"The target '{pattern}' matches none of the {len(catalogue)} sites of {type(model).__name__}.{hint} Its sites "
        f"are called {some(names, 12)}; presets: {', '.join(presets)}.{more}"
    )
