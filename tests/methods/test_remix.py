"""The checks of ReMix's definition; the estimator itself is checked in test_routing."""

import pytest
import torch
import torch.nn.functional as F
from core.tiny import gradients, llama, off_zero, tokens
from torch import nn

import lorry
from lorry.core.life.api import log_probability
from lorry.methods.parts.routing import leave_one_out
from lorry.methods.remix import ReMix


def layer(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 20))
    adapter = lorry.attach(model, ReMix(**{"experts": 6, "top_k": 2, "rank": 3, **options}))
    return model, adapter, adapter.entries["0"].tensors()


def inputs(rows=12):
    return torch.randn(rows, 24, generator=torch.Generator().manual_seed(2))


def test_identity_at_the_start_and_count():
    model, adapter, _ = layer()
    x = inputs()
    for training in (True, False):
        model.train(training)
        assert torch.equal(model(x), F.linear(x, model[0].weight, model[0].bias))
    assert adapter.count() == 6 * 3 * (24 + 20) + 6 * 24


@pytest.mark.parametrize(("stabilized", "omega"), [(False, 2 / 6), (True, 2 / 6**0.5)])
def test_inference_takes_the_best_k_with_one_weight(stabilized, omega):
    model, adapter, tensors = layer(rank_stabilized=stabilized)
    off_zero(adapter, std=0.3)
    model.eval()
    x = inputs()
    best = (x @ tensors["router"].T).argsort(-1, descending=True)[:, :2]
    expected = []
    for row, chosen in zip(x, best.tolist(), strict=True):
        y = model[0].weight @ row + model[0].bias
        for j in chosen:
            part = slice(3 * j, 3 * j + 3)
            y = y + omega * tensors["B"][:, part] @ (tensors["A"][part] @ row)
        expected.append(y)
    torch.testing.assert_close(model(x), torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_all_active_is_one_lora_and_merges():
    model, adapter, tensors = layer(top_k=6)
    off_zero(adapter)
    x = inputs()
    expected = F.linear(x, model[0].weight, model[0].bias) + 2 / 18 * x @ tensors["A"].T @ tensors["B"].T
    for training in (True, False):
        model.train(training)
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    adapter.fuse()
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def step(model, adapter, x, target, draws):
    """One training step of M draws in one batch; returns the loss of each draw and row."""
    rows = len(x)
    losses = (model(x.repeat(draws, 1)) - target.repeat(draws, 1)).square().mean(-1).view(draws, rows)
    chosen = log_probability(model, "default").view(draws, rows)
    leave_one_out(losses, chosen).backward()
    return losses.detach()


def test_gradients_by_route():
    """Experts outside every draw get none; the router gets the score term alone, A and B that of the mean
    loss alone.
    """
    model, adapter, tensors = layer(router_std=0.3)
    off_zero(adapter)
    model.train()
    x, target = inputs(2), inputs(2)[:, :20]
    with (
        lorry.context(model, recording=True) as context,
        lorry.rows(model, ["default"] * 4, seeds={"default": 3}),
    ):
        step(model, adapter, x, target, 2)
    first = gradients(adapter)
    used = (context.records["default", "0", "load"] > 0).repeat_interleave(3)
    assert 0 < int(used.sum()) < 18
    assert torch.equal(first["0.A"].abs().sum(1) > 0, used) and torch.equal(first["0.B"].abs().sum(0) > 0, used)
    assert first["0.router"].any()
    for parameter in adapter.parameters():
        parameter.grad = None
    with lorry.context(model), lorry.rows(model, ["default"] * 4, seeds={"default": 3}):
        (model(x.repeat(2, 1)) - target.repeat(2, 1)).square().mean().backward()
    assert tensors["router"].grad is None
    torch.testing.assert_close(tensors["A"].grad, first["0.A"])
    torch.testing.assert_close(tensors["B"].grad, first["0.B"])


def test_log_probability_has_no_gradient_to_the_input():
    model, adapter, _ = layer(router_std=0.3)
    model.train()
    x = inputs().requires_grad_()
    model(x)
    log_probability(model, "default").sum().backward()
    assert x.grad is None


def test_the_effective_number_of_experts_is_k():
    model, adapter, _ = layer(top_k=4, router_std=1.0)
    off_zero(adapter)
    for training in (True, False):
        model.train(training)
        with lorry.context(model, recording=True) as context:
            model(inputs())
        assert float(context.records["default", "0", "effective"]) == pytest.approx(4)


def test_permuting_experts_with_their_router_rows_changes_nothing():
    model, adapter, tensors = layer()
    off_zero(adapter, std=0.3)
    model.eval()
    x = inputs()
    before = model(x).detach()
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    ranks = (order[:, None] * 3 + torch.arange(3)).flatten()
    with torch.no_grad():
        tensors["A"].copy_(tensors["A"][ranks].clone())
        tensors["B"].copy_(tensors["B"][:, ranks].clone())
        tensors["router"].copy_(tensors["router"][order].clone())
    torch.testing.assert_close(model(x).detach(), before)


def test_the_router_alone_finds_the_right_pair():
    """Frozen random LoRAs; each cluster of inputs has a known pair, which many draws recover."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    adapter = lorry.attach(model, ReMix(experts=6, top_k=2, rank=2, alpha=4.0))
    tensors = adapter.entries["0"].tensors()
    with torch.no_grad():
        tensors["A"].copy_(torch.randn(12, 8, generator=generator))
        tensors["B"].copy_(torch.randn(8, 12, generator=generator))
    pairs = [(0, 1), (2, 3), (4, 5), (1, 4)]
    centres = 3 * torch.eye(4, 8)
    optimizer = torch.optim.Adam([tensors["router"]], lr=0.03)
    model.train()
    torch.manual_seed(1)
    for _ in range(250):
        cluster = torch.randint(4, (32,), generator=generator)
        x = centres[cluster] + 0.3 * torch.randn(32, 8, generator=generator)
        units = (x @ tensors["A"].T).detach().unflatten(1, (6, 2))
        keep = torch.zeros(32, 6).scatter(1, torch.tensor(pairs)[cluster], 1.0)
        update = (units * keep.unsqueeze(-1)).flatten(1) @ tensors["B"].T.detach()
        target = (F.linear(x, model[0].weight) + update).detach()
        optimizer.zero_grad()
        step(model, adapter, x, target, 16)
        optimizer.step()
    best = (centres @ tensors["router"].T).topk(2).indices.sort().values.tolist()
    assert [tuple(b) for b in best] == pairs


def classifier(kind):
    """Models that read a sequence whole: an encoder, and a decoder under a classifier's head."""
    import transformers

    torch.manual_seed(0)
    if kind == "bert":
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
        return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=50, **sizes)).eval()
    return transformers.LlamaForSequenceClassification(llama().config).eval()


