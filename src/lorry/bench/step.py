"""One training step, forward and backward, against the floor (a frozen base that passes activation gradients) and
PEFT.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

import lorry
from lorry.bench._cases import options, targets
from lorry.bench._count import kept
from lorry.bench._measure import interleaved, llama, machine, ratio_table, ratios, threads
from lorry.bench._registry import register
from lorry.bench._step import frozen, step


def run(
    method: str | None = None,
    rounds: int = 7,
    layers: int = 4,
    hidden: int = 512,
    inner: int = 1408,
    batch: int = 2,
    length: int = 256,
    rank: int = 8,
    dtype: str = "float32",
    device: str = "cpu",
    peer: bool = True,
) -> dict[str, Any]:
    """Measure time and kept activations of LoRA with and without dropout and of DoRA, or of one `method` beside LoRA.

    ``kept`` is the memory of distinct tensors that the graph holds after the forward pass, in MB; parameters do not
    count.
    """
    kind = getattr(torch, dtype)
    torch.manual_seed(0)
    tokens = torch.randint(0, 512, (batch, length), device=device)

    def base() -> nn.Module:
        return llama(layers, hidden, inner).to(device, kind).train()

    models = {"floor": frozen(base())}
    wanted: dict[str, Any] = {"lora": {"method": "lora", "rank": rank}}
    if method is None:
        wanted["lora dropout"] = {"method": "lora", "rank": rank, "dropout": 0.05}
        wanted["dora"] = {"method": "dora", "rank": rank}
        wanted["dora dropout"] = {"method": "dora", "rank": rank, "dropout": 0.05}
    elif method != "lora":
        wanted[method] = options(method, rank)
    for name, values in wanted.items():
        models[name] = base()
        lorry.attach(models[name], values, targets=targets(values["method"]))
    if peer:
        models.update(_peers(base, rank, method is None))
    with threads(1):
        seconds = interleaved({n: partial(step, m, tokens) for n, m in models.items()}, rounds, device)
        held = {n: kept(m, partial(step, m, tokens)) / 1e6 for n, m in models.items()}
        return {
            "machine": machine(device),
            "dtype": dtype,
            "tokens": batch * length,
            "ratios": ratios(seconds, "floor"),
            "kept_mb": held,
        }


def _peers(base: Any, rank: int, everything: bool) -> dict[str, nn.Module]:
    from peft import LoraConfig, get_peft_model

    def wrapped(**options: Any) -> nn.Module:
        return get_peft_model(base(), LoraConfig(r=rank, target_modules="all-linear", **options)).train()

    peers = {"peft lora": wrapped()}
    if everything:
        peers["peft lora dropout"] = wrapped(lora_dropout=0.05)
        peers["peft dora"] = wrapped(use_dora=True)
        peers["peft dora dropout"] = wrapped(use_dora=True, lora_dropout=0.05)
    return peers


def table(result: dict[str, Any]) -> Any:
    """Return the ratios as a rich table."""
    rows = {f"{name} ({result['kept_mb'][name]:.0f} MB kept)": values for name, values in result["ratios"].items()}
    return ratio_table(f"Training step, {result['dtype']}, {result['machine']}", rows, "floor")


register("step", run, table, help=__doc__)
