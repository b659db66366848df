"""Questions about pictures, as text such as ``colour:ring>red``.

The *base* skills are what the pocket VLM was trained on; the *held-out* ones are what adapters learn. Pictures of the
test split show titles, scenes and digits that were drawn apart from those of training.
"""

from __future__ import annotations

import difflib
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ..world import Split
from .world import COLUMNS, ROWS, Page, Picture, Scene, Thing, Written, draw_page, draw_scene, draw_written

Kind = Literal["base", "held-out"]


@dataclass(frozen=True)
class Question:
    """A picture, what is asked about it, and the answer."""

    picture: Picture
    prompt: str
    answer: str


@dataclass(frozen=True)
class Skill:
    """A kind of question.

    Attributes
    ----------
    name
        Unique key.
    kind
        ``base`` or ``held-out``.
    picture
        Draws a picture of a split that can be asked about so.
    ask
        Draws what is asked, behind the colon, and the answer.
    pages
        Whether it is about pages.
    """

    name: str
    kind: Kind
    picture: Callable[[random.Random, Split], Picture]
    ask: Callable[[random.Random, Picture], tuple[str, str]]
    pages: bool = False

    def question(self, rng: random.Random, picture: Picture) -> Question:
        """Ask about a picture."""
        asked, answer = self.ask(rng, picture)
        return Question(picture, f"{self.name}:{asked}>", answer)


_SKILLS: dict[str, Skill] = {}


def _things(rng: random.Random, split: Split) -> Scene:
    return draw_scene(rng, rng.randint(1, 4))


def _pairs(rng: random.Random, split: Split) -> Scene:
    """Two things that differ in both directions."""
    while True:
        scene = draw_scene(rng, 2)
        one, two = scene.things
        if one.row != two.row and one.column != two.column:
            return scene


def _alike(rng: random.Random, split: Split) -> Scene:
    return draw_scene(rng, rng.randint(1, 6), alike=True)


def _cored(rng: random.Random, split: Split) -> Scene:
    return draw_scene(rng, rng.randint(1, 3), cores=True)


def _add(
    name: str,
    kind: Kind,
    picture: Callable[[random.Random, Split], Picture],
    ask: Callable[[random.Random, Thing, Scene], tuple[str, str]],
) -> None:
    """Register a skill that asks about one thing of a scene."""

    def asked(rng: random.Random, shown: Picture) -> tuple[str, str]:
        assert isinstance(shown, Scene)
        return ask(rng, rng.choice(shown.things), shown)

    _SKILLS[name] = Skill(name, kind, picture, asked)


def _add_page(name: str, kind: Kind, ask: Callable[[random.Random, Page], tuple[str, str]]) -> None:
    """Register a skill that asks about a page."""

    def asked(rng: random.Random, shown: Picture) -> tuple[str, str]:
        assert isinstance(shown, Page)
        return ask(rng, shown)

    _SKILLS[name] = Skill(name, kind, lambda rng, split: draw_page(rng, split), asked, True)


def _is(rng: random.Random, thing: Thing, scene: Scene) -> tuple[str, str]:
    colour = thing.colour if rng.random() < 0.5 else rng.choice([t.colour for t in scene.things])
    return f"{colour} {thing.shape}", "yes" if colour == thing.colour else "no"


def _entry(rng: random.Random, page: Page) -> tuple[str, str]:
    word, number = rng.choice(page.lines)
    return word, str(number)


def _item(rng: random.Random, page: Page) -> tuple[str, str]:
    word, number = rng.choice(page.lines)
    return str(number), word


def _line(rng: random.Random, page: Page) -> tuple[str, str]:
    place = rng.randrange(len(page.lines))
    return str(place + 1), page.texts[place + 1]


def _relation(rng: random.Random, thing: Thing, scene: Scene) -> tuple[str, str]:
    other = next(t for t in scene.things if t is not thing)
    return f"{thing.shape} {other.shape}", "left" if thing.column < other.column else "right"


def _above(rng: random.Random, thing: Thing, scene: Scene) -> tuple[str, str]:
    other = next(t for t in scene.things if t is not thing)
    return thing.shape, other.shape if other.row < thing.row else "none"


def _most(rng: random.Random, thing: Thing, scene: Scene) -> tuple[str, str]:
    counts = Counter(t.colour for t in scene.things)
    return thing.colour, str(counts[thing.colour])


def _digit(rng: random.Random, shown: Picture) -> tuple[str, str]:
    assert isinstance(shown, Written)
    return "", str(shown.digit)


_add("colour", "base", _things, lambda rng, thing, scene: (thing.shape, thing.colour))
_add("shape", "base", _things, lambda rng, thing, scene: (thing.colour, thing.shape))
_add("texture", "base", _things, lambda rng, thing, scene: (thing.shape, thing.texture))
_add("row", "base", _things, lambda rng, thing, scene: (thing.shape, ROWS[thing.row]))
_add("column", "base", _things, lambda rng, thing, scene: (thing.shape, COLUMNS[thing.column]))
_add("back", "base", _things, lambda rng, thing, scene: ("", scene.background))
_add("is", "base", _things, _is)
_add_page("number", "base", _entry)
_add_page("item", "base", _item)
_add_page("line", "base", _line)

_add("count", "held-out", _alike, lambda rng, thing, scene: ("", str(len(scene.things))))
_add("many", "held-out", _alike, _most)
_add("side", "held-out", _pairs, _relation)
_add("above", "held-out", _pairs, _above)
_add("core", "held-out", _cored, lambda rng, thing, scene: (thing.shape, thing.core or ""))
_add("rim", "held-out", _cored, lambda rng, thing, scene: (thing.shape, thing.colour))
_SKILLS["digit"] = Skill("digit", "held-out", lambda rng, split: draw_written(rng, split), _digit)
_add_page("title", "held-out", lambda rng, page: ("", page.title))
_add_page("lines", "held-out", lambda rng, page: ("", str(len(page.lines))))
_add_page("largest", "held-out", lambda rng, page: ("", str(max(number for _, number in page.lines))))


def skills(kind: Kind | None = None) -> tuple[Skill, ...]:
    """All skills, or those of one kind, in the order of registration."""
    return tuple(one for one in _SKILLS.values() if kind is None or one.kind == kind)


def skill(name: str) -> Skill:
    """The skill of this name.

    Raises
    ------
    KeyError
        No such skill; names the nearest ones.
    """
    if name in _SKILLS:
        return _SKILLS[name]
    near = difflib.get_close_matches(name, _SKILLS, n=3) or sorted(_SKILLS)
    raise KeyError(f"No skill {name!r}; did you mean {', '.join(near)}?")


def questions(one: str | Skill, split: Split, count: int, seed: int) -> list[Question]:
    """Draw questions, each about a picture of its own; the same arguments give the same list everywhere.

    Parameters
    ----------
    one
        A skill or its name.
    split
        ``train`` or ``test``.
    count
        How many.
    seed
        Which draw.

    Raises
    ------
    KeyError
        No skill of this name.
    ValueError
        An unknown split.
    """
    chosen = skill(one) if isinstance(one, str) else one
    if split not in ("train", "test"):
        raise ValueError(f"Expected split 'train' or 'test', found {split!r}.")
    rng = random.Random(f"{chosen.name}/{split}/{seed}")
    return [chosen.question(rng, chosen.picture(rng, split)) for _ in range(count)]
