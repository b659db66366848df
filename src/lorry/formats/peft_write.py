"""Writing PEFT's format: whether an adapter is exactly what PEFT's LoRA or DoRA computes, and the config
that says so.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lorry.core.sites.site import Site
from lorry.formats.peft_moves import PeftMoves
from lorry.formats.stored import (
    OUT_PROJ_TIMES,
    PEFT_EMBEDDING,
    PEFT_NAMES,
    PREFIX,
    doubled_by_peft,
    foreign,
    peft_modules,
)


@dataclass
class Plain:
    """One site of an adapter as a plain LoRA or DoRA: canonical tensors (A, B, magnitude) and their scale."""

    site: Site
    rank: int
    alpha: float
    tensors: Mapping[str, Tensor]


@dataclass
class PeftFolder:
    """An adapter in PEFT's format: keys with tensors in PEFT's layout, and the config."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    notes: list[str]

    def config_bytes(self) -> bytes:
        """Return the content of ``adapter_config.json``."""
        return json.dumps(self.config, indent=2, sort_keys=True).encode()


class NotPlain(Exception):
    """Why an adapter cannot be said in PEFT's format."""


def peft_folder(
    root: nn.Module | None,
    plain: Sequence[Plain],
    whole: Mapping[str, Mapping[str, Tensor]],
    *,
    fields: Mapping[str, Any] | None = None,
    stabilized: bool = False,
    dropout: float = 0.0,
    base: str = "",
    task: str | None = None,
    chosen: Mapping[str, Any] | None = None,
) -> PeftFolder:
    """Return an adapter in PEFT's format.

    Parameters
    ----------
    root
        The model, whose modules decide which target names are exact; without it, whole paths are taken.
    plain
        The low-rank sites.
    whole
        Module path -> its trained parameters by name.
    fields
        Of the config, beside LoRA's own, that make it the method (`lorry.core.method.forms.PeftForm`).
    stabilized, dropout
        Hold for all sites.
    base, task
        ``base_model_name_or_path`` and ``task_type``.
    chosen
        The config that chose the same sites before; without a model its targets are taken over.

    Raises
    ------
    NotPlain
        Some site or name cannot be said exactly in PEFT's format.
    """
    fields, moves = dict(fields or {}), PeftMoves(root)
    for item in plain:
        _check(item.site, bool(fields), moves)
    tensors = _tensors(plain)
    for path, values in whole.items():
        tensors |= {f"{PREFIX}{path}.{name}": value for name, value in values.items()}
    keys = [(_config_key(p.site, moves), p) for p in plain]
    config: dict[str, Any] = {"peft_type": "LORA", "bias": "none", "inference_mode": True, **fields}
    config |= _selection(root, moves, plain, list(whole), chosen) | _numbers(keys, dropout)
    if stabilized:
        config["use_rslora"] = True
    config = {k: v for k, v in config.items() if v not in ({}, None) or k == "target_modules"}
    config["base_model_name_or_path"] = base or None
    if task:
        config["task_type"] = task
    notes = []
    if any(p.site.kind.name in ("qkv", "experts") or moves.moved(p.site) for p in plain) and dropout:
        config["lora_dropout"] = 0.0
        notes.append(f"dropout {dropout} is in lorry.json only: PEFT has none on parameters")
    return PeftFolder(tensors, config, notes)


def _tensors(plain: Sequence[Plain]) -> dict[str, Tensor]:
    """Return the low-rank tensors by PEFT's keys and in its layout."""
    modules = peft_modules([(p.site.path, p.site.kind.name) for p in plain])
    tensors: dict[str, Tensor] = {}
    for item in plain:
        kind = item.site.kind.name
        names = PEFT_EMBEDDING if kind == "embedding" else PEFT_NAMES
        kernel = tuple(item.site.stored.shape[1:]) if kind == "conv" else ()
        for name, value in item.tensors.items():
            if name == "B" and doubled_by_peft(item.site.path, kind):
                value = value / OUT_PROJ_TIMES
            tensors[f"{PREFIX}{modules[item.site.path]}.{names[name]}"] = foreign(name, value, kind, kernel)
    return tensors


