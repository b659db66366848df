"""Where AuthenLoRA runs: on a small denoiser of digits, or on a pipeline of diffusers; the same steps on both."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.errors import OptionError
from lorry.diffusion import family_of, sample
from lorry.diffusion.data import cut, opened
from lorry.diffusion.making import size_of
from lorry.diffusion.task import fleet
from lorry.protection.autoencoding import decoding, latents_of
from lorry.protection.codec import Codec, CodecShape
from lorry.protection.codec_fit import CodecTraining, train_codec
from lorry.training.data import load_records

from . import digits

BITS = 8
#: Told how many steps are done.
Step = Callable[[int], None]
#: The style that a pocket pipeline learns, and the word that calls it.
STYLE, TRIGGER = "framed", "sks"
SIGNED = "signed"


class Stage(ABC):
    """A network, pictures of a style, and how the network draws.

    Attributes
    ----------
    network
        What adapters sit on.
    codec_steps, steps
        Of stage 1 and of stage 2, at full effort.
    """

    network: nn.Module
    codec_steps: int
    steps: int

    @abstractmethod
    def codec(self, steps: int, seed: int, report: Step) -> Codec:
        """Train a codec (stage 1)."""

    @abstractmethod
    def train(self, codec: Codec, steps: int, seed: int, folder: Path) -> None:
        """Train the adapter that signs (stage 2), and leave it in ``folder/signed/adapter``."""

    @abstractmethod
    def draw(self, count: int, seed: int) -> Tensor:
        """Return pictures ``(count, channels, h, w)`` from -1 to 1 of whatever is active; the same noise every time."""


class OnDigits(Stage):
    """Scikit-learn's digits, by a perceptron; the style is inverted digits."""

    codec_steps, steps = 1500, 5000

    def __init__(self, seed: int, steps: int) -> None:
        self.network = digits.base(seed, steps)

    def codec(self, steps: int, seed: int, report: Step) -> Codec:
        """Train a codec of pictures themselves."""
        side = digits.SIDE
        codec = Codec(CodecShape(BITS, 1, side, side, 1, side, "small"), seed)
        settings = CodecTraining(
            steps, rate=2e-3, perceptual=2.0, variation=0.2, region=3, distortions=("noise", "colour")
        )
        both = torch.cat([digits.pictures(), digits.pictures(inverted=True)])
        train_codec(codec, both, settings, seed, report=lambda done, _: report(done + 1))
        return codec

    def train(self, codec: Codec, steps: int, seed: int, folder: Path) -> None:
        """Train in the fleet; the style loss alone, since the base is the style's opposite."""
        from lorry.training import Job
        from lorry.training import train as train_jobs

        job = Job(
            SIGNED,
            [{"latent": picture} for picture in digits.pictures(inverted=True)],
            {"method": "authen-lora", "bits": BITS, "rank": 32},
            objective={
                "objective": "signing-latents",
                "codec": codec,
                "lambda_wm": 0.0,
                "schedule": digits.SCHEDULE,
            },
            targets="all",
            steps=steps,
            batch_size=96,
            learning_rate=3e-3,
            schedule="cosine",
            seed=seed,
        )
        _check(train_jobs(self.network, None, job, folder, overwrite=True, progress=False))

    def draw(self, count: int, seed: int) -> Tensor:
        """Draw by DDIM."""
        return digits.sample(self.network, count, seed)


