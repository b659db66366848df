"""A training step of a language model, for benches."""

from __future__ import annotations

from torch import Tensor, nn


def frozen(model: nn.Module) -> nn.Module:
    """Freeze a model whose activations still pass gradients from the first layer on."""
    model.requires_grad_(False)
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    return model


def step(model: nn.Module, tokens: Tensor, keep: bool = False) -> None:
    """Run forward and backward on the model's own loss; gradients are dropped unless they are to be kept."""
    model(tokens, labels=tokens).loss.backward()
    if not keep:
        for parameter in model.parameters():
            parameter.grad = None
