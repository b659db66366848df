"""Load the pocket CLIP and the pocket VLM, whose weights are in the distribution ``lorry-pocket``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..diffusion.loading import weights

CLIP, VLM = "pocket-clip", "pocket-vlm"


def folder_of(name: str) -> Path:
    """The folder of a model in the layout of transformers.

    Raises
    ------
    ImportError
        The distribution ``lorry-pocket`` is not installed.
    FileNotFoundError
        The installation lacks this model.
    """
    folder = weights() / name
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"Expected a model in {folder}, found none: reinstall lorry-pocket, or train it with "
            f"python -m lorry.pocket.vision.build --out {folder.parent} --parts {name}."
        )
    return folder


def _read(folder: Path, kind: str, name: str, dtype: torch.dtype) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("The pocket vision models need transformers: pip install 'lorry[train]'.") from error
    model = getattr(transformers, kind).from_pretrained(folder, dtype=dtype, local_files_only=True)
    # adapters note the name of their base; where this installation lies is nobody's business
    for config in (model.config, *(getattr(model.config, part, None) for part in ("text_config", "vision_config"))):
        if config is not None:
            config._name_or_path = name
    return model.eval()


def read_clip(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Read the pocket CLIP from a folder of weights."""
    return _read(folder / CLIP, "CLIPModel", CLIP, dtype)


def read_vlm(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Read the pocket VLM from a folder of weights."""
    return _read(folder / VLM, "LlavaForConditionalGeneration", VLM, dtype)
