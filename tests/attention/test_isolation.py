"""A watch ends without a trace, and concerns nobody but the thread or task that opened it."""

import asyncio
import copy
import pickle
import threading

import pytest
import torch
from attention.tiny import MODELS, build, causal_model, interface, same, state, tokens, unet

from lorry.attention import AttentionError, watch


def test_exceptions_interrupts_and_any_order_leave_nothing():
    model = unet()
    own, before = interface(), state(model)
    call = MODELS["unet"][1]
    expected = call(model)

    def fail(error):
        def read(_):
            raise error

        return read

    for error in (RuntimeError("reader."), KeyboardInterrupt()):
        with pytest.raises(type(error)), watch(model, fail(error)):
            call(model)
        same(before, state(model))
    seen = []
    first = watch(model, lambda c: seen.append("first"), kinds="cross")
    second = watch(model, lambda c: seen.append("second"), kinds="cross")
    first.__enter__()
    second.__enter__()
    call(model)
    assert seen == ["first", "second"] * 4
    first.__exit__(None, None, None)
    seen.clear()
    assert torch.equal(call(model), expected)
    assert seen == ["second"] * 4
    second.__exit__(None, None, None)
    call(model)
    assert len(seen) == 4
    same(before, state(model))
    assert interface() is own
    # an interrupted forward has left no mode of torch's behind
    assert torch._C._len_torch_function_stack() == 0


def test_a_watch_is_opened_once_at_a_time():
    model = causal_model("llama")
    calls = []
    one = watch(model, calls.append)
    with one:
        with pytest.raises(AttentionError, match="open already"):
            one.__enter__()
        model(tokens())
    with one:
        model(tokens())
    assert len(calls) == 4


def test_two_threads_see_their_own_calls_only():
    model = causal_model("llama")
    inputs = {name: tokens(rows=rows) for name, rows in (("a", 1), ("b", 3))}
    expected = {name: model(ids).logits for name, ids in inputs.items()}
    found = {name: [] for name in inputs}
    wrong = []
    barrier = threading.Barrier(3)

    def work(name):
        with torch.no_grad():
            for _ in range(10):
                with watch(model, lambda c: found[name].append(c.q.shape[0])):
                    barrier.wait()
                    if not torch.equal(model(inputs[name]).logits, expected[name]):
                        wrong.append(name)

    def unwatched():
        with torch.no_grad():
            for _ in range(10):
                barrier.wait()
                if not torch.equal(model(inputs["b"]).logits, expected["b"]):
                    wrong.append("unwatched")

    threads = [threading.Thread(target=work, args=(name,)) for name in inputs] + [threading.Thread(target=unwatched)]
    before = state(model)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert found == {"a": [1] * 20, "b": [3] * 20}
    same(before, state(model))


def test_two_tasks_see_their_own_calls_only():
    model = causal_model("llama")
    found = {1: [], 3: []}

    async def work(rows):
        with watch(model, lambda c: found[rows].append(c.q.shape[0])):
            for _ in range(3):
                with torch.no_grad():
                    model(tokens(rows=rows))
                await asyncio.sleep(0)

    async def both():
        await asyncio.gather(work(1), work(3))

    before = state(model)
    asyncio.run(both())
    assert found == {1: [1] * 6, 3: [3] * 6}
    same(before, state(model))


def test_a_thread_that_runs_in_the_tasks_context_is_seen():
    model = causal_model("llama")
    calls = []

    async def work():
        with watch(model, calls.append):
            await asyncio.to_thread(model, tokens())

    asyncio.run(work())
    assert len(calls) == 2


def test_other_models_of_the_same_configuration_are_not_seen():
    model = causal_model("llama")
    other = type(model)(model.config).eval()
    seen = []
    with watch(model, lambda c: seen.append(c.site.path)):
        with torch.no_grad():
            other(tokens())
            assert seen == []
            model(tokens())
    assert len(seen) == 2


def test_copies_made_while_watched_are_whole_and_unwatched():
    model = causal_model("llama")
    calls = []
    with torch.no_grad(), watch(model, calls.append):
        copied = copy.deepcopy(model)
        thawed = pickle.loads(pickle.dumps(model))
        assert torch.equal(copied(tokens()).logits, thawed(tokens()).logits)
        assert calls == []
        assert torch.equal(model(tokens()).logits, copied(tokens()).logits)
    assert len(calls) == 2


def test_a_compiled_model_is_refused_and_a_graph_made_while_watching_breaks():
    model = causal_model("llama")
    with pytest.raises(AttentionError, match="is compiled"):
        watch(torch.compile(model, backend="eager"), print)
    layered = causal_model("llama")
    layered.model.layers[0].compile(backend="eager")
    with pytest.raises(AttentionError, match=r"'model\.layers\.0' is compiled"):
        watch(layered, print)

    model, call = build("plain")
    run = torch.compile(lambda m: call(m) * 2, backend="eager")
    with torch.no_grad():
        expected = call(model) * 2
        for _ in range(2):
            calls = []
            with watch(model, calls.append):
                found = run(model)
            assert len(calls) == 1
            torch.testing.assert_close(found, expected)
    torch._dynamo.reset()
