"""Flux: double and single blocks over packed latents, distilled for guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorry.diffusion.conditions import Conditions
from lorry.diffusion.families.base import (
    AutoencoderFamily,
    device_of,
    packed,
    register_family,
    shifted_times,
    unpacked,
)


@register_family
class Flux(AutoencoderFamily):
    """Flux.1, dev and schnell."""

    pipelines: ClassVar[tuple[str, ...]] = ("FluxPipeline",)
    patch: ClassVar[int] = 2
    distilled: ClassVar[bool] = True
    times_to_one: ClassVar[bool] = True

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> Conditions:
        """Return the second text encoder's hidden states and the first one's pooled text."""
        length = min(512, pipeline.tokenizer_2.model_max_length)
        text, pooled, _ = pipeline.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            device=device_of(pipeline.transformer),
            max_sequence_length=length,
        )
        return Conditions({"text": text, "pooled": pooled})

    def set_times(self, scheduler: Any, steps: int, latents: Tensor) -> Tensor:
        """Shift times for the number of tokens."""
        return shifted_times(scheduler, steps, latents, sigmas=True, most=1.15)

    def predict(
        self, network: nn.Module, latents: Tensor, times: Tensor, conditions: Conditions, distilled: float | None = None
    ) -> Tensor:
        """Run the transformer on packed latents."""
        height, width = latents.shape[2:]
        text = conditions["text"]
        config: Any = network.config
        guidance = None
        if config.guidance_embeds:
            guidance = torch.full([1], 3.5 if distilled is None else distilled, device=latents.device)
            guidance = guidance.expand(len(latents))
        found = network(
            hidden_states=packed(latents),
            timestep=times.to(latents.dtype) / 1000,
            guidance=guidance,
            pooled_projections=conditions["pooled"],
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=text.device, dtype=text.dtype),
            img_ids=places(height // 2, width // 2, text),
            return_dict=False,
        )[0]
        return unpacked(found, height, width)


def places(height: int, width: int, like: Tensor) -> Tensor:
    """Return row and column of each patch, ``(height * width, 3)``."""
    found = torch.zeros(height, width, 3)
    found[..., 1] += torch.arange(height)[:, None]
    found[..., 2] += torch.arange(width)[None, :]
    return found.reshape(-1, 3).to(like.device, like.dtype)
