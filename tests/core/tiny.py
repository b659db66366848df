"""Tiny models of real classes, seeded, for all tests of the core."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import lorry


def llama(
    layers: int = 2, *, seed: int = 0, tied: bool = False, dtype: torch.dtype = torch.float32, **more: Any
) -> Any:
    """A LlamaForCausalLM of a few thousand parameters, in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    values = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 50,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **more,
    }
    torch.manual_seed(seed)
    config = LlamaConfig(num_hidden_layers=layers, tie_word_embeddings=tied, **values)
    return LlamaForCausalLM(config).to(dtype).eval()


def tokens(rows: int = 3, length: int = 7, *, vocabulary: int = 50, seed: int = 1) -> Tensor:
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def off_zero(adapter: lorry.Adapter, seed: int = 5, std: float = 0.05) -> lorry.Adapter:
    """Move every trained tensor off its start, so that the adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, tensor, spec in adapter.named_tensors():
            if spec.trained and tensor.is_floating_point():
                noise = torch.empty(tensor.shape).normal_(0, std, generator=generator)
                tensor.add_(noise.to(tensor.dtype))
    return adapter


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all base tensors by state-dict key."""
    return {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    """Whether the state dict has the same keys and, byte for byte, the same values."""
    now = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    return now.keys() == before.keys() and all(same_bytes(now[k], before[k]) for k in before)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a, b))


def gradients(adapter: lorry.Adapter) -> dict[str, Tensor]:
    """Copies of the gradients of an adapter's parameters; a missing one is an error."""
    found = {}
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    return found


def clear(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def close(a: Tensor, b: Tensor) -> None:
    """Check that two results in float64 are one, up to rounding."""
    torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)


def unet(widths: tuple[int, int] = (8, 16), *, cross: int = 12, head: int = 4, seed: int = 0) -> Any:
    """Return diffusers' real U-Net with cross-attention at its first depth, in evaluation."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=cross,
        attention_head_dim=head,
        norm_num_groups=widths[0] // 2,
    ).eval()
