"""A detector over aligned pairs of pictures: two backbones, fusion at each scale, a neck, torchvision's FCOS head."""

from __future__ import annotations

import functools
import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorry.core.errors import CheckpointError, OptionError
from lorry.core.life.adapter import Adapter
from lorry.core.life.api import attach
from lorry.kernels import vision
from lorry.training.checkpoint import write_json

from .focus import BiFocus
from .fusion import DEA, PATHS, VARIANTS, Sum, one_of
from .layers import Conv, Stage

#: ``dea`` as published; the sum of both maps; one backbone over six channels; one modality, the other ignored.
FUSIONS = ("dea", "sum", "early", "rgb", "ir")
#: The published widths of the strides 2 to 32, by size.
WIDTHS = {
    "n": (16, 32, 64, 128, 256),
    "s": (32, 64, 128, 256, 512),
    "m": (48, 96, 192, 384, 576),
    "l": (64, 128, 256, 512, 512),
    "x": (80, 160, 320, 640, 640),
}
#: Channels of the groups of the head's normalisation.
GROUP = 8
WEIGHTS, OPTIONS = "model.safetensors", "deyolo.json"


@dataclass(frozen=True)
class Options:
    """What a detector is made of.

    Attributes
    ----------
    classes
        Names of what is to be found.
    fusion
        One of `FUSIONS`.
    variant, path, crossed
        Of the fusion; see `lorry.systems.deyolo.fusion.DECA`.
    size
        Longer side of the pictures, to which they are brought; with it goes the expected size of the maps.
    widths
        Channels at strides 2, 4, 8, ...; `WIDTHS` has the published ones.
    levels
        How many of the last strides are fused and searched.
    steps, reduction
        See `lorry.systems.deyolo.fusion.DECA`; the published pair, (5, 4), goes with 640 pixels.
    blocks
        Residual blocks of a stage.
    neck
        Channels of the neck and the head, a multiple of 8.
    head
        Convolutions of the head.
    """

    classes: tuple[str, ...]
    fusion: str = "dea"
    variant: str = "code"
    path: str = "auto"
    crossed: bool = True
    size: int = 64
    widths: tuple[int, ...] = (8, 16, 16, 16)
    levels: int = 2
    steps: tuple[int, int] = (2, 2)
    reduction: int = 4
    blocks: int = 1
    neck: int = 16
    head: int = 1

    def __post_init__(self) -> None:
        """Refuse what does not fit together.

        Raises
        ------
        OptionError
            Which option, and why.
        """
        one_of("fusion", self.fusion, FUSIONS)
        one_of("variant", self.variant, VARIANTS)
        one_of("path", self.path, PATHS)
        if not self.classes or len(set(self.classes)) < len(self.classes):
            raise OptionError(f"Expected the names of classes, each once, found {list(self.classes)}.")
        if not 1 <= self.levels <= len(self.widths) - 2:
            raise OptionError(
                f"The option levels is {self.levels}; expected 1 to {len(self.widths) - 2} with {len(self.widths)} "
                "widths: maps are searched from stride 8 on."
            )
        if self.size % (2 * self.strides[-1]):
            raise OptionError(f"The option size is {self.size}, no multiple of twice the stride {self.strides[-1]}.")
        if self.neck % GROUP or any(width % 2 for width in self.widths):
            raise OptionError(
                f"The option neck is {self.neck}; expected a multiple of {GROUP}, and even widths, found {self.widths}."
            )

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the maps that are searched."""
        return tuple(2 ** (i + 1) for i in range(len(self.widths)))[-self.levels :]


class Backbone(nn.Module):
    """Maps of one input at several strides, with a bi-directional focus at stride 4.

    Parameters
    ----------
    inputs
        Channels of the picture.
    options
        Widths, blocks and levels.
    """

    def __init__(self, inputs: int, options: Options) -> None:
        super().__init__()
        self.levels = options.levels
        widths = options.widths
        self.stem = Conv(inputs, widths[0], 3, 2)
        self.steps = nn.ModuleList()
        for i, (before, width) in enumerate(zip(widths, widths[1:], strict=False)):
            parts: list[nn.Module] = [Conv(before, width, 3, 2), Stage(width, options.blocks)]
            self.steps.append(nn.Sequential(*parts, *([BiFocus(width)] if i == 0 else [])))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Pictures ``(pictures, inputs, height, width)`` to a map for each of the last strides."""
        x, maps = self.stem(x), []
        for step in self.steps:
            x = step(x)
            maps.append(x)
        return maps[-self.levels :]


