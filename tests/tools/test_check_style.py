"""The style check: what it finds, and what it leaves in peace."""

import textwrap
from pathlib import Path

import check_style
import pytest


def problems(tmp_path: Path, code: str) -> list[str]:
    """What is found in a file of this code, without the file's name."""
    file = tmp_path / "a.py"
    file.write_text(textwrap.dedent(code))
    return [found.removeprefix(f"{file}:") for found in check_style.check_file(file)]


GOOGLE = '''
def f(a):
    """Do it.

    {title}:
        a: what it is.
    """
'''


@pytest.mark.parametrize("title", ["Args", "Returns", "Raises", "Yields", "Attributes", "Example"])
def test_a_section_with_a_colon_is_found_at_its_line(tmp_path: Path, title: str) -> None:
    (found,) = problems(tmp_path, GOOGLE.format(title=title))
    assert found.startswith("5: ") and f"'{title}:'" in found


def test_sections_in_classes_and_modules_are_found(tmp_path: Path) -> None:
    found = problems(
        tmp_path, '"""A module.\n\nNote:\n    x\n"""\nclass A:\n    """A.\n\n    Attributes:\n        a: b\n    """\n'
    )
    assert [one.partition(":")[0] for one in found] == ["3", "9"]


FINE_DOCSTRINGS = [
    '"""Do it.\n\nParameters\n----------\na\n    What it is.\n\nRaises\n------\nValueError\n    Never.\n"""',
    '"""Two ways:\n\n- one,\n- the other.\n"""',
    '"""What it Returns: a number."""',
    'x = """\nArgs:\n    this is no docstring\n"""',
]


@pytest.mark.parametrize("code", FINE_DOCSTRINGS)
def test_other_docstrings_are_left_in_peace(tmp_path: Path, code: str) -> None:
    assert problems(tmp_path, code) == []


LONG = "the gates of this method depend on the token, so that there is no single weight that does the same thing"
BROKEN = {
    "a word alone": f'f(\n    "{LONG} and it can "\n    "neither "\n    "be merged nor exported."\n)',
    "three words alone": f'f(\n    "{LONG} at "\n    f"{{a}} of {{b}} "\n    "sites, nor anywhere."\n)',
    "the first line": 'f(\n    "It can "\n    "neither be merged nor exported."\n)',
    "half lines": 'f(\n    "The update depends on the token and so "\n    "can neither be merged nor exported."\n)',
    "as a keyword": 'f(\n    help="A path, a pattern, a name, or several of these, "\n    "separated by commas.",\n)',
    "space in front": 'f(\n    "The update depends on the token and so"\n    " can neither be merged nor exported."\n)',
}


@pytest.mark.parametrize("code", BROKEN.values(), ids=BROKEN)
def test_a_text_that_breaks_without_need_is_found(tmp_path: Path, code: str) -> None:
    (found,) = problems(tmp_path, code)
    assert "fill the lines" in found


WHOLE = {
    "full lines": f'f(\n    "{LONG} and can "\n    "neither be merged nor exported, so serve it beside the base."\n)',
    "a few words at the end": f'f(\n    "{LONG} and can "\n    "not be merged."\n)',
    "after a sentence": 'f(\n    "It cannot be merged. "\n    "Serve it unfused."\n)',
    "after a colon": 'f(\n    "There are: "\n    f"{names}."\n)',
    "after a line feed": 'f(\n    "one\\n"\n    "two words\\n"\n    "three"\n)',
    "where no space is": 'f(\n    "{% for message in messages %}"\n    "{{ message }}"\n    "{% endfor %}"\n)',
    "no room for the next word": f'f(\n    "{LONG}, "\n    f"{{some(the, long, expression)}} is left."\n)',
    "a text in three quotes": 'x = """\na\nb c d\n"""',
    "with a comment": 'f(\n    "one "  # of them\n    "two"\n)',
    "texts in a list": 'x = [\n    "one ",\n    "two ",\n]',
}


@pytest.mark.parametrize("code", WHOLE.values(), ids=WHOLE)
def test_a_text_that_breaks_where_it_may_is_left_in_peace(tmp_path: Path, code: str) -> None:
    assert problems(tmp_path, code) == []


@pytest.mark.parametrize(("more", "count"), [(0, 1), (1, 0)])
def test_what_counts_is_whether_a_line_holds_it(tmp_path: Path, more: int, count: int) -> None:
    words = "word " * 10 + "{a} "
    rest = "x" * (120 - len("    f''") - len(words) + more - 1) + "."
    code = f'f(\n    f"{words}"\n    "{rest}"\n)'
    assert len(problems(tmp_path, code)) == count
    if count:
        assert problems(tmp_path, f'f(\n    f"{words}{rest}"\n)') == []
        assert len(f'    f"{words}{rest}"') == 120


@pytest.mark.parametrize(
    ("message", "count"),
    [
        ('"There is no such thing."', 0),
        ('"Did you mean this?"', 0),
        ("f\"There is no '{name}'.{near_misses(name, known)}\"", 0),
        ("f\"'{path}' cannot be read: {problem}\"", 0),
        ("message", 0),
        ('"All of it (see `lorry plan`.)"', 0),
        ('f"{name} is gone."', 0),
        ('"dropout=0 is needed."', 0),
        ('"There is no such thing"', 1),
        ('f"Expected a number, found {value!r}"', 1),
        ('"expected a number."', 1),
        ('f"found {value!r}"', 2),
    ],
)
def test_messages_are_sentences(tmp_path: Path, message: str, count: int) -> None:
    assert len(problems(tmp_path, f"raise lorry.OptionError({message})")) == count
    assert len(problems(tmp_path, f"def f():\n    return OptionError({message})")) == count
    assert problems(tmp_path, f"raise AttributeError({message})") == []


def test_files_folders_and_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "good.py").write_text("x = 1\n")
    assert check_style.main([str(tmp_path)]) == 0
    bad = tmp_path / "inner" / "bad.py"
    bad.write_text("raise OptionError('no')\n")
    assert check_style.main([str(tmp_path)]) == 1
    assert f"{bad}:1: the message of OptionError" in capsys.readouterr().out
    assert check_style.main([str(tmp_path / "inner" / "good.py")]) == 0
    bad.write_text("x = (")
    assert check_style.main([str(bad)]) == 1
    assert "does not parse" in capsys.readouterr().out
