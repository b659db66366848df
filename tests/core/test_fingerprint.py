"""Fingerprints: every changed element is noticed, copies in other dtypes agree, and nothing is read twice."""

import copy

import pytest
import torch
from core.tiny import llama, off_zero
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lorry
from lorry.core.life.state import state_of
from lorry.core.life.switch import make_switch
from lorry.core.sites.checksum import WIDTH, checksums
from lorry.core.sites.fingerprint import Fingerprint, FingerprintCache, fingerprint
from lorry.core.sites.kinds import catalogue

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(3, 6, 5))


class EveryKind(nn.Module):
    """One site of each sort, among them a weight that is not contiguous and one of more than a million elements."""

    def __init__(self, seed=0):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(seed)
        self.linear = nn.Linear(64, 64)
        self.odd = nn.Linear(7, 3)
        self.transposed = Conv1D(10, 6)
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.embedding = nn.Embedding(11, 6)
        self.attention = nn.MultiheadAttention(8, 2)
        self.experts = Experts()
        self.strided = nn.Linear(9, 33)
        self.strided.weight = nn.Parameter(torch.randn(9, 33).t())
        self.long = nn.Linear(1201, 1009, bias=False)


def every_kind(dtype, seed=0):
    model = EveryKind(seed).to(dtype)
    if dtype != torch.float32:  # casting a module makes its weights contiguous
        model.strided.weight = nn.Parameter(model.strided.weight.detach().t().contiguous().t())
    return model


def mark_of(model):
    return fingerprint(catalogue(model).values(), "base")


MODELS = {dtype: every_kind(dtype) for dtype in BITS}
MARKS = {dtype: mark_of(model) for dtype, model in MODELS.items()}
PATHS = sorted(catalogue(MODELS[torch.float32]))


def flip(weight, at, bit):
    """Change one bit of one element of a weight, in place."""
    with torch.no_grad():
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), weight.shape))
        bits = weight[place].view(BITS[weight.dtype])
        mask = torch.tensor(1, dtype=bits.dtype) << bit
        weight[place] = (bits ^ mask).view(weight.dtype)


@settings(deadline=None, max_examples=400)
@given(
    dtype=st.sampled_from(list(BITS)),
    path=st.sampled_from(PATHS),
    place=st.floats(0, 1, exclude_max=True),
    data=st.data(),
)
def test_one_changed_bit_of_one_element_is_noticed(dtype, path, place, data):
    model, site = MODELS[dtype], catalogue(MODELS[dtype])[path]
    weight = site.stored
    at, bit = int(place * weight.numel()), data.draw(st.integers(0, 8 * weight.dtype.itemsize - 1))
    flip(weight, at, bit)
    try:
        found = fingerprint([site])
        assert MARKS[dtype].compare(found) == "differs"
        with pytest.raises(lorry.FingerprintError, match=f"1 of {len(PATHS)} sites.*'{path}'"):
            MARKS[dtype].require(found, "It")
    finally:
        flip(weight, at, bit)
    assert MARKS[dtype].compare(fingerprint([site])) == "match"
    assert model is MODELS[dtype]


@pytest.mark.parametrize("dtype", BITS)
def test_a_base_changed_everywhere_but_in_its_first_row_and_column_is_noticed(dtype):
    layer = nn.Sequential(nn.Linear(64, 64, dtype=dtype))
    before = mark_of(layer)
    with torch.no_grad():
        layer[0].weight[1:, 1:] += 1
    assert before.compare(mark_of(layer)) == "differs"


def exchange(weight, one, other):
    with torch.no_grad():
        weight[[one, other]] = weight[[other, one]].clone()


@pytest.mark.parametrize("dtype", BITS)
def test_exchanged_elements_and_rows_are_noticed(dtype):
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(5 * 4 * WIDTH + 17, generator=generator, dtype=torch.float64).to(dtype)
    words = 8 // flat.element_size()
    before = checksums(flat)[torch.bfloat16]
    near = [(0, 1), (3, 7), (0, words), (words - 1, 2 * words - 1)]
    in_step = [(5, 5 + words * WIDTH), (3, 3 + 3 * words * WIDTH), (len(flat) - 1, len(flat) - 1 - words * WIDTH)]
    anywhere = torch.randint(len(flat), (20, 2), generator=generator).tolist()
    for one, other in [*near, *in_step, *anywhere]:
        changed = flat.clone()
        exchange(changed, one, other)
        assert checksums(changed)[torch.bfloat16] != before, (one, other)
        # the exchange of a number for its negative is one of sign bits alone
        changed = flat.clone()
        changed[other] = -changed[one]
        opposite = checksums(changed)[torch.bfloat16]
        exchange(changed, one, other)
        assert checksums(changed)[torch.bfloat16] != opposite, (one, other)
    for matrix in (torch.eye(64, dtype=dtype), flat[: 300 * 400].view(300, 400).clone(), torch.eye(700, dtype=dtype)):
        before = checksums(matrix)[torch.bfloat16]
        for one, other in [(0, 1), (7, 60), (32, 48)]:
            for view in (matrix, matrix.t()):
                exchange(view, one, other)
                assert checksums(matrix)[torch.bfloat16] != before, (one, other)
                exchange(view, one, other)
        assert checksums(matrix)[torch.bfloat16] == before


