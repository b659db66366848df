"""Every code block of the documentation runs, in order, in a folder of its own; commands that prose mentions exist."""

import re
import shlex
from dataclasses import replace

import pytest
from page_blocks import DOCS, ROOT, Block, PageError, PageRunner, blocks, check_flags, commands

from lorry.core.method.registry import METHODS

#: Enough to see that everything fits together; what the pages show was made with the numbers that stand there.
STEPS, EXAMPLES = 3, 32
PAGES = sorted(DOCS.rglob("*.md"))
WITH_BLOCKS = [page for page in PAGES if blocks(page)]


def shown(page) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(autouse=True)
def fresh_registry(monkeypatch):
    """A page may register a method of its own; no other test shall see it."""
    METHODS.discover()
    monkeypatch.setattr(METHODS, "_items", dict(METHODS))


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=shown)
def test_every_block_runs(page, tmp_path):
    with PageRunner(tmp_path, STEPS, EXAMPLES) as runner:
        for block in blocks(page):
            runner.run(block)


def test_the_readme_runs_in_python_and_its_commands_exist(tmp_path):
    runner = PageRunner(tmp_path, STEPS, EXAMPLES)
    languages = [block.language for block in blocks(ROOT / "README.md")]
    assert {"sh", "python"} == set(languages)
    for block in blocks(ROOT / "README.md"):
        if block.language == "sh":
            check_flags(block)
        else:
            runner.run(block)


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=shown)
def test_commands_in_prose_exist(page):
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for command in re.findall(r"`(lorry [a-z][^`]*)`", prose):
        check_flags(Block(page, 0, "sh", None, command.replace("...", ""), None), whole=False)


# -- the runner itself


def block(code: str, language: str = "sh", title: str | None = None) -> Block:
    return Block(DOCS / "x.md", 1, language, title, code, None)


def test_blocks_are_found_with_title_indentation_and_picture(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        '- a\n  ```yaml title="a.yaml"\n  x: 1\n  ```\n\n```sh\nlorry version\n```\n\n![b](../images/terminal/b.svg)\n'
    )
    found = blocks(page)
    assert [(b.line, b.language, b.title, b.code, b.picture) for b in found] == [
        (2, "yaml", "a.yaml", "x: 1\n", None),
        (6, "sh", None, "lorry version\n", "b"),
    ]


def test_commands_go_on_after_a_backslash_and_end_at_a_comment():
    assert commands("lorry a \\\n  'b c'  # d\n\n# e\nmake f\n") == [["lorry", "a", "b c"], ["make", "f"]]


@pytest.mark.parametrize(
    "code, says",
    [
        ("lorry inspect nowhere", "ended with 2"),
        ("torchrun --nproc-per-node 2 -m lorry train --nothing", "nothing"),
        ("lorry serve --nothing &", "does not serve"),
        ("curl -s http://127.0.0.1:1/x", "failed"),
        ("curl -s http://example.com", "its own server"),
        ("curl -s http://127.0.0.1:1 -d x --next http://example.com", "its own server"),
        ("rm -r x", "may call lorry, torchrun, curl, make and pip install"),
        ("make nothing", "nothing"),
        ("pip install '.[nothing]'", "nothing"),
    ],
)
def test_what_does_not_work_is_an_error(code, says, tmp_path):
    with pytest.raises(PageError, match=says):
        PageRunner(tmp_path).run(block(code))
    with pytest.raises(PageError, match="neither run"):
        PageRunner(tmp_path).run(block(code, language="ruby"))
    with pytest.raises(PageError, match="not known"):
        PageRunner(tmp_path).run(replace(block(code), title="a.sh"))


@pytest.mark.parametrize("code", ["lorry nothing", "lorry train --nothing 1", "lorry generate", "lorry claims nothing"])
def test_commands_that_do_not_exist_are_found(code):
    with pytest.raises(PageError, match=re.escape(shlex.join(code.split()))):
        check_flags(block(code))


def test_sizes_are_cut_down_and_never_raised(tmp_path):
    text = "steps: 100\nsteps: 2\n"
    PageRunner(tmp_path, 3, 32).run(block(text, "yaml", "a.yaml"))
    assert (tmp_path / "a.yaml").read_text() == "steps: 3\nsteps: 2\n"
    PageRunner(tmp_path).run(block(text, "yaml", "a.yaml"))
    assert (tmp_path / "a.yaml").read_text() == text
