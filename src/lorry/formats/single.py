"""Reading single files of diffusion tools: kohya's flattened names, and diffusers' names with a component in front."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lorry.core.errors import CheckpointError, OptionError, some
from lorry.core.method.declared import peft_method
from lorry.formats.file import AdapterFile
from lorry.formats.flux import in_diffusers
from lorry.formats.peft_config import PeftConfig, understood
from lorry.formats.reader import READERS, Location, Reader
from lorry.formats.stored import PREFIX, StoredSite
from lorry.formats.tensors import parsed

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


#: What kohya calls the models of a pipeline -> what diffusers does.
_ROOTS = {"te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_3"}
#: The same where ``unet`` has the layers of the original Flux: kohya numbers its T5 as that of SD3, diffusers does not.
_FLUX_ROOTS = {**_ROOTS, "unet": "transformer", "te3": "text_encoder_2"}


class SingleFile(Reader):
    """A ``.safetensors`` file on its own.

    Parameters
    ----------
    kohya
        Whether this is the reader of kohya's names, or the one of diffusers'.
    """

    def __init__(self, kohya: bool) -> None:
        self.kohya = kohya

    def recognises(self, location: Location) -> bool:
        """Whether it is such a file, and in this naming."""
        if not location.path.is_file() or location.path.suffix != ".safetensors":
            return False
        return any(_KOHYA.match(name) for name in location.tensors().places) == self.kohya

    def read(self, location: Location) -> AdapterFile:
        """Open it; the models of a pipeline become components."""
        file, path = location.tensors(), location.path
        single = read_single(file.places, file.metadata, file.read, str(path))
        roots: dict[str, list[StoredSite]] = {}
        network = [s.path for s in single.sites if s.component == "unet"]
        known = _FLUX_ROOTS if network and all(map(in_diffusers, network)) else _ROOTS
        for stored in single.sites:
            roots.setdefault(known.get(stored.component, stored.component), []).append(stored)
        facts = {k: v for k, v in file.metadata.items() if k.startswith(("ss_", "modelspec")) and len(v) < 200}

        def adapter(sites: dict[str, StoredSite], **more: Any) -> AdapterFile:
            return AdapterFile(
                name=path.stem,
                method=max(sites.values(), key=lambda s: getattr(s.method, "rank", 0)).method,
                sites=sites,
                format=single.format,
                path=path,
                layout="peft",
                file=file,
                base=facts.get("ss_sd_model_name", ""),
                metadata={"source": single.format, **facts},
                notes=tuple(single.notes),
                flat=self.kohya,
                pipeline=True,
                **more,
            )

        several = len({s.component for s in single.sites}) > 1
        parts = {r: adapter({s.path: s for s in own}, partial=True) for r, own in roots.items() if r}
        whole = {f"{s.component}.{s.path}" if several else s.path: s for s in single.sites}
        return adapter(whole, components=parts)


READERS.add("kohya", SingleFile(kohya=True))
READERS.add("diffusers", SingleFile(kohya=False))


@dataclass
class Single:
    """A single file, sorted by site."""

    format: str
    sites: list[StoredSite] = field(default_factory=list)
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
        result.sites.append(_site(component, path, keys, names, configs.get(component), read, where))
    if any("mid" in p.keys for p in result.sites):
        result.notes.append("convolutions in three steps (lora_mid) were folded into two, exactly")
    return result


def _site(
    component: str,
    path: str,
    keys: dict[str, str],
    names: Mapping[str, Any],
    config: PeftConfig | None,
    read: Callable[[str], Tensor],
    where: str,
) -> StoredSite:
    missing = [n for n in ("A", "B") if n not in keys]
    if missing:
        raise CheckpointError(
            f"'{where}' lacks {' and '.join(missing)} of '{path}', though it holds {some(keys.values())}."
        )
    if not names[keys["A"]].shape or len(names[keys["B"]].shape) < 2:
        raise CheckpointError(f"'{where}': the factors of '{path}' are no matrices.")
    rank = int(names[keys["A"]].shape[0])
    alpha: float | None = None
    stabilized = False
    if "alpha" in keys:
        if math.prod(names[keys["alpha"]].shape) > 1:
            raise CheckpointError(
                f"'{where}': alpha of '{path}' must be one number, found {names[keys['alpha']].shape}."
            )
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
    form = {"use_dora": True} if "magnitude" in keys else {}
    try:
        method = peft_method(form, {"rank": rank, "alpha": alpha, "rank_stabilized": stabilized})
    except OptionError as error:
        raise CheckpointError(f"'{where}': the tensors of '{path}' are no LoRA: {error}") from None
    return StoredSite(path, method, keys, component=component)


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
    values = parsed(text.encode(), f"'{where}': the metadata field lora_adapter_metadata is damaged")
    flat: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        component, dot, option = key.partition(".")
        if not dot or component not in COMPONENTS:
            component, option = "", key
        flat.setdefault(component, {})[option] = value
    return {component: understood(options, where) for component, options in flat.items()}
