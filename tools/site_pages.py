"""The pages of the documentation site that are made from the code, and the hook through which mkdocs makes them.

`PAGES` maps the path of a page to the function that writes it. None of them lies in the repository: options come from
their declarations, methods from the registry and their docstrings, verdicts from the records, commands from the
program, the API reference (through mkdocstrings) from what the packages list in ``__all__``.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

#: Packages of the API reference: page, module, what it is for. The names are those of ``__all__``.
REFERENCE = {
    "reference/lorry.md": ("lorry", "Attach, activate, save, load: the verbs and the words of the library."),
    "reference/training.md": ("lorry.training", "Jobs and fleets; what a task, a dynamic and a start are."),
    "reference/merging.md": ("lorry.merging", "Adapters merged with each other, compared, and recipes."),
    "reference/serving.md": (
        "lorry.serving",
        "The engine: requests, how they are answered, and what it tells of itself.",
    ),
    "reference/attention.md": ("lorry.attention", "What attention computes, seen apart and changed."),
    "reference/pocket.md": ("lorry.pocket", "The model that ships with the package, and its skills."),
    "reference/pocket-diffusion.md": (
        "lorry.pocket.diffusion",
        "Two tiny pipelines, their world of pictures, and a judge.",
    ),
}
#: How the paragraph of a method's docstring begins that says when to use it.
ADVICE = "Use it "
#: What the author of a method needs; these have no ``__all__`` of their own.
AUTHORS = (
    "lorry.core.method.registry.register",
    "lorry.core.method.registry.preset",
    "lorry.core.options.option",
    "lorry.core.method.spec.TensorSpec",
    "lorry.core.method.families.Bottleneck",
    "lorry.core.method.families.WeightDelta",
    "lorry.core.method.families.Block",
    "lorry.core.method.families.Combiner",
    "lorry.core.method.call.Call",
    "lorry.core.sites.site.Site",
    "lorry.training.huggingface.with_adapters",
)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a markdown table; bars and line breaks in cells are made harmless."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        lines.append("| " + " | ".join(re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in row) + " |")
    return "\n".join(lines)


def paragraphs(text: str | None) -> list[str]:
    """Return the paragraphs of a docstring as markdown: single lines, code in single backticks."""
    found = inspect.cleandoc(text or "").split("\n\n")
    return [re.sub(r"\s+", " ", part).replace("``", "`").strip() for part in found if part.strip()]


def method_page() -> str:
    """Return the page of methods: formula and meaning, when to use it, options, and what its claims came to."""
    import lorry.methods  # noqa: F401  they register
    from lorry.core.method.registry import METHODS, presets

    METHODS.discover()
    records, variants = verdicts(), presets().values()
    lines = [
        "# Methods",
        "A method is the mathematics of an adapter. This page is made from the registry, the methods' own words and "
        "the records of [claims](claims.md); `lorry methods SLUG` prints the same options. "
        "*Identity* says whether a fresh adapter leaves the model unchanged, *fuse* whether a weight exists that "
        "does the same.",
        table(
            ("method", "family", "identity", "fuse", "in a word"),
            (
                (
                    f"[`{slug}`](#{slug})",
                    info.family,
                    "yes" if info.identity_at_start else "no",
                    info.fuse,
                    headline(info.cls),
                )
                for slug, info in METHODS.items()
            ),
        ),
    ]
    for slug, info in METHODS.items():
        words = paragraphs(info.cls.__doc__)
        advice = [part.removeprefix(ADVICE) for part in words if part.startswith(ADVICE)]
        lines += [f"## {slug}", f"*{headline(info.cls)}*", *(part for part in words if not part.startswith(ADVICE))]
        lines += [f"**When to use it:** {part.strip()}" for part in advice]
        facts = info.to_dict()
        lines.append(
            f"Source: {info.paper}. Sits on: {', '.join(facts['kinds'])}. In code: `lorry.{info.cls.__name__}`."
        )
        lines += [f"Preset `{p.slug}` ({p.paper}): {_shown(p.options)}." for p in variants if p.of == slug]
        options = [(f"`{name}`", f"`{_default(o['default'])}`", o["help"]) for name, o in facts["options"].items()]
        if options:
            lines.append(table(("option", "default", "meaning"), options))
        if records.get(slug):
            lines += ["Claims tried here:", "\n".join(records[slug])]
    return "\n\n".join(lines) + "\n"


def start_page() -> str:
    """Return the page of starts: what each looks at, what it does, and its options."""
    from lorry.training.starts import STARTS

    looks = {name: ", ".join(cls.probes) or "the weight alone" for name, cls in STARTS.items()}
    lines = [
        "# Starts",
        "A start sets the tensors of an adapter before training, and is chosen apart from the method: `start: pissa` "
        "in a [job](training.md), `--start pissa` as a flag, a name or an instance in Python. Where the product of A "
        "and B is not zero at the start, a frozen pair takes it back, so that the model's function and the base's "
        "bytes are unchanged, and any number of such adapters share one base; such an adapter is saved as plain LoRA "
        "of twice the rank. What looks at more than the weight takes the first batches of the job's own data.",
        table(
            ("start", "paper", "looks at", "in a word"),
            ((f"[`{name}`](#{name})", cls.paper, looks[name], headline(cls)) for name, cls in STARTS.items()),
        ),
    ]
    for name, cls in STARTS.items():
        lines += [f"## {name}", *paragraphs(cls.__doc__)[:1]]
        fields = dataclasses.fields(cls)
        options = [(f"`{f.name}`", f"`{_default(f.default)}`", str(f.metadata.get("help", ""))) for f in fields]
        if options:
            lines.append(table(("option", "default", "meaning"), options))
    return "\n\n".join(lines) + "\n"


def headline(cls: type) -> str:
    """Return what a method's file says in its first paragraph."""
    return paragraphs(importlib.import_module(cls.__module__).__doc__)[0]


