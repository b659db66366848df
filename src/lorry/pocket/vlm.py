"""The pocket VLM: a trained ``LlavaForConditionalGeneration`` of 1.7 million parameters, and questions about pictures.

Its tower for pictures comes from `lorry.pocket.clip`, its language model from `lorry.pocket`. It is a weak reader: of
questions of the base skills it answers backgrounds always, textures, colours and rows in two of three cases, shapes in
half, the numbers of a page in one of five and its lines hardly ever; questions of the held-out skills it cannot answer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .diffusion.loading import weights
from .vision.answering import coded, loss_of
from .vision.evaluate import answer, exact_match, prompts_of
from .vision.loading import VLM, folder_of, read_vlm
from .vision.networks import pixels, vlm_processor
from .vision.questions import Question, Skill, questions, skill, skills
from .vision.world import Page, Scene, Thing, Written, draw_page, pictures, render

__all__ = [
    "NAME",
    "Page",
    "Question",
    "Scene",
    "Skill",
    "Thing",
    "Written",
    "answer",
    "coded",
    "draw_page",
    "exact_match",
    "load",
    "loss_of",
    "path",
    "pictures",
    "pixels",
    "processor",
    "prompts_of",
    "questions",
    "render",
    "skill",
    "skills",
]

#: Its folder among the weights.
NAME = VLM


def path() -> Path:
    """The model's folder in the layout of transformers; raises as :func:`load`."""
    return folder_of(VLM)


def processor() -> Any:
    """Its ``LlavaProcessor``."""
    return vlm_processor()


def load(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A fresh copy of the trained model, in eval mode on the CPU, and its processor.

    Parameters
    ----------
    dtype
        Of the weights in memory; they are stored in float16.

    Returns
    -------
    tuple
        A ``LlavaForConditionalGeneration`` and a ``LlavaProcessor``.

    Raises
    ------
    ImportError
        Transformers, or the distribution ``lorry-pocket``, is not installed.
    FileNotFoundError
        The installation lacks the weights.
    """
    folder_of(VLM)
    return read_vlm(weights(), dtype), vlm_processor()
