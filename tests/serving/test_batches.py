"""A request's answer depends on nothing but itself: not on its company, its place, the size of passes or the pool."""

import random
from dataclasses import replace

import pytest
import torch
from serving.tiny_engines import adapt, alone, engine, prompt, request, tiny

import lorry
from lorry import pocket
from lorry.serving.engine import Engine
from lorry.serving.options import EngineOptions
from lorry.serving.paging.batch import Batch, Part

RANKS = (1, 3, 4, 8, 16)


def ranked(dtype=torch.float64):
    """Return a tiny Llama with five adapters of different ranks."""
    model = tiny(dtype=dtype)
    for rank in RANKS:
        adapt(model, f"r{rank}", {"method": "lora", "rank": rank, "alpha": 2 * rank}, seed=rank)
    return model


def logits(machine, parts, compositions):
    """Return the logits of the last tokens of parts that are given as (tokens, composition)."""
    blocks = [machine._pool.take(-(-len(tokens) // machine.options.page_tokens)) for tokens in parts]
    made = [Part(list(t), 0, [block.page for block in own]) for t, own in zip(parts, blocks, strict=True)]
    resolved = [machine._catalogue.acquire(composition) for composition in compositions]
    for versions in resolved:
        for version, _ in versions:
            machine._pool.use(version.resident)
    batch = Batch.of(made, machine.options.page_tokens, torch.device("cpu"))
    found = machine._runner.logits(batch, resolved)
    for own, versions in zip(blocks, resolved, strict=True):
        machine._pool.release(own)
        for version, _ in versions:
            machine._pool.leave(version.resident)
        machine._catalogue.give_back(versions)
    return found


ROWS = [({}, 5), ({"r1": 1.0}, 1), ({"r16": 1.0}, 9), ({"r3": 0.5, "r8": -1.0}, 4), ({"r4": 1.0}, 1), ({}, 1)]
ROWS += [({"r8": 1.0}, 1), ({"r8": 2.0}, 1), ({"r3": 1.0}, 3), ({"r16": 1.0}, 1)]


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-10), (torch.float32, 2e-4)])
def test_a_mixed_batch_is_each_request_alone_and_each_fused(dtype, near):
    model = ranked(dtype)
    parts, compositions = [prompt(n, seed=i) for i, (_, n) in enumerate(ROWS)], [c for c, _ in ROWS]
    machine = engine(model)
    mixed = logits(machine, parts, compositions)
    single = torch.cat([logits(machine, [p], [c]) for p, c in zip(parts, compositions, strict=True)])
    torch.testing.assert_close(mixed, single, atol=near, rtol=0)
    order = random.Random(0).sample(range(len(parts)), len(parts))
    shuffled = logits(machine, [parts[i] for i in order], [compositions[i] for i in order])
    torch.testing.assert_close(shuffled, mixed[order], atol=near, rtol=0)
    machine.close()
    for row in (1, 2, 4):
        (name,) = compositions[row]
        adapter = lorry.adapters(model)[name]
        lorry.activate(model, None)
        adapter.fuse()
        with torch.no_grad():
            fused = model(torch.tensor([parts[row]])).logits[0, -1]
        adapter.unfuse()
        torch.testing.assert_close(mixed[row], fused, atol=near, rtol=0)


def test_exchanging_two_adapters_changes_their_rows_alone():
    machine = engine(ranked())
    parts, compositions = [prompt(n, seed=i) for i, (_, n) in enumerate(ROWS)], [c for c, _ in ROWS]
    before = logits(machine, parts, compositions)
    compositions[1], compositions[4] = compositions[4], compositions[1]
    after = logits(machine, parts, compositions)
    changed = [not torch.allclose(a, b, atol=1e-10, rtol=0) for a, b in zip(before, after, strict=True)]
    assert [row for row, is_other in enumerate(changed) if is_other] == [1, 4]


def test_rows_without_an_adapter_are_the_base_exactly():
    model = ranked()
    machine = engine(model)
    parts = [prompt(5, seed=i) for i in range(4)]
    bare = logits(machine, parts, [{}] * 4)
    assert torch.equal(logits(machine, parts, [{}, {"r4": 1.0}, {"r16": 1.0}, {}])[[0, 3]], bare[[0, 3]])
    assert torch.equal(logits(machine, parts, [{}, {"r4": 0.0}, {}, {}]), bare)
    plain = engine(tiny())
    assert torch.equal(logits(plain, parts, [{}] * 4), bare)


