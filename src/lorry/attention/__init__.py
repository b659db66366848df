"""Attention seen and changed from outside: sites, watches, a report, pictures, limits, and factors in its place.

>>> import torch, lorry.attention
>>> from transformers import LlamaConfig, LlamaForCausalLM
>>> model = LlamaForCausalLM(LlamaConfig(
...     hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
... ))
>>> calls = []
>>> with lorry.attention.watch(model, calls.append):
...     _ = model(torch.tensor([[1, 2, 3]]))
>>> calls[0].probabilities.shape
torch.Size([1, 2, 3, 3])
"""

from __future__ import annotations

from lorry.attention.call import AttentionCall, AttentionError
from lorry.attention.factored import (
    Approximation,
    exact_gradients,
    factor_gradients,
    fast_attention,
    fast_gradients,
)
from lorry.attention.fast import fast
from lorry.attention.limits import HeadLimits, head_limits
from lorry.attention.picture import heat_map
from lorry.attention.reporting import AttentionReport, SiteReport, report
from lorry.attention.sites import AttentionSite, attention_sites
from lorry.attention.watching import Watch, watch

__all__ = [
    "Approximation",
    "AttentionCall",
    "AttentionError",
    "AttentionReport",
    "AttentionSite",
    "HeadLimits",
    "SiteReport",
    "Watch",
    "attention_sites",
    "exact_gradients",
    "factor_gradients",
    "fast",
    "fast_attention",
    "fast_gradients",
    "head_limits",
    "heat_map",
    "report",
    "watch",
]
