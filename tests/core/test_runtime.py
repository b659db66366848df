"""What applies to a pass belongs to the thread or asyncio task that runs it.

`lorry.rows` holds for its own thread or task alone. `lorry.activate` holds for the thread or task that calls it, and
for every one that has made no choice of its own.
"""

from __future__ import annotations

import asyncio
import copy
import gc
import random
import sys
import threading
import weakref

import pytest
import torch
from core.choices import LAYERS, adapted, alone, chosen, together
from core.tiny import llama, off_zero, snapshot, tokens, unchanged

import lorry

ROUNDS = 12
CHOICES = {
    "rows": [["a", None, {"a": 0.5, "b": -1.0}], ["b", "a", None]],
    "one for all rows": ["a", {"a": 0.5, "b": 2.0}],
    "rows beside none": [["a", "b", "a"], None],
}
over_choices = pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)


@pytest.fixture(autouse=True)
def short_turns():
    """Let Python change threads so often that a shared variable is seen in between."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def meeting_inside(model, barrier):
    """Let both threads meet in the middle layer of every pass, so that each is inside a pass while the other is."""
    return model.model.layers[LAYERS // 2].register_forward_pre_hook(lambda *_: (barrier.wait(), None)[1])


def serving(model, choice, ids, wanted, barrier):
    def job():
        try:
            for number in range(ROUNDS):
                with torch.no_grad(), chosen(model, choice):
                    barrier.wait()
                    found = model(ids).logits
                    barrier.wait()
                torch.testing.assert_close(found, wanted, msg=lambda m: f"pass {number} with {choice}: {m}")  # noqa: B023
        except BaseException:
            barrier.abort()
            raise

    return job


@over_choices
def test_two_threads_with_different_choices(choices):
    model, ids = adapted(), [tokens(3, seed=1), tokens(3, seed=2)]
    wanted = [alone(model, c, x) for c, x in zip(choices, ids, strict=True)]
    barrier = threading.Barrier(2, timeout=30)
    hook = meeting_inside(model, barrier)
    together(*(serving(model, *each, barrier) for each in zip(choices, ids, wanted, strict=True)))
    hook.remove()


def test_two_threads_with_batches_of_different_sizes():
    """The number of rows is part of the choice: another thread's would not even fit."""
    choices, ids = [["a", "b"], ["b", None, "a", "a", "b"]], [tokens(2), tokens(5)]
    model = adapted()
    wanted = [alone(model, c, x) for c, x in zip(choices, ids, strict=True)]
    barrier = threading.Barrier(2, timeout=30)
    hook = meeting_inside(model, barrier)
    together(*(serving(model, *each, barrier) for each in zip(choices, ids, wanted, strict=True)))
    hook.remove()


@over_choices
def test_two_tasks_with_different_choices(choices):
    model, ids = adapted(), [tokens(3, seed=1), tokens(3, seed=2)]
    wanted = [alone(model, c, x) for c, x in zip(choices, ids, strict=True)]

    async def request(choice, x, expected):
        for _ in range(ROUNDS):
            with chosen(model, choice):
                for _ in range(3):
                    await asyncio.sleep(0)
                    with torch.no_grad():
                        torch.testing.assert_close(model(x).logits, expected)
            await asyncio.sleep(0)

    async def both():
        await asyncio.gather(*(request(*each) for each in zip(choices, ids, wanted, strict=True)))

    asyncio.run(both())


def test_many_tasks_that_enter_and_leave_in_any_order():
    model, ids = adapted(*"abc"), tokens(2)
    choices = [["a", "b"], ["c", None], [{"a": 0.5, "c": 0.5}, "b"], ["b", "b"], [None, "a"]]
    wanted = [alone(model, c, ids) for c in choices]
    bare = alone(model, None, ids)

    async def request(number):
        order = random.Random(number)
        for _ in range(6):
            index = order.randrange(len(choices))
            with lorry.rows(model, choices[index]):
                for _ in range(order.randrange(4)):
                    await asyncio.sleep(0)
                with torch.no_grad():  # a mode of the thread: it must not be left while another task runs
                    torch.testing.assert_close(model(ids).logits, wanted[index])

    async def every():
        await asyncio.gather(*map(request, range(5)))

    asyncio.run(every())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, bare)


def test_what_a_task_hands_to_a_thread_keeps_its_rows():
    """``asyncio.to_thread`` is how a server keeps its loop free while the model runs."""
    model, ids = adapted(), tokens(2)
    choices = [["a", "b"], [None, "a"]]
    wanted = [alone(model, c, ids) for c in choices]

    def forward():
        with torch.no_grad():
            return model(ids).logits

    async def request(choice, expected):
        for _ in range(ROUNDS):
            with lorry.rows(model, choice):
                torch.testing.assert_close(await asyncio.to_thread(forward), expected)

    async def both():
        await asyncio.gather(*(request(*each) for each in zip(choices, wanted, strict=True)))

    asyncio.run(both())


