"""What each process does in the tests of several processes; see `forking`."""

import json
import shutil
from pathlib import Path

from torch.distributed.tensor import DTensor
from training.tiny_bases import tiny_llama, token_rows

from lorry.training import Fleet, Job
from lorry.training.processes import join

PLAN = {"planner": "lorafusion", "capacity": 90, "steps": 2}


def base():
    return tiny_llama().double()


def jobs(steps=6):
    """Different methods, optimizers, and sizes of batches; one whose tensors all sites share, and one that fails."""
    made = {
        "long": dict(
            data=token_rows(20, (5, 30), 1),
            eval_data=token_rows(5, (5, 30), 4),
            eval_every=2,
            keep_best=True,
            rank=4,
            dynamics=["lora-plus", "lora-mgpo"],
            learning_rate=3e-3,
            batch_size=3,
        ),
        "few": dict(data=token_rows(9, (3, 12), 2), method="dora", rank=2, batch_size=1, gradient_accumulation_steps=3),
        "joint": dict(
            data=token_rows(14, (5, 20), 3), method="uni-lora", optimizer="sgd", learning_rate=2.0, batch_size=4
        ),
    }
    made["wild"] = dict(data=token_rows(14, (5, 20), 6), optimizer="sgd", learning_rate=1e300, batch_size=1)
    common = {"dtype": "float64", "steps": steps, "targets": "all-linear"}
    return [Job.from_dict({"name": n, "seed": i, **common, **made[n]}) for i, n in enumerate(made)]


def planned_jobs():
    """Without what is evaluated, and with an optimizer that shows the size of a gradient."""
    made = {
        "a": dict(data=token_rows(16, (5, 40), 5), optimizer="sgd", learning_rate=0.3, batch_size=3),
        "b": dict(data=token_rows(16, (3, 12), 6), method="dora", rank=2, batch_size=2, gradient_accumulation_steps=2),
        "c": dict(data=token_rows(16, (3, 30), 7), method="rslora", rank=2, batch_size=2),
    }
    common = {"dtype": "float64", "steps": 5, "targets": "all-linear"}
    return [Job.from_dict({"name": n, "seed": i, **common, **made[n]}) for i, n in enumerate(made)]


def worker(folder: Path) -> None:
    processes = join()
    often = {"processes": processes, "checkpoint_every": 1, "keep_checkpoints": 99}
    fleet = Fleet(base(), None, jobs(), folder / "joined", **often)
    weight = fleet.model.model.layers[1].mlp.up_proj.weight
    found = {"spread": isinstance(weight, DTensor), "part": weight.to_local().numel() / weight.numel()}
    found["whole"] = not any(isinstance(p, DTensor) for run in fleet.runs for p in run.adapter.parameters())
    fleet.train()

    if processes.first:  # as if it had been killed after a pass that leaves a step of one job under way
        shutil.copytree(folder / "joined", folder / "resumed")
        kept, *later = sorted((folder / "resumed" / "checkpoints").iterdir())[1:]
        found["under way"] = json.loads((kept / "state.json").read_text())["jobs"]["few"]["progress"]["micro"]
        for path in later:
            shutil.rmtree(path)
    processes.told(None)
    Fleet(base(), None, jobs(), folder / "resumed", processes=processes, resume=True).train()

    Fleet(base(), None, planned_jobs(), folder / "planned", processes=processes, planner=PLAN, shard=False).train()
    if processes.first:
        (folder / "found.json").write_text(json.dumps(found))
    processes.leave()
