"""``lorry init``: a commented YAML for ``lorry train``, with example data, that runs as it stands."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from lorry.cli.arguments import BASE_HELP, Json
from lorry.cli.declared import declared_options
from lorry.cli.output import out, print_json, write_text
from lorry.core.errors import OptionError, near_misses

#: Not a task, but what compares variants of training for one.
STUDY = "study"
#: Examples that are written for each job; few enough to train in seconds.
EXAMPLES = 120
#: Shown switched off below the first job: what people change next.
_NEXT = ("targets", "max_length", "schedule", "warmup", "eval_every", "keep_best", "optimizer", "seed")
#: The same of a study.
_STUDY_NEXT = {"widen": 2, "test": "test.jsonl", "score": "token_accuracy", "max_memory": "24GiB"}
_WIDTH = 100


@dataclass(frozen=True)
class Starter:
    """What ``lorry init`` writes for a task.

    Attributes
    ----------
    about
        What is learned, and how the data look.
    write
        Makes the text of an example file from prompts and answers of the pocket model's world.
    ending
        Of the data files.
    job
        Options of each job.
    skills
        Skills of the pocket model's world, one for each job, with options of that job alone.
    """

    about: str
    write: Callable[[list[tuple[str, str]]], str]
    ending: str
    job: Mapping[str, Any]
    skills: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"swap": {}})


def _lines(make: Callable[[str, str], dict[str, Any]]) -> Callable[[list[tuple[str, str]]], str]:
    return lambda pairs: "".join(json.dumps(make(*pair)) + "\n" for pair in pairs)


def _messages(prompt: str, answer: str) -> dict[str, Any]:
    # the pocket model's chat template puts the '>' behind the user's turn
    turns = [{"role": "user", "content": prompt.rstrip(">")}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


_COMPLETIONS = _lines(lambda prompt, answer: {"prompt": prompt, "completion": answer})
_RATE = {"batch_size": 8, "learning_rate": 5e-3}
_LORA = {"method": "lora", "rank": 8, "alpha": 16}

STARTERS: dict[str, Starter] = {
    "chat": Starter(
        "Conversations: lines of {messages: [{role, content}, ...]}. What the assistant says is learned, in the base's "
        "chat template.",
        _lines(_messages),
        "jsonl",
        {"objective": "chat", **_LORA, "steps": 40, **_RATE, "hold_out": 0.1},
    ),
    "completion": Starter(
        "Prompts with completions: lines of {prompt, completion}. Only the completions are learned.",
        _COMPLETIONS,
        "jsonl",
        {"objective": "completion", **_LORA, "steps": 40, **_RATE, "hold_out": 0.1},
    ),
    "text": Starter(
        "Plain text: every next token is learned. Files of text, or lines of {text}.",
        lambda pairs: "".join(f"{prompt}{answer}\n" for prompt, answer in pairs),
        "txt",
        {"objective": "causal", **_LORA, "max_length": 128, "epochs": 3, **_RATE, "hold_out": 0.1},
    ),
    "classification": Starter(
        "Texts with classes: lines of {text, label}. The head is new, and is trained whole beside the adapter.",
        _lines(lambda prompt, answer: {"text": prompt, "label": answer}),
        "jsonl",
        {"objective": "classification", **_LORA, "epochs": 3, **_RATE, "hold_out": 0.2},
        {"opens": {}},
    ),
    "many-jobs": Starter(
        "Several jobs at once on one frozen base, each with data, method and seed of its own. Each gives the adapter "
        "that it would give alone.",
        _COMPLETIONS,
        "jsonl",
        {"objective": "completion", "rank": 8, "steps": 40, **_RATE, "hold_out": 0.1},
        {"swap": {"method": "lora", "alpha": 16}, "ends": {"method": "dora"}, "star": {"method": "rslora", "seed": 1}},
    ),
}


def init(
    task: Annotated[str, typer.Argument(help=f"What is to be learned: {', '.join(STARTERS)}; or {STUDY}.")],
    file: Annotated[
        Path | None, typer.Argument(help=f"YAML file to write; run.yaml, or {STUDY}.yaml, if not given.")
    ] = None,
    base: Annotated[str, typer.Option("--base", "-b", help=BASE_HELP)] = "pocket",
    data: Annotated[
        str | None, typer.Option("--data", help="Your data; example data are written if not given.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    as_json: Json = False,
) -> None:
    """Write a commented YAML for `lorry train` or `lorry study`, with small example data, that runs as it stands."""
    known = (*STARTERS, STUDY)
    if task not in known:
        raise OptionError(f"There is no task '{task}'.{near_misses(task, known)} There are: {', '.join(known)}.")
    starter = STARTERS["completion" if task == STUDY else task]
    file = file or Path(f"{STUDY if task == STUDY else 'run'}.yaml")
    sources, texts = {}, {}
    for skill in starter.skills:
        path = file.parent / "data" / f"{skill}.{starter.ending}"
        sources[skill] = data or str(path)
        if data is None:
            texts[path] = starter.write(_examples(skill))
    target = str(file.parent / "out" / file.stem)
    if task == STUDY:
        texts[file] = render_study(base, target, sources["swap"], file)
    else:
        texts[file] = render(task, starter, base, target, sources, file)
    there = [str(path) for path in texts if path.exists()]
    if there and not overwrite:
        raise OptionError(f"{', '.join(there)} exists already. Choose another file, or pass --overwrite.")
    for path, text in texts.items():
        write_text(path, text)
    if as_json:
        print_json({"task": task, "file": str(file), "written": [str(path) for path in texts]})
        return
    out().print(
        f"wrote {', '.join(map(str, texts))}; next: lorry {'study' if task == STUDY else 'train'} {file}",
        highlight=False,
        soft_wrap=True,
    )


def _examples(skill: str) -> list[tuple[str, str]]:
    from lorry.pocket.world import examples

    return [(e.prompt, e.answer) for e in examples(skill, "train", EXAMPLES, seed=0)]


def render(task: str, starter: Starter, base: str, target: str, sources: Mapping[str, str], file: Path) -> str:
    """Return the YAML of a starter; the comments are the options' own help.

    Parameters
    ----------
    task, starter
        Name and content.
    base, target
        Base and output folder.
    sources
        Job -> its data.
    file
        Where it will stand, for the commands in the comments.
    """
    run = {o.name: o.help for o in declared_options("cli/run_file.py", "RunFile")}
    job = {o.name: o for o in declared_options("training/jobs.py", "Job")}
    helps = {name: o.help for name, o in job.items()}
    helps |= {o.name: f"Of the method: {o.help}" for o in declared_options("methods/lora.py", "LoRA")}
    first = next(iter(sources))
    lines = [
        *_comment(starter.about, 0),
        f"#   lorry train {file}                  train; --set KEY=VALUE replaces a value, e.g. --set rank=16",
        f"#   lorry eval {base} -a {target}/{first}/adapter --data {sources[first]}",
        "#   lorry train --schema                every option there is",
        "",
        *_entry("base", base, run["base"], 0),
        *_entry("out", target, run["out"], 0),
    ]
    shared = dict(starter.job)
    many = len(sources) > 1
    if many:
        lines += ["", *_comment(run["defaults"], 0), "defaults:"]
        lines += [line for name, value in shared.items() for line in _entry(name, value, helps[name], 1)]
    lines += ["", *_comment(run["jobs"], 0), "jobs:"]
    for name, source in sources.items():
        own = {"data": source, **({} if many else shared), **starter.skills[name]}
        said = helps if name == first else {}
        lines += [*_comment(said.get("name", ""), 2), f"  - name: {_value(name)}"]
        lines += [line for key, value in own.items() for line in _entry(key, value, said.get(key, ""), 2)]
        if name == first:
            lines += ["    # What people change next:"]
            left = (key for key in _NEXT if key not in own and key not in shared)
            lines += [f"    # {key}: {_default(job[key].default)}  # {job[key].help}" for key in left]
    return "\n".join(lines) + "\n"


def render_study(base: str, target: str, source: str, file: Path) -> str:
    """Return the YAML of a study of a few variants; the comments are the options' own help."""
    helps = {o.name: o.help for o in declared_options("training/study/options.py", "Study")}
    job = {"data": source, "objective": "completion", "targets": "attention", "steps": 24, "hold_out": 0.25}
    variants = {
        "lora": {"method": "lora"},
        "dora": {"method": "dora"},
        "lora-plus": {"method": "lora", "dynamics": "lora-plus"},
        "pissa": {"method": "lora", "start": "pissa"},
    }
    lines = [
        *_comment("Variants of training, compared over learning rates and seeds.", 0),
        f"#   lorry study {file}           run it, or go on where it was stopped; --set KEY=VALUE replaces a value",
        f"#   lorry study {file} --ray     the same on a Ray cluster",
        "",
        *_entry("base", base, helps["base"], 0),
        *_entry("out", target, helps["out"], 0),
        "",
        *_comment(helps["job"], 0),
        "job:",
        *(line for key, value in job.items() for line in _entry(key, value, "", 1)),
        "",
        *_comment(helps["variants"], 0),
        "variants:",
        *(line for key, value in variants.items() for line in _entry(key, value, "", 1)),
        "",
    ]
    axes = {"rates": [1e-3, 1e-2, 1e-1], "ranks": [8], "batch_sizes": [8], "seeds": [0, 1]}
    lines += [line for key, value in axes.items() for line in _entry(key, value, helps[key], 0)]
    lines += ["# What people change next:"]
    lines += [f"# {key}: {value}  # {helps[key]}" for key, value in _STUDY_NEXT.items()]
    return "\n".join(lines) + "\n"


def _entry(name: str, value: Any, text: str, depth: int) -> list[str]:
    return [*_comment(text, depth), f"{'  ' * depth}{name}: {_value(value)}"]


def _comment(text: str, depth: int) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=f"{'  ' * depth}# ", subsequent_indent=f"{'  ' * depth}# ")


def _value(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _default(text: str) -> str:
    return {"None": "null", "True": "true", "False": "false"}.get(text, text)
