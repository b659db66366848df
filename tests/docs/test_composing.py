"""The blocks of docs/composing.md run, one after another."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "composing.md"


def test_every_block_of_the_page_runs():
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 7
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert len(names["shares"]) == 4
