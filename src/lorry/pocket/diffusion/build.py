"""Build the pocket diffusion models from nothing: ``python -m lorry.pocket.diffusion.build --out DIR``.

The same arguments give the same weights on the same machine, torch version and thread count; elsewhere they agree in
what they can do (the judge says), not in every bit. The parts stand on each other in the order of ``PARTS``: with
``--parts`` the earlier ones are read from the folder.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .denoising import LOOKED_AT, flux_loss, samples_right, sdxl_loss, train
from .foundations import train_autoencoder, train_judge
from .judge import score
from .loading import RECIPES
from .networks import flux_pipeline, sdxl_pipeline
from .storage import (
    FLUX,
    SDXL,
    read_autoencoder,
    read_judge,
    read_pipeline,
    write_autoencoder,
    write_judge,
    write_pipeline,
)
from .world import draw, pictures

PARTS = ("judge", "autoencoder", SDXL, FLUX)
#: Steps of each part.
STEPS = {"judge": 5000, "autoencoder": 4800, SDXL: 2500, FLUX: 3250}

Report = Callable[[int, str], None]


def reporter(part: str) -> Report:
    """A function that prints a part's figures with the minutes since its start."""
    start = time.monotonic()

    def report(step: int, figures: str) -> None:
        print(f"{part}: step {step}, {(time.monotonic() - start) / 60:.1f} minutes, {figures}", flush=True)

    return report


def build_foundation(part: str, out: Path, steps: int, seed: int) -> None:
    """Train and write the judge or the autoencoder, and print how well it does on fresh scenes of base words."""
    report = reporter(part)
    rng = random.Random(f"check {seed}")
    scenes = [draw(rng) for _ in range(1000)]
    shown = pictures(scenes)
    if part == "judge":
        write_judge(train_judge(steps, seed, report), out)
    else:
        write_autoencoder(train_autoencoder(steps, seed, report, lambda model: write_autoencoder(model, out)), out)
        model = read_autoencoder(out)
        with torch.no_grad():
            shown = model.decode(model.encode(shown / 127.5 - 1).latent_dist.mean).sample / 2 + 0.5
    report(steps, ", ".join(f"{name} {share:.1%}" for name, share in score(read_judge(out), shown, scenes).items()))


def build_denoiser(part: str, out: Path, steps: int, seed: int, *, further: bool = False) -> None:
    """Train and write one of the two pipelines, from nothing or from the one that is there.

    What is in the folder after each look is usable.
    """
    report = reporter(part)
    judge = read_judge(out)
    if further:
        pipeline = read_pipeline(out, part, torch.float32)
        pipeline.vae.requires_grad_(False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pipeline = (sdxl_pipeline if part == SDXL else flux_pipeline)(read_autoencoder(out))

    def look(step: int) -> None:
        write_pipeline(pipeline, out, part)
        for things in (1, 2):
            found = samples_right(pipeline, judge, RECIPES[part], things, LOOKED_AT, seed)
            figures = ", ".join(f"{name} {share:.1%}" for name, share in found.items())
            report(step, f"{LOOKED_AT} samples of {things}: {figures}")

    train(pipeline, sdxl_loss if part == SDXL else flux_loss, steps, seed, report, look)


def main() -> None:
    """Build the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--steps", type=int, help="of each part, instead of its own number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--further", action="store_true", help="train the pipelines that are there; give another seed")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for part in given.parts:
        steps = given.steps or STEPS[part]
        if part in RECIPES:
            build_denoiser(part, given.out, steps, given.seed, further=given.further)
        else:
            build_foundation(part, given.out, steps, given.seed)


if __name__ == "__main__":
    main()
