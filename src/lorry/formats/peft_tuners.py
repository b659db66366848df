"""Adapters of PEFT's other tuners (LoKr, VeRA, ...), converted to plain LoRA by PEFT itself where it can."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.errors import AdapterError, CheckpointError
from lorry.core.receipt import Receipt
from lorry.formats.folders import PEFT_CONFIG, TENSORS, inside, located, write_folder
from lorry.formats.peft_config import read_json
from lorry.formats.save import sealed


def convert(
    path: str | os.PathLike[str],
    base: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int | float = 0.9999,
    overwrite: bool = True,
) -> Receipt:
    """Convert a PEFT folder of another tuner to a plain LoRA folder, by PEFT's ``convert_to_lora``.

    Parameters
    ----------
    path
        The folder, with safetensors.
    base
        The base model (it is copied, and stays as it is), or a folder or name from which transformers loads
        it.
    out
        The folder to write; load it with `lorry.load`.
    rank
        A whole number is the rank at every site; a fraction the share of each update's squared norm to keep,
        with the rank that this takes.
    overwrite
        Replace an adapter that lies at `out`.

    Returns
    -------
    Receipt
        ``relative_error`` is the norm of what was cut off relative to the update's, over all sites.

    Raises
    ------
    AdapterError
        PEFT is not installed, or has no conversion for this tuner.
    CheckpointError
        The folder is missing, unsafe or no adapter.
    """
    place = located(path)
    config = inside(place, PEFT_CONFIG) if place.is_dir() else None
    if config is None:
        raise CheckpointError(f"'{place}' is no folder of PEFT's: it holds no {PEFT_CONFIG}.")
    kind = str(read_json(config).get("peft_type", ""))
    if kind.upper() == "LORA":
        raise AdapterError(f"'{place}' is a LoRA already; load it with lorry.load.")
    values, tensors, relative = _converted(place, kind, base, rank)
    blob, _, _ = sealed({k: v.detach().cpu() for k, v in tensors.items()})
    text = json.dumps(values, indent=2, sort_keys=True).encode()
    write_folder(Path(out), {TENSORS: blob, PEFT_CONFIG: text}, overwrite=overwrite)
    sites, count = sum(k.endswith("lora_A.weight") for k in tensors), len(tensors)
    note = (f"from PEFT's {kind}",)
    return Receipt("convert", Path(out).name, count, count, sites, "unknown", 0.0, relative, note)


def _converted(
    place: Path, kind: str, base: nn.Module | str | os.PathLike[str], rank: int | float
) -> tuple[dict[str, Any], dict[str, Tensor], float]:
    """Return config, tensors and relative error of PEFT's conversion."""
    try:
        from peft import PeftModel
        from peft.tuners.lora.conversion import convert_to_lora
    except ImportError as error:
        raise AdapterError(f"Converting other tuners needs a PEFT that has convert_to_lora: {error}.") from None
    wrapped = PeftModel.from_pretrained(_base(base), str(place))
    try:
        lora, tensors = convert_to_lora(wrapped, rank=rank)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise AdapterError(f"PEFT has no conversion of this {kind} adapter to LoRA: {error}") from None
    values = {k: sorted(v) if isinstance(v, set) else v for k, v in lora.to_dict().items()}
    return values, tensors, _relative_error(wrapped, tensors)


def _relative_error(wrapped: nn.Module, tensors: dict[str, Tensor]) -> float:
    """Return the norm of what the conversion cut off relative to the update's, over all sites."""
    lost = size = 0.0
    with torch.no_grad():
        for name, module in wrapped.named_modules():
            if f"{name}.lora_A.weight" not in tensors:
                continue
            delta = module.get_delta_weight("default").double()
            b, a = tensors[f"{name}.lora_B.weight"].double(), tensors[f"{name}.lora_A.weight"].double()
            product = b @ a
            delta = delta if delta.shape == product.shape else delta.T
            lost, size = lost + float((delta - product).square().sum()), size + float(delta.square().sum())
    return math.sqrt(lost / size) if size else 0.0


def _base(base: nn.Module | str | os.PathLike[str]) -> nn.Module:
    if isinstance(base, nn.Module):
        return copy.deepcopy(base)
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base)
    names = tuple(getattr(config, "architectures", None) or ())
    cls = AutoModelForCausalLM if any("CausalLM" in n or "LMHead" in n for n in names) else AutoModel
    model: nn.Module = cls.from_pretrained(base)
    return model
