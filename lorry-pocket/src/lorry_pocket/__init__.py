"""Weights of Lorry's pocket models: files below ``weights``, read by ``lorry.pocket.diffusion``, ``.clip`` and ``.vlm``."""
