"""Tiny seeded models of real classes, and the comparisons that the tests of adapter files share."""

import copy
from pathlib import Path

import torch
from torch import nn

import lorry

VOCABULARY = 48
IDS = torch.tensor([[3, 7, 11, 2, 40, 5], [9, 1, 0, 47, 20, 6]])


def llama(seed: int = 0, **changes) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **{**sizes, **changes})).eval()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()


def mixtral(**changes) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(2)
    sizes = dict(
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
    )
    return MixtralForCausalLM(MixtralConfig(vocab_size=VOCABULARY, **{**sizes, **changes})).eval()


def classifier() -> nn.Module:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_labels=3,
        pad_token_id=0,
    )
    return LlamaForSequenceClassification(config).eval()


def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(4)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


class Attention(nn.Module):
    """A model around ``nn.MultiheadAttention``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.out = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.attn(x, x, x)[0])


def output(model: nn.Module) -> torch.Tensor:
    """The model's output on fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad():
        if type(base).__name__ == "UNet2DConditionModel":
            x = torch.randn(2, 4, 8, 8, generator=generator)
            kind = next(base.parameters()).dtype
            text = torch.randn(2, 5, 8, generator=generator).to(kind)
            return model(x.to(kind), torch.tensor([3, 7]), text).sample
        if type(base).__name__ == "Attention":
            return model(torch.randn(2, 5, 16, generator=generator))
        result = model(IDS)
        return result.logits if hasattr(result, "logits") else result.last_hidden_state


def stir(adapter: lorry.Adapter, seed: int = 0) -> lorry.Adapter:
    """Move every trained tensor of an adapter off its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, tensor, spec in adapter.named_tensors():
            if spec.trained:
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return adapter


def stir_peft(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every trained tensor of a PEFT model off its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def peft_folder(base: nn.Module, folder: Path, **config) -> torch.Tensor:
    """Save a stirred adapter of the real PEFT's; return its output."""
    from peft import LoraConfig, get_peft_model

    save = config.pop("save", {})
    model = stir_peft(get_peft_model(copy.deepcopy(base), LoraConfig(**config)))
    model.save_pretrained(str(folder), **save)
    return output(model)


def through_peft(base: nn.Module, folder: Path) -> torch.Tensor:
    """The output of the base with a folder loaded by the real PEFT; every tensor must have been found."""
    from peft import PeftModel
    from safetensors import safe_open

    model = PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
    with safe_open(str(folder / "adapter_model.safetensors"), "pt") as file:
        wanted = set(file.keys())
    from peft import get_peft_model_state_dict

    assert set(get_peft_model_state_dict(model, save_embedding_layers=False)) == wanted
    return output(model)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Assert that two outputs agree."""
    assert a.shape == b.shape
    difference = float((a - b).detach().abs().max())
    assert difference <= tolerance, difference
