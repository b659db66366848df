"""Stable Diffusion 1 and 2, and XL: a U-Net over the latents of an autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorry.diffusion.conditions import Conditions
from lorry.diffusion.families.base import AutoencoderFamily, device_of, register_family


@register_family
class StableDiffusion(AutoencoderFamily):
    """Stable Diffusion 1 and 2."""

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline",)
    guidance: ClassVar[float] = 7.5
    root: ClassVar[str] = "unet"
    flow: ClassVar[bool] = False
    guided_together: ClassVar[bool] = True
    shifted: ClassVar[bool] = False

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> Conditions:
        """Return the text encoder's hidden states."""
        embeds, _ = pipeline.encode_prompt(list(prompts), device_of(pipeline.unet), 1, False)
        return Conditions({"text": embeds})

    def predict(
        self, network: nn.Module, latents: Tensor, times: Tensor, conditions: Conditions, distilled: float | None = None
    ) -> Tensor:
        """Run the U-Net."""
        options = {"encoder_hidden_states": conditions["text"], "return_dict": False, **self.added(conditions)}
        found: Tensor = network(latents, times, **options)[0]
        return found

    def added(self, conditions: Conditions) -> dict[str, Any]:
        """Return further arguments of the U-Net."""
        return {}


@register_family
class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL, which is told a pooled text and sizes as well."""

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionXLPipeline",)
    guidance: ClassVar[float] = 5.0

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> Conditions:
        """Return the hidden states of both text encoders and the pooled text of the second."""
        made = pipeline.encode_prompt(list(prompts), device=device_of(pipeline.unet), do_classifier_free_guidance=False)
        return Conditions({"text": made[0], "pooled": made[2]})

    def negative(self, pipeline: Any, prompts: Sequence[str | None], conditions: Conditions) -> Conditions | None:
        """Return zeros where the pipeline says so of texts that nobody gave."""
        if all(text is None for text in prompts) and pipeline.config.get("force_zeros_for_empty_prompt"):
            zeros = {name: torch.zeros_like(conditions[name]) for name in ("text", "pooled")}
            return conditions.with_(**zeros)
        return super().negative(pipeline, prompts, conditions)

    def sized(
        self,
        conditions: Conditions,
        original: Sequence[tuple[int, int]],
        corners: Sequence[tuple[int, int]],
        target: tuple[int, int],
    ) -> Conditions:
        """Add the six numbers that the U-Net is told of sizes."""
        numbers = [[*size, *corner, *target] for size, corner in zip(original, corners, strict=True)]
        text = conditions["text"]
        return conditions.with_(sizes=torch.tensor(numbers, dtype=text.dtype, device=text.device))

    def added(self, conditions: Conditions) -> dict[str, Any]:
        """Return pooled text and sizes."""
        return {"added_cond_kwargs": {"text_embeds": conditions["pooled"], "time_ids": conditions["sizes"]}}

    def pixels(self, pipeline: Any, latents: Tensor) -> Tensor:
        """Decode, with the statistics of latents where the autoencoder has any."""
        config = pipeline.vae.config
        mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
        if mean is None or std is None:
            return super().pixels(pipeline, latents)
        latents = latents * _channels(std, latents) / config.scaling_factor + _channels(mean, latents)
        found: Tensor = pipeline.vae.decode(latents.to(pipeline.vae.dtype), return_dict=False)[0]
        return found

    def posterior(self, pipeline: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode, with the statistics of latents where the autoencoder has any."""
        config = pipeline.vae.config
        mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
        if mean is None or std is None:
            return super().posterior(pipeline, pixels)
        found = pipeline.vae.encode(pixels.to(pipeline.vae.dtype)).latent_dist
        factor = config.scaling_factor / _channels(std, found.mean)
        return (found.mean - _channels(mean, found.mean)) * factor, found.std * factor


def _channels(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values).view(1, -1, 1, 1).to(like.device, like.dtype)
