"""Build the pocket CLIP and the pocket VLM from nothing: ``python -m lorry.pocket.vision.build --out DIR``.

The same arguments give the same weights on the same machine, torch version and thread count; elsewhere they agree in
what they can do, not in every bit. The VLM starts from the CLIP of the folder and from `lorry.pocket`'s language model.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..diffusion.storage import replace_folder
from ..loading import load
from .answering import right, train_vlm
from .contrast import train_clip, zero_shot
from .loading import CLIP, VLM, read_clip
from .networks import clip_processor, vlm_processor

PARTS = (CLIP, VLM)
#: Steps of each part, and rows of a step.
STEPS, ROWS = {CLIP: 1200, VLM: 1400}, {CLIP: 96, VLM: 32}


def reporter(part: str) -> Callable[[int, str], None]:
    """A function that prints a part's figures with the minutes of processor time since its start."""
    start = time.process_time()

    def report(step: int, figures: str) -> None:
        print(f"{part}: step {step}, {(time.process_time() - start) / 60:.1f} minutes, {figures}", flush=True)

    return report


def write(model: Any, processor: Any, folder: Path, name: str) -> None:
    """Write a model in float16 and its processor as one folder of transformers, and leave the model in float32."""

    def save(fresh: Path) -> None:
        model.save_pretrained(fresh)
        processor.save_pretrained(fresh)

    model.half()
    replace_folder(folder / name, save)
    model.float()


def main() -> None:
    """Build the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--steps", type=int, help="of each part, instead of its own number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for part in given.parts:
        steps, report = given.steps or STEPS[part], reporter(part)
        if part == CLIP:
            model, processor = train_clip(steps, ROWS[part], given.seed, report), clip_processor()
            write(model, processor, given.out, part)
            found = zero_shot(model, processor, 500, given.seed + 1)
            report(steps, ", ".join(f"{name} {share:.1%}" for name, share in found.items()))
        else:
            model = train_vlm(read_clip(given.out), load()[0], steps, ROWS[part], given.seed, report)
            processor = vlm_processor()
            write(model, processor, given.out, part)
            report(steps, ", ".join(f"{name} {share:.1%}" for name, share in right(model, processor, 100, 1).items()))


if __name__ == "__main__":
    main()
