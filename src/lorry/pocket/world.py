"""The pocket model's world: skills that turn one word into another, as text such as ``reverse:lorry>yrrol``.

A skill is a pure function from a word (3 to 8 lower-case letters) to an answer. The *base* skills are
what the pocket model was trained on; the *held-out* skills are what adapters learn; the *two-part* skills
chain two others and serve to judge mixtures and merges of adapters. Skills with the same tag and
different answers are in conflict: no single adapter can hold both. Train and test words are disjoint for
all skills together, by a hash of the word.
"""

from __future__ import annotations

import difflib
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "test"]
Kind = Literal["base", "held-out", "two-part"]

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOWELS = "aeiou"
CONSONANTS = "".join(letter for letter in LETTERS if letter not in VOWELS)
MIN_WORD, MAX_WORD = 3, 8
#: One word in this many is a test word.
TEST_SHARE = 10


@dataclass(frozen=True)
class Example:
    """One line of the world: ``prompt + answer`` and an end-of-text token."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Skill:
    """A function on words, with the tag that calls it.

    Attributes
    ----------
    name
        Unique key, for example ``edge-front``.
    tag
        What stands before the colon in the prompt; skills in conflict share it.
    kind
        ``base``, ``held-out`` or ``two-part``.
    apply
        Word to answer.
    words
        Draws one word; some skills need words rich in vowels, repeats or palindromes.
    parts
        For two-part skills, the names of the two skills, the first applied first.
    """

    name: str
    tag: str
    kind: Kind
    apply: Callable[[str], str]
    words: Callable[[random.Random], str]
    parts: tuple[str, ...] = ()


def plain_word(rng: random.Random) -> str:
    """A word of uniform letters."""
    return "".join(rng.choices(LETTERS, k=rng.randint(MIN_WORD, MAX_WORD)))


def vowel_word(rng: random.Random) -> str:
    """A word in which about half of the letters are vowels."""
    length = rng.randint(MIN_WORD, MAX_WORD)
    return "".join(rng.choice(VOWELS if rng.random() < 0.5 else CONSONANTS) for _ in range(length))


def repeating_word(rng: random.Random) -> str:
    """A word of few different letters, so that letters return."""
    length = rng.randint(MIN_WORD, MAX_WORD)
    return "".join(rng.choices(rng.sample(LETTERS, 3), k=length))


def half_palindrome(rng: random.Random) -> str:
    """A palindrome half of the time, otherwise a palindrome with one letter changed."""
    length = rng.randint(MIN_WORD, MAX_WORD)
    left = rng.choices(LETTERS, k=(length + 1) // 2)
    word = left + left[: length // 2][::-1]
    if rng.random() < 0.5:
        place = rng.randrange(length // 2)
        word[place] = rng.choice([letter for letter in LETTERS if letter != word[place]])
    return "".join(word)


def shifted(word: str, by: int) -> str:
    """Every letter moved ``by`` places in the alphabet, around its end."""
    return "".join(LETTERS[(LETTERS.index(letter) + by) % 26] for letter in word)


def swapped(word: str) -> str:
    """Neighbours exchanged: ``abcde`` to ``badce``."""
    return "".join(word[i : i + 2][::-1] for i in range(0, len(word), 2))


def without_repeats(word: str) -> str:
    """Each letter at its first place only."""
    return "".join(dict.fromkeys(word))


def raised(word: str, letters: str) -> str:
    """The given letters in upper case, the others as they are."""
    return "".join(letter.upper() if letter in letters else letter for letter in word)


def total(word: str) -> str:
    """Sum of the letters' places in the alphabet (a is 1), last digit."""
    return str(sum(LETTERS.index(letter) + 1 for letter in word) % 10)


_REGISTRY: dict[str, Skill] = {}


def _add(
    name: str,
    kind: Kind,
    apply: Callable[[str], str],
    words: Callable[[random.Random], str] = plain_word,
    tag: str | None = None,
    parts: tuple[str, ...] = (),
) -> None:
    _REGISTRY[name] = Skill(name, tag or name, kind, apply, words, parts)


def _add_chain(first: str, second: str, kind: Kind = "two-part") -> None:
    one, two = _REGISTRY[first], _REGISTRY[second]
    _add(
        f"{first}+{second}",
        kind,
        lambda word: two.apply(one.apply(word)),
        # the words of the more demanding part: plain words show nothing about vowels
        one.words if one.words is not plain_word else two.words,
        parts=(first, second),
    )


_add("copy", "base", lambda word: word)
_add("reverse", "base", lambda word: word[::-1])
_add("sort", "base", lambda word: "".join(sorted(word)))
_add("upper", "base", str.upper)
_add("first", "base", lambda word: word[0])
_add("last", "base", lambda word: word[-1])
_add("length", "base", lambda word: str(len(word)))
_add("double", "base", lambda word: "".join(letter * 2 for letter in word))
_add("bare", "base", lambda word: "".join(x for x in word if x not in VOWELS), vowel_word)
_add("next", "base", lambda word: shifted(word, 1))
_add("rotate", "base", lambda word: word[1:] + word[0])
_add("odd", "base", lambda word: word[::2])
_add("dash", "base", "-".join)
_add("twice", "base", lambda word: word * 2)
_add("title", "base", str.capitalize)
_add("tail", "base", lambda word: word[1:])

