"""The registry: what is found, and which names collide."""

from dataclasses import dataclass

import pytest

from lorry.core.errors import OptionError
from lorry.core.registry import Registry


@dataclass(frozen=True)
class Thing:
    """Plain data, which is defined nowhere."""

    size: int


def one():
    """A definition."""


def other():
    """Another definition."""


@pytest.mark.parametrize(("first", "second"), [(Thing(1), Thing(2)), (one, other), (Thing, Registry), (Thing(1), one)])
def test_two_things_of_one_name_are_refused_and_the_first_stays(first, second):
    registry = Registry("thing")
    registry.add("a", first)
    with pytest.raises(OptionError, match="Two things are called 'a'"):
        registry.add("a", second)
    assert registry["a"] is first


@pytest.mark.parametrize("make", [lambda: Thing(1), lambda: one, lambda: Thing])
def test_the_same_thing_may_come_twice(make):
    registry = Registry("thing")
    registry.add("a", make())
    registry.add("a", make())
    assert list(registry) == ["a"]
