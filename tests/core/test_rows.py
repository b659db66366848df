"""A different composition of adapters in every row of a batch: forward, gradients, generation, dropout."""

import pytest
import torch
from core.tiny import clear, gradients, llama, off_zero, tokens

import lorry
from lorry.core.forward.compose import for_rows

BATCHES = {
    "sorted": ["a", "a", None, "b", "c"],
    "scattered": ["b", "a", "b", None, "a"],
    "mixtures": [{"a": 0.5, "b": 0.5}, "a", {"a": -1.0, "c": 2.0}, None, {"a": 0.25, "b": 0.25, "c": 0.5}],
    "one adapter with a weight for each row": [{"a": 0.1}, {"a": 0.2}, {"a": 0.3}, {"a": 0.4}, {"a": 0.5}],
    "scattered weights": [{"a": 0.1}, None, {"a": 0.3}, None, {"a": -0.5}],
    "all the same": ["b"] * 5,
    "nothing": [None] * 5,
}
METHODS = {
    "a": lorry.LoRA(rank=2),
    "b": lorry.DoRA(rank=4, alpha=3),
    "c": lorry.LoRA(rank=5, rank_stabilized=True),
}


def loaded(only_plain=False, **more):
    model = llama(**more)
    for number, (name, method) in enumerate(METHODS.items()):
        method = lorry.LoRA(rank=method.rank) if only_plain else method
        targets = "attention" if name == "c" else "all-linear"
        off_zero(lorry.attach(model, method, targets=targets, name=name), number, 0.1)
    return model


@pytest.fixture(scope="module")
def model():
    return loaded()


@pytest.mark.parametrize("plain", [True, False], ids=["fused", "with DoRA"])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_rows_equal_each_row_alone_in_forward_and_gradients(batch, plain):
    model, ids = loaded(only_plain=plain), tokens(5)
    with lorry.rows(model, batch):
        mixed = model(ids).logits
    if mixed.requires_grad:
        mixed.square().mean(-1).sum().backward()
    found = {n: {k: p.grad for k, p in a.named_parameters()} for n, a in lorry.adapters(model).items()}
    clear(model)
    for row, composition in enumerate(batch):
        lorry.activate(model, composition)
        alone = model(ids[row : row + 1]).logits
        torch.testing.assert_close(mixed[row : row + 1], alone, atol=1e-5, rtol=1e-4)
        if alone.requires_grad:
            alone.square().mean(-1).sum().backward()
    for name, adapter in lorry.adapters(model).items():
        for key, parameter in adapter.named_parameters():
            wanted, have = parameter.grad, found[name][key]
            assert (wanted is None) == (have is None)
            if wanted is not None:
                torch.testing.assert_close(have, wanted, atol=2e-5, rtol=1e-3)


def test_input_gradients_flow_through_every_row(model):
    layer = model.model.layers[0].self_attn.q_proj
    batch = BATCHES["mixtures"]
    x = torch.randn(5, 3, 64, requires_grad=True)
    with lorry.rows(model, batch):
        (mixed,) = torch.autograd.grad(layer(x).square().sum(), x)
    for row, composition in enumerate(batch):
        lorry.activate(model, composition)
        (alone,) = torch.autograd.grad(layer(x[row : row + 1]).square().sum(), x)
        torch.testing.assert_close(mixed[row], alone[row], atol=1e-5, rtol=1e-4)


def test_rows_of_an_adapter_are_a_slice_where_the_batch_allows_it(model):
    adapters = lorry.adapters(model)
    rows = {p.adapter.name: p.rows for p in for_rows(BATCHES["sorted"], adapters).portions}
    assert rows == {"a": slice(0, 2), "b": slice(3, 4), "c": slice(4, 5)}
    scattered = {p.adapter.name: p.rows for p in for_rows(BATCHES["scattered"], adapters).portions}
    assert scattered["b"].tolist() == [0, 2] and scattered["a"].tolist() == [1, 4]


def test_nesting_and_exceptions_restore_what_was_active(model):
    ids = tokens(2)
    with torch.no_grad():
        lorry.activate(model, "a")
        outer = model(ids).logits
        with lorry.rows(model, ["b", None]):
            first = model(ids).logits
            with lorry.rows(model, [None, "c"]):
                model(ids)
            assert torch.equal(model(ids).logits, first)
            with pytest.raises(ZeroDivisionError), lorry.rows(model, ["a", "b"]):
                raise ZeroDivisionError
            assert torch.equal(model(ids).logits, first)
        assert torch.equal(model(ids).logits, outer)


def test_a_batch_that_does_not_fit_is_an_error(model):
    for rows, size in ((3, 4), (3, 2), (4, 3)):
        with pytest.raises(lorry.AdapterError, match=f"given {rows} rows.*batch of {size}"):
            with lorry.rows(model, ["a"] * rows):
                model(tokens(size))


