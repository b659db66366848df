"""Qwen-Image: double blocks over packed latents of a video autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorry.diffusion.conditions import Conditions
from lorry.diffusion.families.base import (
    Family,
    check_size,
    device_of,
    packed,
    register_family,
    shifted_times,
    unpacked,
)


@register_family
class QwenImage(Family):
    """Qwen-Image."""

    pipelines: ClassVar[tuple[str, ...]] = ("QwenImagePipeline",)
    guidance: ClassVar[float] = 4.0
    distilled: ClassVar[bool] = True
    times_to_one: ClassVar[bool] = True

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> Conditions:
        """Return the language model's hidden states, and which tokens are real."""
        text, mask = pipeline.encode_prompt(prompt=list(prompts), device=device_of(pipeline.transformer))
        mask = torch.ones(text.shape[:2], dtype=torch.long, device=text.device) if mask is None else mask
        return Conditions({"text": text, "text_mask": mask})

    def latents_shape(self, pipeline: Any, height: int, width: int) -> tuple[int, int, int]:
        """Return the shape of the autoencoder's latents, without the one frame."""
        factor = pipeline.vae_scale_factor
        check_size(height, width, 2 * factor)
        return int(pipeline.vae.config.z_dim), height // factor, width // factor

    def set_times(self, scheduler: Any, steps: int, latents: Tensor) -> Tensor:
        """Shift times for the number of tokens."""
        return shifted_times(scheduler, steps, latents, sigmas=True, most=1.15)

    def predict(
        self, network: nn.Module, latents: Tensor, times: Tensor, conditions: Conditions, distilled: float | None = None
    ) -> Tensor:
        """Run the transformer on packed latents."""
        height, width = latents.shape[2:]
        mask = conditions["text_mask"]
        config: Any = network.config
        guidance = None
        if config.guidance_embeds:
            guidance = torch.full([len(latents)], 1.0 if distilled is None else distilled, device=latents.device)
        found = network(
            hidden_states=packed(latents),
            timestep=times.to(latents.dtype) / 1000,
            guidance=guidance,
            encoder_hidden_states=conditions["text"],
            encoder_hidden_states_mask=None if bool(mask.all()) else mask,
            img_shapes=[[(1, height // 2, width // 2)]] * len(latents),
            return_dict=False,
        )[0]
        return unpacked(found, height, width)

    def guide(self, wanted: Tensor, unwanted: Tensor, guidance: float) -> Tensor:
        """Return the guided prediction, each patch with the norm of the one with the prompt."""
        height, width = wanted.shape[2:]
        guided, wanted = packed(super().guide(wanted, unwanted, guidance)), packed(wanted)
        norms = wanted.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
        return unpacked(guided * norms, height, width)

    def pixels(self, pipeline: Any, latents: Tensor) -> Tensor:
        """Decode a film of one frame."""
        mean, std = _statistics(pipeline, latents)
        film = (latents / std + mean).unsqueeze(2).to(pipeline.vae.dtype)
        found: Tensor = pipeline.vae.decode(film, return_dict=False)[0][:, :, 0]
        return found

    def posterior(self, pipeline: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a film of one frame."""
        found = pipeline.vae.encode(pixels.unsqueeze(2).to(pipeline.vae.dtype)).latent_dist
        mean, std = _statistics(pipeline, found.mean[:, :, 0])
        return (found.mean[:, :, 0] - mean) * std, found.std[:, :, 0] * std


def _statistics(pipeline: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and one over the standard deviation of the channels of latents."""
    config = pipeline.vae.config
    mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1).to(like.device, like.dtype)
    std = 1.0 / torch.tensor(config.latents_std).view(1, -1, 1, 1).to(like.device, like.dtype)
    return mean, std
