"""Load the pocket diffusion models, whose weights are a distribution of their own: ``lorry-pocket``."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import torch

from .judge import Judge
from .storage import FLUX, JUDGE, SDXL, read_judge, read_pipeline

#: Arguments of each pipeline's call, with which the figures of the documentation were measured.
RECIPES: dict[str, dict[str, Any]] = {
    # a guidance of 4 costs textures, and gains nothing
    SDXL: {"height": 32, "width": 32, "num_inference_steps": 16, "guidance_scale": 2.0},
    # without these two the pipeline pads prompts to 512 tokens, and does not guide
    FLUX: {
        "height": 32,
        "width": 32,
        "num_inference_steps": 16,
        "max_sequence_length": 24,
        "negative_prompt": "",
        "true_cfg_scale": 4.0,
    },
}
NAMES = tuple(RECIPES)
_MISSING = (
    "The weights of the pocket diffusion models are a distribution of their own: in a clone of Lorry's repository run "
    "pip install -e ./lorry-pocket, elsewhere pip install lorry-pocket."
)


def weights() -> Path:
    """The folder of the installed weights.

    Returns
    -------
    Path
        With a folder in diffusers' layout for each name of :data:`NAMES`, and the judge.

    Raises
    ------
    ImportError
        The distribution ``lorry-pocket`` is not installed.
    """
    try:
        return Path(str(resources.files("lorry_pocket"))) / "weights"
    except ModuleNotFoundError as error:
        raise ImportError(_MISSING) from error


def load(name: str = SDXL, dtype: torch.dtype = torch.float32) -> Any:
    """A fresh copy of a trained pipeline, on the CPU.

    Parameters
    ----------
    name
        ``pocket-diffusion``, a ``StableDiffusionXLPipeline``, or ``pocket-flux``, a ``FluxPipeline``.
    dtype
        Of the weights in memory; they are stored in float16.

    Returns
    -------
    DiffusionPipeline
        Call it with the arguments of :func:`recipe`.

    Raises
    ------
    ValueError
        There is no model of that name.
    ImportError
        Diffusers or the weights are not installed.
    FileNotFoundError
        The installation lacks this model's weights.
    """
    if name not in RECIPES:
        raise ValueError(f"Expected a name among {', '.join(NAMES)}, found {name}: load one of these.")
    folder = weights()
    if not (folder / name / "model_index.json").is_file():
        raise FileNotFoundError(
            f"Expected a pipeline in {folder / name}, found none: reinstall lorry-pocket, or train it with "
            f"python -m lorry.pocket.diffusion.build --out {folder}."
        )
    try:
        pipeline = read_pipeline(folder, name, dtype)
    except ImportError as error:
        raise ImportError("The pocket diffusion models need diffusers: pip install 'lorry[diffusion]'.") from error
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    if name == FLUX:
        pipeline.default_sample_size = RECIPES[FLUX]["height"] // pipeline.vae_scale_factor
    return pipeline


def recipe(name: str) -> dict[str, Any]:
    """Arguments of a pipeline's call: sizes, steps and guidance.

    Parameters
    ----------
    name
        One of :data:`NAMES`.

    Returns
    -------
    dict
        A copy. A negative prompt in it is one text; give it as often as there are prompts.

    Raises
    ------
    ValueError
        There is no model of that name.
    """
    if name not in RECIPES:
        raise ValueError(f"Expected a name among {', '.join(NAMES)}, found {name}: ask for one of these.")
    return dict(RECIPES[name])


def load_judge() -> Judge:
    """The trained judge of pictures.

    Returns
    -------
    Judge
        In float32 and eval mode, on the CPU.

    Raises
    ------
    ImportError
        The weights are not installed.
    FileNotFoundError
        The installation lacks the judge.
    """
    folder = weights()
    if not (folder / JUDGE).is_file():
        raise FileNotFoundError(
            f"Expected {JUDGE} in {folder}, found none: reinstall lorry-pocket, or train it with "
            f"python -m lorry.pocket.diffusion.build --out {folder} --parts judge."
        )
    return read_judge(folder)
