"""The generators: the same draw everywhere, splits that share no word, answers as written twice."""

import random
import string

import pytest

from lorry import pocket
from lorry.pocket import world

NAMES = [one.name for one in pocket.skills()]


def ordinal(letter: str) -> int:
    return ord(letter) - ord("a")


def moved(word: str, by: int) -> str:
    return "".join(chr((ordinal(x) + by) % 26 + ord("a")) for x in word)


def pairs_swapped(word: str) -> str:
    letters = list(word)
    for place in range(0, len(letters) - 1, 2):
        letters[place], letters[place + 1] = letters[place + 1], letters[place]
    return "".join(letters)


def each_once(word: str) -> str:
    seen = ""
    for letter in word:
        if letter not in seen:
            seen += letter
    return seen


def is_palindrome(word: str) -> str:
    return "yes" if all(word[i] == word[-1 - i] for i in range(len(word))) else "no"


def is_vowel(letter: str) -> bool:
    return letter in ("a", "e", "i", "o", "u")


# Written again, apart from the code under test.
NAIVE = {
    "copy": lambda w: "".join(list(w)),
    "reverse": lambda w: "".join(reversed(w)),
    "sort": lambda w: "".join(x * w.count(x) for x in string.ascii_lowercase),
    "upper": lambda w: "".join(chr(ord(x) - 32) for x in w),
    "first": lambda w: w[: -len(w) + 1],
    "last": lambda w: w[len(w) - 1 :],
    "length": lambda w: f"{sum(1 for _ in w)}",
    "double": lambda w: "".join(x + x for x in w),
    "bare": lambda w: "".join(filter(lambda x: not is_vowel(x), w)),
    "next": lambda w: moved(w, 1),
    "rotate": lambda w: (w + w)[1 : len(w) + 1],
    "odd": lambda w: "".join(x for i, x in enumerate(w) if i % 2 == 0),
    "dash": lambda w: "".join(f"{x}-" for x in w)[:-1],
    "twice": lambda w: w + w,
    "title": lambda w: w[0].upper() + w[1:],
    "tail": lambda w: "".join(x for i, x in enumerate(w) if i > 0),
    "previous": lambda w: moved(w, -1),
    "even": lambda w: "".join(x for i, x in enumerate(w) if i % 2 == 1),
    "unrotate": lambda w: (w + w)[len(w) - 1 : 2 * len(w) - 1],
    "swap": pairs_swapped,
    "middle": lambda w: "".join(x for i, x in enumerate(w) if i == (len(w) - len(w) % 2) / 2),
    "ends": lambda w: w.replace(w[1:-1], "", 1) if w[0] != w[1] else w[0] + w[-1],
    "star": lambda w: w.translate(str.maketrans("aeiou", "*****")),
    "vowels": lambda w: "".join(filter(is_vowel, w)),
    "opens": lambda w: "yes" if is_vowel(w[0]) else "no",
    "descend": lambda w: "".join(x * w.count(x) for x in reversed(string.ascii_lowercase)),
    "biggest": lambda w: sorted(w)[-1],
    "unique": each_once,
    "atbash": lambda w: w.translate(str.maketrans(string.ascii_lowercase, string.ascii_lowercase[::-1])),
    "count": lambda w: str(len([x for x in w if is_vowel(x)])),
    "mirror": is_palindrome,
    "sum": lambda w: str(sum(ordinal(x) + 1 for x in w))[-1],
    "edge-front": lambda w: w[0] + w[1],
    "edge-back": lambda w: w[len(w) - 2] + w[len(w) - 1],
    "case-vowels": lambda w: "".join(x.upper() if is_vowel(x) else x for x in w),
    "case-consonants": lambda w: "".join(x if is_vowel(x) else x.upper() for x in w),
    "jump-ahead": lambda w: moved(moved(w, 1), 1),
    "jump-back": lambda w: moved(moved(w, -1), -1),
    "reverse+upper": lambda w: w.upper()[::-1],
    "next+reverse": lambda w: moved(w[::-1], 1),
    "previous+upper": lambda w: moved(w, -1).upper(),
    "previous+swap": lambda w: moved(pairs_swapped(w), -1),
    "even+previous": lambda w: "".join(moved(w, -1)[i] for i in range(1, len(w), 2)),
    "star+unrotate": lambda w: ("*" if is_vowel(w[-1]) else w[-1]) + "".join("*" if is_vowel(x) else x for x in w[:-1]),
}


def test_every_skill_has_a_naive_twin() -> None:
    assert set(NAIVE) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_answers(name: str) -> None:
    tag = pocket.skill(name).tag
    for line in pocket.examples(name, "train", 200, seed=3):
        head, word = line.prompt.split(":")
        assert head == tag
        assert word.endswith(">")
        word = word[:-1]
        assert 3 <= len(word) <= 8
        assert word.isascii() and word.islower() and word.isalpha()
        assert line.answer == NAIVE[name](word), word
        assert line.answer