def test_changes_that_cancel_in_a_sum_are_noticed():
    flat = torch.randn(4 * 3 * WIDTH).to(torch.bfloat16)
    before = checksums(flat)
    bits = flat.view(torch.int16)
    for one, other in [(0, 4), (3, 7), (3, 3 + 4 * WIDTH)]:
        changed = bits.clone()
        changed[one] += 1
        changed[other] -= 1
        assert checksums(changed.view(torch.bfloat16)) != before


def test_copies_in_other_dtypes_agree_and_noisy_ones_do_not():
    single = mark_of(copy.deepcopy(MODELS[torch.float64]).float())
    double = mark_of(MODELS[torch.float64])
    brain = mark_of(copy.deepcopy(MODELS[torch.float64]).float().bfloat16())
    for one in (single, double, brain):
        for other in (single, double, brain):
            assert one.compare(other) == "match"
        assert one.digest == single.digest
    # a cast and back is another base in its own type, and the same one in the narrow type
    rounded = mark_of(copy.deepcopy(MODELS[torch.float32]).bfloat16().float())
    assert rounded.compare(MARKS[torch.float32]) == "differs"
    assert rounded.compare(MARKS[torch.bfloat16]) == "match"


def test_a_float16_copy_is_compared_where_it_can_be():
    half = MARKS[torch.float16]
    assert half.compare(mark_of(copy.deepcopy(MODELS[torch.float16]))) == "match"
    assert half.compare(mark_of(copy.deepcopy(MODELS[torch.float16]).float())) == "match", "the same values"
    # rounded in another way than to bfloat16: neither the same nor another base for sure
    assert half.compare(MARKS[torch.float32]) == "quantized" == MARKS[torch.float32].compare(half)
    assert half.compare(mark_of(every_kind(torch.float16, seed=1))) == "differs"


