"""An adapter that everybody uses lies in the base weights while that pays, and leaves no trace."""

import pytest
import torch
from serving.tiny_engines import adapt, alone, engine, prompt, request, tiny

from lorry.serving.hot import TRIAL


class Clock:
    """Seconds that pass as a test says: for each look, by whether an adapter is in the base."""

    def __init__(self, machine, beside, inside):
        self.now, self.machine, self.each = 0.0, machine, (beside, inside)

    def __call__(self):
        self.now += self.each[self.machine._hot.version is not None]
        return self.now


def hot(method="lora", beside=2.0, inside=1.0):
    model = tiny()
    adapt(model, "a", method, targets=["q_proj", "v_proj"])
    adapt(model, "b", seed=2)
    machine = engine(model, fuse_hot=True)
    machine._hot.clock = Clock(machine, beside, inside)
    return model, machine


@pytest.mark.parametrize("method", ["lora", "shira"])
def test_answers_and_weights_are_the_same(method):
    model, machine = hot(method)
    weights = {n: p.clone() for n, p in model.named_parameters()}
    asked = [request(str(n), prompt(3 + n), "a", most=20 + n) for n in range(3)]
    other = request("other", prompt(4), {"b": 0.5}, most=12)
    expected = [alone(model, each) for each in (*asked, other)]
    found = machine.generate(asked)
    assert machine._hot.fused == 1 and machine._hot.version is not None
    found += machine.generate([other])
    assert machine._hot.version is None
    assert [each.tokens for each in found] == expected
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


def test_it_stays_beside_where_that_costs_less():
    _, machine = hot(beside=1.0, inside=2.0)
    machine.generate([request("0", prompt(4), "a", most=4 * TRIAL)])
    assert machine._hot.version is None and machine._hot.fused == 1


def test_what_was_learnt_decides_the_next_time():
    _, machine = hot(beside=2.0, inside=1.5)
    machine.generate([request("0", prompt(4), "a", most=2 * TRIAL)])
    machine.generate([request("1", prompt(4), "b", most=1)])
    before = machine._hot.fused
    # a pass saves half a second, and the way in and out costs several: not for a few tokens
    machine.generate([request("2", prompt(4), "a", most=4)])
    assert machine._hot.fused == before
    machine.generate([request("3", prompt(4), "a", most=40)])
    assert machine._hot.fused == before + 1


def test_unloading_and_mixing_take_it_out(tmp_path):
    model, machine = hot()
    machine.generate([request("0", prompt(4), "a", most=30)])
    assert machine._hot.version is not None
    with machine.applied({}) as bare, torch.no_grad():
        assert torch.equal(bare(torch.tensor([prompt(4)])).logits, tiny()(torch.tensor([prompt(4)])).logits)
    machine.generate([request("0", prompt(4), "a", most=60)])
    assert machine._hot.version is not None
    machine.unload("a")
    assert machine._hot.version is None
    machine.close()
