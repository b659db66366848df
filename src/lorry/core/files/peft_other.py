"""Adapters of PEFT's other tuners (LoKr, VeRA, ...), converted to plain LoRA by PEFT itself where it can."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorry.core.errors import AdapterError, CheckpointError
from lorry.core.files.folders import PEFT_CONFIG, TENSORS, inside, located, write_folder
from lorry.core.files.peft_config import read_json
from lorry.core.files.save import serialised
from lorry.core.receipt import Receipt


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
        The base model (it is copied, and stays as it is), or a folder or name from which transformers loads it.
    out
        The folder to write; load it with `lorry.load`.
    rank
        A whole number is the rank at every site; a fraction the share of each update's squared norm to keep, with the rank that
        this takes.
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
    try:
        from peft import PeftModel
        from peft.tuners.lora.conversion import convert_to_lora
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise AdapterError(f"Converting other tuners needs a PEFT that has convert_to_lora (0.19 or later): {error}.") from None
    place = located(path)
    config = inside(place, PEFT_CONFIG) if place.is_dir() else None
    if config is None:
        raise CheckpointError(f"'{place}' is no folder of PEFT's: it holds no {PEFT_CONFIG}.")
    kind = str(read_json(config).get("peft_type", ""))
    if kind.upper() == "LORA":
        raise AdapterError(f"'{place}' is a LoRA already; load it with lorry.load.")
    model = _base(base)
    wrapped = PeftModel.from_pretrained(model, str(place))
    try:
        lora, tensors = convert_to_lora(wrapped, rank=rank)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise AdapterError(f"PEFT has no conversion of this {kind} adapter to LoRA: {error}") from None
    lost = size = 0.0
    with torch.no_grad():
        for name, module in wrapped.named_modules():
            if isinstance(module, BaseTunerLayer) and f"{name}.lora_A.weight" in tensors:
                delta = module.get_delta_weight("default").double()
                product = tensors[f"{name}.lora_B.weight"].double() @ tensors[f"{name}.lora_A.weight"].double()
                if delta.shape != product.shape:
                    delta = delta.T
                lost, size = lost + float((delta - product).square().sum()), size + float(delta.square().sum())
    values: dict[str, Any] = {k: sorted(v) if isinstance(v, set) else v for k, v in lora.to_dict().items()}
    blob, _ = serialised({k: v.detach().cpu() for k, v in tensors.items()})
    text = json.dumps(values, indent=2, sort_keys=True).encode()
    write_folder(Path(out), {TENSORS: blob, PEFT_CONFIG: text}, overwrite=overwrite)
    sites = sum(k.endswith("lora_A.weight") for k in tensors)
    relative = math.sqrt(lost / size) if size else 0.0
    return Receipt(
        "convert", Path(out).name, len(tensors), len(tensors), sites, "unknown", 0.0, relative, (f"from PEFT's {kind}",)
    )


def _base(base: nn.Module | str | os.PathLike[str]) -> nn.Module:
    if isinstance(base, nn.Module):
        return copy.deepcopy(base)
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base)
    names = tuple(getattr(config, "architectures", None) or ())
    cls = AutoModelForCausalLM if any("CausalLM" in n or "LMHead" in n for n in names) else AutoModel
    model: nn.Module = cls.from_pretrained(base)
    return model
