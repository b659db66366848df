"""How far a plain LoRA (peft) takes the pocket model on each skill it was not trained on.

``python tools/pocket_trial.py [SKILL ...]`` prints the Markdown table of docs/pocket.md: exact match on 200
test words before, and after each number of steps of 32 rows with rank 8 on all linears, AdamW, constant rate.
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig, get_peft_model

from lorry import pocket

ROWS = 32


def trial(skill: pocket.Skill, marks: list[int], rate: float, seed: int) -> list[float]:
    """Exact match before training and after each mark's number of steps."""
    model, tokenizer = pocket.load()
    held_back = pocket.examples(skill, "test", 200, seed=seed)
    scores = [pocket.exact_match(model, tokenizer, held_back)]
    torch.manual_seed(seed)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    lines = pocket.examples(skill, "train", max(marks) * ROWS, seed=seed)
    for step in range(max(marks)):
        rows = pocket.batch(tokenizer, lines[step * ROWS : (step + 1) * ROWS])
        loss = model(**rows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step + 1 in marks:
            scores.append(pocket.exact_match(model, tokenizer, held_back))
    return scores


def main() -> None:
    """Print the table, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("skills", nargs="*", help="names; default: every held-out and two-part skill")
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 200])
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [pocket.skill(name) for name in given.skills]
    chosen = chosen or [*pocket.skills("held-out"), *pocket.skills("two-part")]
    print("| skill | example | base |", " | ".join(f"{mark} steps" for mark in given.steps), "|")
    print("|---|---|---:|" + "---:|" * len(given.steps))
    for skill in chosen:
        scores = trial(skill, given.steps, given.rate, given.seed)
        word = pocket.examples(skill, "train", 1, seed=7)[0]
        cells = " | ".join(f"{score:.1%}" for score in scores)
        print(f"| {skill.name} | `{word.prompt}{word.answer}` | {cells} |", flush=True)


if __name__ == "__main__":
    main()
