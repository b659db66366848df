"""How much each image token of a transformer block stands out, told to what runs inside the block."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

#: A thread runs one block at a time; a recomputation in a backward pass runs the block's hooks again, in its thread.
_INSIDE = threading.local()


def saliency(tokens: Tensor) -> Tensor:
    """Return ``sigmoid((‖E_n‖ - μ) / σ)`` of tokens ``(rows, tokens, width)`` as ``(rows, tokens)`` in (0, 1).

    Mean and standard deviation are those of the norms of a row's tokens; equal norms give 1/2. No gradient flows
    through it. (arXiv 2511.15258, visual-gated adaptation.)
    """
    exact = torch.promote_types(tokens.dtype, torch.float32)
    norms = torch.linalg.vector_norm(tokens.detach(), dim=-1, dtype=exact)
    apart = norms - norms.mean(-1, keepdim=True)
    deviation = norms.std(-1, keepdim=True, unbiased=False)
    # norms that are equal but for rounding say nothing
    known = deviation > norms.mean(-1, keepdim=True) * torch.finfo(exact).eps * 16
    return torch.where(known, apart / deviation, 0.0).sigmoid()


@contextmanager
def gated(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Let each of these blocks tell its layers the gate of every token while the context lasts.

    A block is called with image tokens ``hidden_states`` and text tokens ``encoder_hidden_states``, each ``(rows,
    tokens, width)``, which its layers see one after another, text first; text has gate 1.
    """
    with ExitStack() as stack:
        for block in blocks:
            entering = block.register_forward_pre_hook(_enter, with_kwargs=True)
            stack.callback(entering.remove)
            stack.callback(block.register_forward_hook(_leave, always_call=True).remove)
        yield


def gate_here() -> Tensor | None:
    """Return the gates ``(rows, tokens)`` of the gated block that runs now; None outside of one."""
    found: Tensor | None = getattr(_INSIDE, "gate", None)
    return found


def _enter(block: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    given = dict(zip(("hidden_states", "encoder_hidden_states"), arguments, strict=False)) | named
    gate = saliency(given["hidden_states"])
    text = given["encoder_hidden_states"]
    _INSIDE.gate = torch.cat([gate.new_ones(text.shape[:2]), gate], 1)


def _leave(block: nn.Module, arguments: Any, output: Any) -> None:
    _INSIDE.gate = None
