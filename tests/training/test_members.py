"""Jobs whose adapter makes one update of others: a gate over adapters, from fields of the job."""

import pytest
import torch
import yaml
from training.results import tensors
from training.tiny_bases import tiny_llama, token_rows

import lorry
from lorry.core.errors import AdapterError, OptionError
from lorry.training import Fleet, Job, train
from lorry.training.drawn_members import draw_members
from lorry.training.task import Examples, PlainReport


@pytest.fixture
def members(tmp_path):
    """Three LoRAs of the tiny base, in files."""
    paths = {}
    for seed, name in enumerate(("red", "green", "blue")):
        adapter = lorry.attach(tiny_llama(), {"method": "lora", "rank": 2}, targets="attention", name=name, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapter.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        adapter.save(tmp_path / "pool" / name)
        paths[name] = str(tmp_path / "pool" / name)
    return paths


def job(members, name="gate", **more):
    options = {"steps": 3, "batch_size": 3, "seed": 1, "learning_rate": 1e-2, **more}
    return Job(name, token_rows(12, (5, 14), 1), "gated-fusion", members=members, **options)


def test_a_job_file_trains_a_gate_over_adapters_that_exist(members, tmp_path):
    text = yaml.safe_dump({"name": "gate", "method": "gated-fusion", "members": list(members.values()), "steps": 3})
    read = Job.from_dict({**yaml.safe_load(text), "data": token_rows(12, (5, 14), 1), "learning_rate": 1e-2})
    model = tiny_llama()
    made = train(model, None, [read], tmp_path / "run")
    assert made.ok
    gate = made.adapters["gate"]
    assert gate.method.over == ("red", "green", "blue")
    assert set(gate.entries) == set(lorry.adapters(model)["red"].entries)
    fresh = lorry.load(tiny_llama(), members["red"])
    now = dict((n, t) for n, t, _ in lorry.adapters(model)["red"].named_tensors())
    assert all(torch.equal(t, now[n]) for n, t, _ in fresh.named_tensors())
    start = lorry.attach(model, "gated-fusion", targets=list(gate.entries), name="start").named_tensors()
    trained = {n: t for n, t, _ in gate.named_tensors()}
    assert all(not torch.equal(t.detach(), trained[n].detach()) for n, t, _ in start if n.endswith("w_out"))
    # the file says what it combines, and wants it there
    again = tiny_llama()
    with pytest.raises(AdapterError, match="combines 'red', which is not loaded"):
        lorry.load(again, tmp_path / "run" / "gate" / "adapter")
    for path in members.values():
        lorry.load(again, path, activate=False)
    lorry.load(again, tmp_path / "run" / "gate" / "adapter")


def test_a_gate_of_drawn_members_serves_any_of_them(members, tmp_path):
    model = tiny_llama()
    gate = train(model, None, [job(members, drawn_members=2)], tmp_path / "run").adapters["gate"]
    assert gate.method.over == () and set(gate.metadata["members"]) == set(members)
    other = tiny_llama()
    lorry.load(other, members["blue"], name="one", activate=False)
    lorry.load(other, tmp_path / "run" / "gate" / "adapter", activate=False)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        base = other(ids).logits
        with lorry.activate(other, "gate"):
            assert torch.equal(other(ids).logits, base)
            with lorry.context(other, combined={"gate": ["one"]}):
                assert not torch.allclose(other(ids).logits, base)


def test_rows_combine_the_member_of_their_task_and_drawn_ones(members, tmp_path, monkeypatch):
    seen = []
    model = tiny_llama()
    rows = token_rows(6, (5, 14), 1)
    data = Examples(tuple(rows), PlainReport(6, 6), (0, 1, 2, 0, 1, 2))
    one = Job("gate", data, "gated-fusion", members=members, drawn_members=2, steps=1, batch_size=6)
    fleet = Fleet(model, None, [one], tmp_path / "run")
    forward = model.forward

    def spy(*args, **kwargs):
        facts = fleet.runs[0].adapter.state.runtimes.own().context
        seen.append((facts.task_ids.tolist(), {n: w.tolist() for n, w in facts.values["combined"]["gate"].items()}))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", spy)
    monkeypatch.setattr(type(fleet.runs[0]), "task_names", property(lambda self: ("red", "green", "blue")))
    fleet.train()
    ((tasks, weights),) = seen
    for row, task in enumerate(tasks):
        applied = [name for name, each in weights.items() if each[row]]
        assert len(applied) == 2 and ("red", "green", "blue")[task] in applied


def test_members_are_drawn_near_each_other():
    g = torch.Generator().manual_seed(0)
    own = [3, 3, 7, 9]
    drawn = draw_members(40, own, 4, 3, g)
    assert [row[0] for row in drawn] == own and all(len(set(row)) == 3 for row in drawn)
    assert set().union(*drawn) == {3, 7, 9}
    alone = draw_members(40, [5, 5], 2, 3, g)
    assert all(row[0] == 5 and len(set(row)) == 3 for row in alone) and len(set().union(*alone)) == 3
    (first, second) = draw_members(4, None, 2, 3, g)
    assert first == second and len(set(first)) == 3
    counted = {row for _ in range(50) for row in draw_members(4, None, 1, 2, g)}
    assert len(counted) > 6


def test_two_gates_share_members_and_resume(members, tmp_path):
    def gates(steps):
        second = job(members, "plain", steps=steps)
        return [job(members, drawn_members=2, steps=steps), second]

    whole = train(tiny_llama(), None, gates(4), tmp_path / "whole")
    Fleet(tiny_llama(), None, gates(2), tmp_path / "parts").train()
    rest = Fleet(tiny_llama(), None, gates(4), tmp_path / "parts", resume=True).train()
    for name in ("gate", "plain"):
        for key, value in tensors(whole, name).items():
            assert torch.equal(value, tensors(rest, name)[key]), key


def test_what_does_not_fit_is_refused_and_leaves_the_model_as_it_was(members, tmp_path):
    with pytest.raises(OptionError, match="members are for a method that combines"):
        Job("x", token_rows(3, (5, 8), 1), "lora", members=members)
    with pytest.raises(OptionError, match="drawn_members is 4, but there are 3"):
        job(members, drawn_members=4)
    with pytest.raises(OptionError, match="evaluations would combine no members"):
        job(members, drawn_members=2, hold_out=0.5)
    with pytest.raises(OptionError, match="paths that differ"):
        job(["a/x", "b/x"])
    model = tiny_llama()
    with pytest.raises(AdapterError, match="neither an adapter on this model"):
        Fleet(model, None, [job({**members, "none": str(tmp_path / "none")})], tmp_path / "run")
    assert not lorry.adapters(model)
    with pytest.raises(AdapterError, match="another adapter of this name"):
        twisted = {"red": members["green"]}
        Fleet(model, None, [job(members), job(twisted, "other")], tmp_path / "run")
    assert not lorry.adapters(model)
    lorry.attach(model, lorry.LoRA(rank=2), targets="attention", name="mine", activate=False)
    made = train(model, None, [job({"mine": "mine", "red": members["red"]}, steps=1)], tmp_path / "named")
    assert made.ok and set(lorry.adapters(model)) == {"mine", "red", "gate"}