def test_a_thread_that_never_chose_sees_what_anybody_activated_last():
    model, ids = adapted(), tokens(2)
    wanted = {name: alone(model, name, ids) for name in (None, "a", "b")}
    found = []

    def look():
        with torch.no_grad():
            found.append(model(ids).logits)

    for name in ("a", "b", None, "a"):
        lorry.activate(model, name)
        together(look)
        assert torch.equal(found[-1], wanted[name]), name
    together(lambda: lorry.activate(model, "b"))
    together(look)
    assert torch.equal(found[-1], wanted["b"]), "another thread's choice is the last one now"
    look()
    assert torch.equal(found[-1], wanted["a"]), "this thread chose for itself"


def test_a_choice_holds_for_those_that_wait_already_without_one():
    """The thread runs and has looked once when somebody else activates another adapter."""
    model, ids = adapted(), tokens(2)
    wanted = {name: alone(model, name, ids) for name in ("a", "b")}
    lorry.activate(model, "a")
    found, barrier = [], threading.Barrier(2, timeout=30)

    def waiting():
        for _ in range(2):
            with torch.no_grad():
                found.append(model(ids).logits)
            barrier.wait()
            barrier.wait()

    def choosing():
        barrier.wait()
        lorry.activate(model, "b")
        barrier.wait()
        barrier.wait()
        barrier.wait()

    together(waiting, choosing)
    assert torch.equal(found[0], wanted["a"]) and torch.equal(found[1], wanted["b"])


def test_rows_of_one_thread_are_not_those_of_another_that_never_chose():
    model, ids = adapted(), tokens(4)
    wanted = alone(model, "b", ids)
    lorry.activate(model, "b")
    found = []

    def look():
        with torch.no_grad():
            found.append(model(ids).logits)

    with lorry.rows(model, ["a", None]):
        together(look)
    assert torch.equal(found[0], wanted)


def test_layers_see_the_context_of_their_own_thread():
    method = {"method": "lora-mixer", "experts": 2, "rank": 2, "top_k": 1, "inference_mode": "hard"}
    model, ids = adapted("a", method=lorry.method_from(method)), tokens(2)
    tasks = [torch.tensor([0, 1]), torch.tensor([1, 1])]
    wanted = []
    for task_ids in tasks:
        with lorry.context(model, task_ids=task_ids):
            wanted.append(alone(model, "a", ids))
    assert not torch.allclose(*wanted)
    barrier = threading.Barrier(2, timeout=30)
    hook = meeting_inside(model, barrier)

    def job(task_ids, expected):
        with torch.no_grad(), lorry.context(model, task_ids=task_ids) as mine:
            lorry.activate(model, "a")
            barrier.wait()
            torch.testing.assert_close(model(ids).logits, expected)
            assert mine.task_ids is task_ids
            barrier.wait()

    together(*(lambda t=t, w=w: job(t, w) for t, w in zip(tasks, wanted, strict=True)))
    hook.remove()


def test_auxiliary_losses_of_two_threads_do_not_mix():
    model = adapted(*"ab", method=lorry.method_from({"method": "mixlora", "experts": 3, "rank": 2}), training=True)
    model.train()
    ids = {"a": tokens(2, seed=1), "b": tokens(2, seed=2)}
    wanted = {}
    for name in "ab":
        lorry.activate(model, name)
        with lorry.context(model):
            model(ids[name])
            wanted[name] = lorry.auxiliary_loss(model).detach()
    assert not torch.allclose(wanted["a"], wanted["b"], rtol=1e-6, atol=0)
    lorry.activate(model, None)
    barrier = threading.Barrier(2, timeout=30)
    hook = meeting_inside(model, barrier)
    found = {}

    def job(name):
        lorry.activate(model, name)
        with lorry.context(model):
            model(ids[name])
            barrier.wait()
            found[name] = lorry.auxiliary_loss(model).detach()
            barrier.wait()

    together(lambda: job("a"), lambda: job("b"))
    hook.remove()
    for name in "ab":
        torch.testing.assert_close(found[name], wanted[name])


@pytest.mark.parametrize("slug", ["lora", "uni-lora", "mixlora"])
def test_loading_and_unloading_while_another_thread_runs(slug, tmp_path):
    """Plain tensors, tensors shared by all sites (which sit at the root), and whole blocks."""
    options = {"lora": {"rank": 3}, "uni-lora": {"rank": 2}, "mixlora": {"rank": 2, "experts": 2}}[slug]
    donor = llama(LAYERS)
    off_zero(lorry.attach(donor, {"method": slug, **options}, name="guest"), 3, 0.3).save(tmp_path / "guest")
    model, ids = adapted(), tokens(3)
    before = snapshot(model)
    rows = ["a", None, {"a": 0.5, "b": -1.0}]
    wanted, guest = alone(model, rows, ids), alone(donor, "guest", ids)
    lorry.load(donor, tmp_path / "guest", name="again").detach()
    done = threading.Event()
    passes = []

    def runs():
        while not done.is_set() or len(passes) < 3:
            with torch.no_grad(), lorry.rows(model, rows):
                found = model(ids).logits
            torch.testing.assert_close(found, wanted)
            passes.append(1)

    def loads():
        try:
            for number in range(8):
                adapter = lorry.load(model, tmp_path / "guest", name=f"guest{number}")
                with torch.no_grad():
                    torch.testing.assert_close(model(ids).logits, guest)
                adapter.detach()
        finally:
            done.set()

    together(runs, loads)
    assert set(lorry.adapters(model)) == {"a", "b"} and unchanged(model, before)


