"""Single files in kohya's and diffusers' naming."""

import json

import pytest
import torch
from files.tiny_models import close, output, unet
from safetensors.torch import save_file

import lorry
from lorry import open as open_adapter

pytest.importorskip("diffusers")

LINEAR = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
CONV = "mid_block.resnets.0.conv1"
POINTWISE = "down_blocks.1.attentions.0.proj_in"


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.3


def expected(deltas):
    """The output of the U-Net with weights changed by ``{path: delta}``."""
    model = unet()
    with torch.no_grad():
        for path, delta in deltas.items():
            weight = model.get_submodule(path).weight
            weight.add_(delta.reshape(weight.shape))
    return output(model)


def kohya():
    tensors = {}
    for path in (LINEAR, OUT):
        name = "lora_unet_" + path.replace(".", "_")
        tensors |= {
            f"{name}.lora_down.weight": draw(3, 16),
            f"{name}.lora_up.weight": draw(16, 3),
            f"{name}.alpha": torch.tensor(1.5),
        }
    name = "lora_unet_" + CONV.replace(".", "_")
    tensors |= {f"{name}.lora_down.weight": draw(2, 16, 3, 3), f"{name}.lora_up.weight": draw(16, 2, 1, 1)}
    return tensors


def kohya_deltas(t):
    get = lambda path, end: t["lora_unet_" + path.replace(".", "_") + end]  # noqa: E731
    deltas = {p: 0.5 * get(p, ".lora_up.weight") @ get(p, ".lora_down.weight") for p in (LINEAR, OUT)}
    deltas[CONV] = get(CONV, ".lora_up.weight").flatten(1) @ get(CONV, ".lora_down.weight").flatten(1)
    return deltas


def test_kohya(tmp_path):
    tensors = kohya()
    save_file(tensors, tmp_path / "my style.safetensors", {"ss_sd_model_name": "some-base"})
    model = unet()
    adapter = lorry.load(model, tmp_path / "my style.safetensors")
    close(output(model), expected(kohya_deltas(tensors)))
    assert adapter.name == "my_style" and adapter.receipt.tensors_applied == adapter.receipt.tensors_total == 8
    assert adapter.entries[LINEAR].method == lorry.LoRA(rank=3, alpha=1.5)
    adapter.save(tmp_path / "folder", format="peft")
    again = unet()
    lorry.load(again, tmp_path / "folder")
    close(output(again), output(model), 1e-6)


def test_kohya_linear_stored_as_pointwise_convolution_and_the_other_way(tmp_path):
    name = "lora_unet_" + LINEAR.replace(".", "_")
    tensors = {f"{name}.lora_down.weight": draw(3, 16, 1, 1), f"{name}.lora_up.weight": draw(16, 3, 1, 1)}
    point = "lora_unet_" + POINTWISE.replace(".", "_")
    tensors |= {f"{point}.lora_down.weight": draw(3, 16), f"{point}.lora_up.weight": draw(16, 3)}
    save_file(tensors, tmp_path / "a.safetensors")
    model = unet()
    lorry.load(model, tmp_path / "a.safetensors")
    delta = draw(16, 3) @ draw(3, 16)
    flat = tensors[f"{name}.lora_up.weight"].flatten(1) @ tensors[f"{name}.lora_down.weight"].flatten(1)
    close(output(model), expected({LINEAR: flat, POINTWISE: delta}))


def test_kohya_convolution_in_three_steps_is_folded_exactly(tmp_path):
    name = "lora_unet_" + CONV.replace(".", "_")
    down, mid, up = draw(3, 16, 1, 1), draw(3, 3, 3, 3), draw(16, 3, 1, 1)
    save_file(
        {f"{name}.lora_down.weight": down, f"{name}.lora_mid.weight": mid, f"{name}.lora_up.weight": up},
        tmp_path / "a.safetensors",
    )
    model = unet()
    receipt = lorry.load(model, tmp_path / "a.safetensors").receipt
    conv = torch.nn.functional.conv2d
    # the kernel of three convolutions in a row, measured by what they do to unit impulses
    impulses = torch.eye(16).reshape(16, 16, 1, 1)
    response = conv(conv(conv(impulses, down), mid, padding=2), up)
    delta = response.permute(1, 0, 2, 3).flip(2, 3)
    close(output(model), expected({CONV: delta}))
    assert receipt.tensors_applied == 3 and "lora_mid" in receipt.notes[0]


def test_components_of_other_models_are_counted_and_named(tmp_path):
    tensors = kohya()
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    tensors |= {f"{text}.lora_down.weight": draw(3, 16), f"{text}.lora_up.weight": draw(16, 3)}
    save_file(tensors, tmp_path / "a.safetensors")
    model = unet()
    receipt = lorry.load(model, tmp_path / "a.safetensors").receipt
    assert (receipt.tensors_applied, receipt.tensors_total) == (
        8,
        10,
    ) and "2 tensors of 'te'" in receipt.notes[0]
    close(output(model), expected(kohya_deltas(tensors)))
    both = torch.nn.ModuleDict({"unet": unet()})
    with pytest.raises(lorry.CheckpointError, match="text_model_encoder|no such site"):
        lorry.load(both["unet"].mid_block, tmp_path / "a.safetensors")
    assert lorry.load(both, tmp_path / "a.safetensors").receipt.sites == 3


