"""Models whose positions depend on their company are refused; others with scaled positions are served."""

import pytest
import torch

import lorry
from lorry.serving import Completed, Engine, Output, Request, Sampling, Usage

transformers = pytest.importorskip("transformers")
SHAPE = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 16, "pad_token_id": None, "eos_token_id": None,
    "bos_token_id": None,
}  # fmt: skip


def scaled(kind, **given):
    rope = {"rope_type": kind, "rope_theta": 10000.0, **given}
    torch.manual_seed(0)
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 8}
        config = transformers.Phi3Config(**SHAPE, rope_parameters=rope, original_max_position_embeddings=8)
        return transformers.Phi3ForCausalLM(config).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, rope_parameters=rope)).eval()


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_scaled_by_the_longest_of_a_batch_are_refused(kind):
    with pytest.raises(lorry.OptionError, match=f"rotary_emb' scales them as '{kind}'.*Load the model with another"):
        Engine(scaled(kind, factor=2.0), None)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_positions_scaled_each_for_itself_are_served(kind):
    model = scaled(kind, factor=2.0)
    engine = Engine(model, None)
    (found,) = engine.generate([Request("a", (3, 4, 5), sampling=Sampling(max_tokens=4))])
    ids = torch.tensor([[3, 4, 5]])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert list(found.tokens) == expected[0, 3:].tolist()
    engine.close()


def test_outputs_of_one_request_amount_to_one_answer():
    parts = [Output("a", (1,), "x"), Output("a", (2, 3), "yz", finish="stop", stop="!", usage=Usage(4, 0, 3))]
    assert Completed.of(parts) == Completed("a", (1, 2, 3), "xyz", finish="stop", stop="!", usage=Usage(4, 0, 3))
