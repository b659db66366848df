"""Few-shot adaptation of CLIP on a folder of pictures with a folder for each class (CLIP-LoRA, arXiv 2405.18541, and
Block-LoRA, arXiv 2501.16720).
"""

from __future__ import annotations

from .fewshot import Recipe, accuracy, adapt, linear_probe, load_base
from .folder import Pictures, halves, read_folder, shots_of

__all__ = [
    "Pictures",
    "Recipe",
    "accuracy",
    "adapt",
    "halves",
    "linear_probe",
    "load_base",
    "read_folder",
    "shots_of",
]
