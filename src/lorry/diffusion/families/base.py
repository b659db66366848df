"""What every family of pipelines says of itself, and how the family of a pipeline is found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorry.core.errors import near_misses, some
from lorry.core.registry import Registry
from lorry.diffusion.conditions import Conditions
from lorry.diffusion.errors import DiffusionError


class Family(ABC):
    """How pipelines of one sort are used. Families have no state: what belongs to a pipeline is asked of it.

    Attributes
    ----------
    pipelines
        Names of the classes of diffusers.
    root
        Name of the network in the pipeline.
    flow
        Whether the network predicts the flow from picture to noise, in place of what its scheduler's
        ``prediction_type`` says.
    guided_together
        Whether a guided pass runs rows without and rows with the prompt in one batch (all of the first, then all of
        the second), or one after the other.
    distilled
        Whether the network may take a guidance that it was distilled for.
    """

    pipelines: ClassVar[tuple[str, ...]]
    root: ClassVar[str] = "transformer"
    flow: ClassVar[bool] = True
    guided_together: ClassVar[bool] = False
    distilled: ClassVar[bool] = False
    #: Whether the network is called with times from 0 to 1.
    times_to_one: ClassVar[bool] = False
    #: Text encoders without which a pipeline reads its prompts nevertheless.
    spare_encoders: ClassVar[tuple[str, ...]] = ()
    #: The guidance that pictures are made with if none is asked for.
    guidance: ClassVar[float] = 1.0

    def network(self, pipeline: Any) -> nn.Module:
        """Return the network that predicts."""
        found = getattr(pipeline, self.root, None)
        if not isinstance(found, nn.Module):
            raise DiffusionError(f"{type(pipeline).__name__} has no {self.root}; load it whole, or give it one.")
        return found

    def text_encoders(self, pipeline: Any) -> dict[str, nn.Module]:
        """Return the text encoders by name."""
        parts = pipeline.components
        return {n: m for n, m in parts.items() if n.startswith("text_encoder") and isinstance(m, nn.Module)}

    def check_text_encoders(self, pipeline: Any) -> None:
        """Refuse a pipeline that was made without a text encoder that its prompts need.

        Raises
        ------
        DiffusionError
            There is none where one has to be.
        """
        parts = pipeline.components
        for name in (n for n in parts if n.startswith("text_encoder") and n not in self.spare_encoders):
            if parts[name] is None:
                raise DiffusionError(
                    f"The {type(pipeline).__name__} has no {name}, which reads the prompts. Make the pipeline with it: "
                    "an adapter has its part there, too, if it was trained there."
                )

    @abstractmethod
    def encode(self, pipeline: Any, prompts: Sequence[str]) -> Conditions:
        """Return what the network is told of each prompt."""

    def negative(self, pipeline: Any, prompts: Sequence[str | None], conditions: Conditions) -> Conditions | None:
        """Return what it is told to keep away from; None where it is not guided without a text.

        Parameters
        ----------
        pipeline
            With its text encoders.
        prompts
            A text for each row; None where none was given.
        conditions
            Of the prompts, for shapes.
        """
        if all(text is None for text in prompts) and not self.guided_together:
            return None
        return self.encode(pipeline, [text or "" for text in prompts])

    def sized(
        self,
        conditions: Conditions,
        original: Sequence[tuple[int, int]],
        corners: Sequence[tuple[int, int]],
        target: tuple[int, int],
    ) -> Conditions:
        """Return conditions that know sizes in pixels ``(height, width)``, for networks that are told of them.

        Parameters
        ----------
        conditions
            Of the prompts.
        original
            Size of each row's picture before it was cut.
        corners
            Upper left corner of the cut.
        target
            Size of the pictures as they go through the network.
        """
        return conditions

    @abstractmethod
    def latents_shape(self, pipeline: Any, height: int, width: int) -> tuple[int, int, int]:
        """Return channels, height and width of the latents of a picture of a size in pixels.

        Raises
        ------
        DiffusionError
            The size is no multiple of what the network takes.
        """

    def set_times(self, scheduler: Any, steps: int, latents: Tensor) -> Tensor:
        """Let a scheduler begin anew; return its times, ``(steps,)``."""
        scheduler.set_timesteps(steps, device=latents.device)
        times: Tensor = scheduler.timesteps
        return times

    @abstractmethod
    def predict(
        self,
        network: nn.Module,
        latents: Tensor,
        times: Tensor,
        conditions: Conditions,
        distilled: float | None = None,
    ) -> Tensor:
        """Run the network.

        Parameters
        ----------
        network
            Of a pipeline of this family.
        latents
            ``(rows, channels, height, width)``, scaled as the network takes them.
        times
            ``(rows,)``, on the scheduler's scale.
        conditions
            Of each row.
        distilled
            The guidance that the network was distilled for, where it was.

        Returns
        -------
        Prediction of the shape of the latents.
        """

    def guide(self, wanted: Tensor, unwanted: Tensor, guidance: float) -> Tensor:
        """Return the guided prediction of one with the prompt and one without."""
        return unwanted + guidance * (wanted - unwanted)

    @abstractmethod
    def pixels(self, pipeline: Any, latents: Tensor) -> Tensor:
        """Return pictures ``(rows, 3, height, width)`` from -1 to 1."""

    @abstractmethod
    def posterior(self, pipeline: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the latents of pictures, as the network takes them."""


