"""Which parts of a model compute each token from those before it alone, so that nothing there may look ahead."""

from __future__ import annotations

from torch import nn


def generates(root: nn.Module, path: str) -> bool:
    """Return whether `path` lies in the part of a language model that gives the next token.

    It is told by what transformers' models say of themselves (``can_generate``, ``get_decoder``); of other modules
    nothing is known, and the answer is no. Encoders and towers beside the decoder read their whole input at once.
    """
    asked = getattr(root, "can_generate", None)
    if not (callable(asked) and asked()):
        return False
    inner, module = root, root
    for name in path.split("."):
        module = getattr(module, name, module)
        if isinstance(module, nn.Module) and callable(getattr(module, "can_generate", None)):
            inner = module
    find = getattr(root, "get_decoder", None)
    decoder = find() if callable(find) else None
    if inner is root or not isinstance(decoder, nn.Module):
        return True
    return any(m is decoder for m in inner.modules()) or any(m is inner for m in decoder.modules())
