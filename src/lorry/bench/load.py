"""Loading one adapter with 1, 10 and 100 already there, against reading the file and copying its tensors, and PEFT."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lorry
from lorry.bench._measure import interleaved, lines, llama, machine, threads


def run(
    rounds: int = 9,
    layers: int = 24,
    hidden: int = 64,
    inner: int = 172,
    rank: int = 8,
    most: int = 100,
    peer: bool = True,
) -> dict[str, Any]:
    """Measure on a Llama of 24 layers (168 sites, 336 tensors)."""
    from safetensors.torch import load_file

    result: dict[str, Any] = {"machine": machine("cpu"), "loaded": {}}
    with tempfile.TemporaryDirectory() as folder, threads(1):
        model, path = llama(layers, hidden, inner), Path(folder) / "one"
        lorry.attach(model, {"method": "lora", "rank": rank}, name="one").save(path)
        lorry.adapters(model)["one"].detach()
        other = _Peft(llama(layers, hidden, inner), path) if peer else None
        lorry.load(model, path, name="kept0")
        for count in (c for c in (1, 10, 100) if c <= most):
            for number in range(len(lorry.adapters(model)), count):
                lorry.load(model, path, name=f"kept{number}")
            cases: dict[str, Any] = {
                "floor": lambda: [t.clone() for t in load_file(path / "adapter_model.safetensors").values()],
                "lorry": lambda: _load(model, path),
            }
            seconds = interleaved(cases, rounds)
            if other is not None:
                other.fill(count)
                seconds["peft"] = interleaved({"peft": other.load}, 2, warm_up=0)["peft"]
            result["loaded"][count] = _summary(seconds)
    return result


def _load(model: nn.Module, path: Path) -> None:
    lorry.load(model, path, name="fresh")
    # unloading is part of the round, so that the next one finds the same number of adapters
    lorry.adapters(model)["fresh"].detach()


class _Peft:
    def __init__(self, model: nn.Module, path: Path) -> None:
        from peft import PeftModel

        self.path, self.count = str(path), 1
        self.model: Any = PeftModel.from_pretrained(model, self.path, adapter_name="kept0")

    def fill(self, count: int) -> None:
        while self.count < count:
            self.model.load_adapter(self.path, f"kept{self.count}")
            self.count += 1

    def load(self) -> None:
        self.model.load_adapter(self.path, f"kept{self.count}")
        self.count += 1


def _summary(seconds: dict[str, list[float]]) -> dict[str, float]:
    middle = {name: float(torch.tensor(values).median()) for name, values in seconds.items()}
    return {name: value / middle["floor"] for name, value in middle.items()}


def table(result: dict[str, Any]) -> Any:
    """Return the ratios to the floor."""
    rows = [(str(n), r["lorry"], r.get("peft", float("nan"))) for n, r in result["loaded"].items()]
    title = f"Loading one adapter, ratio to read + copy; Lorry's round unloads it again. {result['machine']}"
    return lines(title, ("already loaded", "lorry", "peft"), rows)