@pytest.mark.parametrize(("kind", "target"), [("bert", "query"), ("llama", "q_proj")])
def test_sequences_are_routed_as_wholes(kind, target):
    model = classifier(kind)
    method = ReMix(granularity="sequence", top_k=2, rank=2)
    adapter = off_zero(lorry.attach(model, method, targets=target), std=0.3)
    ids = tokens()
    with lorry.context(model, recording=True) as context:
        model.train()(ids)
        chosen = log_probability(model, "default")
    assert chosen.shape == (3,)
    with lorry.context(model, recording=True) as context:
        model(ids[:1])
    load = context.records["default", next(iter(adapter.entries)), "load"]
    assert sorted(load.tolist()) == [0.0] * 6 + [1.0] * 2
    assert adapter.method.draws == 2


def test_later_tokens_change_no_earlier_logits():
    model = llama().double()
    adapter = lorry.attach(model, ReMix(top_k=2, rank=2), targets="q_proj", dtype=torch.float64)
    off_zero(adapter, std=0.3)
    ids, other = tokens(), tokens(seed=2)
    other[:, :4] = ids[:, :4]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[:, :4], model(other).logits[:, :4], atol=1e-10, rtol=1e-10)
        first = model(ids[:, :4], use_cache=True)
        rest = model(ids[:, 4:], past_key_values=first.past_key_values).logits
        torch.testing.assert_close(model(ids).logits[:, 4:], rest, atol=1e-10, rtol=1e-10)


def test_whole_sequences_are_refused_where_a_model_generates(tmp_path):
    method = ReMix(granularity="sequence", top_k=2, rank=2)
    model = llama()
    for attach in (lorry.attach, lorry.plan):
        with pytest.raises(lorry.SiteError, match=r"later tokens would change .* granularity='token'"):
            attach(model, method, targets="q_proj")
    adapter = lorry.attach(model, ReMix(top_k=2, rank=2), targets="q_proj")
    with pytest.raises(lorry.SiteError, match="later tokens"):
        adapter.configure(granularity="sequence")
    assert adapter.method.granularity == "token"
    headed = classifier("llama")
    lorry.attach(headed, method, targets="q_proj").save(tmp_path / "a")
    with pytest.raises(lorry.SiteError, match="later tokens"):
        lorry.load(llama(), tmp_path / "a", check_base=False)


def test_the_encoder_beside_a_decoder_reads_sequences_whole():
    import transformers

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 50}
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()
    method = ReMix(granularity="sequence", top_k=2, rank=2)
    lorry.attach(model, method, targets="encoder.*.q").detach()
    with pytest.raises(lorry.SiteError, match="decoder.block.0.*later tokens"):
        lorry.attach(model, method, targets="decoder.*.q")


@pytest.mark.parametrize(
    ("options", "rule"),
    [({"top_k": 9}, "top_k=9"), ({"draws": 1}, "at least 2"), ({"granularity": "word"}, "one of")],
)
def test_bad_options(options, rule):
    with pytest.raises(lorry.OptionError, match=rule):
        ReMix(**options)


def test_layers_that_see_flat_tokens_add_to_the_probability_of_their_rows():
    class Flattening(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            h = self.first(x)
            return self.second(h.flatten(0, 1)).view_as(h)

    torch.manual_seed(0)
    model = Flattening().train()
    off_zero(lorry.attach(model, ReMix(experts=4, top_k=2, rank=2)), std=0.4)
    x = torch.randn(3, 5, 8)
    with lorry.context(model, padding_mask=torch.ones(3, 5, dtype=torch.bool)) as context:
        model(x)
        total = log_probability(model, "default")
        each = [context.left["default", name, "log_probability"] for name in ("first", "second")]
    assert [len(v) for v in each] == [3, 15]
    torch.testing.assert_close(total, each[0] + each[1].view(3, 5).sum(1))
