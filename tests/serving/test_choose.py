"""Tokens of a batch of logits: against float64 definitions, transformers' processors, and each row alone."""

import math

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lorry.core.errors import OptionError
from lorry.serving.request import Request, Sampling
from lorry.serving.sampling import Chooser, Vocabulary, check_sampling, choose, report
from lorry.serving.sampling.choose import _processed
from lorry.serving.sampling.draw import gumbel

SIZE = 50
VOCABULARY = Vocabulary(SIZE, ends=(2,))
MANY = [
    Sampling(max_tokens=99),
    Sampling(max_tokens=99, temperature=0.7, seed=1),
    Sampling(max_tokens=99, temperature=1.3, top_k=5, seed=2),
    Sampling(max_tokens=99, temperature=1.0, top_k=9, top_p=0.8, seed=3),
    Sampling(max_tokens=99, temperature=1.0, top_p=0.5, min_p=0.1, seed=4, logprobs=3),
    Sampling(max_tokens=99, temperature=0.9, min_p=0.2, repetition_penalty=1.3, seed=5),
    Sampling(max_tokens=99, presence_penalty=0.5, frequency_penalty=0.4, logprobs=0),
    Sampling(max_tokens=99, temperature=2.0, bias={3: 4.0, 7: -100.0}, min_tokens=40, seed=-6),
    Sampling(max_tokens=99, temperature=0.5, repetition_penalty=0.8, frequency_penalty=-0.3, top_p=0.9, seed=7),
]


def chooser(sampling, prompt=(1, 2, 3, 3)):
    return Chooser(Request("r", tuple(prompt), sampling=sampling), VOCABULARY)


def logits_of(rows, seed=0, dtype=torch.float32):
    return (3 * torch.randn(rows, SIZE, generator=torch.Generator().manual_seed(seed))).to(dtype)


def test_greedy_is_the_likeliest_and_the_first_of_equals():
    logits = torch.zeros(2, SIZE)
    logits[1, [4, 9]] = 1.0
    assert [each.token for each in choose(logits, [chooser(Sampling()), chooser(Sampling())])] == [0, 4]


def test_processors_equal_their_definitions_in_float64():
    choosers = [chooser(s) for s in MANY]
    generator = torch.Generator().manual_seed(3)
    for answer in torch.randint(0, SIZE, (20, len(MANY)), generator=generator).tolist():
        for each, token in zip(choosers, answer, strict=True):
            each.take(token)
    logits = logits_of(len(MANY))
    found = _processed(logits, choosers)
    for row, each in enumerate(choosers):
        s, expected = each.sampling, logits[row].double().tolist()
        for token in range(SIZE):
            value, count = expected[token], each.tokens.count(token)
            if token in (1, 2, 3) or count:
                value = value / s.repetition_penalty if value > 0 else value * s.repetition_penalty
            value -= s.presence_penalty * (count > 0) + s.frequency_penalty * count
            value += s.bias.get(token, 0.0)
            expected[token] = -math.inf if token == 2 and len(each.tokens) < s.min_tokens else value
        torch.testing.assert_close(found[row].double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits, logits_of(len(MANY)))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p", "repetition"),
    [(0.7, 0, 1.0, 0.0, 1.0), (1.2, 5, 1.0, 0.0, 1.0), (1.0, 0, 0.7, 0.0, 1.2), (0.9, 12, 0.8, 0.15, 1.3)],
)
def test_draws_follow_the_distribution_of_transformers_processors(temperature, top_k, top_p, min_p, repetition):
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(repetition)])
    processors.append(TemperatureLogitsWarper(temperature))
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    processors += [TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)]
    logits = logits_of(1, seed=5)
    expected = processors(torch.tensor([[1, 2, 3, 3]]), logits.double())[0].softmax(-1)
    number = 4000
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition)
    choosers = [chooser(Sampling(**options, seed=seed)) for seed in range(number)]
    drawn = torch.tensor([each.token for each in choose(logits.expand(number, -1), choosers)])
    counts = torch.bincount(drawn, minlength=SIZE).double()
    assert not counts[expected == 0].any()
    kept = expected > 0
    chi_squared = ((counts - number * expected)[kept] ** 2 / (number * expected[kept])).sum()
    freedom = int(kept.sum()) - 1
    assert chi_squared < freedom + 4 * math.sqrt(2 * freedom) + 4