def _check(site: Site, special: bool, moves: PeftMoves) -> None:
    kind, owner = site.kind.name, site.owner
    if refused := moves.refused(site):
        raise NotPlain(refused)
    if special and moves.moved(site):
        raise NotPlain(f"PEFT takes '{site.path}' for experts in this model and has nothing but plain LoRA there")
    if not site.path:
        raise NotPlain("the adapted layer is the model itself")
    if kind == "conv" and (owner.groups != 1 or max(owner.dilation) != 1 or owner.padding_mode != "zeros"):  # type: ignore[arg-type]
        raise NotPlain(
            f"'{site.path}' is a convolution with groups, dilation or a padding mode, which PEFT's factors leave out"
        )
    if kind in ("qkv", "experts") and special:
        raise NotPlain(f"PEFT has nothing but plain LoRA at '{site.path}' ({kind})")
    if kind == "qkv" and not site.path.endswith((".in_proj_weight", ".out_proj")):
        raise NotPlain(f"PEFT cannot adapt '{site.path}' of an attention module with separate weights")
    if kind == "experts" and site.lead == (1,):
        raise NotPlain(f"PEFT treats the bank of one expert at '{site.path}' as a matrix")
    if kind not in ("linear", "conv", "embedding", "qkv", "experts"):
        raise NotPlain(f"PEFT has no LoRA at '{site.path}' ({kind})")


#: Fields of a config that say which sites an adapter sits on.
_CHOICES = (
    "target_modules target_parameters modules_to_save exclude_modules layers_to_transform layers_pattern fan_in_fan_out"
).split()


