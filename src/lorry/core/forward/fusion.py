"""PyTorch's fused evaluation of encoder layers, which reads the weights of adapted layers without calling them."""

from __future__ import annotations

from typing import Any

from torch import nn

#: Attributes by which PyTorch's encoder decides for its fused evaluation, with values that rule it out.
_FUSION: tuple[tuple[type[nn.Module], str, Any], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)


def without_fusion(root: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Keep PyTorch's encoder layers from evaluating with the weights of adapted layers without calling these layers.

    Returns
    -------
    list
        Module, attribute and value to give back with the last adapter.
    """
    changed = []
    for module in root.modules():
        for cls, name, value in _FUSION:
            before = module.__dict__.get(name) if isinstance(module, cls) else None
            if before and any("_lorry_link" in m.__dict__ for m in module.modules()):
                changed.append((module, name, before))
                module.__dict__[name] = value
    return changed
