"""Weights of Lorry's pocket diffusion models: files below ``weights``, read by ``lorry.pocket.diffusion``."""
