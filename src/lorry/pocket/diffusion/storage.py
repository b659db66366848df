"""Where the parts lie in a folder of weights, each written whole before it takes its place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .judge import Judge

JUDGE = "judge.safetensors"
#: The folders of the two pipelines, in the layout of diffusers.
SDXL, FLUX = "pocket-diffusion", "pocket-flux"


def replace_folder(out: Path, write: Callable[[Path], object]) -> None:
    """Write a folder beside its place, then put it there instead of what is there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as made:
        fresh = Path(made) / "fresh"
        write(fresh)
        if out.exists():
            os.replace(out, Path(made) / "old")
        shutil.move(fresh, out)


def write_judge(judge: Judge, folder: Path) -> None:
    """Write a judge in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{JUDGE}.part"
    save_file({name: value.half().contiguous() for name, value in judge.state_dict().items()}, part)
    os.replace(part, folder / JUDGE)


def read_judge(folder: Path) -> Judge:
    """Read a judge, in float32 and eval mode."""
    judge = Judge()
    judge.load_state_dict({name: value.float() for name, value in load_file(folder / JUDGE).items()})
    return judge.eval().requires_grad_(False)


def write_autoencoder(model: Any, folder: Path) -> None:
    """Write an autoencoder alone, in float16 (and leave it in float32), for the trainings that stand on it."""
    model.half()
    replace_folder(folder / SDXL / "vae", model.save_pretrained)
    model.float()


def read_autoencoder(folder: Path) -> Any:
    """Read the autoencoder, in float32 and eval mode."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(folder / SDXL / "vae", torch_dtype=torch.float32, local_files_only=True)
    return model.eval().requires_grad_(False)


def write_pipeline(pipeline: Any, folder: Path, name: str) -> None:
    """Write a pipeline in float16, and leave it in float32."""
    pipeline.to(torch.float16)
    replace_folder(folder / name, pipeline.save_pretrained)
    pipeline.to(torch.float32)


def read_pipeline(folder: Path, name: str, dtype: torch.dtype) -> Any:
    """Read a pipeline, on the CPU and in eval mode."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder / name, torch_dtype=dtype, local_files_only=True)
    # files note the name of their base; where this folder lies is nobody's business
    pipeline.register_to_config(_name_or_path=name)
    for part in pipeline.components.values():
        if hasattr(part, "register_to_config"):
            part.register_to_config(_name_or_path=name)
        elif isinstance(part, torch.nn.Module):
            config: Any = part.config
            config._name_or_path = name
    return pipeline
