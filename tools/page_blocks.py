"""The fenced blocks of a documentation page, and a runner that runs them as a reader would, from top to bottom.

What a block is follows from its language and title:

- ``yaml``, ``jsonl`` or ``text`` with ``title="NAME"``: a file of that name, written into the folder of the page;
- ``python``: run, with the names of the page's earlier blocks; with a title it is written as a file instead;
- ``sh``: each line is a command. ``lorry ...`` is run in this process; ``lorry serve ... &`` is started beside it, on a
  free port in the place of `PORT`, until the page ends; ``curl ...`` is run and must not end with an error;
  ``pip install`` and ``make`` are held against pyproject.toml and the Makefile, since running them would change the
  machine; of ``torchrun`` and ``accelerate launch`` the words that lorry gets are held against the program; anything
  else is refused;
- ``text`` without a title: something to read, never run.

A picture under ``images/terminal/`` that follows an ``sh`` block shows the output of that block.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shlex
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
RUN, WRITTEN, READ = ("python", "sh"), ("yaml", "jsonl", "text", "python"), ("text", "toml")

#: Programs that start lorry in several processes.
LAUNCHERS = ("torchrun", "accelerate")

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)(?: +title=\"(?P<title>[^\"]+)\")?[ \t]*\n(?P<code>.*?)^(?P=indent)```[ \t]*$"
    r"(?:\n+(?P=indent)!\[[^\]]*\]\((?:\.\./)*images/terminal/(?P<picture>[\w-]+)\.svg\))?",
    re.DOTALL | re.MULTILINE,
)
#: The port of servers on pages.
PORT = "8000"
_ADDRESS = re.compile(rf"(127\.0\.0\.1:|--port ){PORT}\b")
#: Numbers that make a page slow: training steps, and how many examples of a split are written.
_SIZES = re.compile(r"(\bsteps\b[\"']?(?:\s*[:=]\s*|\s+)|\"(?:train|test)\"\s*[:,]\s*)(\d+)")


class PageError(Exception):
    """A block that cannot be run, or did not do what the page promises."""


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes
    ----------
    line
        Of the page, counted from 1.
    picture
        Name of the picture of its output, if the page shows one.
    """

    page: Path
    line: int
    language: str
    title: str | None
    code: str
    picture: str | None

    @property
    def where(self) -> str:
        """Page and line."""
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, without their indentation."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        code = re.sub(rf"^{match['indent']}", "", match["code"], flags=re.MULTILINE)
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(page, line, match["language"], match["title"], code, match["picture"]))
    return found


def commands(code: str) -> list[list[str]]:
    """Return the commands of a shell block as lists of words; a backslash at its end continues a line."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@dataclass
class PageRunner:
    """Runs the blocks of one page in a folder.

    Attributes
    ----------
    folder
        Where the page's files are written and its commands run.
    steps, examples
        Training steps, and the examples that a page writes of a split, are cut down to this many; None leaves them.
    module
        Holds what the python blocks have defined so far; while one runs it can be imported as ``page``, because
        dataclasses look their module up.
    """

    folder: Path
    steps: int | None = None
    examples: int | None = None
    module: types.ModuleType = field(default_factory=lambda: types.ModuleType("page"))
    _servers: list[Server] = field(default_factory=list, init=False)

    def __enter__(self) -> PageRunner:
        """Return the runner."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the page's servers."""
        for server in self._servers:
            server.end()

    def run(self, block: Block) -> str:
        """Run a block, and return what its commands printed.

        Raises
        ------
        PageError
            An unknown kind of block, a command that may not or cannot be run, or one that failed.
        """
        code = _SIZES.sub(self._fewer, block.code)
        if self._servers:
            code = self._servers[-1].in_place(code)
        if block.title is not None:
            if block.language not in WRITTEN:
                raise PageError(f"{block.where}: a file of {block.language!r} is not known; it may be {WRITTEN}.")
            target = self.folder / block.title
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(code, encoding="utf-8")
            return ""
        if block.language == "python":
            with self._inside():
                sys.modules[self.module.__name__] = self.module
                try:
                    exec(compile(code, block.where, "exec"), self.module.__dict__)
                finally:
                    del sys.modules[self.module.__name__]
            return ""
        if block.language == "sh":
            return "".join(self._command(block, words) for words in commands(code))
        if block.language not in READ:
            raise PageError(f"{block.where}: a block of {block.language!r} is neither run ({RUN}) nor written.")
        return ""

    def _fewer(self, match: re.Match[str]) -> str:
        most = self.steps if match[1].startswith("steps") else self.examples
        return match[1] + str(int(match[2]) if most is None else min(int(match[2]), most))

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        before = Path.cwd()
        os.chdir(self.folder)
        try:
            yield
        finally:
            os.chdir(before)

    def _command(self, block: Block, words: list[str]) -> str:
        if self._servers:
            words = [self._servers[-1].in_place(word) for word in words]
        if words[:2] == ["lorry", "serve"] and words[-1] == "&":
            self._servers.append(Server(words[1:-1], self.folder))
            return ""
        if words[0] == "curl":
            return curl(block, words)
        if words[0] != "lorry":
            check_outside(block, words)
            return ""
        from lorry.cli.main import app

        with self._inside():
            result = CliRunner().invoke(app, words[1:])
        if result.exit_code:
            raise PageError(f"{block.where}: `{shlex.join(words)}` ended with {result.exit_code}: {result.output}")
        return result.output


