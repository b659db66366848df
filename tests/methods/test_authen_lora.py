"""AuthenLoRA's adapter: the checks of its mathematics, on linear layers and convolutions."""

import pytest
import torch
from core.tiny import close, off_zero
from torch import nn

import lorry
from lorry.formats.snapshot import as_file
from lorry.protection.bake import bake

BITS = 6


class Mixed(nn.Module):
    """A convolution, a pointwise linear layer, and one that is narrower than the rank."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.linear = nn.Linear(12, 12)
        self.narrow = nn.Linear(12, 4)

    def forward(self, x):
        h = self.conv(x).tanh().movedim(1, -1)
        return self.narrow(self.linear(h).tanh())


def adapted(rank=8, name="one", method="authen-lora", **options):
    torch.manual_seed(0)
    model = Mixed().double().eval()
    options = {"rank": rank, **options} | ({"bits": BITS} if method == "authen-lora" else {})
    adapter = lorry.attach(model, {"method": method, **options}, targets="all", name=name, dtype=torch.float64)
    return model, off_zero(adapter, 3, 0.3)


def pictures(rows=4):
    return torch.randn(rows, 3, 5, 5, generator=torch.Generator().manual_seed(1)).double()


def messages(rows=4, seed=2):
    return torch.randint(2, (rows, BITS), generator=torch.Generator().manual_seed(seed))


def run(model, x, message=None):
    facts = {} if message is None else {"message": message}
    with torch.no_grad(), lorry.context(model, **facts):
        return model(x)


def test_the_zero_message_is_a_plain_lora():
    model, adapter = adapted()
    found, bare = run(model, pictures(), torch.zeros(BITS)), Mixed
    torch.manual_seed(0)
    other = bare().double().eval()
    with torch.no_grad():
        for path, entry in adapter.entries.items():
            own, layer = entry.tensors(), other.get_submodule(path)
            layer.weight.add_((own["B"] @ own["A"]).view_as(layer.weight))
        close(found, other(pictures()))


def test_distinct_messages_scale_differently_and_embeddings_are_orthogonal_and_normed():
    _, adapter = adapted()
    method = adapter.method
    torch.manual_seed(0)
    fresh = lorry.attach(Mixed(), {"method": "authen-lora", "bits": BITS, "rank": 8}, targets="all", name="x")
    mapper = next(iter(fresh.entries.values())).tensors()["mapper"].detach()
    close(mapper.std(-1), torch.ones(BITS))
    cosines = nn.functional.normalize(mapper, dim=-1)
    torch.testing.assert_close(cosines @ cosines.T, torch.eye(BITS), atol=1e-5, rtol=0)
    every = torch.tensor([[int(c) for c in f"{i:0{BITS}b}"] for i in range(2**BITS)])
    s = method.strength(every, mapper)
    assert torch.equal(s[0], torch.ones(8))
    assert float(torch.pdist(s).min()) > 0.5
    assert torch.equal(s[1:2], method.strength(every[1:2], mapper))


def test_rows_carry_messages_of_their_own_and_guidance_doubles_them():
    model, _ = adapted()
    x, m = pictures(), messages()
    mixed = run(model, x, m)
    for row in range(4):
        close(mixed[row : row + 1], run(model, x[row : row + 1], m[row]))
    with torch.no_grad(), lorry.rows(model, ["one"] * 4, tile=2), lorry.context(model, message=m):
        close(model(torch.cat([x, x])), torch.cat([mixed, mixed]))


def test_no_message_is_stale_after_an_error():
    model, _ = adapted()
    x = pictures(2)
    own = run(model, x)
    with pytest.raises(RuntimeError, match="stop"), lorry.context(model, message=messages(2)):
        model(x)
        raise RuntimeError("stop")
    assert torch.equal(run(model, x), own) and not torch.equal(run(model, x, messages(2)), own)


def test_a_message_of_another_length_is_refused():
    model, _ = adapted()
    with pytest.raises(lorry.AdapterError, match="6 bits was expected"):
        run(model, pictures(), torch.ones(4, BITS + 1))


def test_a_bake_equals_the_message_and_fuses():
    model, adapter = adapted(alpha=4.0)
    x, m = pictures(), messages()[0]
    wanted = run(model, x, m)
    file = bake(as_file(adapter), m)
    adapter.detach()
    baked = file.load(model, name="baked")
    close(run(model, x), wanted)
    baked.fuse()
    close(run(model, x), wanted)
    baked.unfuse()
    assert {type(entry.method).__name__ for entry in baked.entries.values()} == {"LoRA"}
    assert not any("mapper" in name or "message" in name for name, _, _ in baked.named_tensors())


def test_a_fresh_adapter_changes_nothing_at_any_message():
    torch.manual_seed(0)
    model = Mixed().double().eval()
    with torch.no_grad():
        bare = model(pictures())
    lorry.attach(
        model, {"method": "authen-lora", "bits": BITS, "rank": 8}, targets="all", name="one", dtype=torch.float64
    )
    for m in messages():
        close(run(model, pictures(), m), bare)


def test_the_number_of_parameters():
    _, adapter = adapted()
    assert adapter.count() == 8 * (27 + 12) + 8 * (12 + 12) + 4 * (12 + 4) + BITS * 8
