"""Draw the rooms of the house, from the imports that there are: ``python tools/draw_rooms.py [SVG]``.

A package is a box in the band that ``check_layers.py`` gives it, a folder inside it a box inside; an arrow means that
one imports from the other, inside functions too. What follows from other arrows is left out: a package may use all
that it can reach. Without a file to write, the picture of docs/architecture.md is drawn anew.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

from check_layers import BANDS, FACE, FACE_MAY, LEVEL, PACKAGE
from module_graph import Edge, edges, module_files

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "rooms.svg"

#: Sizes in pixels.
LETTER, LINE, GAP, PAD, CORRIDOR = 7.6, 18.0, 26.0, 12.0, 40.0
#: Up to so many modules of a package are listed by name.
LISTED = 6
FILLS = ("#ffffff", "#eaf1fb", "#ffffff")
BORDER, INK, ARROW, STRIPE = "#3b5b8c", "#1b1f24", "#6a7c96", "#f4f6f9"

_LOWEST = (0, 0)
Pairs = frozenset[tuple[str, str]]


@dataclass
class Room:
    """A box: a package, a folder inside one, the modules that lie in one directly, or a way past a band.

    Attributes
    ----------
    name
        Dotted.
    label
        What stands in it, by lines; nothing in a way past.
    level
        Its band, and its row within the band, both counted from below.
    inside
        Boxes in it, already placed relative to its upper left corner.
    arrows
        Lines in it, as SVG.
    x, y, width, height
        Its place, in pixels.
    """

    name: str
    label: tuple[str, ...]
    level: tuple[int, int]
    inside: list[Room] = field(default_factory=list)
    arrows: list[str] = field(default_factory=list)
    x: float = 0.0
    y: float = 0.0
    width: float = 0.0
    height: float = 0.0

    @property
    def middle(self) -> float:
        """The middle of it, from left to right."""
        return self.x + self.width / 2


def main(argv: Sequence[str] | None = None) -> int:
    """Write the picture and return the exit status."""
    given = sys.argv[1:] if argv is None else argv
    target = Path(given[0]) if given else PICTURE
    target.write_text(draw(ROOT / "src"), encoding="utf-8")
    print(f"wrote {target}")
    return 0


def draw(source: Path) -> str:
    """Return the picture of the package below `source` as SVG."""
    files = module_files(source, PACKAGE)
    program = f"{PACKAGE}.__main__"  # another name of the command line
    found = [edge for edge in edges(source, PACKAGE) if edge.source != program]
    parts = {part_of(module, 1) for module in files} - {program}
    rooms = [_package(part, files, found) for part in sorted(parts)]
    kept = reduced(pairs(found, 1))
    for room in rooms:
        room.level = (_band(room.name), 0)
    _raise(rooms, kept)
    width, height, arrows = arrange(rooms, kept)
    return _svg(rooms, arrows, width, height)


def part_of(module: str, depth: int) -> str:
    """Return the part that a module belongs to: its first `depth` names after the package's."""
    if module == f"{PACKAGE}.{FACE}":
        return PACKAGE  # it holds the names of `import lorry`
    return ".".join(module.split(".")[: depth + 1])


def pairs(found: Iterable[Edge], depth: int) -> Pairs:
    """Return who imports whom among parts."""
    cut = ((part_of(edge.source, depth), part_of(edge.target, depth)) for edge in found)
    return frozenset((a, b) for a, b in cut if a != b)


def reduced(found: Pairs) -> Pairs:
    """Leave out the pairs that follow from others; of parts that reach each other all pairs stay."""
    reach: dict[str, set[str]] = {name: set() for pair in found for name in pair}
    for name, seen in reach.items():
        waiting = [name]
        while waiting:
            here = waiting.pop()
            new = {b for a, b in found if a == here} - seen
            seen |= new
            waiting.extend(new)

    def follows(a: str, b: str) -> bool:
        between = (c for c in reach[a] if c not in (a, b) and b in reach[c])
        return any(a not in reach[c] and c not in reach[b] for c in between)

    return frozenset((a, b) for a, b in found if not follows(a, b))


def _band(name: str) -> int:
    """Return the band of a package; the public face lies above all that it may import."""
    face = max(LEVEL[part] for part in FACE_MAY) + 1
    part = name.removeprefix(f"{PACKAGE}.")
    if name == PACKAGE:
        return face
    level = LEVEL.get(part, len(BANDS))
    return level if level < face else level + 1


