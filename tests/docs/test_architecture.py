"""The page on architecture and the table of bands name what there is."""

import re
from pathlib import Path

import pytest
import site_pages
from check_layers import BANDS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: Pages of the site that are made when it is built.
GENERATED = {(ROOT / "docs" / page).resolve() for page in site_pages.PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) + re.findall(r'src="([^"]+)"', text)
    places = {link: (page.parent / link).resolve() for link in links if "://" not in link}
    assert [link for link, place in places.items() if not place.exists() and place not in GENERATED] == []


def test_the_rooms_of_the_page_are_the_folders():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]*`) \|", text.partition("| room |")[2].partition("\n\n")[0], re.MULTILINE)
    rooms = {room for row in rows for room in re.findall(r"`([^`]+)`", row)}
    source = ROOT / "src" / "lorry"
    packages = {one.parent.relative_to(source).as_posix() for one in source.rglob("__init__.py")} - {"."}
    outer = {one for one in packages if "/" not in one or one.startswith("core/")}
    assert rooms == outer


def test_the_table_of_bands_is_that_of_the_check():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", text, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, len(BANDS) + 1))
    assert [tuple(re.findall(r"`(\w+)`", packages)) for _, packages in rows] == [tuple(band) for band in BANDS]
