"""Run the pages of the documentation as they stand, and draw what their commands print and plot.

python tools/draw_site.py [PAGE ...]

Each ``sh`` block that a picture under ``images/terminal`` follows gives that picture: its output as the terminal showed
it, as SVG without fonts from elsewhere. `PLOTS` are pictures that commands of a page write themselves.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from page_blocks import DOCS, PageRunner, blocks, commands
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

WIDTH = 110
#: Longer outputs are cut, and say so.
MOST_LINES = 26
#: Picture under docs/images -> page and the file that one of its commands writes.
PLOTS = {
    "inside.png": ("start.md", "inside.png"),
    "similarities.png": ("merging.md", "similarities.png"),
    "fleet-losses.png": ("guides/many-jobs.md", "out/fleet/losses.png"),
}
#: Rich's frame of a terminal without its fonts, which lie on a foreign host.
FRAME = re.sub(r"\s*@font-face \{\{.*?\}\}\n", "\n", CONSOLE_SVG_FORMAT, flags=re.DOTALL).replace(
    "Fira Code", "ui-monospace, Menlo, Consolas, monospace"
)


def draw(output: str, title: str, target: Path) -> None:
    """Write what was printed as a picture of a terminal."""
    lines = [line.rstrip() for line in output.strip("\n").splitlines()]
    if len(lines) > MOST_LINES:
        lines = [*lines[:MOST_LINES], f"... ({len(lines) - MOST_LINES} more lines)"]
    width = max([len(title) + 10, *map(len, lines)])
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=width, file=nowhere, force_terminal=True)
        console.print(Text("\n".join(lines)), soft_wrap=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    # the identifier would otherwise be a digest of every style, new with each version of rich
    target.write_text(console.export_svg(title=title, code_format=FRAME, unique_id=target.stem), encoding="utf-8")


def draw_page(page: Path) -> None:
    """Run one page with the numbers that it shows, and draw its pictures."""
    with tempfile.TemporaryDirectory() as folder, PageRunner(Path(folder)) as runner:
        for block in blocks(page):
            output = runner.run(block)
            if block.picture:
                title = " ".join(shlex.join(commands(block.code)[-1]).split()[:2])
                draw(output.replace(folder, "."), title, DOCS / "images" / "terminal" / f"{block.picture}.svg")
                print(f"{block.where}: {block.picture}.svg")
        for picture, (source, written) in PLOTS.items():
            if DOCS / source == page:
                shutil.copy(Path(folder) / written, DOCS / "images" / picture)
                print(f"{page.name}: {picture}")


def main(names: list[str]) -> None:
    """Draw the pictures of the named pages, or of all that show any."""
    os.environ["COLUMNS"] = str(WIDTH)
    pages = [DOCS / name for name in names] or sorted(DOCS.rglob("*.md"))
    for page in pages:
        if names or any(block.picture for block in blocks(page)):
            draw_page(page)


if __name__ == "__main__":
    main(sys.argv[1:])
