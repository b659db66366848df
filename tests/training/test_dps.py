"""Growth in stages: what is trained when, when a stage begins, tasks that are drawn no more, and exact resuming."""

import dataclasses
from collections import Counter

import pytest
import torch
from training.results import difference, tensors
from training.tiny_bases import tiny_llama, token_rows

import lorry
from lorry.core.errors import AdapterError, OptionError
from lorry.methods.curriculum_lora import CurriculumLoRA
from lorry.training import Fleet, Job, train
from lorry.training.dynamics.dps import DPS, Controller
from lorry.training.huggingface import with_adapters

TARGETS = ["q_proj", "down_proj"]
DENSE = CurriculumLoRA(rank=2, updates=0, dense=True)


def tasks(count=24, number=3, seed=1):
    """Rows of several tasks, one after another."""
    rows = token_rows(count, (5, 12), seed)
    return dataclasses.replace(rows, task_ids=tuple(i % number for i in range(count)))


def job(dynamics, method=None, **options):
    method = method or {"method": "lora", "rank": 2}
    common = {"targets": TARGETS, "learning_rate": 1e-2, "batch_size": 4, "seed": 1, "steps": 9, "weight_decay": 0.1}
    return Job("job", options.pop("data", token_rows(20, (5, 12), 1)), method, dynamics=dynamics, **common | options)


def switches(fleet):
    """Run a fleet to its end; yield at each stage that is about to begin."""
    (run,) = fleet.runs
    with fleet.base.mode(training=True):
        while run.running and run.progress.step < run.total:
            if run.progress.raised:
                yield run
            fleet._tick()


def stage_of(run):
    return next(e.method.updates for e in run.adapter.entries.values())


@pytest.mark.parametrize("method", [None, DENSE], ids=["from LoRA", "from a dense stage 0"])
def test_no_bit_of_the_output_changes_at_a_switch(method, tmp_path):
    model = tiny_llama()
    fleet = Fleet(model, None, [job([DPS(stages=4, min_stage0=2, max_stage=2)], method)], tmp_path)
    ids = torch.arange(1, 12)[None]

    def output():
        model.eval()
        with torch.no_grad(), lorry.rows(model, ["job"]):
            return model(ids).logits

    seen = []
    for run in switches(fleet):
        before, stage = output(), stage_of(run)
        run.open_step()
        assert stage_of(run) == stage + 1 and not run.progress.raised
        assert torch.equal(output(), before)
        seen.append((run.progress.step, stage + 1))
        model.train()
    assert seen == ([(2, 2), (4, 3)] if method is None else [(2, 1), (4, 2), (6, 3)])


def trained_at(stage, name):
    """Whether the table of the paper trains a tensor at a stage."""
    key = name.rpartition(".")[2]
    if key == "D":
        return stage == 0
    kind, number = key[0], int(key[1:])
    if kind == "l":
        return stage > number
    return number == stage


@pytest.mark.parametrize("method", [None, DENSE], ids=["from LoRA", "from a dense stage 0"])
def test_each_stage_trains_what_the_table_says_and_nothing_else_moves(method, tmp_path):
    fleet = Fleet(tiny_llama(), None, [job([DPS(stages=4, min_stage0=2, max_stage=2)], method)], tmp_path)
    (run,) = fleet.runs
    stages = Counter()
    with fleet.base.mode(training=True):
        while run.progress.step < run.total:
            run.open_step()
            before = {n: t.detach().clone() for n, t, _ in run.adapter.named_tensors()}
            stage = stage_of(run)
            stages[stage] += 1
            expected = {n for n in before if trained_at(stage, n)}
            assert set(run.groups.names()) == expected
            assert {n for n, p in run.adapter.named_parameters() if p.requires_grad} == expected
            assert set(run.groups.resting) == before.keys() - expected
            fleet._tick()
            after = {n: t for n, t, _ in run.adapter.named_tensors() if n in before}
            moved = {n for n in before if not torch.equal(before[n], after[n])}
            # scales are not decayed, so those of updates that are still nothing may stand
            assert moved <= expected and {n for n in expected if ".l" not in n[-4:]} <= moved
            assert stage < 2 or {n for n in expected if n.endswith(".l0")} <= moved
    assert stages == ({1: 2, 2: 2, 3: 5} if method is None else {0: 2, 1: 2, 2: 2, 3: 3})
    kept = {n for n, (state, _) in run.groups.resting.items() if state}
    assert not kept, "the optimizer's state of what is frozen for good takes memory"


def test_scales_are_bounded_and_one_at_the_start():
    model = tiny_llama()
    adapter = lorry.attach(model, {"method": "curriculum-lora", "updates": 3}, targets=TARGETS)
    entry = next(iter(adapter.entries.values()))
    values = dict(entry.home.tensors())
    for stage in range(4):
        assert entry.method.factor(values, stage) == 1
        for logit, bound in ((50.0, 1.2), (-50.0, 0.8)):
            found = entry.method.factor({f"l{stage}": torch.tensor([logit])}, stage)
            torch.testing.assert_close(found, torch.full((1, 1), bound), rtol=1e-7, atol=0)
    with torch.no_grad():
        values["l2"].fill_(0.5)
    assert 1 < entry.method.factor(values, 2) < 1.2