def test_attaching_and_training_while_another_thread_serves():
    model, ids = adapted(), tokens(3)
    before = snapshot(model)
    rows = ["a", None, "b"]
    wanted = alone(model, rows, ids)

    def steps(model):
        adapter = lorry.attach(model, lorry.LoRA(rank=2), name="pupil", seed=9)
        lorry.activate(model, "pupil")
        optimizer = torch.optim.SGD(adapter.parameters(), 0.5)
        for _ in range(6):
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        lorry.activate(model, None)
        return {n: t.detach().clone() for n, t, _ in adapter.named_tensors()}

    expected = steps(adapted())
    done, found = threading.Event(), {}

    def serve():
        while not done.is_set():
            with torch.no_grad(), lorry.rows(model, rows):
                torch.testing.assert_close(model(ids).logits, wanted)

    def train():
        try:
            found.update(steps(model))
        finally:
            done.set()

    together(serve, train)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5)
    assert unchanged(model, before)


def checkpointed(reentrant):
    model = adapted(training=True).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


def gradients_of(model, choice, ids, between=lambda: None):
    """The gradients of one step whose rows are over when its backward pass begins; the adapters differ by thread, so
    that two threads never add to the same gradient.
    """
    with chosen(model, choice):
        loss = model(ids).logits.square().mean()
    between()
    loss.backward()
    found = {}
    for name, adapter in lorry.adapters(model).items():
        for key, parameter in adapter.named_parameters():
            if parameter.grad is not None:
                found[f"{name}.{key}"] = parameter.grad.clone()
    return found


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "choices", [[["a", None, {"a": 0.5}], [None, "b", "b"]], ["a", {"b": 0.5}]], ids=["rows", "all"]
)
def test_checkpointed_segments_are_recomputed_with_the_choice_of_their_thread(choices, reentrant):
    ids = [tokens(3, seed=1), tokens(3, seed=2)]
    wanted = {}
    for choice, x in zip(choices, ids, strict=True):
        wanted |= gradients_of(adapted(training=True).train(), choice, x)
    model, barrier = checkpointed(reentrant), threading.Barrier(2, timeout=30)

    def job(choice, x):
        # both passes are over, and both choices were made, before either thread recomputes anything
        gradients_of(model, choice, x, barrier.wait)

    together(*(lambda c=c, x=x: job(c, x) for c, x in zip(choices, ids, strict=True)))
    found = {f"{n}.{k}": p.grad for n, a in lorry.adapters(model).items() for k, p in a.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_pass_in_another_thread_recomputes_what_the_forward_pass_had(reentrant):
    """On a GPU the backward pass runs in a thread of autograd's own, whatever thread called it."""
    choice, ids = ["a", None, {"a": 0.5, "b": -1.0}], tokens(3)
    wanted = gradients_of(adapted(training=True).train(), choice, ids)
    model = checkpointed(reentrant)
    with lorry.rows(model, choice):
        loss = model(ids).logits.square().mean()

    def elsewhere():
        lorry.activate(model, "b")
        with torch.no_grad(), lorry.rows(model, ["b", "b"]):
            model(tokens(2))
        loss.backward()

    together(elsewhere)
    found = {f"{n}.{k}": p.grad for n, a in lorry.adapters(model).items() for k, p in a.named_parameters()}
    assert all(g is not None for g in found.values()) and found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)


def test_an_adapter_detached_by_one_thread_is_not_active_in_any_other():
    model, ids = adapted(), tokens(2)
    bare = alone(model, None, ids)
    barrier, found = threading.Barrier(2, timeout=30), []

    def holds():
        lorry.activate(model, "a")
        barrier.wait()
        barrier.wait()
        with torch.no_grad():
            found.append(model(ids).logits)

    def detaches():
        barrier.wait()
        lorry.adapters(model)["a"].detach()
        barrier.wait()

    together(holds, detaches)
    assert torch.equal(found[0], bare)


def test_a_thread_that_ends_keeps_nothing_alive():
    """Servers start a thread for each request."""
    import gc
    import weakref

    model, ids = adapted(), tokens(2)
    adapter = lorry.attach(model, lorry.LoRA(rank=2), name="short-lived", activate=False)
    adapter.train(False)

    def use():
        lorry.activate(model, "short-lived")
        with torch.no_grad(), lorry.rows(model, ["short-lived", "a"]):
            model(ids)

    together(use, use)
    adapter.detach()
    gone = weakref.ref(adapter)
    del adapter
    gc.collect()
    assert gone() is None


def test_a_copied_model_keeps_no_detached_adapter_alive():
    model = adapted()
    lorry.activate(model, "a")
    twin = copy.deepcopy(model)
    adapter = lorry.adapters(twin)["a"]
    gone = weakref.ref(adapter)
    adapter.detach()
    del adapter
    gc.collect()
    assert gone() is None