METHODS = [
    "dora",
    "vera",
    "shira",
    "loha",
    "comol",
    {"method": "flylora", "rank": 8},
    {"method": "loramoe", "rank": 4},
    "boft",
    "ia3",
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m if isinstance(m, str) else m["method"])
def test_any_method_beside_a_plain_one(method):
    model = tiny()
    adapt(model, "odd", method, targets=["q_proj", "v_proj"])
    adapt(model, "plain", seed=2)
    asked = [request("0", prompt(6), "odd"), request("1", prompt(3), "plain"), request("2", prompt(4))]
    asked += [request("3", prompt(7), {"odd": 0.5, "plain": 1.0})]
    expected = [alone(model, each) for each in asked]
    found = engine(model, max_batch_tokens=9, max_running=4).generate(asked)
    assert [each.tokens for each in found] == expected
    assert expected[0] != expected[2] or method == "boft"


def test_a_method_that_runs_a_whole_module_gets_passes_of_its_own():
    model = tiny()
    adapt(model, "whole", "lora", targets=["q_proj"], train_also=["model.layers.1.mlp"])
    adapt(model, "plain", seed=2)
    asked = [request("0", prompt(6), "whole"), request("1", prompt(3), "plain"), request("2", prompt(4), "whole")]
    expected = [alone(model, each) for each in asked]
    assert [each.tokens for each in engine(model).generate(asked)] == expected


def test_an_adapter_on_embedding_and_head():
    model = tiny()
    adapt(model, "ends", targets=["embed_tokens", "lm_head", "v_proj"])
    asked = [request("0", prompt(6), "ends"), request("1", prompt(3)), request("2", prompt(9), "ends")]
    expected = [alone(model, each) for each in asked]
    assert [each.tokens for each in engine(model, max_batch_tokens=7, max_running=3).generate(asked)] == expected


@pytest.mark.parametrize("tokens", [4, 7, 64])
def test_prompts_in_chunks_are_prompts_at_once(tokens):
    model = ranked()
    asked = [request("0", prompt(30), "r3"), request("1", prompt(17)), request("2", prompt(2), "r8")]
    expected = [alone(model, each) for each in asked]
    machine = engine(model, max_batch_tokens=tokens, max_running=3)
    assert [each.tokens for each in machine.generate(asked)] == expected


def test_seeded_answers_do_not_depend_on_company():
    model = ranked(torch.float32)
    draw = {"temperature": 1.3, "top_k": 20, "top_p": 0.95}
    asked = [request(str(n), prompt(5 + n), f"r{RANKS[n]}", most=12, seed=n, **draw) for n in range(5)]
    together = engine(model).generate(asked)
    for each, found in zip(asked, together, strict=True):
        assert engine(model, max_batch_tokens=3, max_running=1).generate([each])[0].tokens == found.tokens
    other = engine(model).generate([replace(asked[0], sampling=replace(asked[0].sampling, seed=77))])
    assert other[0].tokens != together[0].tokens


@pytest.mark.parametrize("chunk", [64, 5])
def test_log_probabilities_of_prompt_and_answer(chunk):
    model = ranked()
    asked = request("0", prompt(9), "r4", most=5, logprobs=2, prompt_logprobs=1)
    company = request("1", prompt(4), "r8")
    found = engine(model, max_batch_tokens=chunk, max_running=2).generate([company, asked])[1]
    tokens = torch.tensor([[*asked.prompt, *found.tokens]])
    with torch.no_grad(), lorry.activate(model, "r4"):
        expected = model(tokens).logits[0].log_softmax(-1)
    assert found.prompt_logprobs[0] is None and len(found.prompt_logprobs) == 9
    for place, each in enumerate((*found.prompt_logprobs[1:], *found.logprobs)):
        assert each.token == tokens[0, place + 1]
        assert each.logprob == pytest.approx(float(expected[place, each.token]), abs=1e-4)
        assert each.top[0][1] == pytest.approx(float(expected[place].max()), abs=1e-4)
    assert [len(each.top) for each in found.logprobs] == [2] * 5


def test_texts_and_stop_texts():
    model, tokenizer = pocket.load()
    asked = pocket.examples("copy", "test", 1)[0] if "copy" in pocket.skills() else None
    tokens = tuple(tokenizer(asked.prompt if asked else "abc").input_ids)
    machine = Engine(model, tokenizer, EngineOptions(pool_bytes=1 << 22))
    whole = machine.generate([request("0", tokens, most=20, ignore_end=True)])[0]
    assert whole.text == tokenizer.decode(whole.tokens, skip_special_tokens=True) and len(whole.text) > 4
    stop = whole.text[2:4]
    cut = machine.generate([request("0", tokens, most=20, ignore_end=True, stop=(stop,))])[0]
    assert (cut.text, cut.finish, cut.stop) == (whole.text[: whole.text.index(stop)], "stop", stop)
    machine.close()


def test_a_quantised_base():
    torchao = pytest.importorskip("torchao.quantization")
    model = tiny(dtype=torch.float32)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    adapt(model, "a", dtype=torch.float32)
    asked = [request("0", prompt(6), "a"), request("1", prompt(3)), request("2", prompt(9), "a")]
    expected = [alone(model, each) for each in asked]
    assert [each.tokens for each in engine(model).generate(asked)] == expected