class Server:
    """A server that a page starts.

    Parameters
    ----------
    words
        Of the command, without ``lorry``.
    folder
        Where it is run.

    Raises
    ------
    PageError
        It ends before it serves.
    """

    def __init__(self, words: Sequence[str], folder: Path) -> None:
        given = [{PORT: "0"}.get(word, word) for word in words]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "lorry", *given]
        self._process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
        said = ""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            said += line
            if found := re.search(r"serving \S+ at http://\S+:(\d+)", line):
                self._port = found[1]
                return
        raise PageError(f"`{shlex.join(words)}` does not serve: {said}")

    def in_place(self, text: str) -> str:
        """Return a text with this server's port in the place of the page's."""
        return _ADDRESS.sub(lambda match: match[1] + self._port, text)

    def end(self) -> None:
        """End it as a reader would."""
        self._process.terminate()
        try:
            self._process.wait(30)
        finally:
            self._process.kill()
            assert self._process.stderr is not None
            self._process.stderr.close()


def curl(block: Block, words: Sequence[str]) -> str:
    """Run a command that asks a page's server; return what it printed.

    Raises
    ------
    PageError
        It asks somebody else, or the answer is an error.
    """
    addresses = [word for word in words if "://" in word]
    if not addresses or not all(re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w/]*", word) for word in addresses):
        raise PageError(f"{block.where}: a page may ask its own server alone; found `{shlex.join(words)}`.")
    found = subprocess.run([*words, "--fail-with-body"], capture_output=True, text=True, timeout=60)
    if found.returncode:
        raise PageError(f"{block.where}: `{shlex.join(words)}` failed: {found.stdout or found.stderr}")
    return found.stdout


def check_outside(block: Block, words: list[str]) -> None:
    """Hold a command that is not run against what it would use.

    Raises
    ------
    PageError
        A make target or an extra that does not exist, or a program that pages may not call.
    """
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        unknown = [w for w in words[1:] if w not in targets]
    elif words[0] in LAUNCHERS and ["-m", "lorry"] in [words[i : i + 2] for i in range(len(words))]:
        own = words[words.index("lorry") :]
        check_flags(dataclasses.replace(block, code=shlex.join(own)))
        unknown = []
    elif words[:2] == ["pip", "install"]:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        extras = set(re.findall(r"\w+", " ".join(re.findall(r"\[([^\]]*)\]", " ".join(words)))))
        unknown = sorted(extras - set(project["optional-dependencies"]))
    else:
        raise PageError(
            f"{block.where}: a page may call lorry, torchrun, curl, make and pip install; found `{shlex.join(words)}`."
        )
    if unknown:
        raise PageError(f"{block.where}: `{shlex.join(words)}` names {unknown}, which does not exist.")


def check_flags(block: Block, *, whole: bool = True) -> None:
    """Hold the words of lorry's commands against the program, without running any.

    Parameters
    ----------
    whole
        Whether a required argument must be there; prose names commands without.

    Raises
    ------
    PageError
        An unknown command, flag or missing argument.
    """
    import typer

    from lorry.cli.main import app

    for words in commands(block.code):
        if words[0] != "lorry":
            check_outside(block, words)
            continue
        command, context, rest = typer.main.get_command(app), None, words[1:]
        try:
            while command is not None:
                context = command.make_context(command.name, rest, parent=context)
                command, rest = _below(command, context)
        except Exception as error:
            if not hasattr(error, "format_message"):
                raise
            if not whole and type(error).__name__ == "MissingParameter":
                continue
            raise PageError(f"{block.where}: `{shlex.join(words)}`: {error.format_message()}") from None


def _below(command: Any, context: Any) -> tuple[Any, list[str]]:
    """Return the command that a group's words go on to, and its words; None below a command that is no group."""
    words = [*getattr(context, "_protected_args", ()), *context.args]
    if not hasattr(command, "resolve_command") or not words:
        return None, []
    _, found, rest = command.resolve_command(context, words)
    return found, rest
