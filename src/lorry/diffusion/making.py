"""Making pictures of prompts: each with its own composition of adapters and its own seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorry.core.errors import near_misses
from lorry.core.life import api
from lorry.diffusion.conditions import Conditions
from lorry.diffusion.errors import DiffusionError
from lorry.diffusion.families import family_of
from lorry.diffusion.families.base import device_of
from lorry.diffusion.pictures import Picture, Pictures
from lorry.diffusion.samplers.base import Sampler, sampler_from
from lorry.diffusion.sampling import Applied, Hook, Step, denoise
from lorry.diffusion.weights import composition_text, parse_composition
from lorry.roots import Roots


@dataclass(frozen=True)
class Order:
    """One picture that is wanted.

    Attributes
    ----------
    prompt, negative
        What it is to show, and what not.
    composition
        What applies to it; `ACTIVE` for what is active anyway.
    seed
        Of its noise.
    """

    prompt: str
    negative: str | None = None
    composition: Any = None
    seed: int = 0


Predict = Callable[[Step], Tensor]
#: Stands for what is active on the pipeline anyway.
ACTIVE: Any = object()


@dataclass(frozen=True)
class Settings:
    """How pictures are made.

    Attributes
    ----------
    steps, guidance, distilled
        As in `denoise`; the family's guidance where none is given.
    height, width
        In pixels; the pipeline's own size where none is given.
    batch_size
        How many pictures go through the network at once.
    """

    steps: int = 30
    guidance: float | None = None
    distilled: float | None = None
    height: int | None = None
    width: int | None = None
    batch_size: int = 4


def sample(
    pipeline: Any,
    prompts: str | Sequence[str],
    *,
    compositions: Any = ACTIVE,
    seeds: int | Sequence[int] = 0,
    negative: str | Sequence[str | None] | None = None,
    steps: int = 30,
    guidance: float | None = None,
    distilled: float | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 4,
    sampler: Sampler | str | Mapping[str, Any] | None = None,
    predict: Predict | None = None,
    callback: Callable[[int, int], None] | None = None,
) -> Pictures:
    """Make pictures of prompts; each depends on its own prompt, composition and seed alone, to rounding.

    Parameters
    ----------
    pipeline
        Of diffusers.
    prompts, compositions, seeds, negative
        For each picture, or one for all. A composition is as for `lorry.rows`, or text such as ``a:0.7+b:0.3`` or
        ``a@200-800``; without any, what is active on the pipeline applies.
    steps, guidance, distilled
        As in `denoise`; the family's guidance if none is given.
    height, width
        In pixels; the pipeline's own size if not given.
    batch_size
        How many pictures go through the network at once.
    sampler
        How several adapters of a picture are composed (`lorry.diffusion.samplers`): a sampler, its name, or
        ``{"sampler": name, **options}``; without one their updates add up.
    predict, callback
        What takes the place of the prediction (see `lorry.diffusion.sampling`); what is told the steps made and all.

    Raises
    ------
    DiffusionError
        No family knows the pipeline, numbers that do not fit, or a composition that names no adapter.
    """
    if steps < 1 or batch_size < 1:
        raise DiffusionError(f"Pictures need at least 1 step and a batch of 1, found {steps} and {batch_size}.")
    family_of(pipeline)  # says what is wrong with what is no pipeline
    how, orders = _how(sampler, predict), _orders(pipeline, prompts, negative, compositions, seeds)
    settings = Settings(steps, guidance, distilled, height, width, batch_size)
    made: list[Picture] = []
    total, done = steps * -(-len(orders) // batch_size), 0

    def after_step(step: Step) -> None:
        nonlocal done
        done += 1
        if callback is not None:
            callback(done, max(total, done))

    for start in range(0, len(orders), batch_size):
        made += _batch(pipeline, orders[start : start + batch_size], settings, how, after_step)
    return Pictures(made)


def _how(sampler: Sampler | str | Mapping[str, Any] | None, predict: Predict | None) -> Sampler | Predict | None:
    """Return what makes the predictions; None for the network itself."""
    if sampler is not None and predict is not None:
        raise DiffusionError("A sampler and a function (predict) both say how predictions are made; give one of them.")
    return predict if sampler is None else sampler_from(sampler)


def _orders(pipeline: Any, prompts: Any, negative: Any, compositions: Any, seeds: Any) -> list[Order]:
    """Return what is wanted of each picture."""
    roots = Roots(pipeline)
    names = {name for model in roots.values() for name in api.adapters(model)}
    several = isinstance(compositions, Sequence) and not isinstance(compositions, str)
    each = {
        "prompts": [prompts] if isinstance(prompts, str) else list(prompts),
        "negative": [negative] if negative is None or isinstance(negative, str) else list(negative),
        "compositions": list(compositions) if several else [compositions],
        "seeds": [seeds] if isinstance(seeds, int) else list(seeds),
    }
    count = max(map(len, each.values()))
    for name, values in each.items():
        if len(values) not in (1, count):
            raise DiffusionError(f"There are {count} pictures, but {len(values)} {name}; give one, or one for each.")
        each[name] = values * count if len(values) == 1 else values
    read = [parse_composition(c, names) if isinstance(c, str) else c for c in each["compositions"]]
    for composition in (c for c in read if isinstance(c, dict)):
        for name in composition:
            if isinstance(name, str) and name not in names:
                there = ", ".join(sorted(names)) or "none"
                raise DiffusionError(
                    f"There is no adapter '{name}' on the pipeline.{near_misses(name, names)} Loaded: {there}."
                )
    return [Order(*row) for row in zip(each["prompts"], each["negative"], read, each["seeds"], strict=True)]


@torch.no_grad()
def _batch(
    pipeline: Any, orders: Sequence[Order], settings: Settings, how: Sampler | Predict | None, hook: Hook
) -> list[Picture]:
    """Make the pictures of one batch."""
    family = family_of(pipeline)
    guidance = family.guidance if settings.guidance is None else settings.guidance
    height, width = size_of(pipeline, settings.height, settings.width)
    shape = family.latents_shape(pipeline, height, width)
    compositions = None if orders[0].composition is ACTIVE else [order.composition for order in orders]
    conditions, negative = encoded(pipeline, orders, compositions, guided=guidance > 1)
    rows = len(orders)
    sizes = ([(height, width)] * rows, [(0, 0)] * rows, (height, width))
    conditions = family.sized(conditions, *sizes)
    negative = None if negative is None else family.sized(negative, *sizes)
    network = family.network(pipeline)
    generators = [torch.Generator().manual_seed(order.seed) for order in orders]
    dtype = conditions["text"].dtype
    noise = torch.cat([torch.randn(1, *shape, generator=g, dtype=dtype) for g in generators])
    with _begun(how, pipeline, orders) as (predict, reports):
        latents = denoise(
            pipeline,
            noise.to(device_of(network)),
            conditions,
            negative=negative,
            guidance=guidance,
            distilled=settings.distilled,
            steps=settings.steps,
            compositions=None if compositions is None else [Roots(pipeline).on(family.root, c) for c in compositions],
            generators=generators,
            predict=predict,
            after_step=hook,
        )
        told = reports()
    found = family.pixels(pipeline, latents)
    pixels = ((found / 2 + 0.5).clamp(0, 1).float() * 255).round().to(torch.uint8).cpu()
    facts = {
        "steps": settings.steps,
        "guidance": guidance,
        **({} if settings.distilled is None else {"distilled": settings.distilled}),
        "height": height,
        "width": width,
        "pipeline": type(pipeline).__name__,
        "scheduler": type(pipeline.scheduler).__name__,
        "base": str(getattr(pipeline, "name_or_path", "") or ""),
        **({"sampler": how.described()} if isinstance(how, Sampler) else {}),
    }
    return [Picture(p, {**_said(o), **facts}, t) for p, o, t in zip(pixels, orders, told, strict=True)]


@contextmanager
def _begun(
    how: Sampler | Predict | None, pipeline: Any, orders: Sequence[Order]
) -> Iterator[tuple[Predict | None, Callable[[], list[dict[str, Any]]]]]:
    """Begin with a batch; give what predicts, and what tells of each picture at the end."""
    if not isinstance(how, Sampler):
        yield how, lambda: [{} for _ in orders]
        return
    with how.begin(pipeline, orders) as course:
        yield course.predict, course.reports


def _said(order: Order) -> dict[str, Any]:
    """Return an order as plain data."""
    found: dict[str, Any] = {"prompt": order.prompt, "seed": order.seed}
    if order.negative is not None:
        found["negative"] = order.negative
    if order.composition is not ACTIVE:
        found["adapters"] = composition_text(order.composition)
    return found


def size_of(pipeline: Any, height: int | None, width: int | None) -> tuple[int, int]:
    """Return the size of pictures in pixels: what was asked for, or the pipeline's own."""
    own = getattr(pipeline, "default_sample_size", None)
    if own is None:
        own = getattr(family_of(pipeline).network(pipeline).config, "sample_size", 64)
    tall, wide = own if isinstance(own, Sequence) else (own or 64, own or 64)
    return height or int(tall) * pipeline.vae_scale_factor, width or int(wide) * pipeline.vae_scale_factor


