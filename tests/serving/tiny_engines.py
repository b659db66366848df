"""Tiny models of several families, adapters for them, and what the model itself generates."""

from typing import Any

import torch
from torch import nn

import lorry
from lorry.serving.engine import Engine
from lorry.serving.options import EngineOptions
from lorry.serving.request import Request, Sampling

VOCABULARY = 97
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}


def tiny(family: str = "llama", dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a tiny model with random weights that are large enough for answers to vary."""
    import transformers as t

    layers = ["sliding_attention", "full_attention"]
    makers = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**_COMMON)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**_COMMON)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**_COMMON)),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**_COMMON, sliding_window=5)),
        "gemma2": lambda: t.Gemma2ForCausalLM(
            t.Gemma2Config(
                **_COMMON,
                sliding_window=5,
                layer_types=layers,
                attn_logit_softcapping=2.0,
                final_logit_softcapping=None,
                attn_implementation="eager",
            )
        ),
        "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**_COMMON, sliding_window=5, layer_types=layers)),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(
                vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, eos_token_id=None,
                bos_token_id=None, pad_token_id=None,
            )
        ),
    }  # fmt: skip
    torch.manual_seed(0)
    model = makers[family]().to(dtype).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(5)
    model.generation_config.eos_token_id = None
    return model


def adapt(model: nn.Module, name: str, method: Any = None, seed: int = 1, **options: Any) -> lorry.Adapter:
    """Attach a frozen adapter whose tensors are all random."""
    method = {"method": "lora", "rank": 4, "alpha": 8} if method is None else method
    options.setdefault("dtype", next(model.parameters()).dtype)
    adapter = lorry.attach(model, method, name=name, seed=seed, activate=False, **options)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.add_(noise.to(parameter.dtype), alpha=0.2)
    adapter.train(False)
    return adapter


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Return random tokens."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return tuple(torch.randint(0, VOCABULARY, (length,), generator=generator).tolist())


def request(id: str, tokens: tuple[int, ...], composition: Any = None, most: int = 8, **sampling: Any) -> Request:
    """Return a request for `most` tokens."""
    given = {composition: 1.0} if isinstance(composition, str) else composition or {}
    return Request(id, tokens, given, Sampling(max_tokens=most, **sampling))


def alone(model: nn.Module, asked: Request) -> tuple[int, ...]:
    """Return what the model's own `generate` answers greedily to one request."""
    tokens = torch.tensor([asked.prompt])
    most = asked.sampling.max_tokens

    def run() -> tuple[int, ...]:
        found = model.generate(tokens, max_new_tokens=most, do_sample=False, attention_mask=torch.ones_like(tokens))
        return tuple(found[0, len(asked.prompt) :].tolist())

    if not lorry.adapters(model):
        return run()
    with lorry.activate(model, dict(asked.composition) or None):
        return run()


def engine(model: nn.Module, **options: Any) -> Engine:
    """Return an engine of a small pool."""
    given = {"page_tokens": 4, "pages": 200, **options}
    return Engine(model, None, EngineOptions(**given))
