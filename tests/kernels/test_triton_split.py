"""Attention over values in two parts in Triton's interpreter, against the definition."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import json, torch
from lorry.kernels.split_attention import expanding_attention
from lorry.kernels.triton_split import triton_split_attention

errors = {}
shapes = [(4, 2, 8, 8, 3, 5, 17), (6, 2, 20, 12, 9, 1, 40), (2, 2, 16, 16, 20, 19, 19), (3, 1, 5, 3, 1, 18, 70)]
for seed, (heads, kv_heads, width, wide, rank, length, keys) in enumerate(shapes):
    g = torch.Generator().manual_seed(seed)
    sizes = [(2, heads, length, width), (2, kv_heads, keys, width), (2, kv_heads, keys, wide), (2, keys, rank)]
    q, k, v, low, up = (torch.randn(s, generator=g) for s in (*sizes, (kv_heads * wide, rank)))
    exact = expanding_attention(*(t.double() for t in (q, k, v, low, up)), 0.4)
    found = triton_split_attention(q.transpose(1, 2).contiguous().transpose(1, 2), k, v, low, up, 0.4)
    one = low[:1].expand(2, -1, -1)
    once = triton_split_attention(q, k, v, one, up, 0.4)
    whole = expanding_attention(*(t.double() for t in (q, k, v, one, up)), 0.4)
    errors[str(seed)] = [float((found - exact).abs().max()), float((once - whole).abs().max())]
print(json.dumps(errors))
"""


def test_the_kernel_is_the_definition():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 4 and all(value < 2e-5 for pair in errors.values() for value in pair), errors
