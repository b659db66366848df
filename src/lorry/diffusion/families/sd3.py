"""Stable Diffusion 3: a transformer with joint attention over the latents of an autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from lorry.diffusion.conditions import Conditions
from lorry.diffusion.families.base import AutoencoderFamily, device_of, register_family, shifted_times


@register_family
class StableDiffusion3(AutoencoderFamily):
    """Stable Diffusion 3 and 3.5."""

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusion3Pipeline",)
    guidance: ClassVar[float] = 7.0
    guided_together: ClassVar[bool] = True
    patch: ClassVar[int] = 2
    spare_encoders: ClassVar[tuple[str, ...]] = ("text_encoder_3",)

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> Conditions:
        """Return the hidden states of all text encoders, and the pooled texts of the first two."""
        texts = list(prompts)
        third = pipeline.tokenizer_3
        length = 256 if third is None else min(256, third.model_max_length)
        options = {
            "device": device_of(pipeline.transformer),
            "do_classifier_free_guidance": False,
            "max_sequence_length": length,
        }
        text, _, pooled, _ = pipeline.encode_prompt(prompt=texts, prompt_2=None, prompt_3=None, **options)
        return Conditions({"text": text, "pooled": pooled})

    def set_times(self, scheduler: Any, steps: int, latents: Tensor) -> Tensor:
        """Shift times where the scheduler's configuration asks for it."""
        return shifted_times(scheduler, steps, latents, sigmas=False, most=1.16)

    def predict(
        self, network: nn.Module, latents: Tensor, times: Tensor, conditions: Conditions, distilled: float | None = None
    ) -> Tensor:
        """Run the transformer."""
        found: Tensor = network(
            hidden_states=latents,
            timestep=times,
            encoder_hidden_states=conditions["text"],
            pooled_projections=conditions["pooled"],
            return_dict=False,
        )[0]
        return found