@pytest.mark.parametrize(
    ("name", "word", "expected"),
    [
        ("reverse", "lorry", "yrrol"),
        ("rotate", "lorry", "orryl"),
        ("odd", "lorry", "lry"),
        ("even", "lorry", "or"),
        ("swap", "lorry", "olrry"),
        ("previous", "abz", "zay"),
        ("middle", "abcd", "c"),
        ("descend", "lorry", "yrrol"),
        ("unique", "lorry", "lory"),
        ("atbash", "abz", "zya"),
        ("sum", "abc", "6"),
        ("case-consonants", "lorry", "LoRRY"),
        ("previous+swap", "bcd", "bac"),
    ],
)
def test_by_hand(name: str, word: str, expected: str) -> None:
    line = pocket.example(name, word)
    assert line.answer == expected
    assert line.prompt == f"{pocket.skill(name).tag}:{word}>"


def test_kinds() -> None:
    assert len(pocket.skills("base")) >= 12
    assert len(pocket.skills("held-out")) >= 14
    assert len(pocket.skills("two-part")) >= 4
    assert set(pocket.skills()) == {one for kind in ("base", "held-out", "two-part") for one in pocket.skills(kind)}


def test_held_out_tags_are_new() -> None:
    base = {one.tag for one in pocket.skills("base")}
    assert len(base) == len(pocket.skills("base"))
    assert not base & {one.tag for one in pocket.skills("held-out") + pocket.skills("two-part")}


def test_two_part_skills_chain_their_parts() -> None:
    for one in pocket.skills("two-part"):
        first, second = (pocket.skill(name) for name in one.parts)
        for word in ("lorry", "abcdefgh", "aei"):
            assert one.apply(word) == second.apply(first.apply(word))


def test_conflicts_ask_the_same_and_answer_differently() -> None:
    assert {frozenset(pair) for pair in pocket.conflicts()} == {
        frozenset({"edge-front", "edge-back"}),
        frozenset({"case-vowels", "case-consonants"}),
        frozenset({"jump-ahead", "jump-back"}),
    }
    for one, two in pocket.conflicts():
        left, right = (pocket.examples(name, "test", 100, seed=0) for name in (one, two))
        assert [x.prompt for x in left] == [x.prompt for x in right]
        agreeing = sum(x.answer == y.answer for x, y in zip(left, right, strict=True))
        assert agreeing <= 2


@pytest.mark.parametrize("name", NAMES)
def test_drawing(name: str) -> None:
    one = pocket.examples(name, "train", 300, seed=1)
    assert one == pocket.examples(name, "train", 300, seed=1)
    assert one[:50] == pocket.examples(name, "train", 50, seed=1)
    assert one != pocket.examples(name, "train", 300, seed=2)
    assert len({line.prompt for line in one}) == 300
    test = pocket.examples(name, "test", 300, seed=1)
    assert not {line.prompt for line in one} & {line.prompt for line in test}


def test_the_draw_is_the_same_on_every_machine() -> None:
    assert [line.prompt + line.answer for line in pocket.examples("reverse", "test", 3, seed=0)] == [
        "reverse:jyckdell>lledkcyj",
        "reverse:yuqpgd>dgpquy",
        "reverse:vqd>dqv",
    ]


def test_splits_are_disjoint_for_all_skills_together() -> None:
    words: dict[str, set[str]] = {"train": set(), "test": set()}
    for name in NAMES:
        for split in ("train", "test"):
            words[split] |= {line.prompt.split(":")[1] for line in pocket.examples(name, split, 200, seed=0)}
    assert len(words["test"]) > 1000
    assert not words["train"] & words["test"]


def test_a_tenth_of_the_words_is_test() -> None:
    rng = random.Random(0)
    share = sum(pocket.split_of(world.plain_word(rng)) == "test" for _ in range(20000)) / 20000
    assert 0.09 < share < 0.11


def test_yes_and_no_are_both_common() -> None:
    for name in ("mirror", "opens"):
        yes = sum(line.answer == "yes" for line in pocket.examples(name, "train", 400, seed=0))
        assert 120 < yes < 280


def test_unknown_skill_names_near_ones() -> None:
    with pytest.raises(KeyError, match="reverse"):
        pocket.examples("revers", "train", 1, seed=0)


def test_unknown_split() -> None:
    with pytest.raises(ValueError, match="'dev'"):
        pocket.examples("reverse", "dev", 1, seed=0)  # type: ignore[arg-type]


def test_too_many_words_is_an_error() -> None:
    narrow = world.Skill("narrow", "narrow", "held-out", str.upper, lambda rng: rng.choice(["abc", "abd", "abe"]))
    with pytest.raises(ValueError, match="ask for fewer"):
        pocket.examples(narrow, "train", 4, seed=0)