class Neck(nn.Module):
    """What is seen at each stride goes down to the finer ones, and back up.

    Parameters
    ----------
    widths
        Channels of the maps, fine to coarse.
    channels
        Of all maps that come out.
    """

    def __init__(self, widths: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.enter = nn.ModuleList(Conv(width, channels, 1) for width in widths)
        self.down = nn.ModuleList(Conv(2 * channels, channels, 3) for _ in widths[1:])
        self.halve = nn.ModuleList(Conv(channels, channels, 3, 2) for _ in widths[1:])
        self.up = nn.ModuleList(Conv(2 * channels, channels, 3) for _ in widths[1:])

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """One map for each stride, in and out, fine to coarse."""
        found = [enter(each) for enter, each in zip(self.enter, maps, strict=True)]
        for i in reversed(range(len(self.down))):
            coarse = nn.functional.interpolate(found[i + 1], size=found[i].shape[-2:])
            found[i] = self.down[i](torch.cat([found[i], coarse], 1))
        for i, (halve, up) in enumerate(zip(self.halve, self.up, strict=True)):
            found[i + 1] = up(torch.cat([halve(found[i]), found[i + 1]], 1))
        return found


class PairBackbone(nn.Module):
    """Six channels, RGB first, to the maps that a head searches.

    Attributes
    ----------
    out_channels
        Of each map, as torchvision's detectors ask.
    """

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.fusion, self.out_channels = options.fusion, options.neck
        widths = options.widths[-options.levels :]
        inputs = 6 if self.fusion == "early" else 3
        self.first = Backbone(inputs, options)
        if self.fusion in ("dea", "sum"):
            self.second = Backbone(inputs, options)
            self.fuse = nn.ModuleList(_fuse(options, w, s) for w, s in zip(widths, options.strides, strict=True))
        self.neck = Neck(widths, options.neck)

    def forward(self, pairs: Tensor) -> OrderedDict[str, Tensor]:
        """Pairs ``(pairs, 6, height, width)`` to maps by name, fine to coarse."""
        rgb, infrared = pairs.split(3, 1)
        if self.fusion in ("dea", "sum"):
            both = zip(self.fuse, self.first(rgb), self.second(infrared), strict=True)
            maps = [fuse(a, b) for fuse, a, b in both]
        else:
            maps = self.first({"early": pairs, "rgb": rgb, "ir": infrared}[self.fusion])
        return OrderedDict((str(i), each) for i, each in enumerate(self.neck(maps)))


def _fuse(options: Options, width: int, stride: int) -> nn.Module:
    if options.fusion == "sum":
        return Sum()
    return DEA(
        width,
        options.size // stride,
        options.steps,
        reduction=options.reduction,
        variant=options.variant,
        path=options.path,
        crossed=options.crossed,
    )


def torchvision() -> Any:
    """Return torchvision, able to suppress boxes whichever build it is.

    Raises
    ------
    OptionError
        It is not installed.
    """
    try:
        import torchvision as found
        from torchvision import extension
    except ImportError as error:
        raise OptionError(f"Detection needs torchvision: pip install 'lorry[detection]' ({error}).") from None
    if vision.complete():
        extension._has_ops = vision.complete  # it asks before each call whether its own library was loaded
    return found


def detector(options: Options, seed: int = 0) -> nn.Module:
    """Return a fresh detector.

    Parameters
    ----------
    options
        What it is made of.
    seed
        Of its weights.

    Returns
    -------
    nn.Module
        torchvision's ``FCOS``: given lists of pairs ``(6, height, width)`` within 0 to 1, and while training of targets
        (``boxes`` as corners in pixels, ``labels`` from 0), it returns losses by name, else boxes, labels and scores.
    """
    torchvision()
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.fcos import FCOS, FCOSClassificationHead, FCOSHead, FCOSRegressionHead

    norm: Callable[[int], nn.Module] = functools.partial(nn.GroupNorm, options.neck // GROUP)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = PairBackbone(options)
        head = FCOSHead(32, 1, len(options.classes), 1)  # 32: its own parts have that many groups; they are replaced
        head.classification_head = FCOSClassificationHead(
            options.neck, 1, len(options.classes), options.head, norm_layer=norm
        )
        head.regression_head = FCOSRegressionHead(options.neck, 1, options.head, norm_layer=norm)
    nn.init.ones_(head.regression_head.bbox_reg.bias)  # a ReLU follows: boxes of a cell's size, not of none
    model: nn.Module = FCOS(
        backbone,
        len(options.classes),
        min_size=options.size,
        max_size=options.size,
        size_divisible=2 * options.strides[-1],
        image_mean=[0.5] * 6,
        image_std=[0.25] * 6,
        anchor_generator=AnchorGenerator(tuple((s,) for s in options.strides), ((1.0,),) * options.levels),
        head=head,
        score_thresh=0.05,
    )
    return model


def adapted(model: nn.Module, rank: int = 4, alpha: float = 8.0, name: str = "default", seed: int = 0) -> Adapter:
    """Attach a LoRA to every ordinary convolution with enough channels, and freeze the rest; an addition of ours.

    Left out are convolutions by channel and those to fewer channels than the rank, as in the weights of pixels.

    Parameters
    ----------
    model
        A detector.
    rank, alpha, name, seed
        Of the adapter.
    """
    targets = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups == 1 and module.out_channels >= rank
    ]
    return attach(model, {"method": "lora", "rank": rank, "alpha": alpha}, targets=targets, name=name, seed=seed)


def save(model: nn.Module, options: Options, folder: Path) -> None:
    """Write a detector with its options into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{WEIGHTS}"
    save_file({name: each.contiguous() for name, each in model.state_dict().items()}, str(aside))
    aside.replace(folder / WEIGHTS)
    write_json(folder / OPTIONS, asdict(options))


def load(folder: Path) -> tuple[nn.Module, Options]:
    """Read a detector that `save` wrote.

    Raises
    ------
    CheckpointError
        A file is missing, damaged, or does not fit the options.
    """
    try:
        values = json.loads((folder / OPTIONS).read_text(encoding="utf-8"))
        listed: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        options = Options(**listed)
        weights = load_file(str(folder / WEIGHTS))
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} holds no detector, which is {WEIGHTS} beside {OPTIONS}: {type(error).__name__}: {error}"
        ) from None
    model = detector(options)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"The weights in {folder} do not fit its options: {error}") from None
    return model, options
