"""PEFT's ``adapter_config.json``: which options are understood, and what they mean for a module.

The matching rules are PEFT's own (0.21): lists match whole paths or suffixes after a dot, texts are regular
expressions for the whole path, patterns of rank and alpha are regular expressions for the end of the path,
the first that fits decides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lorry.core.errors import CheckpointError, OptionError, near_misses
from lorry.core.method.base import Method
from lorry.core.method.declared import peft_method, peft_starts
from lorry.formats.patterns import Pattern, pattern
from lorry.formats.tensors import opened, parsed

_MOST_JSON = 200_000_000
#: Options that do not change what a saved adapter computes.
_NEUTRAL = frozenset(
    "peft_type peft_version base_model_name_or_path revision task_type inference_mode auto_mapping fan_in_fan_out "
    "runtime_config megatron_config megatron_core loftq_config eva_config corda_config lora_ga_config "
    "qalora_group_size ensure_weight_tying velora_config exclude_modules".split()
)
_UNDERSTOOD = frozenset(
    "r lora_alpha lora_dropout use_rslora use_dora rank_pattern alpha_pattern target_modules target_parameters bias "
    "lora_bias modules_to_save layers_to_transform layers_pattern init_lora_weights trainable_token_indices".split()
)
#: Options that change the arithmetic and are refused, with what they are.
_REFUSED = {
    "layer_replication": "replicated layers of the base",
    "alora_invocation_tokens": "activation from a token on (aLoRA)",
    "use_qalora": "pooled inputs (QALoRA)",
    "monteclora_config": "sampled factors (MonteCLoRA)",
    "use_bdlora": "block-diagonal factors (BD-LoRA)",
    "arrow_config": "routing among adapters (Arrow)",
    "kasa_config": "a truncated base (KaSA)",
}
#: Starts that leave the base weight as it is, and starts that change it by data or by quantising. Those that take out
#: of it what can be computed from it again are declared by methods (`PeftForm.start`).
_HARMLESS_STARTS = ("gaussian", "eva", "orthogonal", "mica", "true", "false", "none")
_CHANGED_BASE = ("corda", "lora_ga")


@dataclass(frozen=True)
class PeftConfig:
    """What an ``adapter_config.json`` says, as far as it matters for the arithmetic.

    Attributes
    ----------
    values
        The file's content.
    notes
        What the reader should know of it.
    """

    values: Mapping[str, Any]
    notes: tuple[str, ...] = field(default=())

    @cached_property
    def start(self) -> str:
        """Value of ``init_lora_weights`` if it split the base weight and the file was not converted, else empty."""
        start = str(self.values.get("init_lora_weights", "")).lower()
        return start if start.startswith(peft_starts()) else ""

    def _pattern(self, name: str) -> list[tuple[Pattern, Any]]:
        try:
            return [(pattern(rf"(.*\.)?({k})$"), v) for k, v in (self.values.get(name) or {}).items()]
        except CheckpointError as error:
            raise CheckpointError(f"{name} of the adapter config: {error}") from None

    @cached_property
    def _ranks(self) -> list[tuple[Pattern, Any]]:
        return self._pattern("rank_pattern")

    @cached_property
    def _alphas(self) -> list[tuple[Pattern, Any]]:
        return self._pattern("alpha_pattern")

    def rank(self, path: str) -> int:
        """Return the rank at a module."""
        return int(next((v for p, v in self._ranks if p.fullmatch(path)), self.values.get("r", 8)))

    def alpha(self, path: str) -> float:
        """Return alpha at a module."""
        return float(next((v for p, v in self._alphas if p.fullmatch(path)), self.values.get("lora_alpha", 8)))

    @cached_property
    def _made(self) -> dict[tuple[int, float, bool, str], Method]:
        return {}

    def method(self, path: str, *, parameter: bool = False, start: bool = True) -> Method:
        """Return the method at a module.

        `parameter` says that `path` is a parameter which is targeted itself (by its whole path, ``module.name``): PEFT
        never drops out there. Without `start` the layer is one of those whose weight PEFT's starts leave alone.
        """
        rank, alpha, begun = self.rank(path), self.alpha(path), self.start if start and not parameter else ""
        key = (rank, alpha, parameter, begun)
        found = self._made.get(key)
        if found is None:
            options = {"rank": rank, "alpha": alpha, "rank_stabilized": bool(self.values.get("use_rslora"))}
            dropout = 0.0 if parameter else float(self.values.get("lora_dropout") or 0.0)
            try:
                found = self._made[key] = peft_method(self.values, {"dropout": dropout, **options}, begun)
            except OptionError as error:
                raise CheckpointError(f"The PEFT config cannot be followed at '{path}': {error}") from None
        return found

    @cached_property
    def targets_known(self) -> bool:
        """Whether the targets are listed, so that a site without tensors can be told."""
        return bool(self.values.get("target_modules")) and self.values["target_modules"] != "all-linear"

    @cached_property
    def _listed(self) -> frozenset[str]:
        targets = self.values.get("target_modules") or ()
        return frozenset() if isinstance(targets, str) else frozenset(targets)

    def targeted(self, path: str) -> bool:
        """Whether PEFT would put an adapter at the module `path`."""
        excluded = self.values.get("exclude_modules")
        if isinstance(excluded, str) and pattern(excluded).fullmatch(path):
            return False
        if isinstance(excluded, list) and _suffix_in(path, frozenset(excluded)):
            return False
        for name in self.values.get("modules_to_save") or ():
            if pattern(rf"(^|.*\.){name}($|\..*)").fullmatch(path):
                return False
        targets = self.values.get("target_modules")
        if isinstance(targets, str):
            return pattern(targets).fullmatch(path)
        return _suffix_in(path, self._listed) and self._layer_fits(path)

    def _layer_fits(self, path: str) -> bool:
        layers = self.values.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        patterns = self.values.get("layers_pattern") or []
        if isinstance(patterns, str):
            patterns = [patterns]
        if not patterns:
            found = re.match(r".*?\.[^.]*\.(\d+)\.", path)
            index = int(found[1]) if found else None
        else:
            index = next((i for p in patterns if (i := _layer_after(p, path)) is not None), None)
        if index is None:
            return False
        return index == layers if isinstance(layers, int) else index in layers

    def parameter_targeted(self, path: str) -> bool:
        """Whether PEFT would put an adapter on the parameter `path`."""
        return _suffix_in(path, frozenset(self.values.get("target_parameters") or ()))


def _layer_after(name: str, path: str) -> int | None:
    """Return the number that follows a module of this name in the path."""
    whole = pattern(rf"(?:^|.*?\.){name}")
    for found in re.finditer(r"\.(\d+)(?=\.)", path):
        if whole.fullmatch(path[: found.start()]):
            return int(found[1])
    return None


def _suffix_in(path: str, names: frozenset[str]) -> bool:
    """Whether the path, or what follows one of its dots, is among the names."""
    if path in names:
        return True
    dot = path.find(".")
    while dot >= 0:
        if path[dot + 1 :] in names:
            return True
        dot = path.find(".", dot + 1)
    return False


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    CheckpointError
        It cannot be read, or is something else.
    """
    with opened(path) as file:
        text = file.read(_MOST_JSON + 1)
    if len(text) > _MOST_JSON:
        raise CheckpointError(f"'{path}' is larger than {_MOST_JSON} bytes; it is no configuration of an adapter.")
    return parsed(text, f"'{path}' cannot be read as JSON")


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_tokens(value: Any) -> bool:
    lists = value.values() if isinstance(value, dict) else [value]
    return all(isinstance(tokens, list) and all(map(_is_whole, tokens)) for tokens in lists)