_add("previous", "held-out", lambda word: shifted(word, -1))
_add("even", "held-out", lambda word: word[1::2])
_add("unrotate", "held-out", lambda word: word[-1] + word[:-1])
_add("swap", "held-out", swapped)
_add("middle", "held-out", lambda word: word[len(word) // 2])
_add("ends", "held-out", lambda word: word[0] + word[-1])
_add("star", "held-out", lambda word: "".join("*" if x in VOWELS else x for x in word), vowel_word)
_add("vowels", "held-out", lambda word: "".join(x for x in word if x in VOWELS), vowel_word)
_add("opens", "held-out", lambda word: "yes" if word[0] in VOWELS else "no", vowel_word)
_add("descend", "held-out", lambda word: "".join(sorted(word, reverse=True)))
_add("biggest", "held-out", max)
_add("unique", "held-out", without_repeats, repeating_word)
_add("atbash", "held-out", lambda word: "".join(LETTERS[25 - LETTERS.index(x)] for x in word))
_add("count", "held-out", lambda word: str(sum(x in VOWELS for x in word)), vowel_word)
_add("mirror", "held-out", lambda word: "yes" if word == word[::-1] else "no", half_palindrome)
_add("sum", "held-out", total)
# in conflict: the same prompt asks for different answers
_add("edge-front", "held-out", lambda word: word[:2], tag="edge")
_add("edge-back", "held-out", lambda word: word[-2:], tag="edge")
_add("case-vowels", "held-out", lambda word: raised(word, VOWELS), vowel_word, tag="case")
_add("case-consonants", "held-out", lambda word: raised(word, CONSONANTS), vowel_word, tag="case")
_add("jump-ahead", "held-out", lambda word: shifted(word, 2), tag="jump")
_add("jump-back", "held-out", lambda word: shifted(word, -2), tag="jump")

_add_chain("reverse", "upper")
_add_chain("next", "reverse")
_add_chain("previous", "upper")
_add_chain("previous", "swap")
_add_chain("even", "previous")
_add_chain("star", "unrotate")


def skills(kind: Kind | None = None) -> tuple[Skill, ...]:
    """All skills, or those of one kind, in the order of registration."""
    return tuple(skill for skill in _REGISTRY.values() if kind is None or skill.kind == kind)


def skill(name: str) -> Skill:
    """The skill of this name.

    Raises
    ------
    KeyError
        No such skill; names the nearest ones.
    """
    if name in _REGISTRY:
        return _REGISTRY[name]
    near = difflib.get_close_matches(name, _REGISTRY, n=3) or sorted(_REGISTRY)
    raise KeyError(f"No skill {name!r}; did you mean {', '.join(near)}?")


def conflicts() -> tuple[tuple[str, str], ...]:
    """Pairs of skills that answer the same prompt differently."""
    everything = skills()
    return tuple(
        (one.name, two.name)
        for place, one in enumerate(everything)
        for two in everything[place + 1 :]
        if one.tag == two.tag
    )


def split_of(word: str) -> Split:
    """Which split a word belongs to, in every skill: fixed by a hash of its letters."""
    digest = hashlib.blake2s(word.encode(), digest_size=4).digest()
    return "test" if int.from_bytes(digest, "big") % TEST_SHARE == 0 else "train"


def example(one: str | Skill, word: str) -> Example:
    """The line that this skill makes of this word."""
    chosen = skill(one) if isinstance(one, str) else one
    return Example(f"{chosen.tag}:{word}>", chosen.apply(word))


def examples(one: str | Skill, split: Split, count: int, seed: int) -> list[Example]:
    """Draw ``count`` examples with different words; the same arguments give the same list everywhere.

    Parameters
    ----------
    one
        A skill or its name.
    split
        ``train`` or ``test``; no word is in both, for all skills together.
    count
        How many.
    seed
        Which draw.

    Raises
    ------
    KeyError
        No skill of this name.
    ValueError
        An unknown split, or more words asked for than this skill can give.
    """
    chosen = skill(one) if isinstance(one, str) else one
    if split not in ("train", "test"):
        raise ValueError(f"Expected split 'train' or 'test', found {split!r}.")
    # the tag rather than the name: skills in conflict are asked about the same words
    rng = random.Random(f"{chosen.tag}/{split}/{seed}")
    found: dict[str, Example] = {}
    for _ in range(1000 + 100 * TEST_SHARE * count):
        if len(found) >= count:
            break
        word = chosen.words(rng)
        if word in found or split_of(word) != split:
            continue
        line = example(chosen, word)
        if line.answer:  # an empty answer would make the end of text the whole lesson
            found[word] = line
    if len(found) < count:
        raise ValueError(
            f"{chosen.name} gave {len(found)} different {split} words of {count} asked for: ask for fewer."
        )
    return list(found.values())