@pytest.mark.parametrize("spread", [0.1, 6.0])
def test_a_nucleus_is_the_same_whether_it_lies_among_few_tokens_or_many(spread):
    vocabulary = Vocabulary(3000)
    logits = spread * torch.randn(1, 3000, generator=torch.Generator().manual_seed(2))
    shares = logits.double().softmax(-1)[0].sort(descending=True)
    size = int((shares.values.cumsum(0) < 0.7).sum()) + 1
    assert (size > 512) == (spread < 1)
    nucleus, drawn = set(shares.indices[:size].tolist()), []
    for top_k in (0, 3000):
        options = [Sampling(temperature=1.0, top_p=0.7, top_k=top_k, seed=seed) for seed in range(60)]
        choosers = [Chooser(Request("r", (1,), sampling=each), vocabulary) for each in options]
        drawn.append([each.token for each in choose(logits.expand(60, -1), choosers)])
    assert drawn[0] == drawn[1]
    assert set(drawn[0]) <= nucleus


def test_the_random_numbers_are_gumbels():
    found = gumbel(torch.arange(200)[:, None] * 7919, torch.arange(500)[None]).flatten()
    assert abs(found.mean() - 0.5772) < 0.02
    assert abs(found.var() - math.pi**2 / 6) < 0.05
    beside = torch.stack([found[:-1], found[1:]])
    assert abs(torch.corrcoef(beside)[0, 1]) < 0.02


def test_a_row_does_not_depend_on_its_company():
    alone = []
    for row, sampling in enumerate(MANY):
        each = chooser(sampling)
        alone.append([choose(logits_of(len(MANY), seed=step)[row : row + 1], [each])[0] for step in range(25)])
    together = [chooser(s) for s in MANY]
    order = torch.randperm(len(MANY), generator=torch.Generator().manual_seed(1)).tolist()
    for step in range(25):
        found = choose(logits_of(len(MANY), seed=step)[order], [together[row] for row in order])
        for row, each in zip(order, found, strict=True):
            assert each.token == alone[row][step].token
            assert str(each.top) == str(alone[row][step].top)
    assert len({tuple(each.tokens) for each in together}) == len(MANY)


def test_a_draw_depends_on_seed_and_position():
    logits = torch.zeros(1, SIZE)
    first, again, other = (chooser(Sampling(temperature=1.0, seed=s, max_tokens=30)) for s in (4, 4, 5))
    for each in (first, again, other):
        for _ in range(20):
            choose(logits, [each])
    assert first.tokens == again.tokens != other.tokens
    assert len(set(first.tokens)) > 8
    assert chooser(Sampling(temperature=1.0)).seed != chooser(Sampling(temperature=1.0)).seed


def test_half_precision_and_extreme_temperatures():
    logits = logits_of(3, dtype=torch.bfloat16) * 100
    options = [Sampling(temperature=t, seed=1) for t in (1e-40, 1e-3, 1e6)]
    found = choose(logits, [chooser(s) for s in options])
    assert [each.token for each in found][:2] == logits.float().argmax(-1)[:2].tolist()
    assert 0 <= found[2].token < SIZE


def test_ties_with_the_last_of_the_top_are_kept():
    logits = torch.zeros(1, SIZE)
    logits[0, 10:14] = 1.0
    choosers = [chooser(Sampling(temperature=1.0, top_k=2, seed=seed)) for seed in range(200)]
    assert {each.token for each in choose(logits.expand(200, -1), choosers)} == {10, 11, 12, 13}


