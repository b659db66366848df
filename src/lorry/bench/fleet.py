"""Several jobs of few tokens on one base: one joint step of a fleet against PEFT, job after job."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import lorry
from lorry.bench._measure import interleaved, llama, machine, ratio_table, ratios, threads


def run(
    rounds: int = 9,
    jobs: int = 8,
    length: int = 32,
    layers: int = 4,
    hidden: int = 512,
    inner: int = 1408,
    rank: int = 8,
) -> dict[str, Any]:
    """Measure forward, backward, clipping and AdamW of `jobs` jobs with one row of `length` tokens each."""
    from peft import LoraConfig, get_peft_model

    tokens = torch.randint(0, 512, (jobs, length), generator=torch.Generator().manual_seed(0))
    names = [f"job{number}" for number in range(jobs)]
    model = llama(layers, hidden, inner).train()
    own = [
        lorry.attach(model, {"method": "lora", "rank": rank}, name=n, seed=i).parameters() for i, n in enumerate(names)
    ]
    config = LoraConfig(r=rank, target_modules="all-linear")
    peer: Any = get_peft_model(llama(layers, hidden, inner), config, adapter_name=names[0])
    for name in names[1:]:
        peer.add_adapter(name, config)
    theirs = [[p for n, p in peer.named_parameters() if f".{name}." in n] for name in names]
    optimizers = {"lorry": [torch.optim.AdamW(p, lr=1e-4) for p in own]}
    optimizers["peft"] = [torch.optim.AdamW(p, lr=1e-4) for p in theirs]

    def together() -> None:
        with lorry.rows(model, names):
            _loss(model(tokens).logits, tokens).backward()
        for parameters, optimizer in zip(own, optimizers["lorry"], strict=True):
            _finish(parameters, optimizer)

    def one_after_another() -> None:
        for row, name in enumerate(names):
            peer.set_adapter(name)
            _loss(peer(tokens[row : row + 1]).logits, tokens[row : row + 1]).backward()
            _finish(theirs[row], optimizers["peft"][row])

    def base(*batches: Tensor) -> None:
        for batch in batches:
            _bare_step(model, batch)

    cases = {
        "lorry, one joint step": together,
        "peft, job after job": one_after_another,
        "bare base, joint": lambda: base(tokens),
        "bare base, row after row": lambda: base(*tokens.split(1)),
    }
    with threads(1):
        seconds = interleaved(cases, rounds)
        result = ratios(seconds, "lorry, one joint step")
    return {"machine": machine("cpu"), "jobs": jobs, "length": length, "ratios": result}


def _bare_step(model: nn.Module, batch: Tensor) -> None:
    """Run the frozen base forward, and backward for its activations alone."""
    with lorry.rows(model, [None] * len(batch)):
        embedded = model.get_input_embeddings()(batch).requires_grad_(True)  # type: ignore[operator]
        _loss(model(inputs_embeds=embedded).logits, batch).backward()


def _loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the sum of the rows' own mean losses, as a fleet computes it."""
    each = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    return each.mean(1).sum()


def _finish(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def table(result: dict[str, Any]) -> Any:
    """Return the ratios."""
    title = f"{result['jobs']} jobs of 1 x {result['length']} tokens, {result['machine']}"
    return ratio_table(title, result["ratios"], "lorry's joint step")