def diffusers_files():
    a, b = draw(3, 16), draw(16, 3)
    head, out = LINEAR.rpartition(".")[0], OUT
    prefix = f"unet.{head}"
    return (
        a,
        b,
        {
            "new": {f"unet.{LINEAR}.lora_A.weight": a, f"unet.{LINEAR}.lora_B.weight": b},
            "bare": {f"{LINEAR}.lora_A.weight": a, f"{LINEAR}.lora_B.weight": b},
            "old": {f"unet.{LINEAR}.lora.down.weight": a, f"unet.{LINEAR}.lora.up.weight": b},
            "layer": {
                f"unet.{LINEAR}.lora_linear_layer.down.weight": a,
                f"unet.{LINEAR}.lora_linear_layer.up.weight": b,
            },
            "processor": {
                f"{prefix}.processor.to_q_lora.down.weight": a,
                f"{prefix}.processor.to_q_lora.up.weight": b,
            },
            "processor out": {
                f"{prefix}.processor.to_out_lora.down.weight": a,
                f"{prefix}.processor.to_out_lora.up.weight": b,
            },
            "peft out": {f"unet.{out}.lora_A.weight": a, f"unet.{out}.lora_B.weight": b},
        },
    )


@pytest.mark.parametrize("naming", list(diffusers_files()[2]))
def test_diffusers(naming, tmp_path):
    a, b, files = diffusers_files()
    save_file(files[naming], tmp_path / "a.safetensors")
    model = unet()
    lorry.load(model, tmp_path / "a.safetensors")
    close(output(model), expected({OUT if "out" in naming else LINEAR: b @ a}))


@pytest.mark.parametrize("prefix, extra", [("unet.", {}), ("", {}), ("unet.", {"use_rslora": True})])
def test_what_the_real_diffusers_writes(prefix, extra, tmp_path):
    """With alpha in the file's metadata, as pipelines of diffusers save it."""
    from files.tiny_models import stir_peft
    from peft import LoraConfig

    model = unet()
    model.add_adapter(
        LoraConfig(r=3, lora_alpha=7, target_modules=["to_q", "conv1"], rank_pattern={"conv1": 2}, **extra)
    )
    stir_peft(model)
    wanted = output(model)
    if prefix:
        from diffusers.loaders.lora_base import _pack_dict_with_prefix
        from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
        from peft import get_peft_model_state_dict

        tensors = _pack_dict_with_prefix(convert_state_dict_to_diffusers(get_peft_model_state_dict(model)), "unet")
        config = {
            f"unet.{k}": sorted(v) if isinstance(v, set) else v
            for k, v in model.peft_config["default"].to_dict().items()
        }
        metadata = {"lora_adapter_metadata": json.dumps(config)}
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "a.safetensors", metadata)
    else:
        model.save_lora_adapter(tmp_path, weight_name="a.safetensors")
    fresh = unet()
    lorry.load(fresh, tmp_path / "a.safetensors")
    close(output(fresh), wanted)


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda t, n: t.pop(f"{n}.lora_up.weight"), "lacks B"),
        (lambda t, n: t.update({f"{n}.alpha": torch.tensor(-1.0)}), "alpha .* one positive number"),
        (lambda t, n: t.update({f"{n}.lora_up.weight": draw(15, 3)}), "must be of shape"),
        (
            lambda t, n: t.update({f"{n}x.lora_up.weight": draw(16, 3), f"{n}x.lora_down.weight": draw(3, 16)}),
            "no such site",
        ),
        (lambda t, n: t.update({f"{n}.hada_w1_a": draw(2, 2)}), "LoHa"),
        (lambda t, n: t.update({f"{n}.lokr_w1": draw(2, 2)}), "LoKr"),
        (lambda t, n: t.update({f"{n}.dora_scale": draw(2, 2)}), "kohya's DoRA"),
        (lambda t, n: t.update({f"{n}.novel": draw(2, 2)}), "1 tensors of 9 in no known naming"),
        (lambda t, n: t.update({f"{n}.lora_up.weight": draw(16, 3) * float("nan")}), "NaN"),
    ],
)
def test_single_files_are_exact_or_fail(change, match, tmp_path):
    tensors, name = kohya(), "lora_unet_" + LINEAR.replace(".", "_")
    change(tensors, name)
    save_file(tensors, tmp_path / "a.safetensors")
    model = unet()
    before = output(model)
    with pytest.raises(lorry.CheckpointError, match=match):
        lorry.load(model, tmp_path / "a.safetensors")
    assert lorry.adapters(model) == {} and torch.equal(output(model), before)


def test_files_that_are_no_adapters(tmp_path):
    save_file({"model.layers.0.weight": draw(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(lorry.CheckpointError, match="no known naming"):
        lorry.load(unet(), tmp_path / "a.safetensors")
    (tmp_path / "b.gguf").write_text("x")
    with pytest.raises(lorry.CheckpointError, match="neither a folder nor"):
        lorry.load(unet(), tmp_path / "b.gguf")


def test_info_of_a_single_file(tmp_path):
    save_file(kohya(), tmp_path / "a.safetensors")
    info = open_adapter(tmp_path / "a.safetensors")
    assert info.format == "kohya" and sorted(info.ranks.values()) == [2, 3, 3] and info.fingerprint is None
    path = CONV.replace(".", "_")
    assert info.tensors(path)["A"].shape == (2, 144) and info.tensors(path)["B"].shape == (16, 2)