def test_two_stages_with_the_base_frozen_are_plain_lora(tmp_path):
    plain = tensors(train(tiny_llama(), None, job([]), tmp_path / "a"), "job")
    grown = tensors(train(tiny_llama(), None, job([DPS(stages=2, scale_base=False)]), tmp_path / "b"), "job")
    for name, value in plain.items():
        torch.testing.assert_close(grown[f"{name}1"], value, atol=1e-5, rtol=1e-4)
    assert all(v == 0 for n, v in grown.items() if n.rpartition(".")[2][0] == "l")


def test_the_dense_weight_is_the_staged_forward():
    model = tiny_llama().double().eval()
    method = {"method": "curriculum-lora", "updates": 3, "rank": 2, "alpha": 3.0, "dense": True, "bias": True}
    adapter = lorry.attach(model, method, targets=TARGETS, name="a", dtype=torch.float64)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        staged = model(ids).logits
        entry = next(iter(adapter.entries.values()))
        t, scales = entry.tensors(), [float(1 + 0.2 * torch.tanh(entry.tensors()[f"l{s}"])) for s in range(4)]
        by_hand = scales[0] * (entry.site.matrix() + t["D"]) - entry.site.matrix()
        by_hand = by_hand + sum(1.5 * scales[s] * t[f"B{s}"] @ t[f"A{s}"] for s in (1, 2, 3))
        torch.testing.assert_close(entry.method.delta(t, entry.site), by_hand, rtol=0, atol=1e-12)
        adapter.fuse()
        assert (model(ids).logits - staged).abs().max() < 1e-12


@pytest.mark.parametrize(
    "options, course",
    [
        # tasks solved, unsolved, step -> stage after it, worked out by hand
        ((4, 10, 100), [(0, 6, 5, 0), (3, 3, 5, 0), (3, 3, 10, 1), (4, 2, 20, 2), (5, 1, 21, 3), (6, 0, 22, 3)]),
        ((4, 0, 100), [(1, 5, 1, 0), (2, 4, 2, 1), (2, 4, 101, 1), (2, 4, 102, 2), (6, 0, 103, 3), (6, 0, 900, 3)]),
        # more must be solved than one: all that are left, spread over the stages that are left
        ((3, 0, 100), [(1, 5, 1, 0), (2, 4, 2, 1), (3, 3, 3, 1), (4, 2, 4, 2)]),
        # no task left: one solved since the last switch would do, and time does
        ((3, 0, 50), [(0, 0, 49, 0), (0, 0, 50, 1), (0, 0, 99, 1), (0, 0, 100, 2), (0, 0, 500, 2)]),
        # the least of stage 0 above the most of any: time fires as soon as it may
        ((3, 60, 20), [(0, 4, 20, 0), (0, 4, 59, 0), (0, 4, 60, 1), (0, 4, 79, 1), (0, 4, 80, 2)]),
        ((1, 0, 1), [(3, 0, 10, 0)]),
    ],
)
def test_the_controller_follows_the_table(options, course):
    controller = Controller(*options)
    for solved, unsolved, step, stage in course:
        before = controller.stage
        assert controller.due(solved, unsolved, step) == (stage > before), (solved, unsolved, step)
        assert controller.stage == stage


def judged(target, **more):
    options = {"stages": 3, "max_stage": 4, "target": target, **more}
    return job([{"dynamics": "dps", **options}], data=tasks(), eval_data=tasks(9, seed=1), eval_every=2, steps=12)


def test_solved_tasks_are_drawn_no_more_and_reported_to_the_end(tmp_path):
    # task 1 is solved at the first evaluation, the others never
    fleet = Fleet(tiny_llama(), None, [judged({"0": 0.0, "1": 99.0, "2": 0.0})], tmp_path)
    (run,) = fleet.runs
    drawn, sizes = [], []
    with fleet.base.mode(training=True):
        while run.progress.step < run.total:
            run.open_step()
            drawn.append({run.prepared.train.task_ids[i] for batch in run.progress.pending for i in batch})
            sizes.append(run.progress.examples)
            fleet._tick()
    assert set.union(*drawn[:2]) == {0, 1, 2} and set.union(*drawn[2:]) == {0, 2}
    assert run.progress.dropped == [1] and run.progress.drawn == sum(sizes) < 12 * 4
    for row in run.progress.evaluations:
        own = [row[f"loss/{n}"] * row[f"count/{n}"] for n in range(3)]
        assert sum(own) == pytest.approx(row["loss"] * row["count"], rel=1e-6)
    assert [row["step"] for row in run.progress.evaluations] == [2, 4, 6, 8, 10, 12]


