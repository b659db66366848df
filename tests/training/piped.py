"""What each process does in the tests of pipelines; see `forking`."""

import json
import shutil
from pathlib import Path

import torch
from training.tiny_bases import token_rows
from transformers import LlamaConfig, LlamaForCausalLM

from lorry.training import Fleet, Job
from lorry.training.pipelined import PipelinedRounds
from lorry.training.processes import join

PLAN = {"planner": "lorafusion", "capacity": 60, "steps": 3}


def base():
    """A Llama of five blocks, tied embeddings, in float64."""
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).double()


def jobs():
    """Different methods, optimizers, lengths, and sizes of batches; one is evaluated, one has no adapters early on."""
    made = {
        "a": dict(data=token_rows(16, (5, 40), 5), optimizer="sgd", learning_rate=0.3, batch_size=3),
        "b": dict(data=token_rows(16, (3, 12), 6), method="dora", rank=2, batch_size=2, gradient_accumulation_steps=2),
        "c": dict(
            data=token_rows(16, (3, 30), 7),
            method="rslora",
            batch_size=2,
            eval_data=token_rows(5, (3, 20), 8),
            eval_every=2,
            keep_best=True,
        ),
        "d": dict(data=token_rows(16, (3, 30), 9), batch_size=2, layers=[3, 4], max_grad_norm=0.01),
    }
    common = {"dtype": "float64", "rank": 2, "steps": 5, "targets": "all-linear"}
    return [Job.from_dict({"name": n, "seed": i, **common, **made[n]}) for i, n in enumerate(made)]


def _counted() -> list[int]:
    """Count the micro-batches that are in flight in this stage after each forward pass."""
    counts, forth, back = [0], PipelinedRounds._forth, PipelinedRounds._back

    def counting(rounds, *args):
        counts.append(counts[-1] + 1)
        return forth(rounds, *args)

    def ending(rounds, flight):
        counts.append(counts[-1] - 1)
        back(rounds, flight)

    PipelinedRounds._forth, PipelinedRounds._back = counting, ending
    return counts


def worker(folder: Path) -> None:
    processes = join()
    how = {"processes": processes, "planner": PLAN, "pipeline": {"stages": processes.size}}
    counted = _counted()
    fleet = Fleet(base(), None, jobs(), folder / "whole", checkpoint_every=1, keep_checkpoints=99, **how)
    blocks = fleet.model.model.layers
    held = [i for i, block in enumerate(blocks) if block.mlp.up_proj.weight.numel()]
    found = {"blocks": held, "embedding": fleet.model.model.embed_tokens.weight.numel() > 0}
    plan = fleet.planner.rules.stages
    fleet.train()
    found["flights"] = max(counted)

    if processes.first:  # as if it had been killed after the first round
        shutil.copytree(folder / "whole", folder / "resumed")
        for path in sorted((folder / "resumed" / "checkpoints").iterdir())[1:]:
            shutil.rmtree(path)
    gathered = [processes.told(found, rank) for rank in range(processes.size)]
    if processes.size == 2:
        Fleet(base(), None, jobs(), folder / "resumed", resume=True, **how).train()
    if processes.first:
        (folder / "found.json").write_text(json.dumps({"stages": plan, "held": gathered}))
    processes.leave()
