"""Several jobs of few tokens on one base: one joint step of a fleet against PEFT, job after job."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lorry
from lorry.bench._measure import Case, integers, interleaved, lines, llama, machine, ratios, threads
from lorry.bench._registry import register

_JOINT = "lorry, one joint step"


def run(
    rounds: int = 9,
    jobs: int = 8,
    length: int = 32,
    layers: int = 4,
    widths: Sequence[int] | str | int = (128, 256, 512),
    rank: int = 8,
) -> dict[str, Any]:
    """Measure forward, backward, clipping and AdamW of `jobs` jobs with one row of `length` tokens each, at several
    widths of the base (a text is split at commas; 128 is the pocket model's).
    """
    result: dict[str, Any] = {"machine": machine("cpu"), "jobs": jobs, "length": length, "widths": {}}
    with threads(1):
        for width in integers(widths):
            inner = max(64, width * 11 // 4 // 64 * 64)
            seconds = interleaved(_cases(jobs, length, (layers, width, inner), rank), rounds)
            result["widths"][width] = ratios(seconds, _JOINT)
    return result


def _cases(jobs: int, length: int, shape: tuple[int, int, int], rank: int) -> dict[str, Case]:
    tokens = torch.randint(0, 512, (jobs, length), generator=torch.Generator().manual_seed(0))
    names = [f"job{number}" for number in range(jobs)]
    model = llama(*shape).train()
    own = [
        lorry.attach(model, {"method": "lora", "rank": rank}, name=n, seed=i).parameters() for i, n in enumerate(names)
    ]
    peer, theirs = _peft(llama(*shape), names, rank)
    # fused, as Lorry's engine and the Hugging Face Trainer have it
    adam = partial(torch.optim.AdamW, lr=1e-4, fused=True)
    optimizers = {side: [adam(p) for p in all_] for side, all_ in (("l", own), ("p", theirs))}

    def together() -> None:
        with lorry.rows(model, names):
            _loss(model(tokens).logits, tokens).backward()
        for parameters, optimizer in zip(own, optimizers["l"], strict=True):
            _finish(parameters, optimizer)

    def one_after_another() -> None:
        for row, name in enumerate(names):
            peer.set_adapter(name)
            _loss(peer(tokens[row : row + 1]).logits, tokens[row : row + 1]).backward()
            _finish(theirs[row], optimizers["p"][row])

    def base(*batches: Tensor) -> None:
        for batch in batches:
            _bare_step(model, batch)

    return {
        _JOINT: together,
        "peft, job after job": one_after_another,
        "bare base, joint": lambda: base(tokens),
        "bare base, row after row": lambda: base(*tokens.split(1)),
    }


def _peft(model: nn.Module, names: list[str], rank: int) -> tuple[Any, list[list[nn.Parameter]]]:
    """Return PEFT's model with one adapter for each job, and their parameters."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, target_modules="all-linear")
    peer: Any = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        peer.add_adapter(name, config)
    return peer, [[p for n, p in peer.named_parameters() if f".{name}." in n] for name in names]


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
    rows = [
        (width, *(f"{r['ratio']:.2f} ({r['least']:.2f} - {r['most']:.2f})" for n, r in found.items() if n != _JOINT))
        for width, found in result["widths"].items()
    ]
    names = [n for n in next(iter(result["widths"].values())) if n != _JOINT]
    title = f"{result['jobs']} jobs of 1 x {result['length']} tokens, ratio to {_JOINT}, {result['machine']}"
    return lines(title, ("width", *names), rows)


register("fleet", run, table, help=__doc__)
