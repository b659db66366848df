"""Modes of one model, such as generation and retrieval: adapter, attention, head and cache switched as one set (Hydra,
arXiv 2603.28554).
"""

from __future__ import annotations

from lorry.serving.modes.direction import attention_direction
from lorry.serving.modes.folder import load_mode, save_retriever
from lorry.serving.modes.maxsim import maxsim
from lorry.serving.modes.mode import GENERATION, Mode, ModePass, switched

__all__ = [
    "GENERATION",
    "Mode",
    "ModePass",
    "attention_direction",
    "load_mode",
    "maxsim",
    "save_retriever",
    "switched",
]
