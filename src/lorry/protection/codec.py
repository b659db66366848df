"""The codec: a message becomes a residual that is added to latents, and is read from pictures again (stage 1).

The shapes are those of AquaLoRA (arXiv 2405.11135), whose codec AuthenLoRA (arXiv 2511.21216) shares.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from lorry.core.errors import CheckpointError, OptionError
from lorry.core.options import check_options, from_options, option
from lorry.formats.folders import write_folder

TENSORS, FACTS = "codec.safetensors", "codec.json"
_DECODERS = ("small", "efficientnet-b1")


@dataclass(frozen=True)
class CodecShape:
    """What a codec is made for.

    Raises
    ------
    OptionError
        A value out of its range.
    """

    bits: int = option(48, "Length of the messages.", at_least=1)
    channels: int = option(4, "Channels of the latents that the residual is added to.", at_least=1)
    size: int = option(64, "Height and width of these latents; others get the residual resized.", at_least=2)
    grid: int = option(32, "Side of the square that the message is first spread over.", at_least=2)
    picture_channels: int = option(3, "Channels of the pictures that messages are read from.", at_least=1)
    picture_size: int = option(512, "Side that pictures are resized to before they are read.", at_least=4)
    decoder: str = option("efficientnet-b1", "Network that reads; small is for small pictures.", choices=_DECODERS)
    width: int = option(32, "Channels of the small network.", at_least=4)
    zero: str = option(
        "clean",
        "What the zero message is: pictures without residual, or a message like others.",
        choices=("clean", "marked"),
    )

    def __post_init__(self) -> None:
        """Check every option against its range."""
        check_options(self)


class MessageEncoder(nn.Module):
    """A residual for each message, whatever the picture is; zero at the start."""

    def __init__(self, shape: CodecShape) -> None:
        super().__init__()
        self.shape = shape
        self.spread = nn.Linear(shape.bits, shape.grid**2)
        self.last = nn.Conv2d(shape.channels, shape.channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, message: Tensor) -> Tensor:
        """Return the residual ``(rows, channels, size, size)`` of messages ``(rows, bits)``."""
        grid = self.shape.grid
        plane = F.silu(self.spread(message)).view(-1, 1, grid, grid).expand(-1, self.shape.channels, -1, -1)
        residual = self.last(F.interpolate(plane, scale_factor=2.0))
        return F.interpolate(residual, (self.shape.size,) * 2, mode="bilinear", align_corners=False)


class SmallReader(nn.Module):
    """Three convolutions and two linear layers, for pictures of a few dozen pixels a side."""

    def __init__(self, shape: CodecShape) -> None:
        super().__init__()
        width, side = shape.width, -(-shape.picture_size // 2)
        self.layers = nn.Sequential(
            nn.Conv2d(shape.picture_channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(width * side**2, 4 * width),
            nn.SiLU(),
            nn.Linear(4 * width, 2 * shape.bits),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        """Return ``(rows, 2 bits)``."""
        found: Tensor = self.layers(pictures)
        return found


class EfficientReader(nn.Module):
    """EfficientNet-B1 with a linear head."""

    def __init__(self, shape: CodecShape) -> None:
        super().__init__()
        from transformers import EfficientNetConfig, EfficientNetModel

        config = EfficientNetConfig(
            num_channels=shape.picture_channels,
            image_size=shape.picture_size,
            width_coefficient=1.0,
            depth_coefficient=1.1,
            hidden_dim=1280,
            dropout_rate=0.2,
        )
        self.trunk: Any = EfficientNetModel(config)
        self.head = nn.Linear(1280, 2 * shape.bits)

    def forward(self, pictures: Tensor) -> Tensor:
        """Return ``(rows, 2 bits)``."""
        found: Tensor = self.head(self.trunk(pictures).pooler_output.flatten(1))
        return found


class Codec(nn.Module):
    """Writes messages into latents and reads them from pictures.

    Parameters
    ----------
    shape
        What it is made for.
    seed
        Of its start.
    """

    def __init__(self, shape: CodecShape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = MessageEncoder(shape)
            self.decoder = (SmallReader if shape.decoder == "small" else EfficientReader)(shape)

    def residual(self, message: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Return what is added to latents.

        Parameters
        ----------
        message
            ``(rows, bits)`` of zeros and ones.
        size
            Height and width of the latents; those that the codec was made for if not given.

        Returns
        -------
        Tensor
            ``(rows, channels, height, width)``; zeros for a zero message, where that stands for no residual.
        """
        message = message.to(self.encoder.spread.weight)
        found: Tensor = self.encoder(message)
        if self.shape.zero == "clean":
            found = found * (message.sum(1) > 0).to(found).view(-1, 1, 1, 1)
        if size is not None and tuple(size) != tuple(found.shape[-2:]):
            found = F.interpolate(found, size, mode="bilinear", align_corners=False)
        return found

    def logits(self, pictures: Tensor) -> Tensor:
        """Return scores of zero and one ``(rows, bits, 2)`` for pictures ``(rows, channels, h, w)`` from -1 to 1.

        Raises
        ------
        OptionError
            Pictures of another number of channels.
        """
        if pictures.ndim != 4 or pictures.shape[1] != self.shape.picture_channels:
            raise OptionError(
                f"The codec reads pictures (rows, {self.shape.picture_channels}, height, width), found "
                f"{tuple(pictures.shape)}."
            )
        side = (self.shape.picture_size,) * 2
        if tuple(pictures.shape[-2:]) != side:
            pictures = F.interpolate(pictures, side, mode="bilinear", align_corners=False)
        found: Tensor = self.decoder(pictures)
        return found.view(len(pictures), self.shape.bits, 2)

    @torch.no_grad()
    def read(self, pictures: Tensor) -> Tensor:
        """Return the messages ``(rows, bits)`` that pictures carry, as whole numbers."""
        training = self.training
        self.eval()
        found = self.logits(pictures).argmax(-1)
        self.train(training)
        return found

    def save(self, folder: str | os.PathLike[str]) -> str:
        """Write the codec as a folder, and return its `digest`; a reader of it must stay private."""
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        mark = digest(self)
        facts = {"codec": dataclasses.asdict(self.shape), "digest": mark}
        text = json.dumps(facts, indent=1).encode()
        write_folder(Path(folder), {TENSORS: save_bytes(tensors, {"digest": mark}), FACTS: text})
        return mark


def digest(codec: Codec) -> str:
    """Return a hash of a codec's shape and tensors."""
    state = hashlib.sha256(json.dumps(dataclasses.asdict(codec.shape), sort_keys=True).encode())
    for name, tensor in sorted(codec.state_dict().items()):
        state.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def load_codec(folder: str | os.PathLike[str]) -> Codec:
    """Return a codec that `Codec.save` wrote, ready to read.

    Raises
    ------
    CheckpointError
        The folder holds none, or one that was changed after it was written.
    """
    path = Path(folder)
    try:
        facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
        tensors = load_bytes((path / TENSORS).read_bytes())
        codec = Codec(from_options(CodecShape, facts["codec"]))
        codec.load_state_dict(tensors)
    except FileNotFoundError as error:
        raise CheckpointError(f"'{path}' holds no codec: {error.filename} is missing.") from None
    except (ValueError, KeyError, TypeError, RuntimeError, OSError, SafetensorError) as error:
        raise CheckpointError(f"The codec in '{path}' cannot be read: {error}.") from None
    if digest(codec) != facts.get("digest"):
        raise CheckpointError(f"The codec in '{path}' is not the one that was written: its digest differs.")
    return codec.eval()
