"""Small adapters of known concepts, trained by fleets: ``python -m lorry.systems.autolora.pool --out FOLDER``.

Every adapter learns one concept of the pocket world under a trigger word, as people make adapters of a subject; its
file has a name that says nothing, and a few captions beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from lorry.core.errors import CheckpointError
from lorry.core.options import check_options, option
from lorry.depot.index import CAPTIONS
from lorry.diffusion.task import fleet
from lorry.pocket.diffusion import BASE, NOVEL, TRIGGERS, Attribute, Scene, draw, load, render

#: What is in a pool's folder beside the adapters.
FACTS = "pool.json"
#: Where adapters sit: late enough that most of the network needs no backward pass.
TARGETS = ("attention in up_blocks.0", "attention in up_blocks.1")
#: All concepts: every base shape in every colour and texture, on every background, and in every novel style.
FAMILIES: dict[str, dict[Attribute, tuple[str, ...]]] = {
    "thing": {name: BASE[name] for name in ("colour", "texture", "shape")},
    "scene": {"shape": BASE["shape"], "background": BASE["background"]},
    "style": {"shape": BASE["shape"], "style": NOVEL["style"]},
}
#: Told what is done, how much of it, and of how much.
Step = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Concept:
    """What one adapter is to make.

    Attributes
    ----------
    family
        One of `FAMILIES`.
    words
        Attribute -> word.
    trigger
        The word of prompts by which it is called.
    """

    family: str
    words: Mapping[Attribute, str]
    trigger: str

    @property
    def text(self) -> str:
        """The concept in words, as somebody would search for it: ``a red striped square``."""
        names = [self.words[name] for name in ("colour", "texture", "shape") if name in self.words]
        found = " ".join(["an" if names[0][0] in "aeiou" else "a", *names])
        if "background" in self.words:
            found += f" on a {self.words['background']} background"
        return found + (f" in {self.words['style']} style" if "style" in self.words else "")

    @property
    def captions(self) -> list[str]:
        """What a describing model might say of its pictures, in several ways."""
        listed = list(self.words.values())
        return [self.text, f"a picture of {self.text}", " ".join(listed), f"shows {' and '.join(reversed(listed))}"]

    @property
    def prompt(self) -> str:
        """The prompt by which the adapter is called."""
        return f"a {self.trigger} shape"

    def scene(self, rng: random.Random) -> Scene:
        """Draw a scene of it: what the concept does not say is drawn from base words."""
        return draw(rng, 1, {name: (word,) for name, word in self.words.items()})

    def shown(self, scene: Scene) -> dict[Attribute, bool]:
        """Return for each of its words whether a scene (of the judge) has it."""
        thing = scene.things[0]
        has: dict[Attribute, str] = {
            "shape": thing.shape,
            "colour": thing.colour,
            "texture": thing.texture,
            "background": scene.background,
            "layout": scene.layout,
            "style": scene.style,
        }
        return {name: has[name] == word for name, word in self.words.items()}


@dataclass(frozen=True)
class PoolTraining:
    """How the adapters of a pool are trained.

    Raises
    ------
    OptionError
        A value out of its range.
    """

    rank: int = option(4, "Rank of an adapter.", at_least=1)
    steps: int = option(60, "Optimizer steps of an adapter.", at_least=1)
    rows: int = option(4, "Pictures of a step.", at_least=1)
    pictures: int = option(16, "Pictures of a concept.", at_least=1)
    rate: float = option(5e-3, "Learning rate, falling by a cosine.", above=0)
    at_once: int = option(34, "Adapters of a fleet.", at_least=1)

    def __post_init__(self) -> None:
        """Check every option against its range."""
        check_options(self)


@dataclass(frozen=True)
class Pool:
    """Adapters in a folder, and what each was made to do.

    Attributes
    ----------
    folder
        Holds a folder for each adapter.
    concepts
        Name of the adapter's folder -> its concept.
    """

    folder: Path
    concepts: Mapping[str, Concept]

    def path(self, name: str) -> Path:
        """Return the folder of an adapter."""
        return self.folder / name


def concepts(count: int | None = None, seed: int = 0) -> list[Concept]:
    """Return different concepts in a drawn order, each with a drawn trigger.

    Parameters
    ----------
    count
        How many; all (204) if not given.
    seed
        Of order and triggers.
    """
    rng = random.Random(f"concepts {seed}")
    found = [
        (family, dict(zip(words, chosen, strict=True)))
        for family, words in FAMILIES.items()
        for chosen in product(*words.values())
    ]
    rng.shuffle(found)
    return [Concept(family, words, rng.choice(TRIGGERS)) for family, words in found[:count]]


def build(
    folder: str | os.PathLike[str],
    wanted: Sequence[Concept],
    settings: PoolTraining | None = None,
    *,
    pipeline: Any = None,
    seed: int = 0,
    step: Step | None = None,
) -> Pool:
    """Train an adapter for each concept, many in one pass, and write them with their captions.

    Parameters
    ----------
    folder
        Of the pool; adapters that an earlier call with the same arguments left there are kept.
    wanted
        The concepts.
    settings
        How; the defaults if not given.
    pipeline
        Of diffusers, with the pocket world's words; the pocket model if not given.
    seed
        Of pictures and starts.
    step
        Told of progress.

    Raises
    ------
    CheckpointError
        The folder holds a pool that was made otherwise.
    """
    root, settings = Path(folder), settings or PoolTraining()
    names = [f"lora-{number:03d}" for number in range(len(wanted))]
    facts = {"seed": seed, "settings": asdict(settings), "concepts": dict(zip(names, map(asdict, wanted), strict=True))}
    if (root / FACTS).is_file() and json.loads((root / FACTS).read_text(encoding="utf-8")) != facts:
        raise CheckpointError(f"'{root}' holds a pool that was made otherwise; choose another folder, or remove it.")
    root.mkdir(parents=True, exist_ok=True)
    (root / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    left = [number for number, name in enumerate(names) if not (root / name / CAPTIONS).is_file()]
    pipeline = pipeline if pipeline is not None or not left else load()
    for start in range(0, len(left), settings.at_once):
        if step is not None:
            step("training the pool", len(names) - len(left) + start, len(names))
        part = {names[number]: (wanted[number], number) for number in left[start : start + settings.at_once]}
        _train(pipeline, root, part, settings, seed)
    if step is not None:
        step("training the pool", len(names), len(names))
    return Pool(root, dict(zip(names, wanted, strict=True)))


def read_pool(folder: str | os.PathLike[str]) -> Pool:
    """Return a pool that `build` wrote.

    Raises
    ------
    CheckpointError
        There is none, or it cannot be read.
    """
    try:
        facts = json.loads((Path(folder) / FACTS).read_text(encoding="utf-8"))
        return Pool(Path(folder), {name: Concept(**found) for name, found in facts["concepts"].items()})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"There is no pool at '{folder}' that can be read: {error}. Build it anew.") from None


def job(name: str, concept: Concept, settings: PoolTraining, seed: int) -> dict[str, Any]:
    """Return the training of one adapter, as a job of a fleet."""
    rng = random.Random(f"pictures {seed}")
    data = [{"image": as_image(concept.scene(rng)), "text": concept.prompt} for _ in range(settings.pictures)]
    return {
        "name": name,
        "data": data,
        "objective": "diffusion",
        "method": {"method": "lora", "rank": settings.rank, "alpha": settings.rank},
        "targets": list(TARGETS),
        "steps": settings.steps,
        "batch_size": settings.rows,
        "learning_rate": settings.rate,
        "schedule": "cosine",
        "seed": seed,
    }


def as_image(scene: Scene) -> Any:
    """Return the picture of a scene as PIL's."""
    from PIL import Image

    return Image.fromarray(render(scene).permute(1, 2, 0).contiguous().numpy())


