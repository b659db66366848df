"""Training an adapter of a pipeline to make pictures that carry messages (stage 2): the objective ``signing``.

The task is that of the image fleet (`lorry.diffusion.task`), with its data, prompts, noise and weightings; what comes
here is the message, the residual that stands for it in the latents, and the distance from the bare network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from lorry.core.life.api import adapters
from lorry.core.options import option
from lorry.diffusion.families import family_of
from lorry.diffusion.making import size_of
from lorry.diffusion.task import Diffusion, Drawn, noising_of
from lorry.methods.authen_lora import AuthenLoRA
from lorry.protection.codec import Codec
from lorry.protection.drawing import codec_label, codec_of, drawn_messages, fixed_message
from lorry.training.data_errors import DataError
from lorry.training.reference import asking
from lorry.training.task import Batch, Setting, register_task


@dataclass(frozen=True, eq=False)
class Marked(Drawn):
    """A picture with a message in it, as a pass sees it.

    Attributes
    ----------
    message
        ``(bits,)`` of zeros and ones.
    clean
        What the bare network says of the picture without the message, of the shape of `target`; of a picture with a
        prior, the prior's row alone counts.
    """

    message: Tensor
    clean: Tensor


@register_task
@dataclass(frozen=True)
class Signing(Diffusion):
    """Denoising towards pictures of a style with a message in them: ``L = λ_style L_style + λ_wm L_wm``.

    For latents x of the style, a message m and its residual δ_m, the network with the adapter at message m sees
    ``x + δ_m`` with noise. ``L_style`` is the loss of the objective ``diffusion``, and ``L_wm`` the mean squared
    distance from what the bare network says of x with the same noise. With `prior_data`, ``L_wm`` is of the prior's
    pictures in place of the style's, as in AquaLoRA: it does not pull the style back to the base then. With
    probability `zero_rate` the message is zero, and so is the residual, unless the codec's zero is "marked"
    (`CodecShape.zero`).
    """

    name: ClassVar[str] = "signing"

    codec: Any = option(None, "The codec: its folder, or the thing itself.")
    lambda_style: float = option(1.0, "Weight of denoising to the picture with its message.", at_least=0)
    lambda_wm: float = option(1.0, "Weight of the distance from the base's prediction.", at_least=0)
    zero_rate: float = option(0.05, "Share of pictures with the zero message.", at_least=0, below=1)
    message: str = option("", "The one message of all pictures, as zeros and ones; drawn for each if not given.")
    latent_scale: float = option(
        1.0, "Factor of the residual: the autoencoder's scale for a codec of unscaled latents.", above=0
    )

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        fixed_message(self.message, self.codec, self.name)

    @property
    def family(self) -> str:
        """Jobs of one codec share passes."""
        return f"{super().family}, codec {codec_label(self.codec)}"

    def reader(self, setting: Setting) -> Codec:
        """Return the codec, frozen; loaded once for all jobs that name it."""
        return codec_of(self.codec, setting)

    def check_model(self, setting: Setting) -> None:
        """Refuse what the objective ``diffusion`` refuses, a codec for other latents, or another length of messages."""
        super().check_model(setting)
        shape = self.reader(setting).shape
        pipeline = setting.processor
        channels = family_of(pipeline).latents_shape(pipeline, *size_of(pipeline, None, None))[0]
        if shape.channels != channels:
            raise DataError(
                f"The codec is for latents of {shape.channels} channels, the pipeline's have {channels}. Train one on "
                "this pipeline: lorry codec PICTURES --base PIPELINE."
            )
        fixed_message(self.message, self.codec, self.name, shape.bits)

    def draw(self, examples: Sequence[Any], generator: Generator, setting: Setting, adapter: str) -> Sequence[Any]:
        """Draw messages as well, and ask the bare network what it says of the pictures without them."""
        drawn: Sequence[Drawn] = super().draw(examples, generator, setting, adapter)
        codec = self.reader(setting)
        self._check_adapter(setting, adapter, codec)
        message = drawn_messages(self.message, len(drawn), codec.shape.bits, self.zero_rate, generator)
        clean = self._unmarked(setting, drawn)
        with torch.no_grad():
            # pictures of a pass are of one size
            residual = codec.residual(message.to(setting.device), (drawn[0].size[0], drawn[0].size[1])).float().cpu()
        return [
            self._marked(setting, *each)
            for each in zip(drawn, message, self.latent_scale * residual, clean, strict=True)
        ]

    def _check_adapter(self, setting: Setting, adapter: str, codec: Codec) -> None:
        found = adapters(setting.model).get(adapter)
        method = found.method if found is not None else None
        if isinstance(method, AuthenLoRA):
            if method.bits != codec.shape.bits:
                raise DataError(
                    f"The method authen-lora of '{adapter}' has messages of {method.bits} bits, the codec of "
                    f"{codec.shape.bits}; give both the same."
                )
        elif not self.message:
            raise DataError(
                f"The adapter '{adapter}' knows no messages: train the method authen-lora, or give the objective "
                "'signing' the one message that it is to carry."
            )

    def _unmarked(self, setting: Setting, drawn: Sequence[Drawn]) -> Tensor:
        """Return what the bare network says of the last row of each picture: its prior's, if it has one."""
        last = [
            replace(
                d,
                **{f.name: getattr(d, f.name)[-1:] for f in fields(d) if f.name != "conditions"},
                conditions=d.conditions.take([-1]),
            )
            for d in drawn
        ]
        with asking(setting.model, None, len(last)):
            return self.forward(setting, super().collate(setting, last)).float().cpu()

    def _marked(self, setting: Setting, drawn: Drawn, message: Tensor, residual: Tensor, clean: Tensor) -> Marked:
        noising = noising_of(setting, self.prediction)
        # mixing is linear, so what the residual adds to picture and target is what becomes of it without noise
        more = [noising.mixed(residual, torch.zeros_like(residual), float(time)) for time in drawn.times]
        noisy = drawn.noisy + torch.stack([seen for seen, _ in more])
        target = drawn.target + torch.stack([wanted for _, wanted in more])
        rows = torch.cat([target[:-1], clean[None]])
        return Marked(noisy, target, drawn.times, drawn.weights, drawn.conditions, message, rows)

    def collate(self, setting: Setting, examples: Sequence[Any]) -> Batch:
        """Put rows together; methods are told the message of each."""
        batch = super().collate(setting, examples)
        message = torch.cat([e.message.expand(len(e.times), -1) for e in examples]).to(setting.device)
        clean = torch.cat([e.clean for e in examples]).to(setting.device)
        return replace(batch, targets={**batch.targets, "clean": clean}, facts={**batch.facts, "message": message})

    def losses(self, outputs: Tensor, targets: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return both losses of each picture, weighted."""
        style, shift = self.weighed(outputs, targets), _distance(outputs, targets["clean"])
        weight = self.lambda_wm
        if self.prior_data is not None:
            style, shift, weight = style[0::2], shift[1::2], weight * self.prior_weight
        return self.lambda_style * style + weight * shift, torch.ones_like(style)


def _distance(outputs: Tensor, wanted: Tensor) -> Tensor:
    return (outputs.float() - wanted.float()).square().flatten(1).mean(1)
