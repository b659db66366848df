"""Watching and editing under gradient checkpointing, which computes segments again in the backward pass."""

import threading

import pytest
import torch
from attention.tiny import build, causal_model, close, gradients, tokens

from lorry.attention import AttentionError, watch

FIRST = "model.layers.0.self_attn"


def checkpointed(model, reentrant=False):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model.train()


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_loss_of_what_was_seen_in_a_checkpointed_model(at_once, inside, dropout):
    """Readers are told once, and the gradient is that without checkpointing, whether the watch is still open or not."""

    def run(model):
        torch.manual_seed(7)
        kept, losses = [], []

        def read(one):
            kept.append(one)
            if at_once:
                # a graph made inside of the segment, which saves tensors of its own
                losses.append(one.probabilities.square().mean())

        with watch(model, read, want=("probabilities", "gradient", "q", "output")) as w:
            loss = model(tokens()).logits.square().mean()
            loss = loss + sum(one.probabilities.square().mean() + one.q.square().mean() for one in kept)
            loss = loss + sum(one.output.square().mean() for one in kept) + sum(losses)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        assert len(kept) == 2 and set(w.counts.values()) == {1}
        return gradients(model), [one.gradient for one in kept]

    expected, outputs = run(causal_model("llama", attention_dropout=dropout).train())
    found, seen = run(checkpointed(causal_model("llama", attention_dropout=dropout)))
    close(found, expected)
    for one, other in zip(seen, outputs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("reader", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_edits_act_again_in_a_recomputation(reader, reentrant):
    strength = torch.tensor(0.7)
    again = []

    def halve(one):
        again.append(one.recomputation)
        return one.output * strength + one.probabilities.mean() if reader else None

    def edit(one):
        again.append(one.recomputation)
        return {"v": one.v * strength, "q": one.q + one.k.mean()}

    def run(model):
        again.clear()
        with watch(model, halve if reader else None, editor=None if reader else edit, targets=FIRST):
            hidden = model.model.embed_tokens(tokens()).detach().requires_grad_()
            model(inputs_embeds=hidden).logits.square().mean().backward()
        return gradients(model)

    expected = run(causal_model("llama").train())
    assert again == [False]
    found = run(checkpointed(causal_model("llama"), reentrant))
    assert again == [False, True]
    close(found, expected)


def test_a_reader_beside_an_editor_is_told_once():
    model = checkpointed(causal_model("llama"))
    read, edited = [], []

    def edit(one):
        edited.append(one.recomputation)
        return {"v": one.v * 0.5}

    with watch(model, lambda one: read.append(one.recomputation), editor=edit, targets=FIRST):
        model(tokens()).logits.square().mean().backward()
    assert read == [False]
    assert edited == [False, True]


def test_a_pass_before_the_watch_is_recomputed_as_it_was():
    model = checkpointed(causal_model("llama"))
    model(tokens()).logits.square().mean().backward()
    expected = gradients(model)
    loss = model(tokens()).logits.square().mean()
    with pytest.warns(UserWarning, match="Nothing was seen"), watch(model, editor=lambda one: {"v": one.v * 0}):
        loss.backward()
    close(gradients(model), expected)


def test_the_backward_pass_of_an_edited_checkpointed_segment_belongs_into_the_watch():
    model = checkpointed(causal_model("llama"))
    with watch(model, editor=lambda one: {"v": one.v * 0.5}):
        loss = model(tokens()).logits.square().mean()
    with pytest.raises(AttentionError, match="run the backward pass before the watch is closed"):
        loss.backward()
    # without checkpointing nothing is computed again
    model = causal_model("llama").train()
    with watch(model, editor=lambda one: {"v": one.v * 0.5}):
        loss = model(tokens()).logits.square().mean()
    loss.backward()


def test_recomputations_are_told_to_those_who_ask():
    model = checkpointed(causal_model("llama"))
    told = []
    with watch(model, lambda one: told.append(one.recomputation), targets=FIRST, recomputation=True) as w:
        model(tokens()).logits.square().mean().backward()
    assert told == [False, True]
    assert w.counts == {FIRST: 1}


def test_edits_of_another_thread_do_not_reach_a_recomputation():
    model = checkpointed(causal_model("llama"))
    model(tokens()).logits.square().mean().backward()
    expected = gradients(model)
    ready, done = threading.Event(), threading.Event()

    def other():
        with watch(model, editor=lambda one: {"v": one.v * 0}):
            model(tokens())
            ready.set()
            done.wait()

    thread = threading.Thread(target=other)
    thread.start()
    ready.wait()
    model(tokens()).logits.square().mean().backward()
    done.set()
    thread.join()
    close(gradients(model), expected)


def test_edits_act_again_in_a_thread_of_autograds_own():
    """A GPU's backward pass runs in a thread that knows no context, here made in the same way."""
    import _thread

    def run(model, start):
        done = threading.Event()
        with watch(model, editor=lambda one: {"v": one.v * 0.5}, targets=FIRST):
            loss = model(tokens()).logits.square().mean()

            def backward():
                loss.backward()
                done.set()

            start(backward)
            assert done.wait(60)
        return gradients(model)

    expected = run(causal_model("llama").train(), lambda work: work())
    found = run(checkpointed(causal_model("llama")), lambda work: _thread.start_new_thread(work, ()))
    close(found, expected)


def test_tensors_saved_elsewhere_are_no_checkpoint():
    model, call = build("plain")
    with watch(model, editor=lambda one: {"v": one.v * 0.5}), torch.autograd.graph.save_on_cpu():
        loss = call(model).sum()
    loss.backward()
    assert model.qkv.weight.grad is not None