#: What the options that Lorry reads must be, beside null.
_TYPES: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("peft_type", "bias"), ("text", lambda v: isinstance(v, str))),
    **dict.fromkeys(
        ("target_modules", "exclude_modules", "layers_pattern"),
        ("a text or a list of texts", lambda v: isinstance(v, str) or _is_texts(v)),
    ),
    **dict.fromkeys(("modules_to_save", "target_parameters"), ("a list of texts", _is_texts)),
    "trainable_token_indices": ("a list of whole numbers, or such a list for each module", _are_tokens),
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias"), ("true or false", lambda v: isinstance(v, bool))),
    **dict.fromkeys(("lora_alpha", "lora_dropout"), ("a number", _is_number)),
    "r": ("a whole number", _is_whole),
    "init_lora_weights": ("true, false or a text", lambda v: isinstance(v, bool | str)),
    "layers_to_transform": (
        "a whole number or a list of them",
        lambda v: _is_whole(v) or (isinstance(v, list) and all(map(_is_whole, v))),
    ),
    "rank_pattern": ("pattern -> whole number", lambda v: isinstance(v, dict) and all(map(_is_whole, v.values()))),
    "alpha_pattern": ("pattern -> number", lambda v: isinstance(v, dict) and all(map(_is_number, v.values()))),
}


