"""The task ``diffusion``: what a network of a pipeline is to predict of noisy pictures.

The model of the fleet is the network, its processor the pipeline. Autoencoder and text encoders run once, when examples
are made; afterwards an example is a distribution of latents with what the network is told of it (`Shot`). In each pass
a latent, noise and a time are drawn for it by the job's own generator (`Drawn`), so that the result does not depend on
other jobs, and evaluations see the same noise and times every time. With prior preservation an example is two rows:
the picture itself, and one of the prior's. The loss of an example is the mean over its latent of the weighted squared
error, plus `prior_weight` times that of the prior's row: the losses of diffusers' training examples.

Systems that train otherwise subclass `Diffusion` and override `weighed` (what is compared how), `shots` (what of a
record becomes an example) or `forward` (how the network is run).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from lorry.core.errors import near_misses
from lorry.core.options import check_options, option
from lorry.diffusion.conditions import Conditions, joined
from lorry.diffusion.data import CAPTION_COLUMNS, IMAGE_COLUMNS, Cut, bucket_of, buckets, cut, opened, prompt_of
from lorry.diffusion.families import Family, family_of
from lorry.diffusion.families.base import device_of
from lorry.diffusion.making import size_of
from lorry.diffusion.noise import DENSITIES, WEIGHTINGS, Diffused, Flowing, Times
from lorry.training.columns import find_column, value_at
from lorry.training.data import Record, load_records
from lorry.training.data_errors import DataError
from lorry.training.task import Batch, Examples, PlainReport, Setting, Task, digest, register_task


@dataclass(frozen=True, eq=False)
class Shot:
    """A picture as it is kept.

    Attributes
    ----------
    mean, std
        Of its latents, ``(channels, height, width)``.
    conditions
        What the network is told, one row.
    blank
        The same without a prompt, where prompts are dropped.
    mirrored
        The same picture mirrored, where pictures are.
    priors
        Pictures of the same size that are to stay as they are.
    """

    mean: Tensor
    std: Tensor
    conditions: Conditions
    blank: Conditions | None = None
    mirrored: tuple[Tensor, Tensor] | None = None
    priors: tuple[Shot, ...] = field(default=(), repr=False)

    @property
    def size(self) -> tuple[int, ...]:
        """Height and width of its latents."""
        return tuple(self.mean.shape[1:])


@dataclass(frozen=True, eq=False)
class Drawn:
    """A picture as a pass sees it.

    Attributes
    ----------
    noisy, target
        What the network sees and is to predict, ``(rows, channels, height, width)``; the second row is the prior's.
    times, weights
        ``(rows,)``.
    conditions
        Of the rows.
    """

    noisy: Tensor
    target: Tensor
    times: Tensor
    weights: Tensor
    conditions: Conditions

    @property
    def size(self) -> tuple[int, ...]:
        """Height and width of its latents."""
        return tuple(self.noisy.shape[2:])


@register_task
@dataclass(frozen=True)
class Diffusion(Task):
    """What a network of a diffusion pipeline predicts of noisy pictures."""

    name: ClassVar[str] = "diffusion"
    unit: ClassVar[str] = "pictures"
    image_column: str | None = option(None, "Column of the picture; guessed if not named.")
    caption_column: str | None = option(None, "Column of the caption; guessed if not named, and may be missing.")
    prompt: str | None = option(None, "Prompt with {caption} and {trigger}; trigger and caption if not given.")
    trigger: str | None = option(None, "The words by which what is learned is called.")
    caption_dropout: float = option(0.0, "Share of passes without a prompt.", at_least=0, at_most=1)
    resolution: int | None = option(None, "Side in pixels; the pipeline's own if not given.", at_least=8)
    aspect_buckets: bool = option(False, "Keep the shape of pictures, in buckets of like shape.")
    bucket_step: int = option(64, "Sides of buckets are multiples of it, in pixels.", at_least=1)
    mirror: bool = option(False, "Mirror pictures in every other pass, at random.")
    sample_latents: bool = option(True, "Draw latents of the autoencoder's distribution; its mean if not.")
    prediction: str | None = option(
        None,
        "What a network without flow predicts: epsilon, v_prediction or sample; as its scheduler says if not given.",
    )
    density: str = option("uniform", "How times are drawn.", choices=DENSITIES)
    logit_mean: float = option(0.0, "Mean behind logit-normal times.")
    logit_std: float = option(1.0, "Standard deviation behind logit-normal times.", above=0)
    mode_scale: float = option(1.29, "Scale of the times drawn by mode.")
    weighting: str = option("none", "How times weigh.", choices=WEIGHTINGS)
    snr_gamma: float = option(5.0, "Largest signal-to-noise ratio that weighs in full, for min-snr.", above=0)
    timesteps: tuple[float, float] | None = option(None, "Range of times to learn, from low to below high.")
    guidance: float = option(1.0, "Guidance that a network distilled for it is told.", at_least=0)
    prior_data: Any = option(None, "Pictures of the class that are to stay as they are, given like data.")
    prior_prompt: str | None = option(None, "Prompt of the prior's pictures; their captions if not given.")
    prior_weight: float = option(1.0, "How much the prior's loss weighs.", at_least=0)
    checkpointing: bool = option(False, "Compute activations again in the backward pass, to save memory.")

    def __post_init__(self) -> None:
        """Check the options."""
        check_options(self)
        low, high = self.timesteps or (0.0, 1.0)
        if not 0 <= low < high:
            raise DataError(f"The timesteps go from a smaller to a larger time from 0, found {low:g} to {high:g}.")

    @property
    def family(self) -> str:
        """Rows of jobs whose network is told the same guidance share a pass."""
        return f"{self.name}, guidance {self.guidance:g}, checkpointing {self.checkpointing}"

    @property
    def times(self) -> Times:
        """How times are drawn and weighed."""
        low, high = self.timesteps or (0.0, float("inf"))
        drawing = (self.density, self.logit_mean, self.logit_std, self.mode_scale)
        return Times(*drawing, self.weighting, self.snr_gamma, low, high)

    # -- examples

    def check_model(self, setting: Setting) -> None:
        """Refuse a model that is not the network of the pipeline that is its processor."""
        pipeline = setting.processor
        if not hasattr(pipeline, "components"):
            raise DataError(
                f"The objective '{self.name}' needs a pipeline of diffusers as its processor, found "
                f"{type(pipeline).__name__}; use lorry.diffusion.fleet(pipeline, ...), or a pipeline's folder as base."
            )
        family = family_of(pipeline)
        if family.network(pipeline) is not setting.model:
            raise DataError(f"The model of the fleet must be the pipeline's {family.root}.")
        flow = family.flow
        if (self.weighting == "min-snr") if flow else (self.weighting in ("sigma-sqrt", "cosmap")):
            fits = [w for w in WEIGHTINGS if (w != "min-snr" if flow else w in ("none", "min-snr"))]
            raise DataError(
                f"The weighting '{self.weighting}' is not for {type(pipeline).__name__}; choose {' or '.join(fits)}."
            )
        noising_of(setting, self.prediction)

    def examples(
        self, setting: Setting, records: Sequence[Record], labels: Sequence[str] | None = None
    ) -> Examples[Any]:
        """Encode pictures and prompts once."""
        pipeline = setting.processor
        missing = [n for n, part in pipeline.components.items() if part is None and n.startswith(("text_enc", "vae"))]
        needed = [n for n in missing if n == "vae" or n == "text_encoder"]
        if needed:
            raise DataError(
                f"The pipeline has no {needed[0]}, which pictures and prompts are encoded with; load it whole."
            )
        with torch.no_grad():
            found = self.shots(pipeline, records, self.prompt, self.trigger, "Record")
            if self.prior_data is not None:
                sizes = sorted({shot.size for shot in found})
                priors = load_records(self.prior_data)
                kept = {s: self._priors(pipeline, priors, s) for s in sizes}
                found = [replace(shot, priors=kept[shot.size]) for shot in found]
        return Examples(tuple(found), PlainReport(len(records), len(found)))

    def _priors(self, pipeline: Any, records: Sequence[Record], latents: tuple[int, ...]) -> tuple[Shot, ...]:
        factor = pipeline.vae_scale_factor
        size = (latents[0] * factor, latents[1] * factor)
        return tuple(self.shots(pipeline, records, self.prior_prompt, None, "Prior record", only=size))

    def shots(
        self,
        pipeline: Any,
        records: Sequence[Record],
        template: str | None,
        trigger: str | None,
        what: str,
        only: tuple[int, int] | None = None,
    ) -> list[Shot]:
        """Return records as they are kept; all of one size in pixels where `only` gives it."""
        family = family_of(pipeline)
        image = find_column(records, self.image_column, IMAGE_COLUMNS, "picture", "image_column")
        caption = self.caption_column or next((c for c in CAPTION_COLUMNS if any(c in r for r in records)), None)
        sizes = [only] if only else self._sizes(pipeline)
        texts: dict[str, Conditions] = {}
        found = []
        for index, record in enumerate(records):
            where = f"{what} {index}"
            picture = opened(value_at(record, image, index), where)
            made = cut(picture, bucket_of((picture.height, picture.width), sizes))
            text = prompt_of(template, trigger, record.get(caption) if caption else None, where)
            for wanted in (text, "") if self.caption_dropout else (text,):
                if wanted not in texts:
                    texts[wanted] = family.encode(pipeline, [wanted]).to(torch.device("cpu"))
            found.append(self._shot(pipeline, made, texts[text], texts.get("") if self.caption_dropout else None))
        return found

    def _sizes(self, pipeline: Any) -> list[tuple[int, int]]:
        side = self.resolution or size_of(pipeline, None, None)[0]
        sizes = buckets(side, self.bucket_step) if self.aspect_buckets else [(side, side)]
        for size in sizes:
            family_of(pipeline).latents_shape(pipeline, *size)
        return sizes

    def _shot(self, pipeline: Any, made: Cut, text: Conditions, blank: Conditions | None) -> Shot:
        family = family_of(pipeline)
        height, width = made.pixels.shape[1:]

        def latents(pixels: Tensor) -> tuple[Tensor, Tensor]:
            mean, std = family.posterior(pipeline, pixels[None].to(device_of(pipeline.vae)))
            return mean[0].float().cpu(), std[0].float().cpu()

        def sized(conditions: Conditions) -> Conditions:
            return family.sized(conditions, [made.original], [made.corner], (height, width))

        mirrored = latents(made.pixels.flip(-1)) if self.mirror else None
        return Shot(*latents(made.pixels), sized(text), None if blank is None else sized(blank), mirrored)

    # -- a pass

    def draw(self, examples: Sequence[Any], generator: Generator, setting: Setting, adapter: str) -> Sequence[Any]:
        """Draw latents, noise and times."""
        return [self._drawn(shot, generator, setting) for shot in examples]

    def _drawn(self, shot: Shot, generator: Generator, setting: Setting) -> Drawn:
        rows = [self._row(shot, generator, setting)]
        if shot.priors:
            which = int(torch.randint(len(shot.priors), (), generator=generator))
            rows.append(self._row(shot.priors[which], generator, setting))
        noisy, target, times, weights = (torch.stack([row[i] for row in rows]) for i in range(4))
        return Drawn(noisy, target, times, weights, joined([row[4] for row in rows]))

    def _row(self, shot: Shot, generator: Generator, setting: Setting) -> tuple[Any, ...]:
        noising = noising_of(setting, self.prediction)
        time = noising.draw(self.times, generator)
        mean, std = shot.mean, shot.std
        if shot.mirrored is not None and bool(torch.rand((), generator=generator) < 0.5):
            mean, std = shot.mirrored
        noise = torch.randn(mean.shape, generator=generator)
        latent = mean + std * torch.randn(mean.shape, generator=generator) if self.sample_latents else mean
        blank = shot.blank is not None and bool(torch.rand((), generator=generator) < self.caption_dropout)
        noisy, target = noising.mixed(latent, noise, time)
        weight = torch.tensor(noising.weight(self.times, time))
        conditions = shot.blank if blank and shot.blank is not None else shot.conditions
        return noisy, target, torch.tensor(time), weight, conditions

    def collate(self, setting: Setting, examples: Sequence[Drawn]) -> Batch:
        """Put the rows of pictures of one size together."""
        device = setting.device
        kind = next(p.dtype for p in setting.model.parameters() if p.is_floating_point())
        times = torch.cat([e.times for e in examples]).to(device)
        conditions = joined([e.conditions for e in examples]).to(device, kind)
        inputs = {"latents": torch.cat([e.noisy for e in examples]).to(device, kind), "times": times}
        targets = {
            "target": torch.cat([e.target for e in examples]).to(device),
            "weights": torch.cat([e.weights for e in examples]).to(device),
        }
        return Batch({**inputs, "conditions": conditions}, targets, {"timestep": times})

    def forward(self, setting: Setting, batch: Batch) -> Tensor:
        """Return the network's prediction."""
        family: Family = setting.once("diffusion family", lambda: family_of(setting.processor))
        inputs = batch.inputs
        with checkpointed(setting.model, self.checkpointing):
            return family.predict(
                setting.model, inputs["latents"], inputs["times"], inputs["conditions"], distilled=self.guidance
            )

    def losses(self, outputs: Tensor, targets: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the loss of each example, the prior's row with its weight."""
        rows = self.weighed(outputs, targets)
        if self.prior_data is not None:
            rows = rows[0::2] + self.prior_weight * rows[1::2]
        return rows, torch.ones_like(rows)

    def weighed(self, outputs: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of each row: the weighted squared error, averaged over the latent."""
        error = (outputs.float() - targets["target"].float()).square()
        return (targets["weights"][:, None, None, None] * error).flatten(1).mean(1)

    def rows_of(self, example: Any) -> int:
        """Return 2 with a prior, else 1."""
        return 1 if self.prior_data is None else 2

    def cost(self, example: Any) -> int:
        """Return 1: rows of a pass are of one size."""
        return 1

    def kin(self, example: Any) -> Hashable:
        """Return the size of the latents: pictures of several sizes cannot lie in one batch."""
        size: tuple[int, ...] = example.size
        return size

    def fingerprint(self, examples: Sequence[Any]) -> str:
        """Return a hash of latents and prompts."""
        priors = {shot.size: shot.priors for shot in examples}
        own = [(s.mean, s.std, s.conditions.tensors) for s in (*examples, *(p for ps in priors.values() for p in ps))]
        return digest(own)


def noising_of(setting: Setting, prediction: str | None) -> Diffused | Flowing:
    """Return the noise of the pipeline of a setting; `prediction` in place of what its scheduler says."""

    def make() -> Diffused | Flowing:
        scheduler = setting.processor.scheduler
        if family_of(setting.processor).flow:
            if prediction is not None:
                raise DataError(f"This network predicts the flow; leave out prediction, found '{prediction}'.")
            return Flowing(scheduler)
        known = ("epsilon", "v_prediction", "sample")
        found = Diffused(scheduler, prediction)
        if found.prediction not in known:
            hint = near_misses(found.prediction, known)
            raise DataError(f"There is no prediction '{found.prediction}'.{hint} There are {', '.join(known)}.")
        return found

    return setting.once(f"diffusion noise {prediction}", make)


@contextmanager
def checkpointed(network: nn.Module, on: bool) -> Iterator[None]:
    """Let blocks of a network of diffusers keep no activations of passes within the context."""
    enable: Any = getattr(network, "enable_gradient_checkpointing", None)
    if not on or enable is None or not torch.is_grad_enabled():
        yield
        return
    before = [(m, m.gradient_checkpointing) for m in network.modules() if hasattr(m, "gradient_checkpointing")]
    name = "_gradient_checkpointing_func"
    functions = [(m, {k: v for k, v in vars(m).items() if k == name}) for m, _ in before]
    try:
        enable()
        yield
    finally:
        for module, was in before:
            module.gradient_checkpointing = was
        for module, own in functions:
            vars(module).pop(name, None)
            vars(module).update(own)


def fleet(pipeline: Any, jobs: Sequence[Any], output: Any, **options: Any) -> Any:
    """Return a fleet on the network of a pipeline; see `lorry.training.fleet.Fleet`.

    Parameters
    ----------
    pipeline
        Of diffusers; its text encoders and autoencoder encode the data once.
    jobs
        Jobs with the objective ``diffusion``, or another one that works on pipelines.
    output, options
        As for `Fleet`.
    """
    from lorry.training.fleet import Fleet

    return Fleet(family_of(pipeline).network(pipeline), pipeline, jobs, output, **options)
