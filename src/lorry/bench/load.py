"""Loading one adapter with 1, 10 and 100 already there, against reading the file and copying its tensors, and PEFT."""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

import lorry
from lorry.bench._crowd import Crowd, counts
from lorry.bench._measure import interleaved, lines, machine, threads
from lorry.bench._registry import register


def run(
    rounds: int = 9,
    layers: int = 24,
    hidden: int = 64,
    inner: int = 172,
    rank: int = 8,
    most: int = 100,
    peer: bool = True,
    peer_most: int = 10,
) -> dict[str, Any]:
    """Measure on a Llama of 24 layers (168 sites, 336 tensors), PEFT with up to `peer_most` adapters.

    Before PEFT's 100th adapter lie minutes of attaching the others.
    """
    from safetensors.torch import load_file

    result: dict[str, Any] = {"machine": machine("cpu"), "loaded": {}}
    crowd = Crowd(layers, hidden, inner, rank)
    with tempfile.TemporaryDirectory() as folder, threads(1):
        path = Path(folder) / "one"
        crowd.fill(1)
        lorry.adapters(crowd.model)["a0"].save(path)
        for count in counts(most):
            crowd.fill(count)
            cases: dict[str, Any] = {
                "floor": lambda: [t.clone() for t in load_file(path / "adapter_model.safetensors").values()],
                "lorry": lambda: _load(crowd.model, path),
            }
            seconds = interleaved(cases, rounds)
            if peer and count <= peer_most:
                seconds |= interleaved({"peft": partial(_peft_load, crowd.peer(count), path)}, 2, warm_up=1)
            middle = {name: statistics.median(values) for name, values in seconds.items()}
            result["loaded"][count] = {name: value / middle["floor"] for name, value in middle.items()}
    return result


def _load(model: nn.Module, path: Path) -> None:
    lorry.load(model, path, name="fresh")
    # unloading is part of the round, so that the next one finds the same number of adapters
    lorry.adapters(model)["fresh"].detach()


def _peft_load(model: Any, path: Path) -> None:
    model.load_adapter(str(path), "fresh")
    model.delete_adapter("fresh")


def table(result: dict[str, Any]) -> Any:
    """Return the ratios to the floor."""
    rows = [(str(n), r["lorry"], r.get("peft", "-")) for n, r in result["loaded"].items()]
    title = f"Loading one adapter and unloading it again, ratio to read + copy. {result['machine']}"
    return lines(title, ("already loaded", "lorry", "peft"), rows)


register("load", run, table, help=__doc__)
