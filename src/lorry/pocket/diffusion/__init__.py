"""Two tiny trained pipelines of diffusers, a generated world of pictures, and a judge that reads them."""

from .denoising import samples_right
from .grid import grid, image, write_png
from .judge import Judge, agreement, read, score
from .loading import NAMES, load, load_judge, recipe, weights
from .world import BASE, NOVEL, TRIGGERS, Attribute, Scene, Thing, caption, draw, pictures, render, restyle

__all__ = [
    "BASE",
    "NAMES",
    "NOVEL",
    "TRIGGERS",
    "Attribute",
    "Judge",
    "Scene",
    "Thing",
    "agreement",
    "caption",
    "draw",
    "grid",
    "image",
    "load",
    "load_judge",
    "pictures",
    "read",
    "recipe",
    "render",
    "restyle",
    "samples_right",
    "score",
    "weights",
    "write_png",
]
