"""The picture of the rooms: what is drawn, what is left out, and that the one in the docs is of this source."""

import re
from pathlib import Path
from xml.etree import ElementTree

import draw_rooms
import pytest
from check_layers import BANDS
from module_graph import Edge

ROOT = Path(__file__).resolve().parents[2]
SPACE = "{http://www.w3.org/2000/svg}"


def tree(tmp_path: Path, files: dict[str, str]) -> Path:
    """A package of these modules, each with its text."""
    for module, code in files.items():
        file = tmp_path / "lorry" / f"{module}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code)
    return tmp_path


def boxes(svg: str) -> dict[str, tuple[float, float, float, float]]:
    """Left, top, right and bottom of the outer boxes by their label."""
    root = ElementTree.fromstring(svg)
    rects = [r for r in root.findall(f"{SPACE}rect") if r.get("rx")]
    labels = [t.text or "" for t in root.findall(f"{SPACE}text")]
    found = {}
    for label, rect in zip(labels, rects, strict=True):
        x, y, width, height = (float(rect.get(key, "nan")) for key in ("x", "y", "width", "height"))
        found[label] = (x, y, x + width, y + height)
    return found


def arrows(svg: str) -> set[tuple[str, str]]:
    """The pairs of outer boxes that arrows join, from where they begin and end."""
    root = ElementTree.fromstring(svg)
    places = boxes(svg)

    def at(x: float, y: float, edge: int) -> str:
        return next(n for n, b in places.items() if b[0] <= x <= b[2] and abs(b[edge] - y) <= 1)

    found = set()
    for path in root.findall(f"{SPACE}path"):
        numbers = [float(n) for n in re.findall(r"-?\d+", path.get("d", ""))]
        above, below = at(*numbers[:2], 3), at(*numbers[-2:], 1)
        found |= {(above, below)} if path.get("marker-end") else set()
        found |= {(below, above)} if path.get("marker-start") else set()
    return found


def pairs(text: str) -> frozenset[tuple[str, str]]:
    """``ab bc`` as pairs of letters."""
    return frozenset((one[0], one[1]) for one in text.split())


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("ab bc ac", "ab bc"),
        ("ab bc cd ad bd", "ab bc cd"),
        ("ab ac bd cd", "ab ac bd cd"),
        ("ab ba", "ab ba"),
        ("ab ba bc ac", "ab ba bc ac"),
        ("xa ab ba xb", "xa ab ba xb"),
    ],
)
def test_what_follows_from_other_arrows_is_left_out(given: str, kept: str) -> None:
    assert draw_rooms.reduced(pairs(given)) == pairs(kept)


def test_pairs_are_of_parts() -> None:
    found = [Edge("lorry.core.a", "lorry.kernels.b", 1), Edge("lorry.core.a", "lorry.core.sites.c", 2)]
    assert draw_rooms.pairs(found, 1) == {("lorry.core", "lorry.kernels")}
    assert draw_rooms.pairs(found, 2) == {
        ("lorry.core.a", "lorry.kernels.b"),
        ("lorry.core.a", "lorry.core.sites"),
    }


def test_boxes_lie_in_their_bands_and_arrows_join_who_imports_whom(tmp_path: Path) -> None:
    files = {
        "__init__": "from lorry.core.a import f",
        "kernels/a": "",
        "core/a": "from lorry.kernels.a import f",
        "methods/a": "def f():\n    from lorry.core.a import f\n    import lorry.kernels.a",
        "pocket/a": "",
        "training/a": "from lorry.core.a import f",
        "cli/a": "import lorry\nimport lorry.pocket.a\nimport lorry.training.a",
        "__main__": "import lorry.methods.a",
    }
    svg = draw_rooms.draw(tree(tmp_path, files))
    places = boxes(svg)
    order = ["cli", "import lorry", "training", "pocket", "methods", "core", "kernels"]
    assert sorted(places, key=lambda name: places[name][1]) == order
    assert arrows(svg) == {
        ("cli", "import lorry"),
        ("cli", "training"),
        ("cli", "pocket"),
        ("import lorry", "core"),
        ("training", "core"),
        ("methods", "core"),
        ("core", "kernels"),
    }


def test_neighbours_of_a_band_lie_one_above_the_other(tmp_path: Path) -> None:
    files = {"training/a": "", "merging/a": "", "transfer/a": "import lorry.training.a", "bench/a": ""}
    svg = draw_rooms.draw(tree(tmp_path, files))
    places = boxes(svg)
    assert arrows(svg) == {("transfer", "training")}
    assert places["bench"][3] < places["transfer"][1] and places["transfer"][3] < places["training"][1]
    assert places["merging"][1] == places["training"][1]
    stripes = [r for r in ElementTree.fromstring(svg).findall(f"{SPACE}rect") if r.get("fill") == draw_rooms.STRIPE]
    assert len(stripes) == 2


def test_folders_of_a_package_are_boxes_in_it(tmp_path: Path) -> None:
    files = {
        "core/errors": "",
        "core/sites/__init__": "",
        "core/sites/site": "from lorry.core.errors import E",
        "core/forward/__init__": "",
        "core/forward/link": "from lorry.core.sites.site import S\nfrom lorry.core.errors import E",
    }
    root = ElementTree.fromstring(draw_rooms.draw(tree(tmp_path, files)))
    (inner,) = root.findall(f"{SPACE}g")
    assert {t.text for t in inner.findall(f"{SPACE}text")} == {"errors", "sites", "forward"}
    assert len(inner.findall(f"{SPACE}g/{SPACE}path")) == 2


def test_no_boxes_overlap_in_a_full_house(tmp_path: Path) -> None:
    names = [name for band in BANDS for name in band]
    files = {}
    for i, name in enumerate(names):
        below = [n for band in BANDS if name not in band for n in band if names.index(n) < i]
        files[f"{name}/a"] = "\n".join(f"import lorry.{n}.a" for n in below)
    places = boxes(draw_rooms.draw(tree(tmp_path, files)))
    assert set(places) == set(names)
    listed = list(places.values())
    for i, one in enumerate(listed):
        for other in listed[i + 1 :]:
            beside = one[2] <= other[0] or other[2] <= one[0]
            assert beside or one[3] <= other[1] or other[3] <= one[1]


def test_the_picture_in_the_docs_is_of_this_source() -> None:
    drawn = draw_rooms.PICTURE.read_text(encoding="utf-8")
    assert drawn == draw_rooms.draw(ROOT / "src"), "run `python tools/draw_rooms.py`"
