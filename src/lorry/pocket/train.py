"""Train the pocket model from text that the world writes: ``python -m lorry.pocket.train --out DIR``.

The same arguments give the same weights on the same machine, torch version and thread count; elsewhere
they agree in what they can do (see :func:`lorry.pocket.exact_match`), not in every bit.
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .evaluate import exact_match
from .tokenizer import IGNORED, batch, build
from .world import Example, examples, skills

#: The prompt's own letters are random, so learning to predict them is worth little, but not nothing.
PROMPT_WEIGHT = 0.1
WARMUP = 100
#: Skills that need more lines than the others to reach the same accuracy.
SHARES = {"sort": 3}
#: Batches whose lines are sorted by length together: less padding.
WINDOW = 2
#: Steps between lines of progress where the output is not a terminal.
REPORT = 500


def new_model(vocabulary: int, seed: int) -> Any:
    """An untrained ``LlamaForCausalLM`` of about one million parameters, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        # lines are short: a small base spreads the rotation's frequencies over the places that occur
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        initializer_range=0.06,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def batches(steps: int, rows: int, seed: int) -> Iterator[list[Example]]:
    """Training lines of the base skills in the shares of :data:`SHARES`; lines of like length share a batch."""
    base = skills("base")
    share = math.ceil(steps * rows / sum(SHARES.get(one.name, 1) for one in base))
    lines = [line for one in base for line in examples(one, "train", share * SHARES.get(one.name, 1), seed)]
    rng = random.Random(seed)
    rng.shuffle(lines)
    for start in range(0, steps * rows, WINDOW * rows):
        window = sorted(lines[start : start + WINDOW * rows], key=lambda line: len(line.prompt + line.answer))
        starts = list(range(0, len(window), rows))
        rng.shuffle(starts)
        yield from (window[place : place + rows] for place in starts)


def rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine to a fiftieth of the peak."""
    if step < WARMUP:
        return peak * (step + 1) / WARMUP
    done = (step - WARMUP) / max(1, steps - WARMUP)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def loss_of(model: Any, lines: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy for each token, answers at full weight and prompts at :data:`PROMPT_WEIGHT`."""
    logits = model(input_ids=lines["input_ids"], attention_mask=lines["attention_mask"], use_cache=False).logits
    targets = lines["input_ids"][:, 1:]
    weight = torch.where(lines["labels"][:, 1:] == IGNORED, PROMPT_WEIGHT, 1.0) * lines["attention_mask"][:, 1:]
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none")
    return (losses * weight).sum() / weight.sum()


def train(steps: int = 7000, rows: int = 32, rate: float = 2e-3, seed: int = 0) -> tuple[Any, Any]:
    """Train a pocket model from nothing, on the CPU.

    Parameters
    ----------
    steps
        Optimizer steps.
    rows
        Lines in one batch.
    rate
        Peak learning rate of AdamW.
    seed
        Of the weights, the words and their order.

    Returns
    -------
    tuple
        The model in bfloat16, as it is stored, and its tokenizer.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    tokenizer = build()
    model = new_model(len(tokenizer), seed).train()
    matrices = [one for one in model.parameters() if one.ndim > 1]
    others = [one for one in model.parameters() if one.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    columns = (
        TextColumn("loss {task.fields[loss]:.4f}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("", total=steps, loss=math.nan)
        for step, lines in zip(range(steps), batches(steps, rows, seed), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, steps, rate)
            loss = loss_of(model, batch(tokenizer, lines))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            progress.update(task, advance=1, loss=loss.item())
            if not progress.console.is_terminal and (step + 1) % REPORT == 0:
                print(f"step {step + 1} of {steps}: loss {loss.item():.4f}", flush=True)
    return model.to(torch.bfloat16).eval(), tokenizer


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Write a Hugging Face directory whole: each file is complete before it takes its place."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).iterdir()):
            shutil.move(file, out / file.name)


def main() -> None:
    """Train, save, and print what the saved model can do."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--rows", type=int, default=32, help="lines in one batch")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model, tokenizer = train(given.steps, given.rows, given.rate, given.seed)
    save(model, tokenizer, given.out)
    model = model.float()
    for one in skills():
        share = exact_match(model, tokenizer, examples(one, "test", 200, seed=1))
        print(f"{one.kind:9} {one.name:18} {share:6.1%}")


if __name__ == "__main__":
    main()
