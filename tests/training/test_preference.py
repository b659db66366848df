"""Preference objectives: equal to TRL's trainers on the same batch, learned, beside other jobs, and refused."""

import pytest
import torch
from training.passes import first_pass
from training.results import difference, tensors
from training.tiny_tokenizers import byte_tokenizer

import lorry
from lorry import pocket
from lorry.training import DataError, Job, train
from lorry.training.objectives import make_objective
from lorry.training.text_task import TextTask, flat

LORA = {"method": "lora", "rank": 4}
RECORDS = [
    {"prompt": "the town? ", "chosen": "yes yes", "rejected": "no, no"},
    {"prompt": "the load of the lorry? ", "chosen": "of course", "rejected": "answer"},
    {"prompt": "no? ", "chosen": "the lorry carries the load", "rejected": "yes"},
    {"prompt": "a ", "chosen": "b c d", "rejected": "e"},
]
JUDGED = [
    {"prompt": r["prompt"], "completion": r[side], "label": side == "chosen"}
    for r in RECORDS
    for side in ("chosen", "rejected")
]


def tiny(tokenizer, head="LlamaForCausalLM", **more):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1, **more,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    return getattr(transformers, head)(config)


def mine(objective, records, tmp_path, *, batch=4):
    """Return the loss and the gradients of one pass, the model, its adapter, and the batch as rows."""
    tokenizer = byte_tokenizer()
    model = tiny(tokenizer)
    job = Job("job", records, LORA, objective=objective, steps=1, batch_size=batch)
    share, loss, gradients, adapter = first_pass(model, tokenizer, job, tmp_path / "mine")
    return share, loss, gradients, model, adapter, tokenizer


def padded(setting_rows):
    """Return ids, mask and completion mask of rows in TRL's order."""
    length = max(map(len, setting_rows))
    ids, mask, answer = (torch.zeros(len(setting_rows), length, dtype=torch.long) for _ in range(3))
    for i, row in enumerate(setting_rows):
        ids[i, : len(row)], mask[i, : len(row)] = row.input_ids.long(), 1
        answer[i, : len(row)] = (row.labels != -100).long()
    return {"input_ids": ids, "attention_mask": mask, "completion_mask": answer}


def trl_gradients(model, adapter, loss):
    for parameter in adapter.parameters():
        parameter.grad = None
    loss.backward()
    return {n: p.grad.clone() for n, p, _ in adapter.named_tensors() if p.grad is not None}


def options(tmp_path, **more):
    return {
        "output_dir": str(tmp_path / "trl"), "report_to": [], "use_cpu": True, "bf16": False, "max_length": None,
        "per_device_train_batch_size": 4, "gradient_checkpointing": False, "disable_tqdm": True, **more,
    }  # fmt: skip


@pytest.mark.parametrize(("name", "loss_type", "beta"), [("dpo", "sigmoid", 0.3), ("ipo", "ipo", 0.2),
                                                         ("dpo", "hinge", 0.3)])  # fmt: skip