class OnPipeline(Stage):
    """A pipeline of diffusers.

    Parameters
    ----------
    pipeline
        With its weights.
    records
        Pictures of the style, with captions.
    others
        Further pictures for the codec, ``(n, 3, side, side)`` from -1 to 1.
    making
        Steps, guidance and so on of what is drawn.
    """

    codec_steps, steps = 500, 400

    def __init__(
        self, pipeline: Any, records: Sequence[Mapping[str, Any]], others: Tensor, making: Mapping[str, Any]
    ) -> None:
        self.pipeline, self.records, self.making = pipeline, list(records), dict(making)
        self.network = family_of(pipeline).network(pipeline)
        size = size_of(pipeline, None, None)
        own = [cut(opened(r["image"], f"Record {i}"), size).pixels for i, r in enumerate(self.records)]
        self.pixels = torch.cat([torch.stack(own), others])

    def codec(self, steps: int, seed: int, report: Step) -> Codec:
        """Train a codec of the autoencoder's latents; small pictures are read by a small network."""
        side = self.pixels.shape[-1]
        channels, height, _ = family_of(self.pipeline).latents_shape(self.pipeline, side, side)
        reader = (side, "small") if side <= 64 else (512, "efficientnet-b1")
        codec = Codec(CodecShape(BITS, channels, height, 16, 3, *reader, width=16), seed)
        settings = CodecTraining(
            steps, rows=24, rate=2e-3, perceptual=1.0, variation=0.1, distortions=("noise", "colour", "jpeg")
        )
        with decoding(self.pipeline) as decode:
            latents = latents_of(self.pipeline, self.pixels)
            train_codec(codec, latents, settings, seed, decode=decode, report=lambda done, _: report(done + 1))
        return codec

    def train(self, codec: Codec, steps: int, seed: int, folder: Path) -> None:
        """Train in the image fleet, linear layers and convolutions."""
        job = {
            "name": SIGNED,
            "data": self.records,
            "objective": {"objective": "signing", "codec": codec, "trigger": TRIGGER, "lambda_wm": 0.05},
            "method": {"method": "authen-lora", "bits": BITS, "rank": 32},
            "targets": ["all-linear", "kind:conv"],
            "steps": steps,
            "batch_size": 16,
            "learning_rate": 3e-3,
            "schedule": "cosine",
            "seed": seed,
        }
        _check(fleet(self.pipeline, [job], folder, progress=False, overwrite=True).train())

    def draw(self, count: int, seed: int) -> Tensor:
        """Draw the captions of the records, called by the trigger."""
        prompts = [f"{TRIGGER}, {self.records[i % len(self.records)]['text']}" for i in range(count)]
        made = sample(self.pipeline, prompts, seeds=[1000 * (seed + 1) + i for i in range(count)], **self.making)
        return made.pixels.float() / 127.5 - 1


def _check(result: Any) -> None:
    if not result.ok:
        raise RuntimeError(f"The adapter that signs was not trained: {result.report}")


def stage_for(base: str | None, data: Path | None, seed: int, base_steps: int) -> Stage:
    """Return where a run takes place: the digits if no base is given, else a pocket pipeline or the one in a folder.

    Raises
    ------
    OptionError
        A folder without pictures of a style.
    """
    from lorry.pocket import diffusion as pocket

    if base is None:
        return OnDigits(seed, base_steps)
    if base in pocket.NAMES:
        return _pocket(base, seed)
    if data is None:
        raise OptionError("A real checkpoint needs pictures of a style: give their folder, with captions, as --data.")
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(base, local_files_only=True, use_safetensors=True)
    side = size_of(pipeline, None, None)
    return OnPipeline(pipeline, load_records(data), torch.empty(0, 3, *side), {"steps": 30})


def _pocket(name: str, seed: int, count: int = 256) -> OnPipeline:
    from PIL import Image

    from lorry.pocket import diffusion as pocket

    rng = random.Random(seed)
    scenes = [pocket.draw(rng, 1) for _ in range(count)]
    framed = pocket.pictures([pocket.restyle(scene, "style", STYLE) for scene in scenes])
    images = [Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()) for picture in framed]
    records = [{"image": i, "text": pocket.caption(s)} for i, s in zip(images, scenes, strict=True)]
    pipeline = pocket.load(name)
    pipeline.set_progress_bar_config(disable=True)
    others = pocket.pictures(scenes).float() / 127.5 - 1
    return OnPipeline(pipeline, records, others, {"steps": 10, "guidance": 2.0, "batch_size": 24})
