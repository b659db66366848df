"""Files in the original Flux's names, loaded into diffusers' Flux: fused projections are cut exactly."""

import pytest
import torch
from safetensors.torch import save_file

import lorry
from lorry.formats.snapshot import as_file

pytest.importorskip("diffusers")

from diffusion import tiny  # noqa: E402

WIDTH, MLP, RANK, ALPHA = 16, 64, 3, 1.5
QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
#: The original's layer -> inputs, and diffusers' layers, which hold its outputs in this order.
DOUBLE = {
    "img_attn.qkv": (WIDTH, QKV),
    "txt_attn.qkv": (WIDTH, ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    "img_attn.proj": (WIDTH, ("attn.to_out.0",)),
    "txt_attn.proj": (WIDTH, ("attn.to_add_out",)),
    "img_mlp.0": (WIDTH, ("ff.net.0.proj",)),
    "img_mlp.2": (MLP, ("ff.net.2",)),
    "txt_mlp.0": (WIDTH, ("ff_context.net.0.proj",)),
    "txt_mlp.2": (MLP, ("ff_context.net.2",)),
    "img_mod.lin": (WIDTH, ("norm1.linear",)),
    "txt_mod.lin": (WIDTH, ("norm1_context.linear",)),
}
SINGLE = {
    "linear1": (WIDTH, (*QKV, "proj_mlp")),
    "linear2": (WIDTH + MLP, ("proj_out",)),
    "modulation.lin": (WIDTH, ("norm.linear",)),
}
AROUND = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}


def layers(model):
    """The original's layers in a tiny Flux: path -> inputs, and the paths of diffusers' layers."""
    found = {}
    for index in (0, 1):
        for kind, table, blocks in (
            ("double", DOUBLE, "transformer_blocks"),
            ("single", SINGLE, "single_transformer_blocks"),
        ):
            for name, (inputs, parts) in table.items():
                found[f"{kind}_blocks.{index}.{name}"] = (inputs, [f"{blocks}.{index}.{part}" for part in parts])
    return found | {name: (model.get_submodule(path).in_features, [path]) for name, path in AROUND.items()}


def written(path, model, naming, wanted=None):
    """A file in the original's names, and the factors by the original's paths."""
    generator = torch.Generator().manual_seed(4)
    tensors, factors = {}, {}
    for name, (inputs, parts) in layers(model).items():
        if wanted is not None and name not in wanted:
            continue
        outputs = sum(model.get_submodule(part).out_features for part in parts)
        a, b = (0.3 * torch.randn(shape, generator=generator) for shape in ((RANK, inputs), (outputs, RANK)))
        if naming == "kohya":
            flat = "lora_unet_" + name.replace(".", "_")
            own = {"lora_down.weight": a, "lora_up.weight": b, "alpha": torch.tensor(ALPHA)}
        else:
            flat, own = f"{naming}{name}", {"lora_A.weight": a, "lora_B.weight": b, "alpha": torch.tensor(ALPHA)}
        tensors |= {f"{flat}.{end}": tensor for end, tensor in own.items()}
        factors[name] = (a, b)
    save_file(tensors, path)
    return tensors, factors


@pytest.fixture
def model():
    return tiny.flux().transformer


@pytest.mark.parametrize("naming", ["kohya", "", "diffusion_model."])
def test_every_layer_has_the_rows_of_the_fused_update(naming, model, tmp_path):
    tensors, factors = written(tmp_path / "a.safetensors", model, naming)
    adapter = lorry.load(model, tmp_path / "a.safetensors")
    assert adapter.receipt.tensors_applied == adapter.receipt.tensors_total == len(tensors)
    file, seen = as_file(adapter), set()
    for name, (_, parts) in layers(model).items():
        a, b = (t.double() for t in factors[name])
        fused = ALPHA / RANK * (b @ a)
        if name.startswith("final_layer.ada"):  # shift before scale there, scale before shift here
            fused = torch.cat([fused[WIDTH:], fused[:WIDTH]])
        sizes = [model.get_submodule(part).out_features for part in parts]
        for part, rows in zip(parts, fused.split(sizes), strict=True):
            assert (file.delta(part) - rows).abs().max() <= 1e-15
            seen.add(part)
    assert seen == {site.path for site in adapter.sites}
    assert any("original Flux" in note for note in adapter.receipt.notes)


