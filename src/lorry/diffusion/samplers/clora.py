"""CLoRA: every concept in its own place, by a contrast between attention maps while pictures are made.

Meral, Simsar, Tombari, Yanardag: Contrastive Test-Time Composition of Multiple LoRA Models for Image Generation (ICCV
2025, arXiv 2403.19776). Each adapter predicts in a branch of its own, with a prompt of its own. A step moves the
latents so that the maps of one concept's words agree across branches, and those of different concepts part; then masks
of the maps say which branch's prediction holds where. Nothing is trained but the latents.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorry.core.errors import OptionError
from lorry.core.options import option
from lorry.diffusion.conditions import Conditions
from lorry.diffusion.families import family_of
from lorry.diffusion.samplers.base import Course, Sampler, Wanted, adapters_of, register_sampler
from lorry.diffusion.samplers.parts.attention_maps import MapStore, MapWatch, find_map_sites
from lorry.diffusion.samplers.parts.branches import Branch, branches_of, encoded_branches
from lorry.diffusion.samplers.parts.contrast import normed_maps, nt_xent
from lorry.diffusion.samplers.parts.frozen import frozen
from lorry.diffusion.samplers.parts.masks import MORPHOLOGY, blended, branch_masks, enlarged
from lorry.diffusion.samplers.parts.names import check_names
from lorry.diffusion.samplers.parts.passes import guided, halves, rows_of
from lorry.diffusion.sampling import Step


@register_sampler("clora", paper="arXiv 2403.19776")
@dataclass(frozen=True)
class CLoRA(Sampler):
    """Contrast between attention maps, and masks made of them."""

    concepts: Mapping[str, str] = option(
        dataclasses.MISSING,
        "Adapter -> the words of the prompt that it is about; adapters without any are styles, and apply everywhere.",
    )
    triggers: Mapping[str, str] | None = option(
        None, "Adapter -> words that stand in the place of its concept's in its own branch, such as 'sks cat'."
    )
    rate: float = option(20.0, "η: the step of the latents down the loss; 0 moves nothing.")
    until: int = option(30, "Latents are moved at steps before this one.", at_least=0)
    repeat_at: tuple[int, ...] = option((), "Steps at which latents are moved several times more.")
    repeats: int = option(20, "How many times more.", at_least=0)
    temperature: float = option(0.5, "Of the contrast.", above=0)
    threshold: float = option(
        0.3, "θ: a word claims where its map is above this share of its largest value.", at_least=0, at_most=1
    )
    morphology: str = option("none", "What is done to the masks of claims.", choices=MORPHOLOGY)
    masks_after: int = option(0, "Before this step all branches count alike everywhere.", at_least=0)
    divisor: int | None = option(
        None,
        "How many times smaller than the latents maps are; the one nearest to 4 that there is if left out.",
        at_least=1,
    )
    targets: tuple[str, ...] = option((), "Patterns of attention sites whose maps are used; all that fit if left out.")
    averaged: str = option(
        "both",
        "Whether maps are the mean of both halves of a guided pass (the released code), or of that with the prompt.",
        choices=("both", "prompt"),
    )
    text_encoders: bool = option(False, "Whether a branch's own adapter applies in the text encoders, too.")
    at_once: int = option(
        1,
        "How many branches go through the network, and hold graphs for gradients, at once; 0 for all. If not all, "
        "branches are run a second time for their gradients.",
        at_least=0,
    )

    def check(self) -> None:
        """Check that there are concepts, and that triggers belong to them."""
        for name, values in (("concepts", self.concepts), ("triggers", self.triggers or {})):
            if not isinstance(values, Mapping) or not all(isinstance(word, str) and word for word in values.values()):
                raise OptionError(f"'{name}' gives words for each adapter, as in {{'a': 'cat'}}; found {values!r}.")
        if not self.concepts:
            raise OptionError("There is no concept; name at least one adapter with its words, as in {'a': 'cat'}.")
        lone = [name for name in self.triggers or {} if name not in self.concepts]
        if lone:
            raise OptionError(f"'{lone[0]}' has a trigger, but no concept whose place it takes; give it one.")

    @contextmanager
    def begin(self, pipeline: Any, orders: Sequence[Wanted]) -> Iterator[Course]:
        """Begin with a batch."""
        pictures = [adapters_of(order.composition) for order in orders]
        check_names("concepts", self.concepts, pictures)
        kept = [name for name in ("model_outputs", "ets", "derivatives") if hasattr(pipeline.scheduler, name)]
        if kept and self.rate:
            warnings.warn(
                f"{type(pipeline.scheduler).__name__} keeps predictions of earlier steps, which do not know that "
                "latents were moved since. Take a scheduler that keeps none, such as DDIM.",
                stacklevel=3,
            )
        found = [
            branches_of(pipeline, order.prompt, adapters, self.concepts, self.triggers or {})
            for order, adapters in zip(orders, pictures, strict=True)
        ]
        with frozen(family_of(pipeline).network(pipeline)), ExitStack() as stack:
            yield _Contrast(self, pipeline, [o.negative for o in orders], found, stack)


@dataclass
class _Picture:
    """One picture under way."""

    branches: tuple[Branch, ...]
    negative: str | None
    conditions: tuple[Conditions, Conditions | None] | None = None
    losses: list[float] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)
    passes: int = 0


class _Contrast:
    """A batch under way; its pictures have nothing to do with each other."""

    def __init__(
        self,
        options: CLoRA,
        pipeline: Any,
        negatives: Sequence[str | None],
        branches: Sequence[tuple[Branch, ...]],
        stack: ExitStack,
    ) -> None:
        self._options = options
        self._pipeline = pipeline
        self._pictures = [_Picture(each, negative) for each, negative in zip(branches, negatives, strict=True)]
        self._stack = stack
        self._watch: MapWatch | None = None

    def predict(self, step: Step) -> Tensor:
        """Return the guided predictions; `step.latents` become those that were moved."""
        options = self._options
        moving = options.rate != 0 and step.number < options.until
        if self._watch is None and (moving or step.number >= options.masks_after):
            sites = find_map_sites(rows_of(step, [0]), options.divisor, options.targets or None)
            self._watch = self._stack.enter_context(MapWatch(step.network, sites))
        found = [self._predict(self._branch_step(step, row), picture) for row, picture in enumerate(self._pictures)]
        step.latents = torch.cat([latents for _, latents in found])
        return torch.cat([prediction for prediction, _ in found])

    def reports(self) -> list[dict[str, Any]]:
        """Return for each picture prompts and adapters of its branches, the masks after each step
        ``(branches, height, width)``, the loss before each move, and passes of branches.
        """
        return [
            {
                "branches": [(branch.adapter, branch.prompt) for branch in picture.branches],
                "masks": picture.masks,
                "losses": picture.losses,
                "passes": picture.passes,
            }
            for picture in self._pictures
        ]

    def _branch_step(self, step: Step, row: int) -> Step:
        """Return the step of one picture, a row for each branch; its latents are one row still."""
        picture = self._pictures[row]
        rows = rows_of(step, [row] * len(picture.branches))
        if picture.conditions is None:
            picture.conditions = encoded_branches(
                self._pipeline,
                picture.branches,
                picture.negative,
                own_text=self._options.text_encoders,
                guided=step.negative is not None,
            )
        wanted, unwanted = picture.conditions
        negative = None
        if rows.negative is not None and unwanted is not None:
            negative = rows.negative.with_(**unwanted.tensors)
        return dataclasses.replace(
            rows, latents=rows.latents[:1], conditions=rows.conditions.with_(**wanted.tensors), negative=negative
        )

    def _predict(self, step: Step, picture: _Picture) -> tuple[Tensor, Tensor]:
        options, latents = self._options, step.latents
        moving = options.rate != 0 and step.number < options.until and len(picture.branches) > 1
        masking = step.number >= options.masks_after
        times = 1 + (options.repeats if step.number in options.repeat_at else 0) if moving else 1
        for _ in range(times):
            if moving:
                predictions, maps, latents = self._moved(step, picture, latents)
            else:
                predictions, maps = self._run(step, picture, latents, looking=masking)
        masks = self._masks(picture, maps, step.latents) if masking else None
        if masks is None:
            masks = step.latents.new_ones(len(picture.branches), *step.latents.shape[-2:])
        picture.masks.append(masks.bool())
        fused = blended([predictions[:, j] for j in range(len(picture.branches))], list(masks.to(predictions.dtype)))
        return guided(step, fused.unsqueeze(1)), latents

    def _masks(self, picture: _Picture, maps: Tensor, latents: Tensor) -> Tensor:
        """Return where each branch holds, at the size of the latents."""
        options = self._options
        claims = [branch.claims for branch in picture.branches]
        return enlarged(branch_masks(list(maps), claims, options.threshold, options.morphology), *latents.shape[-2:])

    def _moved(self, step: Step, picture: _Picture, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return predictions and maps of the latents, and the latents one step down the loss."""
        every = list(range(len(picture.branches)))
        size = self._options.at_once or len(every)
        whole = size >= len(every)
        with torch.set_grad_enabled(whole):
            start = latents.detach().requires_grad_(whole)
            predictions, maps = self._run(step, picture, start, looking=True)
        with torch.enable_grad():
            ends = maps if whole else maps.detach().requires_grad_()
            loss = contrast(ends, picture.branches, self._options.temperature)
            gradient = torch.autograd.grad(loss, start if whole else ends)[0]
            if not whole:
                gradient = self._pulled(step, picture, latents, gradient, size)
        picture.losses.append(float(loss.detach()))
        return predictions.detach(), maps.detach(), latents - self._options.rate * gradient.to(latents.dtype)

    def _pulled(self, step: Step, picture: _Picture, latents: Tensor, pulls: Tensor, size: int) -> Tensor:
        """Return the gradient of the latents from that of the maps, with the graphs of a few branches at a time."""
        total = torch.zeros_like(latents)
        for first in range(0, len(pulls), size):
            part = list(range(first, min(first + size, len(pulls))))
            again = latents.detach().requires_grad_()
            _, maps = self._chunk(step, picture, again, part, looking=True)
            total += torch.autograd.grad(maps, again, pulls[part])[0]
        return total

    def _run(self, step: Step, picture: _Picture, latents: Tensor, *, looking: bool) -> tuple[Tensor, Tensor]:
        """Return predictions ``(1 or 2, branches, ...)`` and maps ``(branches, height, width, tokens)``."""
        every = list(range(len(picture.branches)))
        size = self._options.at_once or len(every)
        parts = [every[first : first + size] for first in range(0, len(every), size)]
        found = [self._chunk(step, picture, latents, part, looking=looking) for part in parts]
        return torch.cat([each for each, _ in found], 1), torch.cat([maps for _, maps in found])

    def _chunk(
        self, step: Step, picture: _Picture, latents: Tensor, part: Sequence[int], *, looking: bool
    ) -> tuple[Tensor, Tensor]:
        """Run some branches."""
        rows = rows_of(step, part, latents.expand(len(step.conditions["text"]), *latents.shape[1:]))
        stores: dict[str, MapStore] = {}

        def around(half: str, copies: int) -> AbstractContextManager[None]:
            prompt_alone = self._options.averaged == "prompt"
            if not looking or (half == "unwanted" and prompt_alone):
                return nullcontext()
            assert self._watch is not None
            # both halves lie in one batch, that without the prompt first
            kept = slice(len(part) if half == "both" and prompt_alone else 0, None)
            stores[half] = MapStore(self._watch.sites, rows.conditions["text"].shape[1], kept)
            return self._watch.into(stores[half])

        picture.passes += len(part)
        applies = [picture.branches[j].composition or None for j in part]
        predictions = halves(rows, applies, around)
        if not looking:
            return predictions, latents.new_empty(len(part))
        maps = [store.maps().unflatten(0, (-1, len(part))) for store in stores.values()]
        return predictions, torch.cat(maps).mean(0)


def contrast(maps: Tensor, branches: Sequence[Branch], temperature: float) -> Tensor:
    """Return the contrastive loss of the maps of all concepts' words in all branches.

    Parameters
    ----------
    maps
        ``(branches, height, width, tokens)``.
    branches
        With the places of the words.
    temperature
        Of the contrast.
    """
    concepts = list(branches[0].words)
    chosen = [
        (label, maps[j, :, :, token].flatten())
        for label, concept in enumerate(concepts)
        for j, branch in enumerate(branches)
        for token in branch.words[concept]
    ]
    return nt_xent(normed_maps(torch.stack([each for _, each in chosen])), [label for label, _ in chosen], temperature)
