"""Which sites a user means: by name, suffix, pattern, kind or preset, and what is left out and why."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from lorry.core.errors import SiteError, near_misses, some
from lorry.core.sites.kinds import BLOCK, KIND_NAMES
from lorry.core.sites.site import Site

Targets = str | Sequence[str]
_ATTENTION = re.compile(r"(^|[._])(attn\d*|attention|self_attn|cross_attn|selfattention)([._]|$)", re.IGNORECASE)
_MLP = re.compile(r"(^|[._])(mlp|ffn?|feed_?forward|intermediate|output\.dense|fc[12]|experts?)([._]|$)", re.IGNORECASE)
_HEADS = re.compile(r"(^|\.)(lm_head|score|classifier|embed_out|output_projection|head)$")
PRESETS = ("all-linear", "attention", "mlp", "embeddings", "convolutions", "experts", "all")


@dataclass(frozen=True)
class Selection:
    """The sites that were chosen, and those left out with the reason."""

    sites: tuple[Site, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)


def select(
    model: nn.Module,
    catalogue: Mapping[str, Site],
    targets: Targets,
    *,
    kinds: Iterable[str],
    exclude: Targets = (),
    layers: Sequence[int] | None = None,
) -> Selection:
    """Choose sites.

    Parameters
    ----------
    model, catalogue
        The model, for its output head and for blocks, and all its sites by path.
    targets
        A preset (`PRESETS`), ``kind:NAME``, ``re:REGEX`` (searched as a full match of the path), a pattern with ``*``,
        a path, a suffix of a path (``q_proj``, ``mlp.down_proj``), or a list of these.
    kinds
        The kinds that the method can sit on.
    exclude, layers
        Sites to leave out, in the same syntax; indices of transformer blocks to keep (None keeps all).

    Raises
    ------
    SiteError
        Nothing matches a pattern (with near misses), or everything that matches is left out (with reasons).
    """
    allowed = tuple(kinds)
    wanted = [targets] if isinstance(targets, str) else list(targets)
    if not wanted:
        raise SiteError(
            "No targets were given. Try targets='all-linear', or a list of names such as ['q_proj', 'v_proj']."
        )
    head = _head(model, catalogue)
    chosen: dict[str, Site] = {}
    for pattern in wanted:
        found = _matching(model, catalogue, pattern, head, allowed)
        if not found:
            raise _nothing(pattern, catalogue, model)
        chosen.update(found)
    dropped = [exclude] if isinstance(exclude, str) else list(exclude)
    for pattern in dropped:
        if not any(_excluded(site, pattern) for site in (*catalogue.values(), *chosen.values())):
            raise SiteError(f"exclude: {_nothing(pattern, catalogue, model)}")
    left_out = {p: "not targeted" for p in catalogue if p not in chosen}
    if head in left_out:
        left_out[head] = "the output head; name it to adapt it"
    reasons = {path: _reason(site, allowed, dropped, layers) for path, site in chosen.items()}
    left_out.update({path: reason for path, reason in reasons.items() if reason})
    order = {path: i for i, path in enumerate(catalogue)}
    kept = sorted((s for p, s in chosen.items() if not reasons[p]), key=lambda s: order.get(s.path, len(order)))
    if not kept:
        why = "; ".join(sorted({str(reason) for reason in reasons.values()}))
        raise SiteError(f"Targets {wanted} match {len(chosen)} sites, but all are left out: {why}.")
    return Selection(tuple(kept), left_out)


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


def _matching(
    model: nn.Module, catalogue: Mapping[str, Site], pattern: str, head: str | None, allowed: tuple[str, ...]
) -> dict[str, Site]:
    if pattern in PRESETS:
        return {p: s for p, s in catalogue.items() if p != head and _in_preset(s, pattern)}
    if pattern.startswith("kind:"):
        name = pattern[5:]
        if name not in KIND_NAMES:
            raise SiteError(
                f"There is no kind '{name}'.{near_misses(name, KIND_NAMES)} Kinds: {', '.join(KIND_NAMES)}."
            )
        return {p: s for p, s in catalogue.items() if s.kind.name == name}
    found: dict[str, Site] = {}
    if "block" in allowed:
        # a method that sits on nothing but whole modules takes single layers as such, too
        layers_too = set(allowed) == {"block"}
        for path, module in model.named_modules():
            if path and (layers_too or path not in catalogue) and matches(path, pattern):
                found[path] = next(iter(BLOCK.sites(path, module)))
    return found or {p: s for p, s in catalogue.items() if matches(p, pattern)}


def _in_preset(site: Site, name: str) -> bool:
    linear = site.kind.name in ("linear", "packed") and not _HEADS.search(site.path)
    parent = site.path.rpartition(".")[0]
    return {
        "all-linear": linear,
        "attention": linear and bool(_ATTENTION.search(parent)),
        "mlp": linear and not _ATTENTION.search(parent) and bool(_MLP.search(site.path)),
        "embeddings": site.kind.name == "embedding",
        "convolutions": site.kind.name == "conv",
        "experts": site.kind.name == "experts",
        "all": True,
    }[name]


def _reason(site: Site, kinds: tuple[str, ...], exclude: Sequence[str], layers: Sequence[int] | None) -> str | None:
    """Return why a chosen site is left out, or None."""
    if site.kind.name not in kinds:
        return f"the method does not sit on {site.kind.name} sites (only {', '.join(kinds)})"
    if any(_excluded(site, pattern) for pattern in exclude):
        return "excluded"
    if layers is not None and site.layer not in layers:
        return "in another layer"
    return None


def _excluded(site: Site, pattern: str) -> bool:
    return site.kind.name == pattern[5:] if pattern.startswith("kind:") else matches(site.path, pattern)


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
    names = sorted({s.name for s in catalogue.values()})
    hint = near_misses(pattern, [*names, *PRESETS, *catalogue])
    if not catalogue:
        return SiteError(f"{type(model).__name__} has no layer that an adapter can sit on.")
    experts = [p for p, s in catalogue.items() if s.kind.name == "experts"]
    more = f" Its expert banks are {some(experts, 2)}; target them by name or with 'experts'." if experts else ""
    return SiteError(
        f"The target '{pattern}' matches none of the {len(catalogue)} sites of {type(model).__name__}.{hint} Its "
        "sites are "
        f"called {some(names, 12)}; presets: {', '.join(PRESETS)}.{more}"
    )
