"""Adapting CLIP to few pictures of each class: both encoders learn, with one prompt for each class name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorry.core.errors import LorryError
from lorry.core.life import api
from lorry.core.life.adapter import Adapter

from .folder import Pictures

#: Of both encoders of transformers' CLIP.
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_ENCODERS = {"both": ("text_model", "vision_model"), "text": ("text_model",), "vision": ("vision_model",)}
#: Pictures that are judged at once.
BATCH = 100


@dataclass(frozen=True)
class Recipe:
    """How CLIP is adapted; the values are CLIP-LoRA's but for the steps, which it has 500 of for each shot.

    Attributes
    ----------
    method
        A method with its options.
    template
        A prompt with ``{}`` in the place of the class name.
    steps, rows, rate
        Optimizer steps, pictures of each, and the learning rate that falls as a cosine.
    ratio
        Factor of the rate of the tensors ``B``.
    decay
        Decoupled weight decay.
    encoder
        ``both``, ``text`` or ``vision``.
    projections
        Names of the linear layers of attention.
    """

    method: Mapping[str, Any] = field(default_factory=lambda: {"method": "block-lora", "dropout": 0.25})
    template: str = "a photo of a {}"
    steps: int = 500
    rows: int = 32
    rate: float = 2e-4
    ratio: float = 1.0
    decay: float = 1e-2
    encoder: str = "both"
    projections: tuple[str, ...] = PROJECTIONS

    def __post_init__(self) -> None:
        """Refuse a template without a place, and an encoder that there is not."""
        if self.template.count("{}") != 1:
            raise LorryError(f"A template has one {{}} in the place of the class name, found {self.template!r}.")
        if self.encoder not in _ENCODERS:
            raise LorryError(f"Expected the encoder {', '.join(_ENCODERS)}, found {self.encoder!r}: name one of them.")

    @property
    def targets(self) -> list[str]:
        """Patterns of the adapted layers."""
        return [f"{part}.*.{name}" for part in _ENCODERS[self.encoder] for name in self.projections]


def load_base(folder: str | Path) -> tuple[Any, Any]:
    """Load a CLIP and its processor from a folder of transformers, in float32 and eval mode.

    Raises
    ------
    LorryError
        The folder holds no CLIP.
    """
    from transformers import AutoConfig, AutoProcessor, CLIPModel

    path = Path(folder)
    if not (path / "config.json").is_file():
        raise LorryError(f"There is no config.json in {path}: give the folder of a CLIP of transformers.")
    kind = AutoConfig.from_pretrained(path, local_files_only=True).model_type
    if kind != "clip":
        raise LorryError(f"{path} holds a model of type '{kind}': expected a CLIP (model_type 'clip').")
    model = CLIPModel.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoProcessor.from_pretrained(path, local_files_only=True)


def prompts(processor: Any, names: tuple[str, ...], template: str) -> dict[str, Tensor]:
    """Return the tokens of a prompt for each class."""
    texts = [template.format(name) for name in names]
    found = processor.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def logits_of(model: nn.Module, texts: Mapping[str, Tensor], pixels: Tensor) -> Tensor:
    """Return scaled cosines ``(pictures, classes)`` in float32."""
    found: Tensor = model(**texts, pixel_values=pixels).logits_per_image
    return found.float()


@torch.no_grad()
def accuracy(model: nn.Module, processor: Any, data: Pictures, template: str) -> float:
    """Return the share of pictures whose own class has the nearest prompt, with whatever adapter is active."""
    texts, right = prompts(processor, data.names, template), 0
    for start in range(0, len(data), BATCH):
        part = slice(start, start + BATCH)
        right += int((logits_of(model, texts, data.pixels[part]).argmax(-1) == data.labels[part]).sum())
    return right / len(data)


@torch.no_grad()
def features(model: Any, data: Pictures) -> Tensor:
    """Return unit vectors of pictures, ``(pictures, width)``."""
    found = []
    for start in range(0, len(data), BATCH):
        pooled = model.vision_model(pixel_values=data.pixels[start : start + BATCH]).pooler_output
        found.append(F.normalize(model.visual_projection(pooled).float(), dim=-1))
    return torch.cat(found)


def linear_probe(model: Any, train: Pictures, test: Pictures) -> float:
    """Return the accuracy of scikit-learn's logistic regression on the features of pictures, the text not used."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(features(model, train).numpy())
    inputs = [scaler.transform(features(model, part).numpy()) for part in (train, test)]
    probe = LogisticRegression(max_iter=1000, C=0.1).fit(inputs[0], train.labels.numpy())
    return float(probe.score(inputs[1], test.labels.numpy()))


def adapt(
    model: nn.Module, processor: Any, data: Pictures, recipe: Recipe, *, seed: int = 0, name: str = "fewshot"
) -> Adapter:
    """Attach an adapter to both encoders and train it by the cross-entropy of scaled cosines over all classes.

    Parameters
    ----------
    model, processor
        A ``CLIPModel`` and its processor.
    data
        The shots.
    recipe
        How.
    seed
        Of the adapter's start, its dropout and the order of the pictures.
    name
        Of the adapter.

    Returns
    -------
    Adapter
        Active, in eval mode.
    """
    adapter = api.attach(model, recipe.method, targets=recipe.targets, name=name, seed=seed)
    named = dict(adapter.named_parameters())
    ups = [value for key, value in named.items() if key.endswith(".B")]
    downs = [value for key, value in named.items() if not key.endswith(".B")]
    groups = [{"params": downs, "lr": recipe.rate}, {"params": ups, "lr": recipe.ratio * recipe.rate}]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], weight_decay=recipe.decay, betas=(0.9, 0.999)
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps, eta_min=1e-6)
    texts = prompts(processor, data.names, recipe.template)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(recipe.steps):
            picked = torch.randint(len(data), (recipe.rows,), generator=generator)
            loss = F.cross_entropy(logits_of(model, texts, data.pixels[picked]), data.labels[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    return adapter
