"""Check what ruff does not: ``python tools/check_style.py [FILE OR FOLDER ...]``, by default src, tests and tools.

- Docstrings are in numpy style: no section such as ``Args:`` with its entries indented below it.
- A text that is put together from several literals fills its lines. It may break after a sentence, a colon, a semicolon
  or a line feed, and where no space stands; elsewhere it must not take more lines than it needs, and no piece of at
  most three words may stand alone in the middle of a sentence.
- The message of an error is whole sentences: it begins with a capital letter (or a name) and ends with a full stop or a
  question mark. It may end with a placeholder behind a sentence (near misses) or a colon (another message).

Prints a line for each violation and exits 1.
"""

from __future__ import annotations

import ast
import builtins
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("src", "tests", "tools")
LINE = 120
FEW_WORDS = 3
#: Python's own errors: their wording has no full stop, and they are caught and put into sentences.
NOT_SENTENCES = frozenset(dir(builtins))
#: Functions whose text ends a sentence by itself.
ENDING = frozenset({"suggest", "near_misses"})

_SECTION = re.compile(
    r"^[ \t]*(Args|Arguments|Attributes|Examples?|Fields|Keyword Args|Keyword Arguments|Notes?|Parameters|Raises|"
    r"Returns|See Also|Warns|Yields):[ \t]*$",
    re.MULTILINE,
)
_LITERAL = re.compile(r"""^(?P<prefix>[rRbBfFuU]{0,2})(?P<quote>["'])(?!(?P=quote)(?P=quote))(?P<text>.*)(?P=quote)$""")
_PLACEHOLDER = re.compile(r"\{[^{}]*\}")
#: A piece of text that ends so may be the last of its line.
_MAY_END = re.compile(r"([.!?:;]['\"`)]*\s*|\\n)$")
_WORD = re.compile(r"(?:\{[^{}]*\}|\S)+\s*|\s+")


@dataclass(frozen=True)
class Piece:
    """One literal of a text, alone on its line.

    Attributes
    ----------
    text
        As it is written, without prefix and quotes.
    room
        How many characters of text its line has room for.
    """

    text: str
    room: int


