"""Models whose first dimension is not the rows: each row is right as if alone, or refused with what to do."""

import pytest
import torch
from core.tiny import gradients, off_zero, tokens
from torch import nn

import lorry

SIZES = [(2, 6), (2, 5), (3, 3), (4, 2)]  # multiples, none, equal, fewer positions than rows


def xlnet():
    import transformers

    config = transformers.XLNetConfig(vocab_size=50, d_model=32, n_layer=2, n_head=2, d_inner=48)
    return transformers.XLNetLMHeadModel(config)


def fsmt():
    import transformers

    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    inner = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 1, "decoder_layers": 1}
    words = {"src_vocab_size": 50, "tgt_vocab_size": 50, "max_position_embeddings": 32}
    config = transformers.FSMTConfig(langs=["en", "de"], d_model=32, **heads, **inner, **words)
    return transformers.FSMTForConditionalGeneration(config)


class Torch(nn.Module):
    """torch's own encoder with the length first, inside a model with the rows first."""

    def __init__(self, plain=False):
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 2, 48, dropout=0.0, batch_first=False)
        self.encoder = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)) if plain else layer
        self.head = nn.Linear(32, 50)

    def forward(self, input_ids):
        inside = self.encoder(self.embedding(input_ids).transpose(0, 1))
        return {"logits": self.head(inside.transpose(0, 1))}


def inputs_of(model, ids):
    both = type(model).__name__.startswith(("FSMT", "T5"))
    return {"input_ids": ids, **({"decoder_input_ids": ids} if both else {})}


def adapted(make, targets, method="lora"):
    torch.manual_seed(0)
    model = make().eval()
    for name in "ab":
        options = {"method": method, **({"rank": 2} if method != "lokr" else {})}
        off_zero(lorry.attach(model, options, targets=targets, name=name), ord(name), 0.3)
    return model


def expected(model, ids, choice):
    found = []
    for row, name in enumerate(choice):
        lorry.activate(model, name)
        found.append(model(**inputs_of(model, ids[row : row + 1]))["logits"][0])
    lorry.activate(model, None)
    return torch.stack(found)


CASES = {
    "xlnet": (xlnet, "all-linear"),
    "xlnet words": (xlnet, ["word_embedding"]),
    "fsmt": (fsmt, "all-linear"),
    "torch": (Torch, "all-linear"),
    "torch dora": (Torch, ["linear1", "linear2", "head"]),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", sorted(CASES))
def test_each_row_is_as_alone_where_the_length_lies_first(case, size):
    make, targets = CASES[case]
    model = adapted(make, targets, "dora" if case.endswith("dora") else "lora")
    ids = tokens(*size, vocabulary=49)
    choice = ["a", "b", None, "b"][: size[0]]
    with torch.no_grad():
        wanted = expected(model, ids, choice)
        with lorry.rows(model, choice):
            found = model(**inputs_of(model, ids))["logits"]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_gradients_of_rows_where_the_length_lies_first():
    model, ids = adapted(xlnet, "all-linear"), tokens(3, 3, vocabulary=49)
    choice = ["a", "b", "a"]
    adapters = lorry.adapters(model)
    expected(model, ids, choice).square().sum().backward()
    wanted = {name: gradients(adapter) for name, adapter in adapters.items()}
    for parameter in (p for a in adapters.values() for p in a.parameters()):
        parameter.grad = None
    with lorry.rows(model, choice):
        model(ids).logits.square().sum().backward()
    for name, adapter in adapters.items():
        for key, gradient in gradients(adapter).items():
            torch.testing.assert_close(gradient, wanted[name][key], atol=1e-4, rtol=1e-3)


def test_a_model_that_says_nothing_is_known_by_its_shapes():
    """Once seen with unequal lengths, it is right with equal ones too."""
    model = adapted(lambda: Torch(plain=True), ["encoder.0", "encoder.2"])
    for size in ((2, 6), (2, 5), (2, 2)):
        ids, choice = tokens(*size, vocabulary=49), ["a", "b"]
        with torch.no_grad():
            wanted = expected(model, ids, choice)
            with lorry.rows(model, choice):
                torch.testing.assert_close(model(ids)["logits"], wanted, atol=1e-5, rtol=1e-4)


def test_what_may_be_read_in_two_ways_is_refused():
    class Inner(nn.Module):
        """Gives its layer entries whose number is no length of the model's input."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return self.layer(x.repeat_interleave(3, 1).transpose(0, 1)).transpose(0, 1)

    model = adapted(Inner, ["layer"])
    with pytest.raises(lorry.AdapterError, match=r"sees 12 x 2 entries.*counts="), lorry.rows(model, ["a", "b"]):
        model(torch.randn(2, 4, 8))


def test_tables_of_relative_positions_have_no_rows():
    """They are looked up once for all rows: the same adapter for all is right, another one for each is refused."""
    import transformers

    def t5():
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 50}
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))

    model = adapted(t5, ["relative_attention_bias", "q"])
    for size in SIZES:
        ids = tokens(*size, vocabulary=49)
        with pytest.raises(lorry.AdapterError, match=r"relative_attention_bias' is run once for all rows together"):
            with lorry.rows(model, ["a", "b", "a", "b"][: size[0]]):
                model(**inputs_of(model, ids))
        with torch.no_grad():
            wanted = expected(model, ids, ["a"] * size[0])
            with lorry.rows(model, ["a"] * size[0]):
                found = model(**inputs_of(model, ids))["logits"]
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def banks(name):
    import transformers

    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_key_value_heads": 2}
    more = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48}
    if name == "jetmoe":
        return transformers.JetMoeForCausalLM(transformers.JetMoeConfig(kv_channels=8, **sizes, **more))
    sizes["num_attention_heads"] = 2
    if name == "mixtral":
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **more))
    more |= {"intermediate_size_mlp": 48, "head_dim": 16, "moe_layers": [0, 1], "num_experts_per_tok": 1}
    config = transformers.Llama4TextConfig(attention_chunk_size=16, pad_token_id=0, **sizes, **more)
    return transformers.Llama4ForCausalLM(config)


@pytest.mark.parametrize("name", ["llama4", "jetmoe", "mixtral"])
def test_banks_that_see_tokens_by_expert_are_refused(name):
    model = adapted(lambda: banks(name), "experts")
    for size in SIZES:
        ids = tokens(*size, vocabulary=49)
        choice = ["a", "b", "a", "b"][: size[0]]
        with torch.no_grad():
            if name == "mixtral":
                wanted = expected(model, ids, choice)
                with lorry.rows(model, choice):
                    torch.testing.assert_close(model(ids).logits, wanted, atol=1e-5, rtol=1e-4)
                continue
            with pytest.raises(lorry.AdapterError, match="tokens sorted by expert"), lorry.rows(model, choice):
                model(ids)