class AutoencoderFamily(Family):
    """A family whose latents are those of an ``AutoencoderKL``, scaled and shifted."""

    #: Latents must be a multiple of this in height and width.
    patch: ClassVar[int] = 1
    #: Whether latents are shifted before they are scaled.
    shifted: ClassVar[bool] = True

    def latents_shape(self, pipeline: Any, height: int, width: int) -> tuple[int, int, int]:
        """Return the shape of the autoencoder's latents."""
        factor = pipeline.vae_scale_factor
        check_size(height, width, factor * self.patch)
        return int(pipeline.vae.config.latent_channels), height // factor, width // factor

    def pixels(self, pipeline: Any, latents: Tensor) -> Tensor:
        """Decode."""
        config = pipeline.vae.config
        latents = latents / config.scaling_factor
        if self.shifted and config.shift_factor:
            latents = latents + config.shift_factor
        found: Tensor = pipeline.vae.decode(latents.to(pipeline.vae.dtype), return_dict=False)[0]
        return found

    def posterior(self, pipeline: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode."""
        config = pipeline.vae.config
        found = pipeline.vae.encode(pixels.to(pipeline.vae.dtype)).latent_dist
        shift = (config.shift_factor or 0.0) if self.shifted else 0.0
        return (found.mean - shift) * config.scaling_factor, found.std * config.scaling_factor


def check_size(height: int, width: int, multiple: int) -> None:
    """Raise `DiffusionError` unless a size in pixels is a multiple of what a network takes."""
    if height < multiple or width < multiple or height % multiple or width % multiple:
        raise DiffusionError(
            f"Height and width must be multiples of {multiple} for this pipeline, found {height} x {width}."
        )


def packed(latents: Tensor) -> Tensor:
    """Return latents as tokens of 2 x 2 patches, ``(rows, height/2 * width/2, 4 * channels)``."""
    rows, channels, height, width = latents.shape
    patches = latents.reshape(rows, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(rows, (height // 2) * (width // 2), channels * 4)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return what `packed` took, of this height and width."""
    rows, _, channels = tokens.shape
    patches = tokens.reshape(rows, height // 2, width // 2, channels // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(rows, channels // 4, height, width)


def shifted_times(scheduler: Any, steps: int, latents: Tensor, sigmas: bool, most: float) -> Tensor:
    """Let a flow scheduler begin anew, shifted for the number of 2 x 2 patches as its configuration says; return its
    times.

    Parameters
    ----------
    scheduler
        Of diffusers.
    steps
        How many.
    latents
        For their size and device.
    sigmas
        Whether noise levels from 1 to ``1 / steps`` are given, in place of the scheduler's own.
    most
        The largest shift, where the configuration says none.
    """
    config = scheduler.config
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    first, last = config.get("base_shift", 0.5), config.get("max_shift", most)
    slope = (last - first) / (high - low)
    options: dict[str, Any] = {}
    if config.get("use_dynamic_shifting"):
        length = (latents.shape[2] // 2) * (latents.shape[3] // 2)
        options["mu"] = length * slope + (first - slope * low)
    if sigmas and not config.get("use_flow_sigmas"):
        step = (1.0 / steps - 1.0) / max(steps - 1, 1)
        options["sigmas"] = [*(1.0 + step * i for i in range(steps - 1)), 1.0 / steps]
    if "sigmas" in options:
        scheduler.set_timesteps(device=latents.device, **options)
    else:
        scheduler.set_timesteps(steps, device=latents.device, **options)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    times: Tensor = scheduler.timesteps
    return times


#: Families by the name of each class of pipelines that they are for.
FAMILIES: Registry[Family] = Registry("family of pipelines", error=DiffusionError)


def register_family(cls: type[Family]) -> type[Family]:
    """Register a family under its pipelines' names; a decorator."""
    made = cls()
    for name in cls.pipelines:
        FAMILIES.add(name, made)
    return cls


def family_of(pipeline: Any) -> Family:
    """Return the family of a pipeline.

    Raises
    ------
    DiffusionError
        It is no pipeline, or one of a family that Lorry does not know.
    """
    for cls in type(pipeline).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    if isinstance(pipeline, nn.Module) or not hasattr(pipeline, "components"):
        raise DiffusionError(
            f"Expected a pipeline of diffusers, found {type(pipeline).__name__}. Load it with "
            "diffusers.DiffusionPipeline.from_pretrained."
        )
    name = type(pipeline).__name__
    raise DiffusionError(
        f"Pipelines of the class {name} are not known here.{near_misses(name, FAMILIES)} Known are {some(FAMILIES)}."
    )


def device_of(module: nn.Module) -> torch.device:
    """Return where a module's first parameter lies."""
    return next(module.parameters()).device