def _selection(
    root: nn.Module | None,
    moves: PeftMoves,
    plain: Sequence[Plain],
    whole: list[str],
    chosen: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the fields that select the sites: as exact as is known."""
    if root is not None:
        return _targets(root, moves, plain, whole)
    return _whole_paths(plain, whole) if chosen is None else {k: chosen[k] for k in _CHOICES if chosen.get(k)}


def _targets(root: nn.Module, moves: PeftMoves, plain: Sequence[Plain], whole: list[str]) -> dict[str, Any]:
    """Return the fields that select these sites of a model and no others."""
    targets, parameters = _target_names(plain, moves)
    every = [path for path, _ in root.named_modules() if path]
    config: dict[str, Any] = {}
    if whole:
        if not _hits_exactly(whole, whole, every, lambda p, n: p.endswith(n)):
            raise NotPlain(f"PEFT's modules_to_save would take more modules than {whole}")
        config["modules_to_save"] = whole
        inside = [p for p in targets if any(f".{w}." in f".{p}." for w in whole)]
        if inside:
            raise NotPlain(f"PEFT cannot adapt '{inside[0]}' inside a module that is trained whole")
    config["target_modules"] = _exact_targets(targets, every)
    if moves.banks and isinstance(config["target_modules"], str):
        raise NotPlain("PEFT reduces a regular expression to the last names of modules in models with experts")
    if parameters:
        config["target_parameters"] = _exact_parameters(parameters, [n for n, _ in root.named_parameters()])
    if any(type(p.site.owner).__name__ == "Conv1D" for p in plain):
        config["fan_in_fan_out"] = True
    return config


def _whole_paths(plain: Sequence[Plain], whole: list[str]) -> dict[str, Any]:
    """Return the fields without a model: only whole paths are certain to mean these modules and no others."""
    if whole or any(p.site.kind.name in ("experts", "qkv") for p in plain):
        raise NotPlain(
            "banks, packed weights and whole modules are written in PEFT's format only beside their model, or with the "
            "config that chose them"
        )
    if any("expert" in p.site.path for p in plain):
        raise NotPlain("PEFT moves targets to experts in such a model, so it is written only beside the model")
    return {"target_modules": [p.site.path for p in plain]}


def _numbers(keys: Sequence[tuple[str, Plain]], dropout: float) -> dict[str, Any]:
    """Return rank, alpha and dropout, with patterns where they differ."""
    common = Counter((p.rank, p.alpha) for _, p in keys).most_common(1)
    (rank, alpha) = common[0][0] if common else (8, 8.0)
    return {
        "r": rank,
        "lora_alpha": _tidy(alpha),
        "lora_dropout": dropout,
        "rank_pattern": _pattern({k: p.rank for k, p in keys}, rank),
        "alpha_pattern": _pattern({k: _tidy(p.alpha) for k, p in keys}, _tidy(alpha)),
    }


def _config_key(site: Site, moves: PeftMoves) -> str:
    """Return the path by which PEFT looks up rank and alpha of a site: an attention module answers for both
    its matrices, a targeted parameter for itself.
    """
    if moves.moved(site):
        return f"{site.path}.{site.parameter}"
    return site.path.rpartition(".")[0] if site.kind.name == "qkv" else site.path


def _target_names(plain: Sequence[Plain], moves: PeftMoves) -> tuple[list[str], list[str]]:
    targets: list[str] = []
    parameters: list[str] = []
    packed: dict[str, list[Plain]] = {}
    for item in plain:
        site = item.site
        if site.kind.name == "experts" or moves.moved(site):
            parameters.append(_config_key(site, moves))
        elif site.kind.name == "qkv":
            packed.setdefault(_config_key(site, moves), []).append(item)
        else:
            targets.append(site.path)
    for owner, items in packed.items():
        if len(items) != 2 or len({(i.rank, i.alpha) for i in items}) != 1:
            raise NotPlain(
                f"PEFT adapts '{owner}' only with in_proj_weight and out_proj together, of one rank and alpha"
            )
        targets.append(owner)
    return targets, parameters


def _exact_targets(targets: Sequence[str], every: Sequence[str]) -> list[str] | str:
    """Return names, paths or, where neither is exact, a regular expression that selects the targets and no
    other module.
    """
    last = sorted({t.rpartition(".")[2] for t in targets})
    for names in (last, list(targets)):
        if _hits_exactly(targets, names, every, lambda p, n: p == n or p.endswith(f".{n}")):
            return names
    return "(?:" + "|".join(re.escape(t) for t in targets) + ")"


def _exact_parameters(parameters: Sequence[str], every: Sequence[str]) -> list[str]:
    short = sorted({".".join(p.split(".")[-2:]) for p in parameters})
    for names in (short, list(parameters)):
        if _hits_exactly(parameters, names, every, lambda p, n: p == n or p.endswith(f".{n}")):
            return names
    raise NotPlain(f"PEFT's target_parameters would take more than {parameters}")


def _hits_exactly(
    wanted: Sequence[str], names: Sequence[str], every: Sequence[str], hit: Callable[[str, str], bool]
) -> bool:
    aim = set(wanted)
    endings = {n.rpartition(".")[2][-1:] for n in names}
    candidates = [p for p in every if p[-1:] in endings]
    return all(any(hit(p, n) for n in names) == (p in aim) for p in candidates)


def _pattern(values: Mapping[str, Any], common: Any) -> dict[str, Any]:
    """Return PEFT's pattern for values that differ from the common one: by last name where that is exact,
    else by whole path.
    """
    differing = {k: v for k, v in values.items() if v != common}
    if not differing:
        return {}
    by_name: dict[str, set[Any]] = {}
    for key, value in values.items():
        by_name.setdefault(key.rpartition(".")[2], set()).add(value)
    names = {k.rpartition(".")[2]: v for k, v in differing.items()}
    short = {re.escape(n): v for n, v in names.items()}
    if all(len(by_name[n]) == 1 for n in names):
        return short
    return {f"^{re.escape(k)}": v for k, v in differing.items()}


def _tidy(alpha: float) -> float | int:
    """Return a whole number as an int, as PEFT's own files have it."""
    return int(alpha) if float(alpha).is_integer() else float(alpha)
