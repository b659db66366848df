"""Attention over values in two parts, in all its forms, against values made whole, in float64."""

import pytest
import torch

from lorry.kernels.split_attention import QUERIES, expanding_attention, split_attention, tiled_split_attention

#: heads, heads of keys, width of heads, width of values, rank, length, keys: ranks above and below the width of a head.
SHAPES = [(4, 2, 8, 8, 3, 5, 17), (6, 2, 4, 6, 9, 1, 33), (2, 2, 16, 16, 20, 7, 7), (8, 1, 5, 3, 1, 19, 40)]


def drawn(shape, seed=0, dtype=torch.float64):
    heads, kv_heads, width, wide, rank, length, keys = shape
    g = torch.Generator().manual_seed(seed)
    sizes = [(2, heads, length, width), (2, kv_heads, keys, width), (2, kv_heads, keys, wide), (2, keys, rank)]
    tensors = [torch.randn(size, generator=g, dtype=torch.float64) for size in (*sizes, (kv_heads * wide, rank))]
    return [t.to(dtype) for t in tensors]


def by_hand(q, k, v, low, up, scaling):
    """Row by row and head by head from the definition."""
    batch, heads, length, _ = q.shape
    kv_heads, keys, wide = v.shape[1:]
    out = q.new_zeros(batch, heads, length, wide)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // kv_heads)
            values = v[b, g] + low[b] @ up[g * wide : (g + 1) * wide].T
            for i in range(length):
                seen = keys - length + i + 1
                share = (k[b, g, :seen] @ q[b, h, i] * scaling).softmax(0)
                out[b, h, i] = share @ values[:seen]
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_all_forms_are_the_definition(shape):
    given = drawn(shape)
    expected = by_hand(*given, 0.4)
    for form in (expanding_attention, split_attention):
        torch.testing.assert_close(form(*given, 0.4), expected, rtol=0, atol=1e-12)
    for queries, keys in ((1, 1), (4, 16), (16, 5), (64, 64)):
        found = tiled_split_attention(*given, 0.4, queries=queries, keys=keys)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    single = split_attention(*drawn(shape, dtype=torch.float32), 0.4)
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_mask_takes_the_place_of_the_causal_one(shape):
    given = drawn(shape)
    length, keys = shape[-2:]
    mask = torch.full((1, 1, length, keys), float("-inf"), dtype=torch.float64).triu(keys - length + 1)
    torch.testing.assert_close(split_attention(*given, 0.4, mask), split_attention(*given, 0.4))
    window = mask.masked_fill(torch.ones(length, keys).tril(keys - length - 3).bool(), float("-inf"))
    torch.testing.assert_close(split_attention(*given, 0.4, window), expanding_attention(*given, 0.4, window))
    assert not torch.allclose(split_attention(*given, 0.4, window), by_hand(*given, 0.4))


def test_long_prompts_in_blocks_of_queries():
    given = drawn((2, 1, 4, 4, 2, 2 * QUERIES + 3, 2 * QUERIES + 20))
    torch.testing.assert_close(split_attention(*given, 0.4), expanding_attention(*given, 0.4), rtol=0, atol=1e-12)
    length, keys = given[0].shape[2], given[1].shape[2]
    mask = torch.full((1, 1, length, keys), float("-inf"), dtype=torch.float64).triu(keys - length + 1)
    torch.testing.assert_close(split_attention(*given, 0.4, mask), expanding_attention(*given, 0.4), rtol=0, atol=1e-12)


def test_inputs_stay_as_they_are():
    given = drawn(SHAPES[0])
    before = [t.clone() for t in given]
    split_attention(*given, 0.4)
    tiled_split_attention(*given, 0.4)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
