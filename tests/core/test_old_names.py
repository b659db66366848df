"""Names that were changed work for one more release."""

import pytest
import torch
from torch import nn

import lorry


def test_merge_is_fuse():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    before = {name: p.clone() for name, p in base.state_dict().items()}
    adapter = lorry.attach(base, lorry.LoRA(rank=2))
    with pytest.warns(FutureWarning, match="fuse"):
        adapter.merge()
    with pytest.warns(FutureWarning, match="fused"):
        assert adapter.merged
    with pytest.warns(FutureWarning, match="unfuse"):
        adapter.unmerge()
    assert all(torch.equal(p, before[name]) for name, p in base.state_dict().items())
