"""Help, version and completion, which wait for nothing."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorry.cli.declared import declared_mapping, declared_options
from lorry.cli.main import COMPLETE, MISUSE, SHELLS

SOURCE = Path(__file__).resolve().parents[2] / "src"
#: Runs the program, then says on stderr whether torch was imported.
PROGRAM = """
import sys
from lorry.cli.main import app
try:
    app(prog_name="lorry")
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""


def program(*arguments: str, **variables: str) -> tuple[str, bool]:
    """Return what the program prints in a process of its own, and whether it imported torch."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), **variables}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr.strip().endswith("True")


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("train", "--help"), ("completion", "fish")])
def test_what_only_tells_about_the_program_imports_no_torch(arguments):
    text, torch = program(*arguments)
    assert text and not torch


@pytest.mark.parametrize(("typed", "wanted"), [("lorry tr", "train"), ("lorry train --max-gr", "--max-grad-norm")])
def test_a_shell_completes_commands_and_flags_without_torch(typed, wanted):
    words = len(typed.split()) - 1
    text, torch = program(COMP_WORDS=typed, COMP_CWORD=str(words), **{COMPLETE: "complete_bash"})
    assert wanted in text.split() and not torch


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_prints_a_script_for_the_shell(lorry, shell):
    script = lorry("completion", shell).stdout
    assert COMPLETE in script and f"complete_{shell}" in script


def test_completion_of_an_unknown_shell_is_misuse(lorry):
    result = lorry("completion", "fihs")
    assert result.exit_code == MISUSE and "'fish'" in result.stderr


def test_declarations_read_from_the_source_are_those_of_the_class():
    from lorry.training.aliases import EARLIER, FOREIGN
    from lorry.training.jobs import Job

    read = declared_options("training/jobs.py", "Job")
    fields = dataclasses.fields(Job)
    assert [(d.name, d.type, d.help) for d in read] == [(f.name, f.type, f.metadata["help"]) for f in fields]
    plain = [(d.default, f.default) for d, f in zip(read, fields, strict=True) if f.default is not dataclasses.MISSING]
    assert all(shown == str(default) or float(shown) == default for shown, default in plain)
    assert declared_mapping("training/aliases.py", "EARLIER") == EARLIER
    assert declared_mapping("training/aliases.py", "FOREIGN") == FOREIGN


def test_methods_and_formats_are_found_whichever_part_is_imported_first():
    code = "from lorry.core.method.registry import METHODS; from lorry.formats.registry import LOADERS\n"
    code += "import lorry.methods.lora, lorry\nprint(len(METHODS) > 20, len(LOADERS) > 1, lorry.methods.__name__)"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["True", "True", "methods"]