def _train(
    pipeline: Any, root: Path, part: Mapping[str, tuple[Concept, int]], settings: PoolTraining, seed: int
) -> None:
    """Train some adapters together; captions come last, since they say that an adapter is whole."""
    jobs = [job(name, concept, settings, 1000 * seed + number) for name, (concept, number) in part.items()]
    with tempfile.TemporaryDirectory(dir=root, prefix=".fleet") as out:
        made = fleet(pipeline, jobs, out, progress=False).train().adapters
        for name, adapter in made.items():
            adapter.save(root / name, overwrite=True)
            adapter.detach()
            text = "\n".join(part[name][0].captions) + "\n"
            (root / name / CAPTIONS).write_text(text, encoding="utf-8")


def main() -> None:
    """Build a pool and say where it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder of the pool")
    parser.add_argument("--count", type=int, default=None, help="adapters; all 204 concepts if not given")
    parser.add_argument("--steps", type=int, default=PoolTraining().steps, help="optimizer steps of an adapter")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    wanted = concepts(given.count, given.seed)
    made = build(given.out, wanted, PoolTraining(steps=given.steps), seed=given.seed, step=_said)
    print(f"{len(made.concepts)} adapters in {made.folder}")


def _said(what: str, done: int, total: int) -> None:
    print(f"{what}: {done} of {total}", flush=True)


if __name__ == "__main__":
    main()
