"""The flags of one training job, made from the fields of `Job`, so that each option is written down once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from lorry.cli.arguments import key_values, layers, names
from lorry.cli.declared import Declared, declared_mapping, declared_options
from lorry.core.errors import OptionError

#: Fields that are not flags of their own name: the method has --method and --option, as in every command.
_OWN = ("method", "data", "site_options")
_LISTS = ("targets", "exclude", "modules_to_save", "labels", "dynamics", "built_from", "members")
#: Mappings, with what their values are.
_PAIRS: dict[str, Callable[[Any], Any]] = {"columns": str, "stages": float, "schedule_options": lambda value: value}
#: Parts of a job with options of their own, and what else their flags are called.
_PARTS = (("method", "--option", "-o"), ("objective", "--objective-option"), ("start",), ("scaling",))
#: Options of the method that nearly every command line has.
_SHORT = {"rank": int, "alpha": float}
_SIMPLE = {"int": int, "float": float, "str": str, "bool": bool}


def parameters() -> list[inspect.Parameter]:
    """Return the flags as parameters of a typer command; each is None where it was not given."""
    flags = [_flag("data", str, "Training data: a file or a folder.")]
    flags.append(_flag("method", str, "Slug or preset of the method; see `lorry methods`.", "-m"))
    flags += [_flag(name, kind, f"Short for --method-options {name}=N.") for name, kind in _SHORT.items()]
    for part, *short in _PARTS:
        said = f"KEY=VALUE, an option of the {part}; repeatable."
        flags.append(_flag(f"{part}_options", list[str], said, *short))
    for field in declared_options("training/jobs.py", "Job"):
        if field.name in _OWN:
            continue
        text = field.help
        declared = field.type.split("|")[0].strip()
        if field.name in _LISTS:
            flags.append(_flag(field.name, list[str], f"{text} Repeatable, or separated by commas."))
        elif field.name in _PAIRS:
            flags.append(_flag(field.name, list[str], f"{text} Written KEY=VALUE; repeatable."))
        else:
            kind = _SIMPLE.get(declared, str)
            flags.append(_flag(field.name, kind, f"{text} Default: {_shown(field)}."))
    by_name = {flag.name: flag.annotation.__origin__ for flag in flags}
    aliases = [declared_mapping("training/aliases.py", name) for name in ("EARLIER", "FOREIGN")]
    for other, now in {**aliases[0], **aliases[1]}.items():
        kind = next(k for k in by_name[now].__args__ if k is not type(None))
        flags.append(_flag(other, kind, f"Another name of --{now.replace('_', '-')}.", hidden=True))
    return flags


def _flag(name: str, kind: Any, text: str, *short: str, hidden: bool = False) -> inspect.Parameter:
    long = f"--{name.replace('_', '-')}"
    declared = f"{long}/--no-{long[2:]}" if kind is bool else long
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, typer.Option(declared, *short, help=text, show_default=False, hidden=hidden)],
    )


def _shown(field: Declared) -> str:
    return "required" if field.default == "MISSING" else field.default


def job_values(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the job's options that the flags mean; those not given are absent."""
    from lorry.training.aliases import renamed

    given = renamed({k: v for k, v in flags.items() if v is not None and v != []})
    values: dict[str, Any] = {}
    for part, *_ in _PARTS:
        options = key_values(given.pop(f"{part}_options", None), f"--{part}-options")
        if options:
            values[f"{part}_options"] = options
    for name, value in given.items():
        if name in _LISTS:
            chosen = names(value)
            values[name] = chosen[0] if name == "targets" and len(chosen) == 1 else chosen
        elif name in _PAIRS:
            values[name] = {k: _PAIRS[name](v) for k, v in key_values(value, f"--{name}").items()}
        elif name == "layers":
            values[name] = layers(value)
        elif name == "task_ids" and str(value).isdigit():
            values[name] = int(value)
        elif name == "betas":
            values[name] = _numbers(value, name)
        else:
            values[name] = value
    return values


def _numbers(text: str, name: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(f"--{name} expects numbers separated by commas, found {text!r}.") from None