def test_loss_and_gradients_on_pairs_are_those_of_trl(name, loss_type, beta, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    objective = {"objective": name, "beta": beta, **({"form": "hinge"} if loss_type == "hinge" else {})}
    share, loss, gradients, model, adapter, tokenizer = mine(objective, RECORDS, tmp_path)
    trainer = trl.DPOTrainer(
        model, tiny(tokenizer), processing_class=tokenizer, train_dataset=datasets.Dataset.from_list(RECORDS),
        args=trl.DPOConfig(**options(tmp_path, loss_type=loss_type, beta=beta)),
    )  # fmt: skip
    batch = padded([e.rows[side] for side in (0, 1) for e in share.examples])
    lorry.activate(model, "job")
    theirs = trainer._compute_loss(model.eval(), batch, False)
    assert loss == pytest.approx(float(theirs.detach()), rel=1e-5, abs=1e-7)
    assert difference(gradients, trl_gradients(model, adapter, theirs)) < 1e-5
    assert max(float(g.abs().max()) for g in gradients.values()) > 1e-3


def test_loss_and_gradients_of_kto_are_those_of_trl(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    objective = {"objective": "kto", "beta": 0.3, "desirable_weight": 1.5}
    share, loss, gradients, model, adapter, tokenizer = mine(objective, JUDGED, tmp_path, batch=8)
    trainer = trl.KTOTrainer(
        model, tiny(tokenizer), processing_class=tokenizer, train_dataset=datasets.Dataset.from_list(JUDGED),
        args=trl.KTOConfig(**options(tmp_path, beta=0.3, desirable_weight=1.5)),
    )  # fmt: skip
    from lorry.training.objectives.kto import _crossed

    rows = [row for e in share.examples for row in e.rows]
    crossed = [_crossed(row, rows[i - 1], 512) for i, row in enumerate(rows)]
    batch = padded(rows) | {f"KL_{k}": v for k, v in padded(crossed).items()}
    batch["label"] = torch.tensor([bool(e.numbers[0, 2]) for e in share.examples])
    lorry.activate(model, "job")
    theirs = trainer._compute_loss(model.eval(), batch, False)
    assert float(share.examples[0].numbers[0, 1]) > 0
    assert loss == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert difference(gradients, trl_gradients(model, adapter, theirs)) < 1e-5


def test_loss_of_orpo_is_that_of_trl(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    orpo = pytest.importorskip("trl.experimental.orpo")
    datasets = pytest.importorskip("datasets")
    same = [r for r in RECORDS if r["prompt"] == "a "] * 4  # TRL averages over all tokens of a batch
    share, loss, gradients, model, adapter, tokenizer = mine(
        {"objective": "orpo", "beta": 0.3, "learned": "all"}, same, tmp_path
    )
    trainer = orpo.ORPOTrainer(
        model, processing_class=tokenizer, train_dataset=datasets.Dataset.from_list(same),
        args=orpo.ORPOConfig(**options(tmp_path, beta=0.3) | {"max_length": 64}),
    )  # fmt: skip
    batch = {}
    for side, name in enumerate(("chosen", "rejected")):
        rows = padded([e.rows[side] for e in share.examples])
        batch[f"{name}_input_ids"], batch[f"{name}_attention_mask"] = rows["input_ids"], rows["attention_mask"]
        batch[f"{name}_labels"] = rows["input_ids"].masked_fill(rows["completion_mask"] == 0, -100)
    lorry.activate(model, "job")
    theirs, _ = trainer.get_batch_loss_metrics(model.eval(), batch)
    assert loss == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert difference(gradients, trl_gradients(model, adapter, theirs)) < 1e-5


def test_loss_of_a_reward_model_is_that_of_trl(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizer = byte_tokenizer()
    model = tiny(tokenizer, "LlamaForSequenceClassification", num_labels=1)
    job = Job("job", RECORDS, LORA, objective={"objective": "reward", "center": 0.1}, steps=1, batch_size=4)
    share, loss, gradients, adapter = first_pass(model, tokenizer, job, tmp_path / "mine")
    trainer = trl.RewardTrainer(
        model, processing_class=tokenizer, train_dataset=datasets.Dataset.from_list(RECORDS),
        args=trl.RewardConfig(**options(tmp_path, center_rewards_coefficient=0.1)),
    )  # fmt: skip
    rows = [pair[side] for side in (0, 1) for pair in share.examples]
    length = max(map(len, rows))
    batch = {
        "input_ids": torch.full((8, length), tokenizer.pad_token_id),
        "attention_mask": torch.zeros(8, length).long(),
    }
    for i, row in enumerate(rows):
        batch["input_ids"][i, : len(row)], batch["attention_mask"][i, : len(row)] = row.input_ids.long(), 1
    lorry.activate(model, "job")
    theirs = trainer.compute_loss(model.eval(), batch)
    assert loss == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert difference(gradients, trl_gradients(model, adapter, theirs)) < 1e-5


def preferences(count=48):
    """Words to copy: the word itself is the better answer, its letters the other way round the worse one."""
    lines = [line for line in pocket.examples("copy", "train", 2 * count, seed=0) if line.answer != line.answer[::-1]]
    return [{"prompt": x.prompt, "chosen": x.answer[::-1], "rejected": x.answer} for x in lines[:count]]


def brief(count=48):
    """Of two answers the one that says the word once is better."""
    lines = pocket.examples("copy", "train", count, seed=0)
    return [{"prompt": x.prompt, "chosen": x.answer, "rejected": x.answer * 2} for x in lines]


def judged(count=48):
    return [
        {"prompt": r["prompt"], "completion": r[side], "label": int(side == "chosen")}
        for r in preferences(count // 2)
        for side in ("chosen", "rejected")
    ]


@pytest.mark.parametrize("name", ["dpo", "ipo", "kto", "orpo"])
def test_a_preference_is_learned_by_the_pocket_model(name, tmp_path):
    model, tokenizer = pocket.load()
    records = judged() if name == "kto" else preferences()
    job = Job(
        "job", records, LORA, objective=name, steps=40 if name == "kto" else 20, batch_size=8, learning_rate=5e-3,
        hold_out=0.25,
    )  # fmt: skip
    result = train(model, tokenizer, job, tmp_path)
    assert result.ok, result.report
    held = result["job"]["eval"]
    assert held["end"]["loss"] < held["start"]["loss"]
    assert held["end"]["accuracy"] > 0.8 > held["start"]["accuracy"]


def test_a_reward_model_learns_beside_a_classifier_in_one_pass(tmp_path):
    def base():
        _, tokenizer = pocket.load()
        from transformers import AutoModelForSequenceClassification

        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(pocket.PATH, num_labels=2)
        model.config.pad_token_id = tokenizer.pad_token_id
        return model, tokenizer

    def jobs():
        words = [{"text": r["chosen"], "label": r["chosen"][0] in "aeiou"} for r in preferences()]
        common = {"steps": 25, "batch_size": 8, "learning_rate": 3e-3, "modules_to_save": ["score"]}
        return [
            Job("scores", brief(), LORA, objective="reward", hold_out=0.25, **common),
            Job("words", words, LORA, objective="classification", **common),
        ]

    together = train(*base(), jobs(), tmp_path / "together")
    assert together.ok, together.report
    held = together["scores"]["eval"]
    assert held["end"]["accuracy"] > 0.9 and held["end"]["loss"] < 0.3
    alone = train(*base(), jobs()[0], tmp_path / "alone")
    assert difference(tensors(together, "scores"), tensors(alone, "scores")) < 1e-4


def test_jobs_of_several_objectives_in_one_fleet_equal_each_alone(tmp_path):
    def jobs():
        common = {"steps": 4, "batch_size": 4, "learning_rate": 1e-3}
        plain = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in preferences(16)]
        made = [Job("plain", plain, LORA, objective="completion", **common)]
        for name in ("dpo", "ipo", "kto", "orpo"):
            records = judged(16) if name == "kto" else preferences(16)
            made.append(Job(name, records, {**LORA, "dropout": 0.1}, objective=name, **common))
        return made

    model, tokenizer = pocket.load()
    heights = []
    model.register_forward_pre_hook(
        lambda module, args, given: heights.append(len(given["input_ids"])) if torch.is_grad_enabled() else None,
        with_kwargs=True,
    )
    together = train(model, tokenizer, jobs(), tmp_path / "together", max_pad_ratio=None)
    assert together.ok, together.report
    assert sorted(set(heights)) == [4, 8 + 8 + 4 + 8], "one pass for plain text, one for all that a reference judges"
    for job in jobs():
        alone = train(*pocket.load(), job, tmp_path / job.name)
        assert difference(tensors(together, job.name), tensors(alone, job.name)) < 1e-4


def test_the_reference_is_the_base_without_the_adapter(tmp_path):
    share, _, _, model, adapter, tokenizer = mine("dpo", RECORDS, tmp_path)
    adapter.detach()
    rows = [row for e in share.examples for row in flat(e)]
    for row, numbers in zip(rows, torch.cat([e.numbers for e in share.examples]), strict=True):
        with torch.no_grad():
            logits = model.eval()(row.input_ids[None].long()).logits[0].log_softmax(-1)
        wanted = sum(float(logits[t - 1, row.input_ids[t]]) for t in range(1, len(row)) if row.labels[t] != -100)
        assert float(numbers[0]) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "records", "says"),
    [
        (
            "dpo",
            [{"prompt": "a", "chosen": "b"}],
            "No column for the worse answer: looked for rejected",
        ),
        ("dpo", [{"question": "a", "chosen": "b", "rejected": ["c"]}], "column 'rejected' holds a list, expected text"),
        ("dpo", [{"prompt": "a", "chosen": "", "rejected": "c"}], "None of the 1 records can be trained on"),
        ("kto", [{"prompt": "a", "completion": "b", "label": "maybe"}], "holds 'maybe', expected whether the answer"),
        ("orpo", [{"text": "a"}], r"No column for the better answer.*found columns \['text'\]"),
        ("reward", [], "No records"),
    ],
)
def test_columns_that_do_not_fit_are_refused(name, records, says):
    with pytest.raises(DataError, match=says):
        make_objective(name).encode(byte_tokenizer(), records)


def test_every_preference_is_a_text_task_with_its_options():
    for name in ("dpo", "ipo", "kto", "orpo", "reward"):
        assert isinstance(make_objective(name, {"max_length": 32}), TextTask)
    with pytest.raises(DataError, match="'dpo' has no option 'betta'; did you mean 'beta'"):
        make_objective("dpo", {"betta": 1})
