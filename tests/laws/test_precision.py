"""A model in float64 computes in float64, whatever applies to its rows."""

import pytest
import torch
from core.tiny import llama, off_zero, tokens

import lorry


@pytest.mark.parametrize("train", [True, False])
def test_rows_of_different_weights_are_exact_in_float64(train):
    """The scale of rank-stabilised LoRA is no number of float32, the weights are."""
    model, ids = llama(1).double(), tokens(3)
    method = lorry.LoRA(rank=2, rank_stabilized=True)
    off_zero(lorry.attach(model, method, dtype=torch.float64), 1, 0.3).train(train)
    rows = [{"default": 0.5}, {"default": -2.0}, None]
    with torch.no_grad():
        with lorry.rows(model, rows):
            mixed = [model(ids).logits for _ in range(2)]
        for row, composition in enumerate(rows):
            lorry.activate(model, composition)
            alone = model(ids[row : row + 1]).logits[0]
            for found in mixed:
                torch.testing.assert_close(found[row], alone, atol=1e-12, rtol=1e-12)