def test_a_job_ends_when_all_tasks_are_solved(tmp_path):
    result = train(tiny_llama(), None, judged(99.0), tmp_path)
    assert result["job"]["status"] == "stopped early" and result["job"]["steps"] == 2
    kept = train(tiny_llama(), None, judged(99.0, drop=False), tmp_path / "kept")
    assert kept["job"]["status"] == "done" and kept["job"]["steps"] == 12


def test_a_resumed_run_goes_on_in_its_stage_with_the_same_moments(tmp_path):
    target = {"0": 0.0, "1": 99.0, "2": 0.0}
    whole = train(tiny_llama(), None, judged(target), tmp_path / "whole")
    for tick in (1, 2, 5, 8, 9, 11):
        first = Fleet(tiny_llama(), None, [judged(target)], tmp_path / str(tick))
        with first.base.mode(training=True):
            first._evaluate(first.runs)  # as a run begins
            for _ in range(tick):
                first._tick()
        first.save_checkpoint()
        second = Fleet(tiny_llama(), None, [judged(target)], tmp_path / str(tick), resume=True)
        one, two = first.runs[0], second.runs[0]
        assert stage_of(one) == stage_of(two)
        assert one.groups.describe() == two.groups.describe()
        assert {n: p.requires_grad for n, p in one.adapter.named_parameters()} == {
            n: p.requires_grad for n, p in two.adapter.named_parameters()
        }
        again = two.groups.parameters()
        for name, parameter in one.groups.parameters().items():
            moments, restored = one.optimizer.state[parameter], two.optimizer.state[again[name]]
            assert moments.keys() == restored.keys()
            assert all(torch.equal(torch.as_tensor(moments[k]), torch.as_tensor(restored[k])) for k in moments)
        assert one.progress == two.progress
        assert one.acting.tensors().keys() == two.acting.tensors().keys()
        assert all(torch.equal(t, two.acting.tensors()[n]) for n, t in one.acting.tensors().items())
        assert difference(tensors(second.train(), "job"), tensors(whole, "job")) == 0


def test_growth_follows_the_jobs_own_stages_and_other_rates(tmp_path):
    planned = job(["lora-plus:ratio=4", {"dynamics": "dps", "stages": 4}], stages={"grow": [3, 6]})
    fleet = Fleet(tiny_llama(), None, [planned], tmp_path)
    (run,) = fleet.runs
    seen = []
    with fleet.base.mode(training=True):
        while run.progress.step < run.total:
            run.open_step()
            seen.append(stage_of(run))
            path = next(iter(run.adapter.entries))
            assert run.groups.options(f"{path}.B{seen[-1]}")["factor"] == 4
            assert run.groups.options(f"{path}.A{seen[-1]}")["factor"] == 1
            fleet._tick()
    assert seen == [1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_a_grown_adapter_saves_loads_and_fuses(tmp_path):
    model = tiny_llama()
    train(model, None, job([DPS(stages=3, max_stage=3)]), tmp_path)
    again = tiny_llama()
    adapter = lorry.load(again, tmp_path / "job" / "adapter", name="job")
    assert {e.method.updates for e in adapter.entries.values()} == {2}
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        for one in (model, again):
            lorry.activate(one, "job")
        torch.testing.assert_close(again.eval()(ids).logits, model.eval()(ids).logits)
        adapter.fuse()
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-4)


def test_bad_input_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(OptionError, match="set eval_every, and give eval_data or hold_out"):
        job([{"dynamics": "dps", "target": 1.0}])
    with pytest.raises(OptionError, match="target is a number, or a mapping"):
        DPS(target={"a": "low"})
    with pytest.raises(OptionError, match="'dps' and 'relora' cannot act together"):
        job(["dps", "relora"])
    with pytest.raises(OptionError, match="use the planner 'joined'"):
        Fleet(tiny_llama(), None, [judged(1.0)], tmp_path / "a", planner="lorafusion")
    cases = {
        "give its task_ids": job([DPS(target=1.0)], eval_data=token_rows(9, (5, 9), 2), eval_every=2),
        "the tasks are": judged({"0": 1.0, "x": 1.0}),
        "has no accuracies of task '0'": judged(0.5, metric="accuracies"),
        "grows plain LoRA": job([DPS(stages=2)], {"method": "vera", "rank": 4}),
        "fewer steps in the job's stages": job([DPS(stages=2)], stages={"grow": 2}),
        "matches no trained tensor": job([DPS(stages=2, freeze=("norm*",))]),
    }
    for number, (says, one) in enumerate(cases.items()):
        status = train(tiny_llama(), None, one, tmp_path / str(number))["job"]["status"]
        assert status.startswith("failed") and says in status, status
    with pytest.raises(OptionError, match="set dense: true, or begin at stage 1"):
        CurriculumLoRA(updates=0)
    from transformers import Trainer, TrainingArguments

    model = tiny_llama()
    lorry.attach(model, {"method": "lora", "rank": 2}, targets=TARGETS)
    arguments = TrainingArguments(output_dir=str(tmp_path / "trainer"), use_cpu=True, report_to=[])
    with pytest.raises(AdapterError, match="train a job with lorry.train"):
        with_adapters(Trainer, [DPS(target=1.0)])(model, arguments)
