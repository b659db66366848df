"""Image diffusion: pipelines of diffusers, sampled, trained, probed and composed.

The parts, from below:

``families``
    What differs between pipelines, one file each: how prompts become conditions, latents become pixels and back, how
    the network is called, how guidance is combined. Everything else asks a `Family` and knows no class of diffusers.
``conditions``
    What a network is told of each picture (text embeddings, sizes), one row for each.
``prompting``
    Another prompt for single blocks, and times told to a pipeline's own call.
``words``
    Where words of a prompt stand among the tokens that a network attends to.
``weights``
    Weights of a composition by the sampler's time: ``a@200-800``.
``sampling``
    `denoise`, the loop, with hooks for samplers that replace its parts.
``making``
    `sample`, from prompts to `Pictures`, each with its own composition and seed.
``pictures``
    Pictures with their recipes: PNG files, grids.
``task``, ``noise``, ``data``
    Training as a task of the fleet: a frozen network, prompts and latents worked out once, targets and weightings of
    the loss, folders of pictures.
``probe``
    What each block of a network does, by another prompt in it alone.

Blocks and kinds of attention (``up_blocks.0.attentions.1``, ``attention:cross in mid_block``) are targets like others
(`lorry.core.sites.targets.select`); pipelines are taken by the public verbs (`lorry.roots`).

Latents are ``(rows, channels, height, width)`` everywhere, also for networks that take packed ones, and times are on
the scheduler's scale from 0 to the number of its training steps, also for networks that take them from 0 to 1.
"""

from __future__ import annotations

from lorry.core.registry import import_for
from lorry.diffusion.conditions import Conditions, joined
from lorry.diffusion.errors import DiffusionError
from lorry.diffusion.families import Family, family_of
from lorry.diffusion.making import sample
from lorry.diffusion.pictures import Picture, Pictures, read_recipe
from lorry.diffusion.probe import Probe, probe
from lorry.diffusion.prompting import following, prompted, text_blocks
from lorry.diffusion.sampling import Step, denoise
from lorry.diffusion.weights import within
from lorry.diffusion.words import word_positions

import_for("objective", f"{__name__}.task")

__all__ = [
    "Conditions",
    "DiffusionError",
    "Family",
    "Picture",
    "Pictures",
    "Probe",
    "Step",
    "denoise",
    "family_of",
    "following",
    "joined",
    "probe",
    "prompted",
    "read_recipe",
    "sample",
    "text_blocks",
    "within",
    "word_positions",
]
