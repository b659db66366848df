"""The Trainers of transformers and TRL train adapters as they are; with_adapters lets them resume."""

import json

import pytest
import torch
from training.tiny_bases import tiny_llama, token_rows
from training.tiny_tokenizers import byte_tokenizer

from lorry.core.errors import AdapterError, CheckpointError
from lorry.core.life.api import adapters, attach
from lorry.training.huggingface import STATE_FILE, load_adapters, with_adapters

METHOD = {"method": "lora", "rank": 4, "dropout": 0.1}


def options(folder, steps=8, **more):
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_steps": 4,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "lr_scheduler_type": "constant",
        "seed": 3,
        **more,
    }


def plain_trainer(model, folder, **more):
    from transformers import Trainer, TrainingArguments

    rows = token_rows(32, (12, 12), 1).rows
    data = [{"input_ids": r.input_ids.long(), "labels": r.labels.long()} for r in rows]
    arguments = TrainingArguments(**options(folder, **more))
    return with_adapters(Trainer)(model, arguments, train_dataset=data, eval_dataset=data[:8])


def sft_trainer(model, folder, **more):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    texts = [f"the lorry carries {n} loads to the town number {n % 5}" for n in range(32)]
    config = SFTConfig(**options(folder, **more), max_length=32)
    data = Dataset.from_dict({"text": texts})
    tokenizer = byte_tokenizer()
    return with_adapters(SFTTrainer)(model, config, train_dataset=data, processing_class=tokenizer)


def base_for(make):
    if make is plain_trainer:
        return tiny_llama()
    from transformers import LlamaConfig, LlamaForCausalLM

    config = tiny_llama().config.to_dict() | {"vocab_size": 320}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**config))


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def adapter_tensors(model):
    return {n: t.detach().clone() for n, t, _ in adapters(model)["job"].named_tensors()}