def first_edition_model():
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Embedding(5, 3), nn.Conv2d(2, 3, 3), nn.Linear(3, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((torch.arange(p.numel()) % 251 / 64 - 1.7).view_as(p))
    return model


def test_files_of_the_first_edition_are_compared_by_their_samples():
    # written by the first edition for this model
    old = Fingerprint({"0": "22e8621a:7e3dcc77", "1": "e5cca9ea:2c25b6b9", "2": "279ded61:5ef86b60", "3": "be67a0e8:"})
    model = first_edition_model()
    assert old.compare(mark_of(model)) == "quantized", "the last site was quantised"
    sampled = Fingerprint({p: v for p, v in old.sites.items() if p != "3"})
    assert sampled.compare(mark_of(model)) == "match" == mark_of(model).compare(sampled)
    assert sampled.compare(mark_of(model.bfloat16())) == "match" and sampled.compare(sampled) == "match"
    model = first_edition_model()
    with torch.no_grad():
        model[0].weight[1, 1] += 1  # not among its 16 samples
        assert (
            sampled.compare(mark_of(model)) == "match"
            and mark_of(first_edition_model()).compare(mark_of(model)) == "differs"
        )
        model[0].weight[4, 0] += 1
        assert sampled.compare(mark_of(model)) == "differs" == mark_of(model).compare(sampled)


class Reads(TorchDispatchMode):
    """Which weights operations read, and how many of their bytes are summed."""

    def __init__(self, model):
        super().__init__()
        self.names = {p.untyped_storage()._cdata: n for n, p in model.named_parameters()}
        self.summed = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for leaf in tree_leaves((args, kwargs)):
            name = self.names.get(leaf.untyped_storage()._cdata) if isinstance(leaf, torch.Tensor) else None
            if name is not None:
                size = leaf.nbytes if func is torch.ops.aten.sum.dim_IntList and args[1] == [0] else 0
                self.summed[name] = self.summed.get(name, 0) + size
        return func(*args, **(kwargs or {}))


def reads(model, cache):
    """What taking the fingerprint of a model reads, by parameter name in bytes."""
    counter = Reads(model)
    with counter:
        fingerprint(catalogue(model).values(), "", cache)
    return counter.summed


def test_every_weight_is_read_once_tied_ones_too_and_then_no_more():
    model, cache = llama(2, tied=True, dtype=torch.bfloat16), FingerprintCache()
    assert {"lm_head", "model.embed_tokens"} <= catalogue(model).keys()
    first = reads(model, cache)
    assert first == {n: p.nbytes for n, p in model.named_parameters() if p.ndim > 1}
    assert reads(model, cache) == {}


CHANGES = {
    "in place": lambda layer: layer.weight.mul_(2),
    "through a view": lambda layer: layer.weight.view(-1)[5:6].add_(1),
    "loaded": lambda layer: layer.load_state_dict({"weight": layer.weight + 1}),
    "loaded by assignment": lambda layer: layer.load_state_dict({"weight": layer.weight + 1}, assign=True),
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight + 1)),
    "other data": lambda layer: setattr(layer.weight, "data", layer.weight + 1),
    "rounded by casts": lambda layer: layer.bfloat16().float(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_weight_that_changed_is_read_again_and_only_that(change):
    model, cache = llama(2), FingerprintCache()
    sites = catalogue(model)
    before = fingerprint(sites.values(), "", cache)
    layer = model.model.layers[1].mlp.up_proj
    with torch.no_grad():
        change(layer)
    assert set(reads(model, cache)) == {"model.layers.1.mlp.up_proj.weight"}
    after = fingerprint(sites.values(), "", cache)
    assert before.compare(after) == "differs" and after == fingerprint(sites.values())
    assert before.compare(fingerprint([s for p, s in sites.items() if "1.mlp.up_proj" not in p])) == "match"


def test_casting_a_model_is_noticed_where_memory_and_address_stay_the_same():
    layer = nn.Sequential(nn.Linear(300, 300))
    cache = FingerprintCache()
    site = catalogue(layer)["0"]
    before = cache.hash_of(site)
    for _ in range(5):
        layer.bfloat16()
        layer.float()
        assert cache.hash_of(site) != before


def test_writes_that_pytorch_does_not_count_are_seen_after_forget():
    layer, cache = nn.Sequential(nn.Linear(8, 8)), FingerprintCache()
    site = catalogue(layer)["0"]
    before = cache.hash_of(site)
    layer[0].weight.data[3, 3] += 1
    cache.forget()
    assert cache.hash_of(site) != before


def test_weights_made_in_inference_mode_are_read_each_time():
    with torch.inference_mode():
        layer = nn.Sequential(nn.Linear(8, 8))
        cache = FingerprintCache()
        site = catalogue(layer)["0"]
        before = cache.hash_of(site)
        layer[0].weight[3, 3] += 1
        assert cache.hash_of(site) != before


def test_the_base_stays_the_base_while_an_adapter_is_in_it_and_only_then():
    model = llama(1)
    one = off_zero(lorry.attach(model, lorry.LoRA(rank=2), name="one"))
    base, cache = one.fingerprint, state_of(model).hashes
    sites = catalogue(llama(1))
    one.fuse()
    copied = copy.deepcopy(model)
    for merged in (model, copied):
        assert lorry.attach(merged, lorry.LoRA(rank=2), name="late").fingerprint == base
    assert fingerprint(sites.values(), base.base).compare(base) == "match"
    assert FingerprintCache().hash_of(one.sites[0]) != base.sites[one.sites[0].path]
    one.unfuse()
    assert cache.hash_of(one.sites[0]) == base.sites[one.sites[0].path]
    with torch.no_grad():
        one.sites[0].stored[0, 0] += 1
    assert cache.hash_of(one.sites[0]) != base.sites[one.sites[0].path]


def test_a_switch_written_into_the_base_leaves_its_fingerprint():
    model = llama(1)
    sparse = off_zero(lorry.attach(model, lorry.method_from("shira"), name="sparse"))
    lorry.activate(model, None)
    switch = make_switch(sparse)
    switch.on()
    assert lorry.attach(model, lorry.LoRA(rank=2), name="late", activate=False).fingerprint == sparse.fingerprint
    switch.off()
    assert lorry.attach(model, lorry.LoRA(rank=2), name="last", activate=False).fingerprint == sparse.fingerprint


def test_an_adapter_meets_a_base_with_one_changed_element(tmp_path):
    lorry.attach(llama(1), lorry.LoRA(rank=2), targets="q_proj").save(tmp_path / "adapter")
    other = llama(1)
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight[13, 7] += 1e-6
    with pytest.raises(lorry.FingerprintError, match="1 of 1 sites"):
        lorry.load(other, tmp_path / "adapter")
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.zero_()  # which the adapter does not use
        other.model.layers[0].self_attn.q_proj.weight.copy_(llama(1).model.layers[0].self_attn.q_proj.weight)
    assert lorry.load(other, tmp_path / "adapter").receipt.fingerprint == "match"


def test_weights_on_the_meta_device_have_no_hash():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 4))
    found = mark_of(model)
    assert found.compare(mark_of(nn.Sequential(nn.Linear(8, 4)))) == "quantized"
    assert found.compare(mark_of(nn.Sequential(nn.Linear(4, 8)))) == "differs"