def _package(name: str, files: Mapping[str, Path], found: Sequence[Edge]) -> Room:
    """Return the box of a package, with a box in it for each folder inside."""
    label = "import lorry" if name == PACKAGE else name.removeprefix(f"{PACKAGE}.")
    depth = name.count(".") + 1
    own = [m for m in files if m.startswith(f"{name}.") and m.count(".") == depth] if name != PACKAGE else []
    folders = [m for m in own if files[m].name == "__init__.py"]
    if not folders:
        return _sized(Room(name, (label,), _LOWEST))
    modules = [m.rpartition(".")[2] for m in own if m not in folders]
    listed = (", ".join(modules[:3]) + ",", ", ".join(modules[3:])) if len(modules) > 3 else (", ".join(modules),)
    rooms = [Room(f, (f.rpartition(".")[2],), _LOWEST) for f in folders]
    if modules:
        rooms.append(Room(name, listed if len(modules) <= LISTED else ("*.py",), _LOWEST))
    # what a package's own __init__ gathers is no arrow between its rooms
    inner = [e for e in found if part_of(e.source, 1) == part_of(e.target, 1) == name and e.source != name]
    names = {room.name: room for room in rooms}
    cut = frozenset((_in(edge.source, names), _in(edge.target, names)) for edge in inner)
    kept = reduced(frozenset((a, b) for a, b in cut if a != b))
    for room in rooms:
        _sized(room)
    _raise(rooms, kept)
    width, height, arrows = arrange(rooms, kept, corridor=26.0)
    whole = Room(name, (label,), _LOWEST, rooms, arrows)
    whole.width, whole.height = max(width, len(label) * LETTER) + 2 * PAD, height + LINE + 2 * PAD
    for room in rooms:
        room.x, room.y = room.x + PAD, room.y + PAD + LINE
    return whole


def _in(module: str, names: Mapping[str, Room]) -> str:
    """Return the room of a package that a module lies in."""
    while module not in names:
        module = module.rpartition(".")[0]
    return module


def _sized(room: Room) -> Room:
    """Make a box as large as its label."""
    room.width = max(len(line) for line in room.label) * LETTER + 2 * PAD
    room.height = len(room.label) * LINE + PAD
    return room


def _raise(rooms: Sequence[Room], found: Pairs) -> None:
    """Raise rooms within their band above those that they import from; of two that import each other, one."""
    names = {room.name: room for room in rooms}
    forward = {(a, b) for a, b in found if (b, a) not in found or a > b}
    for _ in rooms:
        for a, b in sorted(forward):
            (band, row), (other, below) = names[a].level, names[b].level
            if band == other and row <= below < len(rooms):
                names[a].level = (band, below + 1)


def arrange(rooms: Sequence[Room], found: Pairs, corridor: float = CORRIDOR) -> tuple[float, float, list[str]]:
    """Place rooms in rows by level, the highest on top.

    Parameters
    ----------
    rooms
        Boxes with level and size; they get their place.
    found
        The arrows between them.
    corridor
        Height between two rows.

    Returns
    -------
    tuple
        Width and height of it all in pixels, and the arrows as SVG.
    """
    names = {room.name: room for room in rooms}
    levels = sorted({room.level for room in rooms}, reverse=True)
    rows = [[room for room in rooms if room.level == level] for level in levels]
    ways: dict[tuple[str, str], list[Room]] = {}
    for pair in sorted(found):
        below, above = sorted((names[name] for name in pair), key=lambda room: (room.level, room.name))
        past = [Room("", (), level, width=2.0) for level in levels if below.level < level < above.level]
        if (above.name, below.name) not in ways:
            ways[above.name, below.name] = [above, *past, below]
            for room in past:
                rows[levels.index(room.level)].append(room)
    near: dict[int, list[Room]] = {id(room): [] for row in rows for room in row}
    for way in ways.values():
        for one, other in zip(way, way[1:], strict=False):
            near[id(one)].append(other)
            near[id(other)].append(one)
    _place(rows, near)
    top = 0.0
    for row in rows:
        tallest = max(room.height for room in row)
        for room in row:
            room.y = top + (tallest - room.height) / 2 if room.label else top
            room.height = room.height if room.label else tallest
        top += tallest + corridor
    left = min(room.x for row in rows for room in row)
    for row in rows:
        for room in row:
            room.x -= left
    width = max(room.x + room.width for row in rows for room in row)
    return width, top - corridor, _lines(ways, found)


def _place(rows: list[list[Room]], near: Mapping[int, Sequence[Room]]) -> None:
    """Order each row by where the neighbours lie, and move the boxes towards them."""

    def wish(room: Room) -> float:
        others = near[id(room)]
        return sum(other.middle for other in others) / len(others) if others else room.middle

    for row in rows:
        _apart(row, [0.0] * len(row))
    for turn in range(24):
        for row in rows if turn % 2 else rows[::-1]:
            row.sort(key=wish)
            _apart(row, [wish(room) for room in row])


