"""Single files of diffusion tools: kohya's flattened names, and diffusers' names with a component in
front.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lorry.core.errors import CheckpointError, some
from lorry.core.method.registry import method_from
from lorry.formats.parts import PREFIX, Part
from lorry.formats.peft_config import PeftConfig, understood

_KOHYA = re.compile(r"lora_(unet|te\d?|transformer|prior|vae|mmdit)_(.+)")
#: Suffixes of other methods that share kohya's naming.
_OTHER_METHODS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "on_input": "IA3",
    "dora_scale": "kohya's DoRA",
    "diff": "full difference",
}
_TAILS = {
    "lora_down.weight": "A",
    "lora_up.weight": "B",
    "lora_mid.weight": "mid",
    "lora.down.weight": "A",
    "lora.up.weight": "B",
    "lora_linear_layer.down.weight": "A",
    "lora_linear_layer.up.weight": "B",
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_A": "A",
    "lora_B": "B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora.alpha": "alpha",
    "alpha": "alpha",
}
_PROCESSOR = re.compile(r"^(.*)\.processor\.(.+)_lora\.(down|up)\.weight$|^(.*)\.processor\.(.+)_lora\.alpha$")
COMPONENTS = (
    "unet",
    "transformer",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "prior",
    "controlnet",
    "vae",
)


@dataclass
class Single:
    """A single file, sorted by site."""

    format: str
    parts: list[Part] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_single(
    names: Mapping[str, Any], metadata: Mapping[str, str], read: Callable[[str], Tensor], where: str
) -> Single:
    """Sort the tensors of a single file by site.

    Parameters
    ----------
    names
        Tensor name -> anything with a ``shape``.
    metadata
        Of the file; diffusers keeps rank and alpha there.
    read
        Gives a tensor by name; only scalars (alpha) are read.
    where
        What errors call the file.

    Raises
    ------
    CheckpointError
        A tensor that belongs to no known naming (by name), or an incomplete site.
    """
    found: dict[tuple[str, str], dict[str, str]] = {}
    strange = []
    kohya = any(_KOHYA.match(name) for name in names)
    for name in names:
        at = _kohya_place(name, where) if kohya else _diffusers_place(name)
        if at is None:
            strange.append(name)
            continue
        component, path, tensor = at
        keys = found.setdefault((component, path), {})
        if tensor in keys:
            raise CheckpointError(
                f"'{where}' holds two tensors for {tensor} of '{path}': '{keys[tensor]}' and '{name}'."
            )
        keys[tensor] = name
    if strange or not found:
        raise CheckpointError(
            f"'{where}' holds {len(strange)} tensors of {len(names)} in no known naming: {some(strange)}. "
            "Single files are read in kohya's (lora_unet_...lora_down.weight) and diffusers' "
            "(unet....lora_A.weight) naming."
        )
    configs = _configs(metadata, where)
    result = Single("kohya" if kohya else "diffusers")
    for (component, path), keys in found.items():
        result.parts.append(_part(component, path, keys, names, configs.get(component), read, where))
    if any("mid" in p.keys for p in result.parts):
        result.notes.append("convolutions in three steps (lora_mid) were folded into two, exactly")
    return result


def _part(
    component: str,
    path: str,
    keys: dict[str, str],
    names: Mapping[str, Any],
    config: PeftConfig | None,
    read: Callable[[str], Tensor],
    where: str,
) -> Part:
    missing = [n for n in ("A", "B") if n not in keys]
    if missing:
        raise CheckpointError(
            f"'{where}' lacks {' and '.join(missing)} of '{path}', though it holds {some(keys.values())}."
        )
    rank = int(names[keys["A"]].shape[0])
    alpha: float | None = None
    stabilized = False
    if "alpha" in keys:
        value = read(keys.pop("alpha"))
        if value.numel() != 1 or not float(value) > 0 or float(value) == float("inf"):
            raise CheckpointError(
                f"'{where}': alpha of '{path}' must be one positive number, found {value.flatten()[:4].tolist()}."
            )
        alpha = float(value)
    elif config is not None:
        alpha, stabilized = config.alpha(path), bool(config.values.get("use_rslora"))
        if config.rank(path) != rank:
            raise CheckpointError(
                f"'{where}': '{path}' has rank {rank}, but the file's metadata say {config.rank(path)}."
            )
    slug = "dora" if "magnitude" in keys else "lora"
    method = method_from({"method": slug, "rank": rank, "alpha": alpha, "rank_stabilized": stabilized})
    return Part(path, method, keys, component=component)


def _kohya_place(name: str, where: str) -> tuple[str, str, str] | None:
    module, _, tail = name.partition(".")
    for mark, method in _OTHER_METHODS.items():
        if tail.startswith(mark):
            raise CheckpointError(
                f"'{where}' holds '{name}': {method}, not LoRA, which Lorry does not read from such files."
            )
    found = _KOHYA.fullmatch(module)
    if found is None or tail not in _TAILS:
        return None
    return found[1], found[2], _TAILS[tail]


def _diffusers_place(name: str) -> tuple[str, str, str] | None:
    path = name.removeprefix(PREFIX)
    component, _, rest = path.partition(".")
    if component in COMPONENTS:
        path = rest
    else:
        component = ""
    old = _PROCESSOR.match(path)
    if old:
        owner, linear = (old[1], old[2]) if old[1] is not None else (old[4], old[5])
        linear = "to_out.0" if linear == "to_out" else linear
        return component, f"{owner}.{linear}", {"down": "A", "up": "B", None: "alpha"}[old[3]]
    for tail, tensor in _TAILS.items():
        if path.endswith(f".{tail}"):
            return component, path[: -len(tail) - 1], tensor
    return None


def _configs(metadata: Mapping[str, str], where: str) -> dict[str, PeftConfig]:
    """Return the PEFT config of each component that diffusers wrote into the file's metadata."""
    text = metadata.get("lora_adapter_metadata")
    if not text:
        return {}
    try:
        values = json.loads(text)
        flat: dict[str, dict[str, Any]] = {}
        for key, value in values.items():
            component, dot, option = key.partition(".")
            if not dot or component not in COMPONENTS:
                component, option = "", key
            flat.setdefault(component, {})[option] = value
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"'{where}': the metadata field lora_adapter_metadata is damaged ({error}).") from None
    return {component: understood(options, where) for component, options in flat.items()}
