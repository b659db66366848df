"""The demo's pictures: adapters for a shape and a colour, trained at once on the pocket diffusion model, composed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorry.diffusion.making import sample
from lorry.diffusion.pictures import Pictures, write_png
from lorry.diffusion.task import fleet
from lorry.pocket.diffusion import Attribute, Scene, caption, draw, image, load, load_judge, read, recipe, render

BASE = "pocket-diffusion"
#: Adapter -> the meaningless word that it learns, what of its pictures is always the same, and the word for it.
TAUGHT: dict[str, tuple[str, Attribute, str]] = {
    "shape": ("sks", "shape", "ring"),
    "colour": ("vex", "colour", "green"),
}
#: What captions do not speak of: all things are plain.
UNSAID: tuple[Attribute, ...] = ("texture",)
#: Compositions along the top of the grid.
COLUMNS = ("none", "shape", "colour", "shape+colour")
#: Where the thing is -> on what, neither of which the adapters are trained for.
ROWS = {"at the left": "white", "at the top": "black", "in the middle": "sand"}
#: Late enough that most of the network needs no backward pass.
TARGETS = ("attention in up_blocks.0", "attention in up_blocks.1")
RANK, STEPS, BATCH, RATE, EXAMPLES = 8, 60, 6, 5e-3, 48


@dataclass(frozen=True)
class Drawing:
    """What was drawn.

    Attributes
    ----------
    steps
        Of training, each adapter's.
    prompts
        One for each row of the grid.
    seen
        Composition -> what the judge reads in its pictures, from top to bottom.
    seconds
        Of it all: loading, training, sampling.
    """

    steps: int
    prompts: list[str]
    seen: dict[str, list[str]]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return what `report.json` holds."""
        return {"prompts": self.prompts, "seen": self.seen, "seconds": round(self.seconds, 2)}


def draw_grid(folder: Path, steps: int, bars: bool | None = None) -> Drawing:
    """Train both adapters in the same passes, compose them, and write ``pictures.png`` with its recipe inside.

    Parameters
    ----------
    folder
        Where the grid goes, and the adapters in ``pictures/``.
    steps
        Of training, for each adapter.
    bars
        Whether training shows progress bars; None shows them on a terminal.

    Raises
    ------
    ImportError, FileNotFoundError
        diffusers or the weights (``lorry-pocket``) are not installed.
    """
    began = time.perf_counter()
    pipeline, judge = load(BASE), load_judge()
    jobs = [_job(name, steps, seed) for seed, name in enumerate(TAUGHT)]
    report = fleet(pipeline, jobs, folder / "pictures", overwrite=True, progress=bars).train().report
    for job in report["jobs"]:
        if job["status"].startswith("failed"):
            raise RuntimeError(f"Training '{job['name']}' {job['status']}.")
    triggers = " ".join(TAUGHT[name][0] for name in ("colour", "shape"))
    prompts = [f"a {triggers} {where} on a {ground} background" for where, ground in ROWS.items()]
    own = recipe(BASE)
    made = sample(
        pipeline,
        [prompt for prompt in prompts for _ in COLUMNS],
        compositions=[None if column == "none" else column for _ in prompts for column in COLUMNS],
        seeds=[row for row in range(len(prompts)) for _ in COLUMNS],
        steps=own["num_inference_steps"],
        guidance=own["guidance_scale"],
        batch_size=len(prompts) * len(COLUMNS),
    )
    _write(made, folder / "pictures.png")
    found = [_words(scene) for scene in read(judge, made.pixels)]
    seen = {column: found[place :: len(COLUMNS)] for place, column in enumerate(COLUMNS)}
    return Drawing(steps, prompts, seen, time.perf_counter() - began)


def try_grid(folder: Path, steps: int, say: Callable[[str], None], bars: bool | None) -> Drawing | str:
    """Draw the grid and say how it went, or return why it was left out: what it needs is not installed."""
    try:
        drawing = draw_grid(folder, steps, bars=bars)
    except (ImportError, FileNotFoundError) as error:
        (folder / "pictures.png").unlink(missing_ok=True)  # of an earlier run
        say(f"no pictures: {error}")
        return str(error)
    both = ", ".join(drawing.seen[COLUMNS[-1]])
    say(f"pictures: adapters for a shape and a colour, composed: {both} ({drawing.seconds:.0f} seconds)")
    return drawing


def _job(name: str, steps: int, seed: int) -> dict[str, Any]:
    """Return the training of an adapter, in whose captions the trigger stands for the word."""
    trigger, attribute, word = TAUGHT[name]
    rng = random.Random(f"{name} {seed}")
    scenes = [draw(rng, 1, {attribute: (word,), **dict.fromkeys(UNSAID, ("plain",))}) for _ in range(EXAMPLES)]
    texts = [caption(scene, UNSAID).replace(word, trigger) for scene in scenes]
    return {
        "name": name,
        "data": [{"image": image(render(s)), "text": text} for s, text in zip(scenes, texts, strict=True)],
        "objective": "diffusion",
        "method": {"method": "lora", "rank": RANK, "alpha": RANK},
        "targets": list(TARGETS),
        "steps": steps,
        "batch_size": BATCH,
        "learning_rate": RATE,
        "schedule": "cosine",
        "seed": seed,
    }


def _write(made: Pictures, path: Path) -> None:
    """Write the grid with the recipes of all its pictures."""
    told = {"grid": [picture.recipe for picture in made], "columns": list(COLUMNS), "rows": list(ROWS)}
    write_png(made.grid(COLUMNS, list(ROWS)), told, path)


def _words(scene: Scene) -> str:
    return " and ".join(f"{thing.colour} {thing.shape}" for thing in scene.things)
