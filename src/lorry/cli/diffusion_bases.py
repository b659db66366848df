"""Pipelines of diffusers as commands name them: a folder, a pocket model, or a name on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorry.cli.bases import dtype_of, quiet
from lorry.cli.hub import from_hub, is_hub_name
from lorry.core.errors import CheckpointError

INDEX = "model_index.json"


def is_pipeline(name: str) -> bool:
    """Whether a base is a folder with a pipeline of diffusers, or a pocket model."""
    return name in pocket_names() or (Path(name).expanduser() / INDEX).is_file()


def pocket_names() -> tuple[str, ...]:
    """Return the names of the pocket models that make pictures."""
    from lorry.pocket.diffusion import NAMES

    return NAMES


def usual(name: str) -> dict[str, Any]:
    """Return with how many steps and which guidance a base is sampled if nothing is said."""
    if name not in pocket_names():
        return {"steps": 30, "guidance": None, "negative": None}
    from lorry.pocket.diffusion import recipe

    own = recipe(name)
    guidance = own.get("true_cfg_scale", own.get("guidance_scale"))
    return {"steps": own["num_inference_steps"], "guidance": guidance, "negative": own.get("negative_prompt")}


def load_pipeline(name: str, dtype: str = "auto") -> Any:
    """Return a pipeline with its weights, on the CPU.

    Raises
    ------
    CheckpointError
        There is no such folder, it holds no pipeline, or a part of it cannot be read.
    """
    quiet()
    wanted = dtype_of(dtype)
    if name in pocket_names():
        from lorry.pocket.diffusion import load

        pocket = load(name) if isinstance(wanted, str) else load(name, wanted)
        pocket.set_progress_bar_config(disable=True)
        return pocket
    path = Path(name).expanduser()
    if is_hub_name(name):
        path = from_hub(name, "model")
    if not path.is_dir():
        raise CheckpointError(
            f"There is no folder {path}. Expected the folder of a diffusers pipeline, or a name on the hub such as "
            "stabilityai/stable-diffusion-xl-base-1.0."
        )
    if not (path / INDEX).is_file():
        raise CheckpointError(
            f"{path} is no pipeline of diffusers: a {INDEX} was expected. Give the folder of the whole pipeline, not "
            "of one of its models."
        )
    from diffusers import DiffusionPipeline

    options = {} if wanted == "auto" else {"torch_dtype": wanted}
    try:
        pipeline = DiffusionPipeline.from_pretrained(path, local_files_only=True, use_safetensors=True, **options)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise CheckpointError(f"Cannot load the pipeline {path}: {str(error).splitlines()[0]}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
