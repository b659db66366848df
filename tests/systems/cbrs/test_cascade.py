"""The cascade: who is asked, how often, and what failures and weights do."""

import random

import pytest

from lorry.core.errors import OptionError
from lorry.systems.cbrs import Cascade, FirstLayer
from lorry.systems.cbrs.cascade import read_answer

NEEDS, OTHERS = ("blood", "donor", "urgent", "hospital", "needed"), ("match", "rain", "lunch", "music", "traffic")
YES, NO = '{"is_blood_donation_request": "true"}', '{"is_blood_donation_request": "false"}'


def messages(count: int, seed: int) -> tuple[list[str], list[bool]]:
    """Bags of words; each class says some of the other's."""
    g = random.Random(seed)
    labels = [g.random() < 0.5 for _ in range(count)]
    texts = []
    for label in labels:
        own, foreign = (NEEDS, OTHERS) if label else (OTHERS, NEEDS)
        texts.append(" ".join(g.choices(own, k=3) + g.choices(foreign, k=g.randrange(4))))
    return texts, labels


@pytest.fixture(scope="module")
def layers():
    texts, labels = messages(400, 0)
    return {weight: FirstLayer(texts, labels, weight) for weight in (1.0, 4.0, 15.0, 60.0)}


def test_a_model_that_always_agrees_gives_the_first_layer_and_is_asked_for_its_positives_alone(layers):
    texts, _ = messages(200, 1)
    first, asked = layers[15.0](texts), []
    cascade = Cascade(layers[15.0], lambda text: asked.append(text) or YES)
    assert cascade(texts) == first
    assert asked == [text for text, passes in zip(texts, first, strict=True) if passes]
    assert cascade.calls == sum(first) and 0 < cascade.calls < len(texts)


def test_what_the_first_layer_refuses_is_never_a_request(layers):
    texts, _ = messages(200, 2)
    g = random.Random(0)
    found = Cascade(layers[1.0], lambda text: YES if g.random() < 0.5 else NO)(texts)
    assert all(passes or not each for each, passes in zip(found, layers[1.0](texts), strict=True))
    assert 0 < sum(found) < sum(layers[1.0](texts))


def test_the_weight_lowers_calls_and_recall_and_a_perfect_judge_keeps_precision(layers):
    texts, labels = messages(400, 3)
    truth = dict(zip(texts, labels, strict=True))
    calls, recalls = [], []
    for layer in layers.values():
        cascade = Cascade(layer, lambda text: YES if truth[text] else NO)
        found = cascade(texts)
        assert all(truth[text] for text, each in zip(texts, found, strict=True) if each)
        calls.append(cascade.calls)
        recalls.append(sum(found))
    assert calls == sorted(calls, reverse=True) and calls[0] > calls[-1]
    assert recalls == sorted(recalls, reverse=True) and recalls[0] > recalls[-1]


def test_an_answer_that_cannot_be_read_and_an_error_keep_the_message():
    def broken(text: str) -> str:
        raise TimeoutError

    for ask in (broken, lambda text: "perhaps", lambda text: "{"):
        cascade = Cascade(lambda texts: [True, False], ask)
        assert cascade(["a", "b"]) == [True, False]
        assert (cascade.calls, cascade.unread) == (1, 1)


def test_yes_and_no_are_read_in_the_ways_that_models_write_them():
    assert [read_answer(text) for text in (YES, NO, '"Yes"', "false", '{"x": 1}', "")] == [
        True,
        False,
        True,
        False,
        None,
        None,
    ]


def test_one_class_alone_is_refused():
    with pytest.raises(OptionError, match="both classes"):
        FirstLayer(["a", "b"], [True, True])
    with pytest.raises(OptionError, match="found 1 messages"):
        FirstLayer(["a"], [True, False])