def main(argv: Sequence[str] | None = None) -> int:
    """Check the files and folders given and return the exit status."""
    given = [Path(a) for a in (sys.argv[1:] if argv is None else argv)] or [ROOT / folder for folder in FOLDERS]
    files = [file for path in given for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    problems = [problem for file in files for problem in check_file(file)]
    for problem in problems:
        print(problem)
    print(f"style: {len(files)} files, {len(problems)} problems")
    return 1 if problems else 0


def check_file(file: Path) -> list[str]:
    """Return a line for each violation in a file, in the order of its lines."""
    text = file.read_text(encoding="utf-8")
    try:
        tree = ast.parse(text, filename=str(file))
    except SyntaxError as error:
        return [f"{file}:{error.lineno}: does not parse: {error.msg}"]
    found = [*sections(tree), *broken_texts(tree, text), *unfinished_messages(tree)]
    return [f"{file}:{line}: {problem}" for line, problem in sorted(found)]


def sections(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the sections of docstrings that are not underlined."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node, clean=False)
        for match in _SECTION.finditer(text or ""):
            line = node.body[0].lineno + (text or "").count("\n", 0, match.start())
            yield line, f"'{match[1]}:' in a docstring: name the section without a colon, and underline it with dashes"


def broken_texts(tree: ast.Module, source: str) -> Iterator[tuple[int, str]]:
    """Yield the texts whose literals break in the middle of a sentence without need."""
    lines = source.split("\n")
    for node in _texts(tree):
        problem = _breaks_badly(_pieces(node, lines))
        if problem:
            yield node.lineno, f"{problem}: fill the lines"


def _breaks_badly(pieces: Sequence[Piece]) -> str | None:
    """Return what is wrong with the way in which a text is spread over lines, if anything."""
    for piece, after in zip(pieces, pieces[1:], strict=False):
        first = _WORD.match(after.text)
        fits = first is not None and len(piece.text) + len(first[0].rstrip()) <= piece.room
        few = len(_PLACEHOLDER.sub("x", piece.text).split()) <= FEW_WORDS
        if few and fits and not _may_break(piece, after):
            return f"the words '{piece.text.strip()}' stand alone in a sentence"
    start = 0
    for end in range(1, len(pieces) + 1):
        if end == len(pieces) or _may_break(pieces[end - 1], pieces[end]):
            needed = _lines_needed(pieces[start:end])
            if needed < end - start:
                return f"a sentence takes {end - start} lines where {needed} would do"
            start = end
    return None


def _texts(tree: ast.Module) -> Iterator[ast.expr]:
    """Yield the literal texts that are not parts of others."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            yield node
        else:
            waiting.extend(ast.iter_child_nodes(node))


def _pieces(node: ast.expr, lines: Sequence[str]) -> list[Piece]:
    """Return the literals of a text; none if it is one literal, or if its lines hold other things too."""
    first, last = node.lineno, node.end_lineno or node.lineno
    found = []
    for number in range(first, last + 1) if last > first else ():
        line = lines[number - 1].encode()
        begin = node.col_offset if number == first else len(line) - len(line.lstrip())
        end = node.end_col_offset if number == last and node.end_col_offset is not None else len(line)
        match = _LITERAL.match(line[begin:end].decode().rstrip())
        if match is None:
            return []
        behind = len(line.decode()) - len(line[:end].decode())
        found.append(Piece(match["text"], LINE - len(line[:begin].decode()) - behind - len("f''")))
    return found


def _may_break(before: Piece, after: Piece) -> bool:
    """Whether a text may break here however full the line is."""
    at_space = before.text[-1:].isspace() or after.text[:1].isspace()
    return not at_space or _MAY_END.search(before.text) is not None


def _lines_needed(pieces: Sequence[Piece]) -> int:
    """Return how many lines hold a text that breaks at spaces only."""
    rooms = [piece.room for piece in pieces]
    count, used = 1, 0
    for word in _WORD.findall("".join(piece.text for piece in pieces)):
        # the space behind the last word of a line stays on that line
        if used and used + len(word) > rooms[min(count, len(rooms)) - 1]:
            count, used = count + 1, 0
        used += len(word)
    return count


def unfinished_messages(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the messages of errors that are no whole sentences."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and node.args):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if not called.endswith("Error") or called in NOT_SENTENCES:
            continue
        parts = _message(node.args[0])
        if not parts:
            continue
        if not _ends(parts):
            yield node.lineno, f"the message of {called} ends in the middle of a sentence: end it with a full stop"
        if parts[0] is not None and re.match(r"[a-z]+[ ,](?!must )", parts[0]):
            yield node.lineno, f"the message of {called} does not begin like a sentence: begin with a capital letter"


def _message(node: ast.expr) -> list[str | None]:
    """Return the parts of a literal text, None for each placeholder; nothing if it is no literal text."""
    if isinstance(node, ast.JoinedStr):
        return [str(v.value) if isinstance(v, ast.Constant) else _placed(v) for v in node.values]
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


def _placed(node: ast.expr) -> str | None:
    """Return a full stop for a placeholder that ends a sentence, None for any other."""
    call = node.value if isinstance(node, ast.FormattedValue) else None
    name = getattr(call.func, "id", "") if isinstance(call, ast.Call) else ""
    return "." if name in ENDING else None


def _ends(parts: Sequence[str | None]) -> bool:
    """Whether a message ends with a whole sentence, as far as one can see."""
    last = parts[-1]
    if last is not None:
        return re.search(r"[.?!]['\"`)]*\s*$", last) is not None
    before = parts[-2] if len(parts) > 1 else None
    return before is None or re.search(r"[.?!:]['\"`)]*\s*$", before) is not None


if __name__ == "__main__":
    sys.exit(main())
