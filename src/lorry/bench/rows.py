"""A batch whose rows use different adapters, decoding and prefilling, against the bare base and PEFT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lorry
from lorry.bench._crowd import off_zero
from lorry.bench._measure import interleaved, llama, machine, ratio_table, ratios, threads
from lorry.bench._registry import register


def run(
    rounds: int = 7,
    layers: int = 4,
    hidden: int = 512,
    inner: int = 1408,
    batch: int = 32,
    steps: int = 24,
    prefill: int = 64,
    rank: int = 8,
    dtype: str = "float32",
    device: str = "cpu",
    peer: bool = True,
) -> dict[str, Any]:
    """Measure `steps` tokens of decoding with a key-value cache, and one prefill of `prefill` tokens, for 1 to `batch`
    adapters.
    """
    kind = getattr(torch, dtype)
    model = llama(layers, hidden, inner).to(device, kind).eval()
    for number in range(batch):
        adapter = lorry.attach(model, {"method": "lora", "rank": rank}, name=f"a{number}", seed=number, activate=False)
        off_zero(adapter.parameters(), number)
        adapter.train(False)
    other = _peft(llama(layers, hidden, inner).to(device, kind).eval(), batch, rank) if peer else None
    torch.manual_seed(0)
    prompt = torch.randint(0, 512, (batch, prefill), device=device)
    counts = [c for c in (1, 4, 16, 32) if c <= batch]
    result: dict[str, Any] = {"machine": machine(device), "dtype": dtype, "batch": batch}
    with threads(1), torch.no_grad():
        for phase in ("decode", "prefill"):
            cases: dict[str, Callable[[], object]] = {"base": _case(model, None, phase, prompt, steps)}
            for count in counts:
                names = [f"a{row * count // batch}" for row in range(batch)]
                cases[f"{count} adapters"] = _case(model, names, phase, prompt, steps)
                if other is not None:
                    cases[f"peft {count} adapters"] = _peft_case(other, names, phase, prompt, steps)
            result[phase] = ratios(interleaved(cases, rounds, device, warm_up=1), "base")
    return result


def _decode(call: Callable[..., Any], prompt: Tensor, steps: int) -> None:
    from transformers import DynamicCache

    cache = DynamicCache()
    token = prompt[:, :1]
    for _ in range(steps):
        token = call(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)


def _work(call: Callable[..., Any], phase: str, prompt: Tensor, steps: int) -> None:
    if phase == "decode":
        _decode(call, prompt, steps)
    else:
        call(input_ids=prompt)


def _case(model: nn.Module, names: list[str] | None, phase: str, prompt: Tensor, steps: int) -> Callable[[], object]:
    def run_case() -> None:
        if names is None:
            lorry.activate(model, None)
            _work(model, phase, prompt, steps)
            return
        with lorry.rows(model, names):
            _work(model, phase, prompt, steps)

    return run_case


def _peft(model: nn.Module, count: int, rank: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)
    wrapped = get_peft_model(model, config, adapter_name="a0")
    for number in range(1, count):
        wrapped.add_adapter(f"a{number}", config)
    return wrapped.eval()


def _peft_case(model: nn.Module, names: list[str], phase: str, prompt: Tensor, steps: int) -> Callable[[], object]:
    def call(**inputs: Any) -> Any:
        return model(**inputs, adapter_names=names)

    return lambda: _work(call, phase, prompt, steps)


def table(result: dict[str, Any]) -> Any:
    """Return both phases as rich tables."""
    from rich.console import Group

    title = f"batch of {result['batch']}, {result['dtype']}, {result['machine']}"
    return Group(*(ratio_table(f"{phase}, {title}", result[phase], "base") for phase in ("decode", "prefill")))


register("rows", run, table, help=__doc__)
