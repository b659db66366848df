"""``lorry kit`` and ``lorry transfer``: an adapter goes to another base without its data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorry.cli.arguments import BASE_HELP, Dtype, Json, key_values, names
from lorry.cli.output import note, out, print_json
from lorry.core.errors import OptionError

if TYPE_CHECKING:
    from lorry.transfer.kit import Base

BaseOption = Annotated[str, typer.Option("--base", help=BASE_HELP)]
Style = Annotated[
    str, typer.Option("--style", help="demonstrations (models that follow instructions) or openings (others).")
]
End = Annotated[str, typer.Option("--end", help="What ends an input and belongs to it, such as '>'.")]
GeneratorOption = Annotated[
    str | None,
    typer.Option("--generator", help="Who writes inputs: a base, or FILE.py:FUNCTION(seeds, count, seed)."),
]
Temperature = Annotated[float, typer.Option(help="Of the generator's draws.", min=0.0)]


def kit(
    adapter: Annotated[Path, typer.Argument(help="Adapter that will travel.")],
    data: Annotated[Path, typer.Option("--data", help="What it was trained on: prompt and completion.")],
    to: Annotated[Path, typer.Option("--out", help="Folder for the kit.")],
    name: Annotated[str, typer.Option("--name", help="A few words that say what the data are.")],
    base: BaseOption = "pocket",
    generator: GeneratorOption = None,
    style: Style = "demonstrations",
    end: End = "",
    temperature: Temperature = 0.9,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="KEY=VALUE", help="seeds, rank, steps, learning_rate, ...; repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Make a kit of an adapter while its data are at hand: a discriminator and a few seeds; then they may go."""
    import lorry
    from lorry.core.options import from_options
    from lorry.training.data import load_records
    from lorry.transfer.kit import KitOptions, make_kit

    how = from_options(KitOptions, key_values(option))
    records = load_records(data)
    source = _base(base, dtype)
    carried = lorry.load(source.model, adapter, activate=False)
    writes = _generator(generator, source, dtype, style, end, temperature)
    made = make_kit(source, carried, records, to, name=name, generator=writes, options=how, seed=seed)
    if as_json:
        print_json({"kit": str(to), "count": made.count, "seeds": len(made.seeds), **made.facts})
        return
    out().print(f"wrote {to}: the adapter, its discriminator and {len(made.seeds)} of {made.count} examples")
    for label, what in (("yes_held_out", "held-out inputs of the data"), ("yes_generated", "generated inputs")):
        if label in made.facts:
            note(f"takes {made.facts[label]:.1%} of {what} for the data")


def transfer(
    folder: Annotated[Path, typer.Argument(metavar="KIT", help="A kit that `lorry kit` made.")],
    target: Annotated[str, typer.Option("--to", help=f"Base that gets the adapter: {BASE_HELP}")],
    to: Annotated[Path, typer.Option("--out", help="Folder for the adapter and the facts.")],
    source: Annotated[str, typer.Option("--from", help="Base of the kit, which judges and answers.")] = "pocket",
    method: Annotated[str, typer.Option("--method", "-m", help="Method of the target's adapter.")] = "lora",
    method_option: Annotated[
        list[str] | None, typer.Option("--method-option", metavar="KEY=VALUE", help="Of the method; repeatable.")
    ] = None,
    targets: Annotated[list[str] | None, typer.Option("--targets", "-t", help="Layers of the target.")] = None,
    teacher: Annotated[
        Path | None, typer.Option("--teacher", help="Adapter that answers in place of the kit's: an earlier hop's.")
    ] = None,
    teacher_base: Annotated[str | None, typer.Option("--teacher-base", help="The base of that adapter.")] = None,
    generator: GeneratorOption = None,
    style: Style = "demonstrations",
    end: End = "",
    temperature: Temperature = 0.9,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="KEY=VALUE", help="count, filtered, steps, epochs, ...; repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Teach another base what an adapter does, on generated inputs that its discriminator takes for the task's."""
    from lorry.core.options import from_options
    from lorry.transfer.distil import TransferOptions
    from lorry.transfer.distil import transfer as move
    from lorry.transfer.kit import Kit

    if (teacher is None) != (teacher_base is None):
        raise OptionError("Another teacher is an adapter with its base: give both --teacher and --teacher-base.")
    opened = Kit.open(folder)
    chosen: dict[str, Any] = {"method": {"method": method, **key_values(method_option, "--method-option")}}
    if targets:
        chosen["targets"] = names(targets)
    how = from_options(TransferOptions, {**chosen, **key_values(option)})
    judge, learner = _base(source, dtype), _base(target, dtype)
    earlier = None if teacher is None or teacher_base is None else (_base(teacher_base, dtype), teacher)
    writes = _generator(generator, learner, dtype, style, end, temperature)
    _, facts = move(opened, judge, learner, out=to, generator=writes, teacher=earlier, options=how, seed=seed)
    if as_json:
        print_json({"adapter": str(to / "adapter"), **facts})
        return
    accepted = "" if facts["accepted"] is None else f", {facts['accepted']:.1%} of the different ones accepted"
    out().print(f"wrote {to / 'adapter'}: {facts['inputs']} inputs of {facts['attempts']} written{accepted}")


def _base(name: str, dtype: str) -> Base:
    from lorry.cli.bases import load_base, load_tokenizer
    from lorry.transfer.kit import Base

    return Base(load_base(name, dtype), load_tokenizer(name), name)


def _generator(given: str | None, other: Base, dtype: str, style: str, end: str, temperature: float) -> Any:
    """Return the generator that the command line names; the other base writes if it names none."""
    from lorry.transfer.generate import Prompted, from_file

    if given is not None and ".py:" in given:
        return from_file(given)
    base = other if given is None else _base(given, dtype)
    wanted: Any = style
    return Prompted(base.model, base.tokenizer, wanted, end=end, temperature=temperature)
