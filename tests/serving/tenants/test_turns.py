"""Whose examples come next, and what is kept of a model between two steps."""

import random

import pytest
import torch
from serving.tenants.clients import datum, service, training

from lorry import pocket
from lorry.core.errors import CheckpointError
from lorry.serving.training.datum import Datum
from lorry.serving.training.losses import LOSSES
from lorry.serving.training.passes import Turns, Work, together
from lorry.serving.training.states import snapshot, write_state
from lorry.serving.training.tenant import Adam, LoraChoice, Tenant


def work(name, *lengths, owner="", forward_only=False):
    data = [Datum(torch.zeros(length, dtype=torch.long), {}) for length in lengths]
    return Work(name, data, LOSSES["cross_entropy"], {}, forward_only, owner)


def test_one_that_sends_much_does_not_keep_another_waiting():
    turns, much = Turns(), work("much", *[10] * 400)
    for _ in range(10):
        together([much], turns, 100)
    for _ in range(5):  # a small request, again and again: each time in the very next pass
        little = work("little", 10, 10)
        parts = dict(together([much, little], turns, 100))
        assert little.done and len(parts[much]) == 8  # and the rest of the pass is not given away
        together([much], turns, 100)


def test_turns_go_by_owner_before_they_go_by_model():
    turns = Turns()
    many = [work(f"m{n}", *[10] * 50, owner="many") for n in range(9)]
    one = work("one", *[10] * 50, owner="one")
    taken = [dict(together([*many, one], turns, 100)) for _ in range(6)]
    assert sum(len(parts[one]) for parts in taken) == 30


def test_short_rows_are_not_padded_to_long_ones_beyond_measure():
    turns = Turns()
    short, long = [work(f"s{n}", 20) for n in range(8)], work("long", 1000)
    passes = []
    while left := [each for each in [*short, long] if not each.done]:
        passes.append({each.adapter for each, _ in together(left, turns, 8192)})
    assert passes == [{each.adapter for each in short}, {"long"}]
    assert len(together([work("a", 30), work("b", 60)], Turns(), 8192)) == 2  # a little padding is cheaper than a pass


@pytest.mark.parametrize("seed", range(20))
def test_passes_hold_every_example_once_within_their_bounds(seed):
    draw, turns, most = random.Random(seed), Turns(), 300
    works = [
        work(f"m{draw.randrange(4)}", *[draw.randint(1, 400) for _ in range(draw.randint(1, 9))],
             owner=str(draw.randrange(2)), forward_only=draw.random() < 0.3)
        for _ in range(12)
    ]  # fmt: skip
    seen = []
    while left := [each for each in works if not each.done]:
        parts = together(left, turns, most)
        lengths = [len(each.data[place]) for each, places in parts for place in places]
        assert len({each.forward_only for each, _ in parts}) == 1
        assert len(lengths) == 1 or max(lengths) * len(lengths) <= most
        seen += [(each, place) for each, places in parts for place in places]
    assert sorted(seen, key=lambda s: (works.index(s[0]), s[1])) == [(w, n) for w in works for n in range(len(w.data))]


def test_a_small_request_is_answered_while_a_large_one_goes_on(tmp_path):
    with training(tmp_path, max_tokens=64) as server:
        large, small = (
            service(server.url).create_lora_training_client("pocket", rank=4, seed=seed).result() for seed in (1, 2)
        )
        data = [datum(example) for example in pocket.examples("star", "train", 200, seed=0)]
        waiting = large.forward_backward(data, "cross_entropy")
        small.forward_backward(data[:1], "cross_entropy").result()
        assert not waiting.future().done()
        assert len(waiting.result().loss_fn_outputs) == len(data)


def stepped(tenant, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in tenant.adapter.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    tenant.step(Adam(learning_rate=1e-2))
    return {name: tensor.detach().clone() for name, tensor, _ in tenant.adapter.named_tensors()}


def test_a_state_is_that_of_its_moment_and_goes_on_like_a_checkpoint(tmp_path):
    model, _ = pocket.load()
    tenant = Tenant(model, "s:train:0", LoraChoice(4, 32.0, 1))
    stepped(tenant, 0)
    tenant.save(tmp_path / "folder", {})
    tensors = snapshot(tenant.adapter, tenant.optimizer)
    after = stepped(tenant, 1)  # while the state is not written yet
    write_state(tensors, {"seq": 2}, tmp_path / "state.safetensors")
    for saved in ("folder", "state.safetensors"):
        tenant.load(tmp_path / saved, optimizer=True)
        again = stepped(tenant, 1)
        assert all(torch.equal(again[name], after[name]) for name in after)
    other = Tenant(model, "s:train:1", LoraChoice(8, 32.0, 1))
    with pytest.raises(CheckpointError, match="do not fit"):
        other.load(tmp_path / "state.safetensors", optimizer=True)
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(CheckpointError, match="cannot be read"):
        other.load(tmp_path / "broken.safetensors", optimizer=True)
