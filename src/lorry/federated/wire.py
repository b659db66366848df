"""Messages between server and clients: tensors and plain facts in one safetensors blob, checked before it is used.

A blob is read by safetensors alone, so nothing in it can run; names, shapes and types of the tensors must be those
that the reader expects, and every number must be finite.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorry.core.errors import CheckpointError, some

_KEY = "lorry_federated"
#: Most bytes of the facts of a message; a header that claims more is refused before it is parsed.
_MOST_FACTS = 16 * 2**20


def pack(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> bytes:
    """Return a message of tensors and of facts that JSON can hold."""
    from safetensors.torch import save

    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return save(whole, metadata={_KEY: json.dumps(dict(facts), allow_nan=False)})


def unpack(blob: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the facts of a message.

    Raises
    ------
    CheckpointError
        It is no message of `pack`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        (length,) = struct.unpack("<Q", blob[:8])
        if length > min(len(blob), _MOST_FACTS):
            raise ValueError(f"its header claims {length} bytes")
        facts = json.loads(json.loads(blob[8 : 8 + length])["__metadata__"][_KEY])
        tensors = load(blob)
    except (SafetensorError, struct.error, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"A federated message of {len(blob)} bytes cannot be read ({error}). Run the same version of Lorry at the "
            "server and at every client."
        ) from error
    if not isinstance(facts, dict):
        raise CheckpointError("The facts of a federated message must be a mapping.")
    return tensors, facts


def check(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], whose: str) -> None:
    """Raise `CheckpointError` unless the tensors have exactly these names and shapes, float32, and finite values."""
    missing, surplus = [n for n in shapes if n not in tensors], [n for n in tensors if n not in shapes]
    if missing or surplus:
        raise CheckpointError(
            f"{whose} sent other tensors than expected: missing {some(missing) or 'none'}, surplus "
            f"{some(surplus) or 'none'}. Use one run file, with the same method, targets and freeze, everywhere."
        )
    for name, shape in shapes.items():
        found = tensors[name]
        if tuple(found.shape) != tuple(shape) or found.dtype != torch.float32:
            raise CheckpointError(
                f"{whose} sent '{name}' as {tuple(found.shape)} {found.dtype}, expected {tuple(shape)} torch.float32. "
                "Use the same rank, or an aggregation that takes several (stack, svd)."
            )
        if not bool(torch.isfinite(found).all()):
            raise CheckpointError(f"{whose} sent '{name}' with values that are not finite; lower its learning rate.")


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes of the tensors' values."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of names, shapes and bytes of tensors, 32 hexadecimal digits."""
    state = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        plain = tensors[name].detach().cpu().contiguous()
        state.update(f"{name}{plain.dtype}{tuple(plain.shape)}".encode())
        state.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()
