"""A kind of site is one class: what it declares is all that the rest of Lorry asks."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from core.tiny import gradients, off_zero, snapshot, unchanged
from torch import nn
from torch.func import functional_call

import lorry
from lorry.core.sites.kinds import KINDS, Kind, catalogue, kind_named, kinds_in_order, register_kind
from lorry.core.sites.site import Site


class Upsample(nn.ConvTranspose2d):
    """A transposed convolution of a model's own, which no kind of Lorry's knows."""


@pytest.fixture
def upsample():
    @register_kind
    class UpsampleKind(Kind):
        """A is a pointwise convolution to `rank` channels, B a transposed one to the outputs.

        The matrix is ``(out * window, in)``.
        """

        name = "upsample"
        presets = ("upsampling", "convolutions")
        positionwise = False
        row_channels = False

        def sites(self, path, module):
            if isinstance(module, Upsample):
                window = module.kernel_size[0] * module.kernel_size[1]
                yield Site(path, self, module, module, "weight", module.out_channels * window, module.in_channels)

        def _apply(self, site, x, weight):
            return F.conv_transpose2d(x, weight, stride=site.owner.stride, padding=site.owner.padding)

        def down(self, site, x, a):
            return x.movedim(1, -1) @ a.mT

        def up(self, site, h, b):
            return self._apply(site, h.movedim(-1, 1), self.to_weight(site, b))

        def dense(self, site, x, matrix):
            return self._apply(site, x, self.to_weight(site, matrix))

        def to_matrix(self, site, weight):
            return weight.flatten(1).mT

        def to_weight(self, site, matrix):
            return matrix.mT.reshape(matrix.shape[1], site.owner.out_channels, *site.owner.kernel_size)

    yield UpsampleKind
    del KINDS._items["upsample"]


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.grow = Upsample(4, 5, (3, 2), stride=2, padding=1)

    def forward(self, x):
        return self.grow(self.conv(x).tanh())


def decoder():
    torch.manual_seed(0)
    return Decoder().eval(), torch.randn(3, 3, 5, 6)


@pytest.mark.parametrize("method", ["lora", "loha", "flylora", "smora"])
def test_a_new_kind_is_one_class(upsample, method, tmp_path):
    model, x = decoder()
    before, bare = snapshot(model), model(x)
    options = {"method": method, "rank": 2, **({"rank": 4, "top_k": 2} if method in ("flylora", "smora") else {})}
    assert [s.path for s in lorry.plan(model, options, "upsampling").sites] == ["grow"]
    assert [s.path for s in lorry.plan(model, options, "convolutions").sites] == ["conv", "grow"]
    one = off_zero(lorry.attach(model, options, targets="kind:upsample", name="one"), 1, 0.3)
    off_zero(lorry.attach(model, lorry.LoRA(rank=1), targets=["grow", "conv"], name="two"), 2, 0.3)
    lorry.activate(model, "one")
    adapted = model(x)
    assert (adapted - bare).norm() > 0.05 * bare.norm()
    adapted.square().sum().backward()
    assert all(g.abs().sum() > 0 for g in gradients(one).values())
    batch = ["two", {"one": 0.5, "two": 1.0}, None]
    with torch.no_grad(), lorry.rows(model, batch):
        mixed = model(x)
    for row, composition in enumerate(batch):
        lorry.activate(model, composition)
        torch.testing.assert_close(mixed[row : row + 1], model(x[row : row + 1]), atol=1e-5, rtol=1e-5)
    lorry.activate(model, "one")
    if one.method.fusing == "exact":
        site = one.sites[0]
        weight = {"grow.weight": site.stored + site.kind.to_weight(site, one.entries["grow"].delta())}
        lorry.activate(model, None)
        torch.testing.assert_close(adapted, functional_call(model, weight, (x,)), atol=1e-5, rtol=1e-4)
        lorry.activate(model, "one")
        one.fuse()
        torch.testing.assert_close(model(x), adapted, atol=1e-5, rtol=1e-4)
        one.unfuse()
    one.save(tmp_path / "one")
    fresh = decoder()[0]
    loaded = lorry.load(fresh, tmp_path / "one")
    assert loaded.receipt.fingerprint == "match"
    torch.testing.assert_close(fresh(x), model(x))
    for adapter in list(lorry.adapters(model).values()):
        adapter.detach()
    assert unchanged(model, before)


def test_a_method_that_needs_more_than_a_kind_can_do_is_refused(upsample):
    with pytest.raises(lorry.SiteError, match="does not sit on upsample sites"):
        lorry.attach(decoder()[0], lorry.DoRA(rank=2), targets="grow")
    with pytest.raises(lorry.SiteError, match="does not sit on upsample sites"):
        lorry.attach(decoder()[0], "eva", targets="grow")


def test_a_file_with_a_former_name_of_a_kind_loads(tmp_path):
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    adapter = off_zero(lorry.attach(model, lorry.LoRA(rank=2)))
    adapter.save(tmp_path)
    manifest = tmp_path / "lorry.json"
    text = manifest.read_text()
    assert '"kind": "qkv"' in text
    manifest.write_text(text.replace('"kind": "qkv"', '"kind": "packed"'))
    adapter.detach()
    loaded = lorry.load(model, tmp_path)
    assert {s.kind.name for s in loaded.sites} == {"qkv"} and loaded.receipt.fingerprint == "match"


def test_a_new_kind_may_claim_what_another_one_would_take():
    class Codebook(nn.Linear):
        """A linear layer by its class."""

    try:

        @register_kind
        class CodebookKind(type(kind_named("linear"))):
            name = "codebook"
            priority = Kind.priority
            presets = ()

            def sites(self, path, module):
                if isinstance(module, Codebook):
                    yield Site(path, self, module, module, "weight", module.out_features, module.in_features)

        model = nn.Sequential(nn.Linear(3, 4), Codebook(4, 2))
        assert {p: s.kind.name for p, s in catalogue(model).items()} == {"0": "linear", "1": "codebook"}
        assert [s.path for s in lorry.plan(model, lorry.LoRA(rank=2)).sites] == ["0"]
        assert [s.path for s in lorry.plan(model, lorry.LoRA(rank=2), "1").sites] == ["1"]
    finally:
        del KINDS._items["codebook"]


def test_kinds_are_asked_by_priority_and_methods_say_what_they_need():
    names = [kind.name for kind in kinds_in_order()]
    assert names == ["block", "experts", "router", "qkv", "embedding", "conv", "linear"]
    kinds = {slug: set(info.kinds) for slug, info in lorry.methods().items()}
    assert kinds["lora"] == set(names) - {"block"} and kinds["mixlora"] == {"block"}
    assert kinds["flylora"] == {"linear", "conv", "embedding"} and kinds["eva"] == {"linear"}


def test_there_is_one_instance_of_a_kind_in_copies_and_pickles_too():
    for kind in kinds_in_order():
        assert copy.deepcopy(kind) is kind is copy.copy(kind) and pickle.loads(pickle.dumps(kind)) is kind
    model = decoder()[0]
    lorry.attach(model, lorry.LoRA(rank=1), targets="conv")
    assert lorry.attach(copy.deepcopy(model), lorry.LoRA(rank=1), targets="conv", name="more").receipt.sites == 1


def test_a_kind_of_a_former_name_is_found_and_an_unknown_one_refused():
    assert kind_named("packed") is kind_named("qkv")
    with pytest.raises(lorry.SiteError, match="no kind 'lineer'. Did you mean 'linear'"):
        kind_named("lineer")
