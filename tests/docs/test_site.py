"""The site builds strictly without foreign hosts, and what its pages say of the code is so."""

import ast
import dataclasses
import importlib
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import site_pages
from page_blocks import DOCS, ROOT

import lorry
from lorry.cli.run_file import RunFile
from lorry.core.method.registry import METHODS, presets
from lorry.training.data import DataSpec
from lorry.training.jobs import Job
from lorry.training.objectives import OBJECTIVES

# -- messages


def template(node: ast.expr) -> str | None:
    """Return a text of the source with an ellipsis in the place of each value."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    return None


def raised() -> set[str]:
    """Return the messages of all errors that the source raises."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "src" / "lorry").rglob("*.py"))
    calls = (node.exc for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Raise))
    texts = (template(arg) for call in calls if isinstance(call, ast.Call) for arg in call.args)
    return {text for text in texts if text}


def quoted() -> list[str]:
    return re.findall(r"^> (.*)$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_every_quoted_message_is_one_that_the_code_raises():
    messages = raised()
    pieces = {quote: quote.strip("…. ") for quote in quoted()}
    assert len(pieces) > 30
    assert [quote for quote, piece in pieces.items() if not any(piece in message for message in messages)] == []
    assert [quote for quote, piece in pieces.items() if len(re.findall(r"[A-Za-z]{2,}", piece)) < 4] == [], "too vague"


# -- fields, methods, commands


def known_fields() -> set[str]:
    classes = [RunFile, Job, DataSpec, *(info.cls for info in METHODS.values()), *OBJECTIVES.values()]
    return {field.name for cls in classes if dataclasses.is_dataclass(cls) for field in dataclasses.fields(cls)}


def test_fields_that_other_trainers_call_otherwise_exist():
    text = (DOCS / "guides" / "from-trainers.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\|[^|]*\|[^|]*\| (`.*?) \|$", text.partition("## Field by field")[2].partition("## Data")[0], re.M
    )
    assert len(rows) > 30
    named = [re.match(r"`(\w+)(?:: ([\w-]+))?`", row).groups() for row in rows]
    assert {field for field, _ in named} - known_fields() == set()
    methods = {value for field, value in named if field == "method"}
    assert methods - {*METHODS, *presets()} == set()
    assert {value for field, value in named if field == "objective"} - set(OBJECTIVES) == set()


@pytest.mark.parametrize("slug", sorted(lorry.methods()))
def test_a_method_says_its_formula_and_when_to_use_it(slug):
    words = site_pages.paragraphs(lorry.methods()[slug].cls.__doc__)
    assert sum(part.startswith(site_pages.ADVICE) for part in words) == 1
    assert re.search(r"`[^`]*=[^`]*`", " ".join(words)), "a formula"


def test_generated_pages_hold_what_is_registered():
    methods = site_pages.method_page()
    assert set(METHODS) <= set(re.findall(r"^## (\S+)$", methods, re.MULTILINE))
    assert all(f"Preset `{slug}`" in methods for slug in presets())
    assert all(
        f"`{f.name}`" in site_pages.run_file_page() for f in (*dataclasses.fields(RunFile), *dataclasses.fields(Job))
    )
    assert "## lorry claims run\n" in site_pages.command_page()
    for path, (module, _) in site_pages.REFERENCE.items():
        listed, page = importlib.import_module(module).__all__, site_pages.PAGES[path]()
        assert [name for name in listed if f"{module}.{name}" not in page] == []


# -- pictures


def test_pictures_are_shown_and_hold_nothing_foreign():
    pages = "".join(page.read_text(encoding="utf-8") for page in [ROOT / "README.md", *DOCS.rglob("*.md")])
    pictures = [*(DOCS / "images").rglob("*.svg"), *(DOCS / "images").rglob("*.png")]
    assert [picture for picture in pictures if picture.relative_to(DOCS).as_posix() not in pages] == []
    drawn = [picture for picture in pictures if picture.suffix == ".svg"]
    assert [picture for picture in drawn if re.search(r"url\([\"']?http|href=[\"']http", picture.read_text())] == []


# -- the site


class Fetched(HTMLParser):
    """What a page fetches by itself (links that a reader may follow are not)."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        found = given.get("href") if tag == "link" and given.get("rel") != "canonical" else given.get("src")
        self.addresses += [found] if found else []


def test_the_site_builds_strictly_and_fetches_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    expected = {page.relative_to(DOCS).with_suffix(".html").as_posix() for page in DOCS.rglob("*.md")}
    expected |= {Path(page).with_suffix(".html").as_posix() for page in site_pages.PAGES}
    assert {page.relative_to(tmp_path).as_posix() for page in pages} >= expected
    for page in pages:
        fetched = Fetched()
        fetched.feed(page.read_text(encoding="utf-8"))
        assert [address for address in fetched.addresses if re.match(r"(https?:)?//", address)] == [], page.name
    sheets = "".join(sheet.read_text(encoding="utf-8") for sheet in tmp_path.rglob("*.css"))
    assert re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//[^)]*", sheets) == []
    reference = (tmp_path / "reference" / "lorry.html").read_text(encoding="utf-8")
    assert all(f"lorry.{name}" in reference for name in lorry.__all__)
