"""Adapters of the real PEFT in half precision, held against the same numbers computed in float64."""

import copy

import peft
import pytest
import torch
from files.tiny_models import gpt2, llama, mixtral, output, stir_peft

import lorry

#: Model, what PEFT is asked for, and how many roundings of the output (units of its last place) are allowed for.
CASES = {
    "dora": (llama, dict(use_dora=True, target_modules=["q_proj", "down_proj"]), 6),
    "dora, transposed": (gpt2, dict(use_dora=True, target_modules=["c_attn"], fan_in_fan_out=True), 6),
    "dora, embedding": (llama, dict(use_dora=True, target_modules=["embed_tokens"]), 6),
    "lora": (llama, dict(target_modules=["q_proj", "down_proj"]), 6),
    "experts": (
        lambda: mixtral(intermediate_size=16),
        dict(target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        6,
    ),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_as_near_to_float64_as_rounding_allows_and_as_peft_when_merged(case, dtype, tmp_path):
    make, config, units = CASES[case]
    base = make().to(dtype)
    peer = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, **config), autocast_adapter_dtype=False)
    stir_peft(peer).save_pretrained(str(tmp_path / "a"))
    exact = copy.deepcopy(base).double()
    if case == "experts":
        exact.set_experts_implementation("eager")  # the grouped product has no float64
    lorry.load(exact, tmp_path / "a", dtype=torch.float64)
    wanted = output(exact)
    allowed = units * torch.finfo(dtype).eps * float(wanted.abs().max())
    adapter = lorry.load(base, tmp_path / "a")
    assert float((output(base) - wanted).abs().max()) <= allowed
    adapter.fuse()
    merged = float((output(base) - wanted).abs().max())
    theirs = peft.PeftModel.from_pretrained(make().to(dtype), str(tmp_path / "a")).merge_and_unload().eval()
    assert merged <= max(1.5 * float((output(theirs) - wanted).abs().max()), allowed / units)


def test_the_length_of_a_channel_is_not_rounded_before_it_is_used():
    """A frozen DoRA in bfloat16: what multiplies a channel is its magnitude by its exact length, rounded once."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 48)).to(torch.bfloat16)
    adapter = lorry.attach(model, {"method": "dora", "rank": 4}, dtype=torch.bfloat16)
    with torch.no_grad():
        for _, tensor, _ in adapter.named_tensors():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)).to(tensor.dtype))
    adapter.train(False)
    entry = adapter.entries["0"]
    tensors = {name: tensor.double() for name, tensor in entry.tensors().items()}
    sums = model[0].weight.detach().double() + entry.method.scale(entry.site) * tensors["B"] @ tensors["A"]
    exact = tensors["magnitude"] / sums.norm(dim=1)
    found = entry.method.gain(*entry.method.factors(entry.tensors(), entry.site), entry.tensors(), entry.site)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)
