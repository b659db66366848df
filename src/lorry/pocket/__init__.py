"""A tiny trained model and a small world of text skills, so that everything runs offline in seconds."""

from .evaluate import answer, exact_match
from .loading import PATH, load
from .tokenizer import batch
from .world import Example, Skill, conflicts, example, examples, skill, skills, split_of

__all__ = [
    "PATH",
    "Example",
    "Skill",
    "answer",
    "batch",
    "conflicts",
    "exact_match",
    "example",
    "examples",
    "load",
    "skill",
    "skills",
    "split_of",
]