def _apart(row: list[Room], wishes: Sequence[float]) -> None:
    """Put the boxes of a row as near to their wishes as the gaps between them allow, in this order."""
    edge = float("-inf")
    lefts = []
    for room, wanted in zip(row, wishes, strict=True):
        edge = max(edge, wanted - room.width / 2)
        lefts.append(edge)
        edge += room.width + GAP
    rights, edge = [], float("inf")
    for room, wanted in zip(reversed(row), reversed(wishes), strict=True):
        edge = min(edge, wanted + room.width / 2)
        rights.append(edge - room.width)
        edge -= room.width + GAP
    for room, one, other in zip(row, lefts, reversed(rights), strict=True):
        room.x = (one + other) / 2


def _lines(ways: Mapping[tuple[str, str], Sequence[Room]], found: Pairs) -> list[str]:
    """Return the arrows; the places where they leave and reach a box are spread along its edge."""
    leaving: dict[int, list[Sequence[Room]]] = {}
    reaching: dict[int, list[Sequence[Room]]] = {}
    for way in ways.values():
        leaving.setdefault(id(way[0]), []).append(way)
        reaching.setdefault(id(way[-1]), []).append(way)

    def port(room: Room, all_ways: list[Sequence[Room]], way: Sequence[Room], next_to: int) -> float:
        order = sorted(all_ways, key=lambda other: other[next_to].middle)
        place = next(i for i, other in enumerate(order) if other is way)
        return room.x + room.width * (place + 1) / (len(order) + 1)

    result = []
    for pair, way in ways.items():
        first, last = way[0], way[-1]
        x, y = port(first, leaving[id(first)], way, 1), first.y + first.height
        path = [f"M{x:.0f} {y:.0f}"]
        for room in way[1:-1]:
            path.append(_curve(x, y, room.middle, room.y))
            x, y = room.middle, room.y + room.height
            path.append(f"L{x:.0f} {y:.0f}")
        path.append(_curve(x, y, port(last, reaching[id(last)], way, -2), last.y))
        ends = {"marker-end": pair, "marker-start": pair[::-1]}
        heads = " ".join(f'{end}="url(#head)"' for end, arrow in ends.items() if arrow in found)
        result.append(f'<path d="{" ".join(path)}" fill="none" stroke="{ARROW}" stroke-width="1.4" {heads}/>')
    return result


def _curve(x: float, y: float, to_x: float, to_y: float) -> str:
    """Return a curve that begins and ends upright."""
    half = (y + to_y) / 2
    return f"C{x:.0f} {half:.0f} {to_x:.0f} {half:.0f} {to_x:.0f} {to_y:.0f}"


def _svg(rooms: Sequence[Room], arrows: Iterable[str], width: float, height: float) -> str:
    """Return the whole picture, on a white ground with a stripe for each band."""
    margin = 20.0
    stripes = []
    for band in sorted({room.level[0] for room in rooms}):
        row = [room for room in rooms if room.level[0] == band]
        top = min(room.y for room in row) - 8
        bottom = max(room.y + room.height for room in row) + 8
        stripes.append(
            f'<rect x="{-margin:.0f}" y="{top:.0f}" width="{width + 2 * margin:.0f}" height="{bottom - top:.0f}" '
            f'fill="{STRIPE}"/>'
        )
    head = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto-start-reverse"><path d="M0 0L8 4L0 8z" fill="{ARROW}"/></marker></defs>'
    )
    box = f"{-margin:.0f} {-margin:.0f} {width + 2 * margin:.0f} {height + 2 * margin:.0f}"
    ground = f'<rect x="{-margin:.0f}" y="{-margin:.0f}" width="100%" height="100%" fill="#ffffff"/>'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" width="{width + 2 * margin:.0f}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="14">',
        head,
        ground,
        *stripes,
        *(line for room in rooms for line in _box(room, 1)),
        *arrows,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _box(room: Room, depth: int) -> list[str]:
    """Return a box with what is in it."""
    size = f'width="{room.width:.0f}" height="{room.height:.0f}"'
    lines = [
        f'<rect x="{room.x:.0f}" y="{room.y:.0f}" {size} rx="6" fill="{FILLS[depth]}" stroke="{BORDER}"/>',
    ]
    for number, line in enumerate(room.label):
        weight = ' font-weight="bold"' if depth == 1 else ""
        y = room.y + PAD / 2 + LINE * (number + 0.75)
        lines.append(
            f'<text x="{room.middle:.0f}" y="{y:.0f}" text-anchor="middle" fill="{INK}"{weight}>{escape(line)}</text>'
        )
    inner = [line for one in room.inside for line in _box(one, depth + 1)]
    if inner:
        lines.append(f'<g transform="translate({room.x:.0f} {room.y:.0f})">')
        lines += inner
        lines.append(f'<g transform="translate({PAD:.0f} {PAD + LINE:.0f})">')
        lines += room.arrows
        lines.append("</g></g>")
    return lines


if __name__ == "__main__":
    sys.exit(main())
