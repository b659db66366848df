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


def test_a_method_that_needs_draws_is_refused_unless_the_loss_makes_them(tmp_path):
    from transformers import Trainer, TrainingArguments

    from lorry.training.routing import policy_loss, repeated

    method = {"method": "remix", "rank": 2, "experts": 4, "top_k": 2}
    model = tiny_llama()
    adapter = attach(model, method, name="a")
    with pytest.raises(AdapterError, match=r"'a' \(remix\) .* 2 draws .* lorry.training.train"):
        plain_trainer(model, tmp_path)

    class Drawing(with_adapters(Trainer)):
        def compute_loss(self, model, inputs, return_outputs=False, **more):
            batch = repeated({"input_ids": inputs["input_ids"]}, adapter.row_draws)
            logits, targets = model(**batch).logits[:, :-1], batch["input_ids"][:, 1:]
            losses = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none").mean(1)
            return policy_loss(model, "a", losses, adapter.row_draws)

    data = [{"input_ids": r.input_ids.long(), "labels": r.labels.long()} for r in token_rows(16, (12, 12), 1).rows]
    Drawing(model, TrainingArguments(**options(tmp_path, steps=3)), train_dataset=data).train()
    assert all(p.any() for n, p in adapter.named_parameters() if n.endswith("router"))

    # with every expert active nothing is drawn
    adapter.detach()
    attach(model, {**method, "top_k": 4}, name="a")
    plain_trainer(model, tmp_path)
