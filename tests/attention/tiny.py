"""Tiny models of real classes with a call for each, and an attention of plain float64 operations as a reference."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from core import tiny
from torch import Tensor, nn

LENGTH = 9
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IDS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tokens(rows: int = 2, length: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randint(3, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def causal_model(family: str, implementation: str = "sdpa", **more: Any) -> Any:
    """A causal language model: llama, mistral and gemma3 (sliding window 4), gemma2 (soft cap too), gpt_oss (sinks)."""
    import transformers as hf

    values = {**TEXT, "attn_implementation": implementation}
    if family != "llama":
        values["sliding_window"] = 4
    name = {"llama": "Llama", "mistral": "Mistral", "gemma2": "Gemma2", "gemma3": "Gemma3", "gpt_oss": "GptOss"}[family]
    if family in ("gemma2", "gemma3"):
        values.update(query_pre_attn_scalar=1, layer_types=["sliding_attention", "full_attention"])
    if family == "gemma2":
        values["attn_logit_softcapping"] = 5.0
    if family == "gpt_oss":
        values.update(num_local_experts=2, num_experts_per_tok=1)
    config = getattr(hf, f"{name}TextConfig" if family == "gemma3" else f"{name}Config")(**{**values, **more})
    torch.manual_seed(0)
    model = getattr(hf, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # larger queries make attention that is not flat
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(12)
            if name.endswith("sinks"):
                parameter.normal_()
    return model


def gpt2(**more: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_head=4, n_layer=2, n_positions=64, **{**IDS, "add_cross_attention": True, **more})
    return GPT2LMHeadModel(config).eval()


def bert(**more: Any) -> Any:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 32}
    return BertModel(BertConfig(**sizes, vocab_size=60, **more)).eval()


def t5(implementation: str = "sdpa") -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(d_model=32, d_kv=8, num_heads=4, d_ff=32, num_layers=2, vocab_size=60, decoder_start_token_id=0)
    config._attn_implementation = implementation
    return T5ForConditionalGeneration(config).eval()


def whisper() -> Any:
    from transformers import WhisperConfig, WhisperModel

    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 8, "max_source_positions": 20}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 1}
    return WhisperModel(WhisperConfig(**sizes, **heads, **IDS)).eval()


def unet() -> Any:
    return tiny.unet((16, 32), cross=16, head=4)


def sd3() -> Any:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=4,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
    ).eval()


def flux() -> Any:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    ).eval()


def wan() -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
    ).eval()


def mochi() -> Any:
    """A model whose joint attention is one product for each row of the batch, over its real text tokens."""
    from diffusers import MochiTransformer3DModel

    torch.manual_seed(0)
    return MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=8,
    ).eval()


def explicit_unet() -> Any:
    """A U-Net whose processors multiply, normalise and multiply again instead of calling one function."""
    from diffusers.models.attention_processor import AttnProcessor

    model = unet()
    model.set_attn_processor(AttnProcessor())
    return model


class Torch(nn.Module):
    """torch's own encoder and decoder layers, with a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        self.decoder = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True)
        self.pool = nn.MultiheadAttention(16, 2, kdim=12, vdim=12, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[0, -2:] = True
        memory = self.encoder(x, src_key_padding_mask=padding)
        out = self.decoder(x, memory, memory_key_padding_mask=padding)
        pooled, weights = self.pool(out, memory[..., :12], memory[..., :12], key_padding_mask=padding)
        return torch.cat([out, pooled, weights], dim=-1)


class Plain(nn.Module):
    """An attention module of no library."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.num_heads = 2
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def padded() -> Tensor:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :3] = 0
    return mask


def masked(model: Any) -> Tensor:
    """A U-Net's prediction with a text of which the first row's last token is padding."""
    text = torch.ones(2, 5)
    text[0, -1] = 0
    return model(noise(2, 4, 8, 8), 3, noise(2, 5, 16), encoder_attention_mask=text).sample


#: Each model with a call of it that gives one tensor. Values at padding are not compared and left out.
MODELS: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor]]] = {
    "llama": (lambda: causal_model("llama"), lambda m: m(tokens(), attention_mask=padded()).logits),
    "llama eager": (lambda: causal_model("llama", "eager"), lambda m: m(tokens(), attention_mask=padded()).logits),
    "mistral": (lambda: causal_model("mistral"), lambda m: m(tokens(), attention_mask=padded()).logits),
    "gemma2": (lambda: causal_model("gemma2", "eager"), lambda m: m(tokens(), attention_mask=padded()).logits),
    "gemma3": (lambda: causal_model("gemma3"), lambda m: m(tokens()).logits),
    "gpt_oss": (lambda: causal_model("gpt_oss", "eager"), lambda m: m(tokens()).logits),
    "gpt2": (gpt2, lambda m: m(tokens(), encoder_hidden_states=noise(2, 3, 32)).logits),
    "bert": (bert, lambda m: m(tokens(), attention_mask=padded().flip(1)).last_hidden_state),
    "t5": (t5, lambda m: m(tokens(), decoder_input_ids=tokens(seed=3)).logits),
    "t5 eager": (lambda: t5("eager"), lambda m: m(tokens(), decoder_input_ids=tokens(seed=3)).logits),
    "whisper": (whisper, lambda m: m(noise(2, 8, 40), decoder_input_ids=tokens()).last_hidden_state),
    "unet": (unet, lambda m: masked(m)),
    "unet explicit": (explicit_unet, lambda m: masked(m)),
    "sd3": (sd3, lambda m: m(noise(2, 4, 4, 4), noise(2, 5, 16), noise(2, 16), torch.tensor([1, 2])).sample),
    "flux": (
        flux,
        lambda m: (
            m(
                noise(2, 16, 8),
                noise(2, 5, 16),
                noise(2, 16),
                torch.tensor([0.1, 0.2]),
                torch.arange(48.0).reshape(16, 3),
                torch.zeros(5, 3),
            ).sample
        ),
    ),
    "wan": (wan, lambda m: m(noise(1, 4, 2, 8, 8), torch.tensor([3]), noise(1, 5, 16)).sample),
    "mochi": (
        mochi,
        lambda m: (
            m(
                noise(2, 4, 2, 4, 4),
                noise(2, 5, 16),
                torch.tensor([3, 3]),
                torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool(),
            ).sample
        ),
    ),
    "torch": (Torch, lambda m: m(noise(2, 6, 16))),
    "plain": (Plain, lambda m: m(noise(2, 6, 16))),
}


def build(name: str) -> tuple[Any, Callable[[Any], Tensor]]:
    make, call = MODELS[name]
    return make().eval(), call


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scaling: float | None = None,
    seen: Tensor | None = None,
    cap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Probabilities and output in float64, head by head, with exp and sums only; `seen` is what each query may see."""
    q, k, v = q.double(), k.double(), v.double()
    scaling = 1 / math.sqrt(q.shape[-1]) if scaling is None else scaling
    group = q.shape[1] // k.shape[1]
    maps = []
    for head in range(q.shape[1]):
        logits = torch.einsum("bld,bsd->bls", q[:, head], k[:, head // group]) * scaling
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        if bias is not None:
            logits = logits + bias.detach().double()[:, head]
        weights = torch.exp(logits)
        if seen is not None:
            weights = weights * seen
        total = weights.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + torch.exp(sinks.detach().double()[head])
        maps.append(torch.where(total > 0, weights / total, 0))
    found = torch.stack(maps, dim=1)
    return found, torch.stack([found[:, h] @ v[:, h // group] for h in range(q.shape[1])], dim=1)


def state(model):
    """All that could be left changed: attributes, hooks, processors, configuration, weights."""
    found = {}
    for path, module in model.named_modules():
        plain = {
            name: value
            for name, value in vars(module).items()
            if name not in ("_parameters", "_buffers", "_modules", "_forward_hooks_always_called")
        }
        found[path] = (type(module), type(module).__call__, list(plain), [id(value) for value in plain.values()])
        hooks = [dict(value) for name, value in vars(module).items() if "hooks" in name and isinstance(value, dict)]
        found[path] += (hooks, id(getattr(module, "processor", None)))
    config = getattr(model, "config", None)
    told = copy.deepcopy(dict(config.items()) if hasattr(config, "items") else vars(config) if config else {})
    return found, told, {k: v.clone() for k, v in model.state_dict().items()}


def same(before, after):
    assert before[:2] == after[:2]
    assert before[2].keys() == after[2].keys()
    assert all(torch.equal(before[2][key], after[2][key]) for key in before[2])


def interface():
    from transformers.modeling_utils import AttentionInterface

    return vars(AttentionInterface)["get_interface"]


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def close(found, expected, atol=1e-6):
    assert found.keys() == expected.keys() and found
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=atol, rtol=1e-4)
