"""The task of each example is a field of a job's data, and reaches the methods that route by it."""

import json

import pytest
import torch
from training.results import difference, tensors
from training.tiny_bases import tiny_llama, token_rows
from training.tiny_tokenizers import byte_tokenizer

from lorry.core.errors import OptionError
from lorry.training import DataError, Fleet, Job, train
from lorry.training.prepare import record_tasks
from lorry.training.rows import EncodedSet

HARD = {
    "method": "lora-mixer",
    "experts": 3,
    "rank": 2,
    "top_k": 1,
    "training_mode": "hard",
    "inference_mode": "hard",
}
EPT = {"method": "ept", "rank": 2, "kernels": (2, 4), "top_k": 1, "tasks": 3, "gate": "token+task", "contrastive": 1.0}


def tagged(count, seed, tasks):
    data = token_rows(count, (5, 14), seed)
    return EncodedSet(data.examples, data.report, tuple(i % tasks for i in range(count)))


def jobs(steps=8):
    return [
        Job("hard", tagged(24, 1, 2), HARD, steps=steps, batch_size=4, learning_rate=1e-2, seed=1, hold_out=0.25),
        Job("ept", tagged(24, 2, 3), EPT, steps=steps, batch_size=3, learning_rate=1e-2, seed=2),
        # without tasks, in a pass of its own
        Job("plain", token_rows(24, (9, 20), 3), {"method": "lora", "rank": 4}, steps=steps, seed=3),
    ]


def base():
    return tiny_llama().double()


def test_tasks_reach_their_rows_in_company_as_alone(tmp_path):
    together = train(base(), None, jobs(), tmp_path / "together", max_pad_ratio=None)
    assert together.ok, together.report
    for job in jobs():
        alone = train(base(), None, job, tmp_path / job.name)
        assert difference(tensors(together, job.name), tensors(alone, job.name)) < 1e-5
    b = torch.stack([t for n, t in tensors(together, "hard").items() if n.endswith(".B") and len(t) == 32])
    used = b.unflatten(2, (3, 2)).abs().sum((0, 1, 3))
    assert used[:2].min() > 0 and used[2] == 0  # the expert of a task that never came stays at zero
    assert together["hard"]["eval"]["end"]["loss"] > 0


def test_a_run_with_tasks_is_resumed_exactly(tmp_path):
    whole = train(base(), None, jobs()[1], tmp_path / "whole")
    first = Fleet(base(), None, [jobs()[1]], tmp_path / "part")
    with first.base.mode(training=True):
        for _ in range(3):
            first._tick()
    first.save_checkpoint()
    second = train(base(), None, jobs()[1], tmp_path / "part", resume=True)
    assert difference(tensors(second, "ept"), tensors(whole, "ept")) == 0
    other = Job(**{**vars(jobs()[1]), "data": tagged(24, 2, 2)})
    with pytest.raises(ValueError, match="training examples"):
        Fleet(base(), None, [other], tmp_path / "part", resume=True)


def test_the_contrastive_loss_of_tasks_is_trained(tmp_path):
    result = train(base(), None, jobs(30)[1], tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "ept" / "metrics.jsonl").read_text().splitlines()]
    penalties = [r["auxiliary"] for r in rows if "auxiliary" in r]
    assert result.ok and len(penalties) == 30 and sum(penalties[-5:]) < sum(penalties[:5])


def test_a_method_that_routes_by_task_says_what_it_lacks(tmp_path):
    data = token_rows(8, (5, 9), 1)
    result = train(tiny_llama(), None, Job("job", data, HARD, steps=1), tmp_path)
    assert "task_ids" in result["job"]["status"]
    numbered = train(tiny_llama(), None, Job("job", data, HARD, steps=1, task_ids=2), tmp_path, overwrite=True)
    assert numbered.ok


def test_columns_give_tasks(tmp_path):
    records = [
        {"text": f"the lorry carries {i} loads", "kind": ("road", "rail")[i % 2], "id": i % 2} for i in range(12)
    ]
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**tiny_llama().config.to_dict() | {"vocab_size": 320}))
    by_name = {"column": "kind", "names": ["road", "rail"]}
    common = {"method": HARD, "steps": 2, "batch_size": 4, "max_length": 32}
    fleet = Fleet(
        model,
        byte_tokenizer(),
        [
            Job("names", records, task_ids=by_name, hold_out=0.5, **common),
            Job("numbers", records, task_ids="id", packing=True, **common),
            Job("none", records, task_ids="nowhere", **common),
        ],
        tmp_path,
    )
    names, numbers, none = fleet.runs
    assert "nowhere" in none.progress.status and "kind" in none.progress.status
    held = names.prepared.evaluation
    assert held.task_ids == (0, 0, 0, 1, 1, 1) == names.prepared.train.task_ids  # each task is held out alike
    tokens = byte_tokenizer()
    for example, tag in zip(held.examples, held.task_ids, strict=True):
        number = int("".join(c for c in tokens.decode(example.input_ids) if c.isdigit()))
        assert number % 2 == tag
    # packed rows hold documents of one task
    assert set(numbers.prepared.train.task_ids) == {0, 1}
    assert numbers.prepared.train.report.records == 12
    assert fleet.train()["names"]["status"] == "done"


def test_tasks_are_numbers_columns_or_names():
    records = [{"t": 1, "n": "a"}, {"t": 0.0, "n": "b"}, {"t": "2", "n": "a"}]
    assert record_tasks(records, 5) == [5, 5, 5] and record_tasks(records, "t") == [1, 0, 2]
    assert record_tasks(records, {"column": "n", "names": ["b", "a"]}) == [1, 0, 1]
    with pytest.raises(DataError, match="(?i)names: "):
        record_tasks(records, "n")
    with pytest.raises(DataError, match="(?i)unknown task 'a'"):
        record_tasks(records, {"column": "n", "names": ["b", "c"]})
    for value in (-1, True, 1.5, {"names": ["a"]}):
        with pytest.raises(OptionError, match="task_ids"):
            Job("job", records, task_ids=value)