@pytest.mark.parametrize("make", [plain_trainer, sft_trainer])
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_a_resumed_run_equals_an_uninterrupted_one(make, reentrant, tmp_path):
    more = {"gradient_checkpointing": reentrant is not None}
    if reentrant is not None:
        more["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
    model = base_for(make)
    bytes_before = {k: v.clone() for k, v in model.state_dict().items()}
    start = {n: t.detach().clone() for n, t, _ in attach(model, METHOD, name="job", seed=1).named_tensors()}
    straight = make(model, tmp_path / "run", **more)
    straight.train()
    expected = adapter_tensors(model)
    assert any(not torch.equal(expected[n], start[n]) for n in start)
    assert all(torch.equal(v, bytes_before[k]) for k, v in model.state_dict().items())
    assert model.state_dict().keys() == bytes_before.keys()

    fresh = base_for(make)
    attach(fresh, METHOD, name="job", seed=77)
    resumed = make(fresh, tmp_path / "run", **more)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert losses(resumed) == losses(straight) and len(losses(straight)) == 8
    found = adapter_tensors(fresh)
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_checkpoints_hold_adapters_that_load_and_no_base(tmp_path):
    from lorry.formats.load import load

    model = tiny_llama()
    attach(model, METHOD, name="job", seed=1)
    plain_trainer(model, tmp_path).train()
    folder = tmp_path / "checkpoint-8"
    assert not (folder / "model.safetensors").exists() and (folder / STATE_FILE).is_file()
    other = tiny_llama()
    load(other, folder / "adapters" / "job", name="job")
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(other.eval()(ids).logits, model.eval()(ids).logits)
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 8


def test_the_best_adapter_comes_back(tmp_path):
    model = tiny_llama()
    attach(model, METHOD, name="job", seed=1)
    more = {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True, "learning_rate": 0.5}
    trainer = plain_trainer(model, tmp_path, **more)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    now = adapter_tensors(model)
    other = tiny_llama()
    attach(other, METHOD, name="job")
    load_adapters(other, type(tmp_path)(best))
    found = adapter_tensors(other)
    assert all(torch.equal(found[n], now[n]) for n in now)


def test_what_is_missing_is_said(tmp_path):
    model = tiny_llama()
    with pytest.raises(AdapterError, match="in training"):
        plain_trainer(model, tmp_path)
    attach(model, METHOD, name="job")
    with pytest.raises(CheckpointError, match=STATE_FILE):
        load_adapters(model, tmp_path)
    trainer = plain_trainer(model, tmp_path, steps=1)
    trainer._save(str(tmp_path / "saved"))
    other = tiny_llama()
    attach(other, METHOD, name="another")
    with pytest.raises(CheckpointError, match="tensors differ"):
        load_adapters(other, tmp_path / "saved")


def test_accelerate_trains_the_adapter_alone(tmp_path):
    from accelerate import Accelerator

    model = tiny_llama()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapter = attach(model, METHOD, name="job", seed=1)
    start = adapter_tensors(model)
    accelerator = Accelerator(cpu=True)
    ready, optimizer = accelerator.prepare(model, torch.optim.AdamW(adapter.parameters(), lr=1e-2))
    ids = torch.stack([r.input_ids.long() for r in token_rows(4, (9, 9), 1).rows])
    for _ in range(3):
        accelerator.backward(ready(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()
    now = adapter_tensors(model)
    assert all(not torch.equal(now[n], start[n]) for n in start)
    assert all(torch.equal(v, before[k]) for k, v in accelerator.unwrap_model(ready).state_dict().items())


REMIX = {"method": "remix", "rank": 2, "experts": 4, "top_k": 2, "router_std": 0.02}


def test_routers_learn_from_draws(tmp_path):
    model = tiny_llama()
    adapter = attach(model, REMIX, name="a")
    start = {n: t.detach().clone() for n, t, _ in adapter.named_tensors()}
    sizes = []
    model.register_forward_pre_hook(lambda m, args, given: sizes.append(len(given["input_ids"])), with_kwargs=True)
    trainer = plain_trainer(model, tmp_path, steps=3)
    trainer.train()
    assert sizes == [8, 8, 8]
    routers = {n: t for n, t, _ in adapter.named_tensors() if n.endswith("router")}
    assert routers and all(not torch.equal(t, start[n]) for n, t in routers.items())
    # what is reported is a loss of the data, and evaluation does not draw
    assert trainer.evaluate()["eval_loss"] == pytest.approx(4.57, abs=0.4)
    assert sizes[3:] == [8]


def test_the_draws_of_a_trainer_give_the_gradients_of_the_engine(tmp_path):
    from lorry.training import Job
    from lorry.training.fleet import Fleet

    data = token_rows(4, (12, 12), 1)
    method = {**REMIX, "top_k": 1}
    job = Job("a", data, method, steps=1, batch_size=4, seed=1)
    fleet = Fleet(tiny_llama(), None, [job], tmp_path / "fleet")
    model = tiny_llama()
    adapter = attach(model, method, name="a", seed=1)
    trainer = plain_trainer(model, tmp_path)
    rows = [{"input_ids": r.input_ids.long(), "labels": r.labels.long()} for r in data.examples]
    # the routes of both come from the same generator
    chosen = []
    for root, run in ((fleet.model, "engine"), (model, "trainer")):
        torch.manual_seed(5)
        root.train()
        if run == "engine":
            batch = {k: torch.stack([r[k] for r in rows]).repeat(2, 1) for k in rows[0]}
            from lorry.core.life.api import activate, context
            from lorry.training.objectives import Causal
            from lorry.training.routing import policy_loss

            activate(root, "a")
            with context(root):
                losses, counts = Causal().losses(root(batch["input_ids"]).logits, batch["labels"])
                (policy_loss(root, "a", losses, 2) * 4 / counts[:4].sum()).backward()
            chosen.append({n: p.grad for n, p in fleet.runs[0].adapter.named_parameters()})
        else:
            trainer.compute_loss(root, {k: torch.stack([r[k] for r in rows]) for k in rows[0]}).backward()
            chosen.append({n: p.grad for n, p in adapter.named_parameters()})
    assert chosen[0].keys() == chosen[1].keys()
    for name, gradient in chosen[0].items():
        torch.testing.assert_close(chosen[1][name], gradient, rtol=1e-4, atol=1e-7)


def test_a_loss_of_ones_own_may_make_the_draws(tmp_path):
    from transformers import Trainer, TrainingArguments

    from lorry.training.routing import policy_loss, repeated

    model = tiny_llama()
    adapter = attach(model, REMIX, name="a")
    start = {n: t.detach().clone() for n, t, _ in adapter.named_tensors()}

    class Drawing(with_adapters(Trainer)):
        def compute_loss(self, model, inputs, return_outputs=False, **more):
            batch = repeated({"input_ids": inputs["input_ids"]}, adapter.row_draws)
            logits, targets = model(**batch).logits[:, :-1], batch["input_ids"][:, 1:]
            losses = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none").mean(1)
            return policy_loss(model, "a", losses, adapter.row_draws)

    data = [{"input_ids": r.input_ids.long(), "labels": r.labels.long()} for r in token_rows(16, (12, 12), 1).rows]
    Drawing(model, TrainingArguments(**options(tmp_path, steps=3)), train_dataset=data).train()
    moved = {n: t for n, t, _ in adapter.named_tensors() if n.endswith("router")}
    assert all(not torch.equal(t, start[n]) for n, t in moved.items())


def test_draws_that_a_trainer_cannot_make_are_refused(tmp_path):
    model = tiny_llama()
    attach(model, REMIX, name="a")
    trainer = plain_trainer(model, tmp_path, steps=1)
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.logits.mean()
    with pytest.raises(AdapterError, match=r"'a' \(remix\) .* 2 draws .* lorry.training.train"):
        trainer.train()


@pytest.mark.parametrize("method", ["smora", "flylora"])
def test_rules_after_a_step_are_applied(method, tmp_path):
    model = tiny_llama()
    adapter = attach(model, {"method": method, "rate": 0.01}, name="a")
    before = {n: t.clone() for n, t, s in adapter.named_tensors() if not s.trained}
    plain_trainer(model, tmp_path, steps=2).train()
    moved = [n for n, t, s in adapter.named_tensors() if not s.trained and not torch.equal(t, before[n])]
    assert moved


def test_auxiliary_losses_are_in_the_loss(tmp_path):
    found = {}
    for weight in (0.0, 1e3):
        model = tiny_llama()
        attach(
            model,
            {
                "method": "lora-mixer",
                "experts": 3,
                "rank": 2,
                "load_balance": weight,
                "entropy": 0.0,
                "shared_router": False,
            },
            name="a",
        )
        trainer = plain_trainer(model, tmp_path / str(weight), steps=1, gradient_accumulation_steps=2)
        trainer.train()
        found[weight] = losses(trainer)[0]
    # sum over the routers of load_balance * sum p f, which is at least 1/3 each; once for a step of two micro-batches
    routers = len({n for n, _, _ in adapters(model)["a"].named_tensors() if "router" in n})
    assert found[1e3] - found[0.0] == pytest.approx(1e3 * routers / 3, rel=0.2)


def test_calibration_comes_before_training(tmp_path):
    def run(folder, steps=2, **more):
        model = tiny_llama()
        attach(model, {"method": "eva", "rank": 3}, name="job")
        trainer = plain_trainer(model, folder, steps=steps, save_steps=1)
        trainer.train(**more)
        return adapters(model)["job"], trainer

    adapter, straight = run(tmp_path / "a")
    assert adapter.metadata["calibration"]["batches"] == 8
    ranks = {entry.method.rank for entry in adapter.entries.values()}
    assert len(ranks) > 1  # directions moved between layers
    again, resumed = run(tmp_path / "a", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    first = {n: t for n, t, _ in adapter.named_tensors()}
    assert all(torch.equal(t, first[n]) for n, t, _ in again.named_tensors())
    assert losses(resumed) == losses(straight)


def test_calibration_and_an_optimizer_of_ones_own_do_not_go_together(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = tiny_llama()
    adapter = attach(model, {"method": "eva", "rank": 3}, name="job")
    start = {n: t.detach().clone() for n, t, _ in adapter.named_tensors()}
    data = [{"input_ids": r.input_ids.long(), "labels": r.labels.long()} for r in token_rows(8, (12, 12), 1).examples]
    own = (torch.optim.SGD(adapter.parameters(), lr=0.1), None)
    arguments = TrainingArguments(**options(tmp_path, steps=1))
    trainer = with_adapters(Trainer)(model, arguments, train_dataset=data, optimizers=own)
    with pytest.raises(AdapterError, match="before the optimizer"):
        trainer.train()
    assert all(torch.equal(t, start[n]) for n, t, _ in adapter.named_tensors())


def test_task_ids_reach_the_methods(tmp_path):
    from transformers import Trainer, TrainingArguments

    method = {"method": "lora-mixer", "experts": 2, "rank": 2, "top_k": 1, "training_mode": "hard"}
    method |= {"inference_mode": "hard", "shared_router": False}
    rows = token_rows(16, (12, 12), 1).examples

    def trained(tasks):
        model = tiny_llama()
        adapter = attach(model, method, name="job", seed=1)
        data = [
            {"input_ids": r.input_ids.long(), "labels": r.labels.long(), "task_ids": t}
            for r, t in zip(rows, tasks, strict=True)
        ]
        arguments = TrainingArguments(**options(tmp_path, steps=4))
        trainer = with_adapters(Trainer)(model, arguments, train_dataset=data, eval_dataset=data[:8])
        trainer.train()
        assert trainer.evaluate()["eval_loss"] > 0 and trainer.predict(data[:4]).predictions.shape[0] == 4
        entry = next(iter(adapter.entries.values()))
        return entry.tensors()["B"].unflatten(1, (2, 2)).abs().sum((0, 2))

    both, first = trained([i % 2 for i in range(16)]), trained([0] * 16)
    assert both.min() > 0 and first[0] > 0 and first[1] == 0  # the expert of a task that never came has not moved
    with pytest.raises(AdapterError, match="task_ids"):
        model = tiny_llama()
        attach(model, method, name="job")
        plain_trainer(model, tmp_path, steps=1).train()