@pytest.mark.parametrize("trainable", [False, True])
def test_parts_share_no_memory(trainable, model, tmp_path):
    written(tmp_path / "a.safetensors", model, "kohya", {"double_blocks.0.img_attn.qkv"})
    adapter = lorry.load(model, tmp_path / "a.safetensors", trainable=trainable)
    storages = [tensor.untyped_storage().data_ptr() for _, tensor, _ in adapter.named_tensors()]
    assert len(storages) == 6 and len(set(storages)) == 6


def test_a_pipeline_takes_the_file_with_both_text_encoders(tmp_path):
    pipeline = tiny.flux()
    tensors, _ = written(tmp_path / "a.safetensors", pipeline.transformer, "kohya", {"single_blocks.1.linear1"})
    texts = {
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": "text_encoder",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q": "text_encoder_2",
    }
    for name in texts:
        tensors |= {f"{name}.lora_down.weight": torch.ones(1, 16), f"{name}.lora_up.weight": torch.ones(16, 1)}
    save_file(tensors, tmp_path / "b.safetensors")
    bundle = lorry.load(pipeline, tmp_path / "b.safetensors")
    assert set(bundle.parts) == {"transformer", *texts.values()}
    assert all(r.tensors_applied == r.tensors_total for r in bundle.receipts.values())
    assert {site.path for site in bundle.parts["transformer"].sites} == {
        f"single_transformer_blocks.1.{part}" for part in (*QKV, "proj_mlp")
    }


def test_diffusers_gives_the_same_weights(tmp_path):
    pipeline = tiny.flux()
    # diffusers itself cuts linear1 at the sizes of the full Flux alone
    blocks = {n for n in layers(pipeline.transformer) if "_blocks." in n and "linear1" not in n}
    written(tmp_path / "a.safetensors", pipeline.transformer, "kohya", blocks)
    state = type(pipeline).lora_state_dict(tmp_path / "a.safetensors")
    adapter = lorry.load(pipeline, tmp_path / "a.safetensors").parts["transformer"]
    file = as_file(adapter)
    for path in file:
        a, b = (state[f"transformer.{path}.lora_{which}.weight"].double() for which in "AB")
        assert (file.delta(path) - b @ a).abs().max() <= 1e-6
    assert len(state) == 2 * len(file.sites)


def test_names_of_the_library_itself_are_read_as_they_are(model, tmp_path):
    a, b = torch.ones(2, WIDTH), torch.ones(WIDTH, 2)
    name = "lora_transformer_single_transformer_blocks_0_attn_to_k"
    save_file({f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}, tmp_path / "a.safetensors")
    adapter = lorry.load(model, tmp_path / "a.safetensors")
    assert [site.path for site in adapter.sites] == ["single_transformer_blocks.0.attn.to_k"]
    assert adapter.receipt.tensors_applied == 2 and not adapter.receipt.notes


def test_a_model_with_the_original_layers_takes_them_uncut(tmp_path):
    fused = torch.nn.ModuleDict({"double_blocks": torch.nn.ModuleList([torch.nn.Module()])})
    fused["double_blocks"][0].img_attn = torch.nn.ModuleDict({"qkv": torch.nn.Linear(WIDTH, 3 * WIDTH)})
    written(tmp_path / "a.safetensors", tiny.flux().transformer, "kohya", {"double_blocks.0.img_attn.qkv"})
    assert [s.path for s in lorry.load(fused, tmp_path / "a.safetensors").sites] == ["double_blocks.0.img_attn.qkv"]


@pytest.mark.parametrize("outputs, inputs", [(3 * WIDTH - 3, WIDTH), (3 * WIDTH + MLP, WIDTH), (3 * WIDTH, WIDTH + 1)])
def test_wrong_sizes_are_refused(outputs, inputs, model, tmp_path):
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {"lora_down.weight": torch.ones(2, inputs), "lora_up.weight": torch.ones(outputs, 2)}
    save_file({f"{name}.{end}": tensor for end, tensor in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(
        lorry.CheckpointError, match=f"{inputs} inputs and {outputs} outputs .*16 inputs and 48 outputs"
    ):
        lorry.load(model, tmp_path / "a.safetensors")
    assert not lorry.adapters(model)


def test_a_block_that_the_model_lacks_is_refused_by_name(model, tmp_path):
    name = "lora_unet_double_blocks_7_img_attn_qkv"
    tensors = {"lora_down.weight": torch.ones(2, WIDTH), "lora_up.weight": torch.ones(3 * WIDTH, 2)}
    save_file({f"{name}.{end}": tensor for end, tensor in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(lorry.CheckpointError, match="double_blocks_7_img_attn_qkv"):
        lorry.load(model, tmp_path / "a.safetensors")