@pytest.mark.parametrize("generation", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_generation_with_left_padding_and_beams(model, generation):
    ids, mask = tokens(4, 6), torch.ones(4, 6, dtype=torch.long)
    for row, padding in enumerate((0, 3, 1, 2)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    batch = ["a", None, {"a": 0.5, "c": 1.5}, "b"]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": 49, **generation}
    with torch.no_grad(), lorry.rows(model, batch, repeat=generation.get("num_beams", 1)):
        mixed = model.generate(ids, attention_mask=mask, **options)
    count = generation.get("num_return_sequences", 1)
    for row, composition in enumerate(batch):
        lorry.activate(model, composition)
        with torch.no_grad():
            alone = model.generate(ids[row : row + 1], attention_mask=mask[row : row + 1], **options)
        assert torch.equal(mixed[row * count : (row + 1) * count], alone)


def test_dropout_with_seeds_does_not_depend_on_the_other_rows_or_on_padding():
    model = llama().train()
    for name in "ab":
        off_zero(lorry.attach(model, lorry.LoRA(rank=2, dropout=0.5), name=name), ord(name), 0.3)
    ids, seeds = tokens(4), {"a": 5, "b": 6}

    def run(batch, chosen, seeds=seeds, ids=ids):
        with torch.no_grad(), lorry.rows(model, batch, seeds=seeds):
            return model(ids[chosen]).logits

    mixed = run(["a", "a", "b", "b"], [0, 1, 2, 3])
    torch.testing.assert_close(run(["a", "a"], [0, 1]), mixed[:2], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(run(["b", "a", "b", "a"], [2, 0, 3, 1]), mixed[[2, 0, 3, 1]], atol=1e-5, rtol=1e-4)
    assert torch.equal(run(["a", "a"], [0, 1]), run(["a", "a"], [0, 1]))
    assert not torch.allclose(run(["a", "a"], [0, 1], {"a": 7}), mixed[:2], atol=1e-2)
    longer = torch.cat([ids, tokens(4, 3, seed=8)], 1)
    torch.testing.assert_close(run(["a", "a"], [0, 1], ids=longer)[:, : ids.shape[1]], mixed[:2], atol=1e-5, rtol=1e-4)
    model.eval()
    assert torch.equal(run(["a"], [0], {"a": 1}), run(["a"], [0], {"a": 2}))


def test_dropout_without_seeds_follows_the_global_generator_and_differs_between_sites():
    model = llama(1).train()
    adapter = off_zero(lorry.attach(model, lorry.LoRA(rank=2, dropout=0.5)), std=0.3)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(model(tokens()).logits.detach())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert adapter.method.dropout == 0.5


def test_rows_in_inference_mode_then_in_training(model):
    ids = tokens(3)
    model = loaded()
    with torch.inference_mode(), lorry.rows(model, ["a", "b", {"c": 0.5}]):
        first = model(ids).logits.clone()
    lorry.activate(model, {"a": 1.0, "b": 0.5})
    with torch.inference_mode():
        model(ids)
    model(ids).logits.sum().backward()
    assert gradients(lorry.adapters(model)["b"])
    with lorry.rows(model, ["a", "b", {"c": 0.5}]):
        again = model(ids).logits
        again.sum().backward()
    torch.testing.assert_close(again.detach(), first.clone())


def test_encoder_with_whole_embeddings_adapted():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    model, ids = BertModel(config).eval(), tokens(3)
    for number, name in enumerate("ab"):
        targets = ["all-linear", "embeddings"]
        off_zero(lorry.attach(model, lorry.LoRA(rank=2), targets=targets, name=name), number, 0.3)
    with torch.no_grad():
        with lorry.rows(model, ["b", None, "a"]):
            mixed = model(ids).last_hidden_state
        for row, composition in enumerate(["b", None, "a"]):
            lorry.activate(model, composition)
            alone = model(ids[row : row + 1]).last_hidden_state
            torch.testing.assert_close(mixed[row : row + 1], alone, atol=1e-5, rtol=1e-4)


def test_many_adapters_one_row_each():
    """Decoding: one token for each row, more adapters than the kernel runs one by one."""
    model = llama(1)
    for number in range(8):
        off_zero(lorry.attach(model, lorry.LoRA(rank=1 + number % 3), name=str(number)), number, 0.2).train(False)
    batch = [str(n) for n in (3, 1, 4, 0, 5, 2, 6, 7)] + [None, "3"]
    ids = tokens(10, 1)
    with torch.no_grad():
        with lorry.rows(model, batch):
            mixed = [model(ids).logits for _ in range(2)]
        assert torch.equal(*mixed)
        for row, composition in enumerate(batch):
            lorry.activate(model, composition)
            torch.testing.assert_close(mixed[0][row], model(ids[row : row + 1]).logits[0], atol=1e-5, rtol=1e-4)


def test_a_whole_model_part_is_joined_from_groups_of_rows():
    """A block that returns a model output, with layers inside that have adapters of their own."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=60, num_labels=3
    )
    model = BertForSequenceClassification(config).eval()
    ids = torch.randint(0, 60, (4, 6))
    base = model(ids).logits
    lorry.attach(model, "full", targets=["bert", "classifier"], name="full")
    lorry.attach(model, lorry.LoRA(rank=2), train_also=["classifier"], name="lora")
    alone = {}
    for name, adapter in lorry.adapters(model).items():
        off_zero(adapter)
        lorry.activate(model, name)
        alone[name] = model(ids).logits
    names = ["full", None, "lora", "full"]
    with lorry.rows(model, names):
        mixed = model(ids).logits
    for row, name in enumerate(names):
        wanted = (base if name is None else alone[name])[row]
        torch.testing.assert_close(mixed[row], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["uni-lora", "mos", "vera", "dylora"])
def test_whole_modules_beside_a_method_whose_sites_share_tensors(method, tmp_path):
    model = llama()
    adapter = lorry.attach(model, method, targets="all-linear", train_also=["norm"], name="one", seed=0)
    before = model(tokens()).logits
    before.sum().backward()
    whole = {name: p for name, p in adapter.named_parameters() if name.startswith("model.norm")}
    assert whole and all(p.grad is not None for p in whole.values())
    adapter.save(tmp_path / "one")
    fresh = llama()
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if "lorry_" not in k}, strict=False)
    lorry.load(fresh, tmp_path / "one", name="one")
    lorry.activate(fresh, "one")
    with torch.no_grad():
        assert torch.equal(fresh.eval()(tokens()).logits, model.eval()(tokens()).logits)
