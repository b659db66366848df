"""``lorry sample``: pictures and grids of prompts, each with adapters of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lorry.cli.arguments import CheckBase, Dtype, Json, adapter_references
from lorry.cli.output import note, print_json, progress
from lorry.core.errors import OptionError

#: What a grid can have along its side.
SIDES = ("prompts", "seeds")


Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", "-a", metavar="[NAME=]PATH[:WEIGHT]", help="Adapter to load; repeatable."),
]
Use = Annotated[
    list[str] | None,
    typer.Option(
        "--use",
        metavar="NAME[:W][@LOW-HIGH][+...]",
        help="Composition, such as a:0.7+b:0.3, a@200-800 or none; repeatable. Each adapter alone if not given.",
    ),
]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", "-p", help="What the picture shows; repeatable.")]
Grid = Annotated[
    str | None,
    typer.Option("--grid", metavar="adapters x prompts|seeds", help="Also draw a grid, compositions along the top."),
]
Sampler = Annotated[
    str | None, typer.Option(help="How several adapters come together: merge, switch, composite, cmlora or clora.")
]
SamplerOptions = Annotated[
    list[str] | None,
    typer.Option("--sampler-option", metavar="KEY=VALUE", help="Option of the sampler, read as YAML; repeatable."),
]
Guidance = Annotated[float | None, typer.Option(help="Guidance; the pipeline's usual one if not given.")]


def sample(
    base: Annotated[str, typer.Argument(help="pocket-diffusion, pocket-flux, a diffusers folder, or a hub name.")],
    adapter: Adapters = None,
    prompt: Prompts = None,
    use: Use = None,
    seed: Annotated[list[int] | None, typer.Option("--seed", help="Seed of the noise; repeatable.")] = None,
    negative: Annotated[str | None, typer.Option("--negative", help="What pictures are to keep away from.")] = None,
    grid: Grid = None,
    out_folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures.")] = Path("pictures"),
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the scheduler; 30 if not given.")] = None,
    guidance: Guidance = None,
    sampler: Sampler = None,
    sampler_option: SamplerOptions = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels; the pipeline's own if not given.")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels; the pipeline's own if not given.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures in one batch.")] = 4,
    check_base: CheckBase = True,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Make pictures: every composition of adapters with every prompt and every seed."""
    import lorry
    from lorry.cli.diffusion_bases import load_pipeline, usual

    own = usual(base)
    way = _sampler(sampler, sampler_option)
    prompts, seeds = prompt or [], seed or [0]
    if not prompts:
        raise OptionError("There is nothing to show: give --prompt TEXT.")
    side = _side(grid, prompts, seeds)
    references = adapter_references(adapter)
    pipeline = load_pipeline(base, dtype)
    for name, (path, _) in references.items():
        for receipt in lorry.load(pipeline, path, name=name, check_base=check_base).receipts.values():
            note(str(receipt))
    weighted = [name if weight == 1 else f"{name}:{weight:g}" for name, (_, weight) in references.items()]
    chosen = use or weighted or ["none"]
    wanted = [(p, s, c) for p in prompts for s in seeds for c in chosen]
    settings = {"height": height, "width": width, "batch_size": batch_size, "sampler": way}
    given = {"steps": steps, "guidance": guidance, "negative": negative}
    said = {name: own[name] if value is None else value for name, value in given.items()}
    pictures = _made(pipeline, wanted, {**settings, **said})
    paths = pictures.save(out_folder)
    drawn = None if side is None else _drawn(pictures, chosen, side, out_folder / "grid.png")
    if as_json:
        rows = [{"path": str(path), **p.recipe} for path, p in zip(paths, pictures, strict=True)]
        print_json({"pictures": rows, "grid": None if drawn is None else str(drawn)})
        return
    note(f"{len(paths)} pictures are in {out_folder}" + ("" if drawn is None else f", the grid in {drawn}"))


def _made(pipeline: Any, wanted: Sequence[tuple[str, int, str]], options: dict[str, Any]) -> Any:
    """Make a picture of each prompt, seed and composition, with a bar of their steps."""
    from lorry.diffusion import sample as make

    prompts, seeds, compositions = (list(column) for column in zip(*wanted, strict=True))
    with progress() as bar:
        shown = bar.add_task("steps", total=None)
        return make(
            pipeline,
            prompts,
            seeds=seeds,
            compositions=compositions,
            callback=lambda done, total: bar.update(shown, completed=done, total=total),
            **options,
        )


def _sampler(name: str | None, texts: Sequence[str] | None) -> dict[str, Any] | None:
    """Return the sampler with its options, as `lorry.diffusion.sample` takes it."""
    from lorry.cli.yaml_text import plain_yaml

    pairs = [text.partition("=") for text in texts or ()]
    wrong = next((key for key, found, _ in pairs if not found or not key), None)
    if wrong is not None:
        raise OptionError(f"--sampler-option expects KEY=VALUE, found '{wrong}'.")
    if pairs and name is None:
        raise OptionError("--sampler-option needs a --sampler that it belongs to.")
    if name is None:
        return None
    options = {key.replace("-", "_"): plain_yaml(raw, f"--sampler-option {key}") for key, _, raw in pairs}
    return {"sampler": name, **options}


def _side(grid: str | None, prompts: Sequence[str], seeds: Sequence[int]) -> list[str] | None:
    """Return the labels along the side of a grid, or None for no grid."""
    if grid is None:
        return None
    top, _, side = grid.replace(" ", "").partition("x")
    if top != "adapters" or side not in SIDES:
        raise OptionError(f"--grid expects 'adapters x prompts' or 'adapters x seeds', found '{grid}'.")
    other = ("seeds", seeds) if side == "prompts" else ("prompts", prompts)
    if len(other[1]) > 1:
        raise OptionError(f"--grid '{grid}' shows one of the {other[0]}, but {len(other[1])} are given; give one.")
    return list(prompts) if side == "prompts" else [f"seed {seed}" for seed in seeds]


def _drawn(pictures: Any, columns: Sequence[str], rows: Sequence[str], path: Path) -> Path:
    """Write the grid with the recipes of all its pictures."""
    from lorry.diffusion.pictures import write_png

    recipe = {"grid": [p.recipe for p in pictures], "columns": list(columns), "rows": list(rows)}
    write_png(pictures.grid(columns, rows), recipe, path)
    return path
