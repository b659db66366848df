"""Two jobs at once on one real language model: Shakespeare for one adapter, questions and answers for the other.

The base is stories260K (karpathy/tinyllamas), a Llama of 260 thousand parameters that has read children's stories
only. Both held-out losses of each adapter are measured before and after: its own must fall, and the other job must not
move it. Run as

    python examples/two_texts.py --base ../shared/models/stories260k --data ../shared/data --out out/two-texts
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorry
from lorry.training import train

FILES = {"shakespeare": "tinyshakespeare.txt", "boolq": "boolq_train.json"}


def job(name: str, source: Path, steps: int) -> dict:
    """Describe a job; a tenth of the text is held out."""
    objective = "completion" if source.suffix == ".json" else "causal"
    return {
        "name": name,
        "method": {"method": "lora", "rank": 8, "dropout": 0.05},
        "data": {"path": str(source), "split": "[:90%]"},
        "eval_data": {"path": str(source), "split": "[99%:]"},
        "objective": objective,
        "max_length": 256,
        "steps": steps,
        "batch_size": 8,
        "rate": 3e-3,
        "schedule": "cosine",
    }


def main() -> None:
    """Train both at once and each alone, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder of stories260K in Hugging Face's format")
    parser.add_argument("--data", type=Path, required=True, help="folder with tinyshakespeare.txt and boolq_train.json")
    parser.add_argument("--out", type=Path, default=Path("out/two-texts"))
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()

    def fresh():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_pretrained(args.base), AutoTokenizer.from_pretrained(args.base)

    both = [job(name, args.data / file, args.steps) for name, file in FILES.items()]
    together = train(*fresh(), both, args.out / "together", overwrite=True)
    summary = {j["name"]: {"eval": j.get("eval")} for j in together.report["jobs"]}
    for values in both:
        alone = train(*fresh(), [values], args.out / f"alone-{values['name']}", overwrite=True)
        mine, other = ({k: t for k, t, _ in r.adapters[values["name"]].named_tensors()} for r in (alone, together))
        summary[values["name"]]["largest difference to training alone"] = max(
            float((mine[key] - other[key]).abs().max()) for key in mine
        )
    print(json.dumps(summary, indent=2))
    print(f"{lorry.__version__}: curves in {args.out / 'together'}")


if __name__ == "__main__":
    main()