def _check_types(values: Mapping[str, Any], where: str) -> None:
    for name, (wanted, fits) in _TYPES.items():
        value = values.get(name)
        if name in values and not (fits(value) if value is not None else name not in ("r", "lora_alpha")):
            raise CheckpointError(f"'{where}': {name} must be {wanted}, found {value!r:.80}.")


def understood(values: Mapping[str, Any], where: str) -> PeftConfig:
    """Check that nothing in a PEFT config changes the arithmetic in a way that Lorry does not know.

    Raises
    ------
    CheckpointError
        Another tuner than LoRA, or an option that is refused or unknown; each by name.
    """
    _check_types(values, where)
    kind = values.get("peft_type", "LORA")
    if str(kind).upper() != "LORA":
        raise CheckpointError(
            f"'{where}' is an adapter of PEFT's tuner {kind}, not of LoRA. Load it with lorry.load(model, "
            "path), or convert it to a plain LoRA: lorry.formats.peft_tuners.convert(path, base_model, out)."
        )
    notes = []
    for name, value in values.items():
        if name in _NEUTRAL or name in _UNDERSTOOD:
            continue
        if not value:
            if name not in _REFUSED:
                notes.append(f"the config's unknown option '{name}' is {value!r} and was left aside")
            continue
        if name in _REFUSED:
            raise CheckpointError(f"'{where}' sets {name}={value!r}: {_REFUSED[name]}, which Lorry cannot carry yet.")
        raise CheckpointError(
            f"'{where}' sets the unknown option {name}={value!r}, which may change the arithmetic."
            f"{near_misses(name, _UNDERSTOOD | _NEUTRAL)} Understood are: {', '.join(sorted(_UNDERSTOOD))}."
        )
    if values.get("bias") not in (None, "none", "all", "lora_only") or (
        values.get("lora_bias") and values.get("use_dora")
    ):
        raise CheckpointError(
            f"'{where}' sets bias={values.get('bias')!r} and lora_bias={values.get('lora_bias')!r}; known are none, "
            "all and lora_only for the first, and true without use_dora for the second."
        )
    config = PeftConfig(dict(values), tuple(notes))
    return replace(config, notes=(*notes, *_notes_of_start(config, where)))


def _notes_of_start(config: PeftConfig, where: str) -> tuple[str, ...]:
    """Return what is to be said of how the adapter started; raise `CheckpointError` if its start changed the base in a
    way that cannot be repeated.
    """
    values = config.values
    start = str(values.get("init_lora_weights", True)).lower()
    if start.startswith("loftq"):
        raise CheckpointError(
            f"'{where}' was trained with init_lora_weights='{start}', which changed the base weight to a quantised "
            "one, as no low-rank update could. Where it was trained, save the base too; then set init_lora_weights to "
            "true and load the adapter onto that base."
        )
    if start.startswith(_CHANGED_BASE):
        raise CheckpointError(
            f"'{where}' was trained with init_lora_weights='{start}', which changed the base weight, and was saved "
            "unconverted. If it was saved before training too, make a plain LoRA of the two folders: "
            "lorry.formats.peft_initial.with_initial(path, initial, out). Or save it in PEFT with "
            "path_initial_model_for_weight_conversion; or, if the base was saved as it was left, set init_lora_weights "
            "to true and load it onto that base."
        )
    if not config.start and not start.startswith(_HARMLESS_STARTS):
        raise CheckpointError(
            f"'{where}' sets init_lora_weights='{start}', which is unknown and may have changed the base weight."
        )
    if not config.start:
        return ()
    if values.get("use_dora"):
        raise CheckpointError(
            f"'{where}' combines use_dora with init_lora_weights='{start}', which Lorry cannot carry."
        )
    if "_niter_" in start:
        raise CheckpointError(
            f"'{where}' was trained with init_lora_weights='{start}', a randomised SVD whose draw is not in the "
            "file, and was saved unconverted: what it took out of the base cannot be computed again. Where it was "
            "trained, save it with path_initial_model_for_weight_conversion, which makes it a plain LoRA; or, if "
            "the base was saved as it was left, set init_lora_weights to true and load it onto that base."
        )
    return (f"{start} saved unconverted: what it took out of each weight was computed again from this base",)