def _shown(options: Mapping[str, Any]) -> str:
    return ", ".join(f"`{k}={v!r}`" for k, v in options.items()) or "the method as it is, by another name"


def _default(value: Any) -> str:
    return "required" if value is dataclasses.MISSING else str(value)


def verdicts() -> dict[str, list[str]]:
    """Return for each slug the lines of its tried claims, with links to the trials."""
    from lorry.claims.ledger import RECORDS, read_records

    found: dict[str, list[str]] = {}
    for record in read_records(RECORDS):
        slug, _, _ = record.name.partition("/")
        anchor = record.name.replace("/", "").lower()
        found.setdefault(slug, []).append(
            f"- [{record.name}](claims.md#{anchor}), **{record.finding.verdict}**: {_sentence(record.finding.summary)}"
        )
    return found


def _sentence(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def merge_method_page() -> str:
    """Return the page of merge methods."""
    from lorry.merging import merge_methods

    lines = [
        "# Merge methods",
        "What can be put into `method:` of a [recipe](merging.md). *Delta* methods work on the updates, *factor* "
        "methods on A and B apart, *aligned* ones in the joint singular basis of the adapters. How they compare: "
        "[`merging/pocket-skills`](claims.md#mergingpocket-skills) and [`merging/text`](claims.md#mergingtext).",
    ]
    for slug, method in merge_methods().items():
        lines += [f"## {slug}", method.help, f"Source: {method.source}. Works on: {method.space}."]
        if method.note:
            lines.append(method.note)
        options = [
            (f"`{f.name}`", f"`{_default(f.default)}`", f.metadata.get("help", ""))
            for f in dataclasses.fields(method.options)
        ]
        if options:
            lines.append(table(("option", "default", "meaning"), options))
    return "\n\n".join(lines) + "\n"


def command_page() -> str:
    """Return the page of the command line."""
    import typer

    from lorry.cli.main import app

    program = typer.main.get_command(app)
    lines = [
        "# Command line",
        "Every command takes `--help`; most take `--json` and then print one JSON document and nothing else. "
        "Exit codes: 0 done, 1 failed, 2 misused, 130 interrupted.",
    ]
    for path, command in _leaves(program, ("lorry",)):
        lines += [f"## {' '.join(path)}", inspect.cleandoc(command.help or "")]
        rows = [
            (
                "`" + (", ".join([*p.opts, *p.secondary_opts]) if p.param_type_name == "option" else p.name) + "`",
                (getattr(p, "help", None) or "") + (" Required." if p.required else ""),
            )
            for p in command.params
            if p.name != "help"
        ]
        if rows:
            lines.append(table(("argument or flag", "meaning"), rows))
    return "\n\n".join(lines) + "\n"


def _leaves(command: Any, path: tuple[str, ...]) -> Iterable[tuple[tuple[str, ...], Any]]:
    if not hasattr(command, "commands") or len(path) > 1:
        yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from _leaves(below, (*path, name))


def run_file_page() -> str:
    """Return the page of the files that commands read: a run's YAML, a merge recipe, what an objective takes."""
    from lorry.cli.run_file import RunFile
    from lorry.federated import Federation, Privacy
    from lorry.merging.recipe import Recipe, RecipeInput, RecipeStep
    from lorry.training.data import DataSpec
    from lorry.training.jobs import Job
    from lorry.training.objectives import OBJECTIVES
    from lorry.training.study import Study

    def fields(cls: type) -> str:
        notes = _field_notes(cls)
        rows = []
        for f in dataclasses.fields(cls):
            value = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            rows.append((f"`{f.name}`", f"`{_default(value)}`", f.metadata.get("help") or notes.get(f.name, "")))
        return table(("field", "default", "meaning"), rows)

    lines = [
        "# Fields of YAML files",
        "`lorry train --schema` prints the same as a JSON schema, which editors can check a file against as you type.",
        "## A run: `lorry train run.yaml`",
        fields(RunFile),
        "## A job: each entry of `jobs`, and `defaults`",
        fields(Job),
        "## Data: `data` and `eval_data` as a mapping",
        fields(DataSpec),
    ]
    for name, cls in OBJECTIVES.items():
        if dataclasses.is_dataclass(cls):
            lines += [f"## Objective `{name}`", *paragraphs(cls.__doc__)[:1], fields(cls)]
    lines += ["## A study: `lorry study study.yaml`", fields(Study)]
    lines += ["## A federation: `lorry federate run.yaml`", fields(Federation), "### `privacy`", fields(Privacy)]
    lines += ["## A merge recipe: `lorry merge recipe.yaml`", fields(Recipe)]
    lines += ["### Each entry of `inputs`", fields(RecipeInput), "### Each entry of `schedule`", fields(RecipeStep)]
    return "\n\n".join(lines) + "\n"


def _field_notes(cls: type) -> dict[str, str]:
    """Return the texts that stand below the fields of a class, the way some dataclasses describe them."""
    source = inspect.getsource(cls)
    found = re.findall(r"^    (\w+):[^\n]*\n    \"\"\"(.*?)\"\"\"", source, re.MULTILINE | re.DOTALL)
    return {name: " ".join(text.split()).replace("``", "`").replace("\\\\", "\\") for name, text in found}


def reference_page(module: str, about: str) -> str:
    """Return the API reference of a package: what it lists in ``__all__``, each under its public name."""
    package = importlib.import_module(module)
    lines = [f"# `{module}`", about]
    for name in sorted(package.__all__, key=lambda name: (not callable(getattr(package, name)), name.lower())):
        value = getattr(package, name)
        if not callable(value):
            lines += [f"## {module}.{name}", f"A value of type `{type(value).__name__}`."]
            continue
        lines.append(_directive(f"{value.__module__}.{value.__qualname__}", f"{module}.{name}"))
    return "\n\n".join(lines) + "\n"


def author_page() -> str:
    """Return the API reference of what the author of a method, or of a loop of their own, uses."""
    lines = ["# For authors", "What a new [method](../adding-a-method.md) is made of, and what a foreign loop calls."]
    return "\n\n".join([*lines, *(_directive(path, path) for path in AUTHORS)]) + "\n"


def _directive(path: str, heading: str) -> str:
    return f"::: {path}\n    options:\n      heading: {heading}\n      toc_label: {heading.rpartition('.')[2]}"


PAGES: dict[str, Callable[[], str]] = {
    "methods.md": method_page,
    "starts.md": start_page,
    "merge-methods.md": merge_method_page,
    "reference/command-line.md": command_page,
    "reference/files.md": run_file_page,
    "reference/authors.md": author_page,
    **{path: lambda given=given: reference_page(*given) for path, given in REFERENCE.items()},
}


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages (called by mkdocs)."""
    from mkdocs.structure.files import File

    for path, write in PAGES.items():
        files.append(File.generated(config, path, content=write()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Turn links out of the documentation, into the source, into plain names (called by mkdocs)."""
    return re.sub(r"\[([^\]]+)\]\(((?:\.\./)+(?:src|tests|tools|examples)/[^)]*)\)", r"`\1`", markdown)
