"""Samplers: ways to compose several adapters while pictures are made, one file each, found by name."""

from __future__ import annotations

from lorry.diffusion.samplers.base import SAMPLERS, Course, Sampler, register_sampler, sampler_from

SAMPLERS.source(__name__, __path__)

__all__ = ["SAMPLERS", "Course", "Sampler", "register_sampler", "sampler_from"]
