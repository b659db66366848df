"""`lorry.rows` left out of order, and adapters that come, change and go while rows are in force."""

from __future__ import annotations

import pytest
import torch
from core.choices import adapted, alone
from core.tiny import off_zero, tokens

import lorry


def test_rows_that_are_left_out_of_order():
    model, ids = adapted(*"abc"), tokens(2)
    choices = [["a", "b"], ["c", None]]
    first, second = (alone(model, c, ids) for c in choices)
    bare = alone(model, None, ids)
    one, two = (lorry.rows(model, c) for c in choices)
    with torch.no_grad():
        one.__enter__()
        assert torch.equal(model(ids).logits, first)
        two.__enter__()
        assert torch.equal(model(ids).logits, second)
        one.__exit__(None, None, None)
        assert torch.equal(model(ids).logits, second), "what is left last is still in force"
        two.__exit__(None, None, None)
        assert torch.equal(model(ids).logits, bare), "nothing is in force when all are left"


def test_rows_kept_open_by_a_generator_that_is_dropped_late():
    """A streaming answer holds its rows; the next request is over before the stream is closed."""
    model, ids = adapted(), tokens(2)
    bare = alone(model, None, ids)

    def stream():
        with lorry.rows(model, ["a", "b"]):
            while True:
                with torch.no_grad():  # around no yield: it would be left in the caller's mode
                    logits = model(ids).logits
                yield logits

    answer = stream()
    next(answer)
    with lorry.rows(model, ["b", "b"]):
        answer.close()
        with torch.no_grad():
            found = model(ids).logits
    assert torch.equal(found, alone(model, ["b", "b"], ids))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, bare)


@pytest.mark.parametrize("before", ["a", {"a": 0.5, "b": 0.5}])
def test_an_adapter_detached_inside_rows_is_not_active_afterwards(before):
    model, ids = adapted(), tokens(2)
    bare, half = alone(model, None, ids), alone(model, {"b": 0.5}, ids)
    lorry.activate(model, before)
    with torch.no_grad():
        with lorry.rows(model, ["b", None]):
            lorry.adapters(model)["a"].detach()
        assert torch.equal(model(ids).logits, bare if before == "a" else half)
        # a name that is free again does not bring it back
        off_zero(lorry.attach(model, lorry.LoRA(rank=2), name="a", activate=False), 8, 0.3)
        assert torch.equal(model(ids).logits, bare if before == "a" else half)


def test_the_last_adapter_detached_inside_rows_leaves_the_bare_model():
    model, ids = adapted("a"), tokens(2)
    bare = alone(model, None, ids)
    with lorry.rows(model, ["a", None]):
        lorry.adapters(model)["a"].detach()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, bare)
    assert not any("lorry" in key for m in model.modules() for key in (*m.__dict__, *m._parameters))


@pytest.mark.parametrize("verb", ["load", "attach"])
def test_what_is_loaded_inside_rows_does_not_replace_them(verb, tmp_path):
    model, ids = adapted(), tokens(2)
    rows = ["a", "b"]
    wanted = alone(model, rows, ids)
    lorry.adapters(model)["a"].save(tmp_path / "saved")
    with torch.no_grad(), lorry.rows(model, rows):
        if verb == "load":
            lorry.load(model, tmp_path / "saved", name="guest")
        else:
            off_zero(lorry.attach(model, lorry.LoRA(rank=2), name="guest"), 3, 0.3)
        found = model(ids).logits
    torch.testing.assert_close(found, wanted)


def test_changes_of_other_adapters_inside_rows_keep_the_rows():
    """Freezing, training and configuring work compositions out anew."""
    model, ids = adapted(), tokens(2)
    wanted = alone(model, ["a", "b"], ids)
    other = lorry.attach(model, "smora", name="other", activate=False)
    with torch.no_grad(), lorry.rows(model, ["a", "b"]):
        for change in (lambda: other.train(False), other.train, lambda: other.configure(rate=0.5), other.detach):
            change()
            torch.testing.assert_close(model(ids).logits, wanted)
