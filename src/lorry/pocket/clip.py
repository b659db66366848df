"""The pocket CLIP: a trained ``CLIPModel`` of 1.3 million parameters for pictures of 48 x 48 pixels.

It tells shapes, colours and backgrounds apart without being shown any; textures, places and written digits are hard for
it, other shapes and colours are unknown to it. What it reads is drawn by `lorry.pocket.vision.world`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .diffusion.loading import weights
from .vision.contrast import classes, zero_shot
from .vision.loading import CLIP, folder_of, read_clip
from .vision.networks import clip_processor, pixels

__all__ = ["NAME", "classes", "load", "path", "pixels", "processor", "zero_shot"]

#: Its folder among the weights.
NAME = CLIP


def path() -> Path:
    """The model's folder in the layout of transformers; raises as :func:`load`."""
    return folder_of(CLIP)


def processor() -> Any:
    """Its ``CLIPProcessor``."""
    return clip_processor()


def load(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A fresh copy of the trained model, in eval mode on the CPU, and its processor.

    Parameters
    ----------
    dtype
        Of the weights in memory; they are stored in float16.

    Returns
    -------
    tuple
        A ``CLIPModel`` and a ``CLIPProcessor``.

    Raises
    ------
    ImportError
        Transformers, or the distribution ``lorry-pocket``, is not installed.
    FileNotFoundError
        The installation lacks the weights.
    """
    folder_of(CLIP)
    return read_clip(weights(), dtype), clip_processor()