def encoded(
    pipeline: Any, orders: Sequence[Order], compositions: Sequence[Applied] | None, *, guided: bool
) -> tuple[Conditions, Conditions | None]:
    """Return the conditions of prompts and of what they keep away from, adapters of the text encoders applied.

    Parameters
    ----------
    pipeline
        With its text encoders.
    orders
        One for each picture.
    compositions
        What applies to each picture; None for what is active.
    guided
        Whether anything is wanted to keep away from.

    Raises
    ------
    DiffusionError
        The pipeline was made without a text encoder that prompts need.
    """
    family = family_of(pipeline)
    family.check_text_encoders(pipeline)
    with text_rows(pipeline, compositions):
        conditions = family.encode(pipeline, [order.prompt for order in orders])
        negative = family.negative(pipeline, [o.negative for o in orders], conditions) if guided else None
    return conditions, negative


@contextmanager
def text_rows(pipeline: Any, compositions: Sequence[Applied] | None) -> Iterator[None]:
    """Let each row of the text encoders have its composition, where any are given."""
    roots = Roots(pipeline)
    with ExitStack() as stack:
        for name, model in family_of(pipeline).text_encoders(pipeline).items() if compositions is not None else ():
            if api.adapters(model):
                stack.enter_context(api.rows(model, [roots.on(name, c) for c in compositions or ()]))
        yield