def test_logprobs_are_of_the_raw_distribution():
    logits = logits_of(3)
    expected = logits.double().log_softmax(-1)
    options = Sampling(temperature=3.0, top_k=4, bias={5: 9.0}, seed=1)
    asked = [Sampling(**{**vars(options), "logprobs": top}) for top in (None, 0, 4)]
    none, bare, four = choose(logits, [chooser(s) for s in asked])
    assert math.isnan(none.logprob) and not none.top and not bare.top
    assert bare.logprob == pytest.approx(float(expected[1, bare.token]), abs=1e-5)
    best = expected[2].topk(4)
    assert [token for token, _ in four.top] == best.indices.tolist()
    assert [value for _, value in four.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_report_takes_the_tokens_of_a_prompt():
    logits = logits_of(4)
    expected = logits.double().log_softmax(-1)
    found = report(logits, [1, 5, 7, 7], 2)
    assert [each.logprob for each in found] == pytest.approx(
        [float(expected[i, t]) for i, t in enumerate((1, 5, 7, 7))]
    )
    assert all(len(each.top) == 2 for each in found)


def run_of(sampling, tokens):
    each = chooser(sampling)
    for token in tokens:
        logits = torch.zeros(1, SIZE)
        logits[0, token] = 9.0
        choose(logits, [each])
        if each.finish:
            break
    return each


@pytest.mark.parametrize(
    ("options", "count", "finish", "stop"),
    [
        ({}, 3, "stop", None),
        ({"stop_tokens": (8,)}, 1, "stop", 8),
        ({"ignore_end": True}, 6, "length", None),
        ({"ignore_end": True, "stop_tokens": (9,)}, 4, "stop", 9),
        ({"max_tokens": 2}, 2, "length", None),
    ],
)
def test_ends(options, count, finish, stop):
    each = run_of(Sampling(**{"max_tokens": 6, **options}), [8, 7, 2, 9, 5, 5, 5])
    assert (len(each.tokens), each.finish, each.stop) == (count, finish, stop)


def test_nothing_ends_an_answer_that_is_too_short():
    each = run_of(Sampling(max_tokens=9, min_tokens=3, stop_tokens=(8,)), [8, 2, 5, 2])
    assert 8 not in each.tokens and 2 not in each.tokens[:3]
    assert each.tokens[-1] == 2 and each.finish == "stop"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -0.1}, "'temperature' must not be negative"),
        ({"temperature": math.nan}, "'temperature' must be a finite number"),
        ({"temperature": math.inf}, "'temperature' must be a finite number"),
        ({"top_p": 0.0}, "'top_p' must be above 0"),
        ({"top_p": 1.1}, "'top_p' must be above 0"),
        ({"min_p": -0.1}, "'min_p' must be from 0 to 1"),
        ({"top_k": -1}, "'top_k' must be a whole number"),
        ({"top_k": 2.5}, "'top_k' must be a whole number"),
        ({"max_tokens": 0}, "'max_tokens' must be a whole number"),
        ({"min_tokens": 17}, "'min_tokens' must be at most 'max_tokens'"),
        ({"repetition_penalty": 0.0}, "'repetition_penalty' must be above 0"),
        ({"bias": {50: 1.0}}, "'bias' names '50'"),
        ({"bias": {3: math.inf}}, "bias of token 3"),
        ({"stop_tokens": (-1,)}, "'stop_tokens' names '-1'"),
        ({"stop": ("",)}, "stop text"),
        ({"logprobs": 65}, "'logprobs' must be at most 64"),
        ({"seed": 1.5}, "'seed' must be a whole number"),
        ({"presence_penalty": "1"}, "'presence_penalty' must be a finite number"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, words):
    with pytest.raises(OptionError, match=words):
        check_sampling(Sampling(**options), VOCABULARY)


def test_options_that_mean_something_are_not():
    for sampling in MANY:
        check_sampling(sampling, VOCABULARY)
