"""The public verbs on whole pipelines: one adapter, one file, both ways; rows right through the pipelines' calls."""

import pytest
import torch
from diffusion import tiny
from diffusion.test_sampling import NAMES, own_call

import lorry

PROMPT = ["a photo of a cat"]
TARGETS = {
    "sd": {"unet": "attention", "text_encoder": ["q_proj", "out_proj"]},
    "sdxl": {"unet": "attention", "text_encoder": ["q_proj", "out_proj"], "text_encoder_2": ["v_proj", "out_proj"]},
    "sd3": {"transformer": "attention", "text_encoder": ["q_proj"]},
    "flux": {"transformer": "attention", "text_encoder": ["q_proj", "out_proj"]},
    "qwen": {"transformer": "attention"},
}


def stirred(bundle, seed=1, size=0.4):
    """An adapter off its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in bundle.parts.values():
            for _, tensor, spec in part.named_tensors():
                if spec.trained:
                    tensor.add_(size * torch.randn(tensor.shape, generator=generator))
    return bundle


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("format", ["lorry", "diffusers", "kohya"])
def test_one_adapter_one_file_both_ways(name, format, clean, tmp_path):
    pipeline = clean(name)
    bare = own_call(pipeline, name, PROMPT, [1])
    bundle = stirred(lorry.attach(pipeline, lorry.LoRA(rank=2, alpha=2), targets=TARGETS[name], name="style"))
    assert set(bundle.parts) == set(TARGETS[name]) and set(lorry.adapters(pipeline)) == {"style"}
    wanted = own_call(pipeline, name, PROMPT, [1])
    assert (wanted.float() - bare.float()).abs().max() > 2
    path = tmp_path / ("style" if format == "lorry" else "style.safetensors")
    bundle.save(path, format=format)
    bundle.detach()
    assert torch.equal(own_call(pipeline, name, PROMPT, [1]), bare)
    loaded = lorry.load(pipeline, path)
    assert all(r.tensors_applied == r.tensors_total for r in loaded.receipts.values())
    assert torch.equal(own_call(pipeline, name, PROMPT, [1]), wanted)


# diffusers reads no files in kohya's naming for SD3, and for Qwen-Image only those of other trainers
@pytest.mark.parametrize(
    "name, format", [*((n, "diffusers") for n in NAMES), *((n, "kohya") for n in ("sd", "sdxl", "flux"))]
)
def test_diffusers_itself_loads_the_file_to_the_same_picture(name, format, clean, tmp_path):
    pipeline = clean(name)
    bundle = stirred(lorry.attach(pipeline, lorry.LoRA(rank=2, alpha=2), targets=TARGETS[name]))
    wanted = own_call(pipeline, name, PROMPT, [1])
    bundle.save(tmp_path / "a.safetensors", format=format)
    bundle.detach()
    other = tiny.MAKERS[name]()  # what peft leaves behind stays with it
    other.set_progress_bar_config(disable=True)
    other.load_lora_weights(tmp_path / "a.safetensors")
    found = own_call(other, name, PROMPT, [1])
    assert (found.float() - wanted.float()).abs().max() <= 1


def test_names_of_older_text_encoders_are_read(clean, tmp_path):
    from safetensors.torch import load_file, save_file

    pipeline = clean("sd")
    bundle = stirred(lorry.attach(pipeline, lorry.LoRA(rank=2), targets=TARGETS["sd"]))
    wanted = own_call(pipeline, "sd", PROMPT, [1])
    bundle.save(tmp_path / "a.safetensors", format="diffusers")
    bundle.detach()
    tensors = load_file(tmp_path / "a.safetensors")
    older = {k.replace("text_encoder.encoder", "text_encoder.text_model.encoder"): v for k, v in tensors.items()}
    assert older.keys() != tensors.keys()
    save_file(older, tmp_path / "older.safetensors")
    lorry.load(pipeline, tmp_path / "older.safetensors")
    assert (own_call(pipeline, "sd", PROMPT, [1]).float() - wanted.float()).abs().max() <= 1


@pytest.mark.parametrize("targets", [{"text_encoder": ["q_proj"]}, "attention:cross"])
def test_an_adapter_of_one_root_comes_back_to_it(targets, clean, tmp_path):
    pipeline = clean("sd")
    bundle = stirred(lorry.attach(pipeline, lorry.LoRA(rank=2), targets=targets))
    wanted = own_call(pipeline, "sd", PROMPT, [1])
    bundle.save(tmp_path / "a")
    bundle.detach()
    assert set(lorry.load(pipeline, tmp_path / "a").parts) == set(bundle.parts)
    assert torch.equal(own_call(pipeline, "sd", PROMPT, [1]), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_each_picture_of_a_call_has_its_own_composition(name, clean):
    pipeline = clean(name)
    stirred(lorry.attach(pipeline, lorry.LoRA(rank=2), targets=TARGETS[name], name="one"), seed=2)
    stirred(lorry.attach(pipeline, lorry.LoRA(rank=2), targets=TARGETS[name], name="two"), seed=3)
    lorry.activate(pipeline, None)
    chosen = [{"one": 1.0}, None, {"one": 0.5, "two": 0.7}]
    prompts = ["a photo of a cat", "a red square", "a blue dog"]
    prompts = ["a photo of a cat"] * 3 if name == "qwen" else prompts  # lengths differ, so that masks would, too
    alone = []
    for prompt, composition, seed in zip(prompts, chosen, [5, 6, 7], strict=True):
        with lorry.activate(pipeline, composition):
            alone.append(own_call(pipeline, name, [prompt], [seed]))
    with lorry.rows(pipeline, chosen):
        together = own_call(pipeline, name, prompts, [5, 6, 7])
    assert (together.float() - torch.cat(alone).float()).abs().max() <= 1
    with lorry.rows(pipeline, chosen, pictures=2):
        several = own_call(pipeline, name, prompts, [5, 1, 6, 2, 7, 3], num_images_per_prompt=2)
    assert (several[::2].float() - torch.cat(alone).float()).abs().max() <= 1
    ours = lorry.diffusion.sample(
        pipeline, prompts, compositions=chosen, seeds=[5, 6, 7], steps=3, guidance=3.0, height=16, width=16,
        negative="dog" if name in ("flux", "qwen") else None, distilled=3.5 if name == "flux" else None,
    )  # fmt: skip
    assert (ours.pixels.float() - torch.cat(alone).float()).abs().max() <= 1


def test_fuse_and_blocks_that_end(clean):
    pipeline = clean("sd")
    bare = own_call(pipeline, "sd", PROMPT, [1])
    bundle = stirred(lorry.attach(pipeline, lorry.LoRA(rank=2), targets=TARGETS["sd"], name="style"))
    wanted = own_call(pipeline, "sd", PROMPT, [1])
    with lorry.activate(pipeline, None):
        assert torch.equal(own_call(pipeline, "sd", PROMPT, [1]), bare)
    assert torch.equal(own_call(pipeline, "sd", PROMPT, [1]), wanted)
    receipts = bundle.fuse()
    assert set(receipts) == {"unet", "text_encoder"}
    assert (own_call(pipeline, "sd", PROMPT, [1]).float() - wanted.float()).abs().max() <= 1
    bundle.unfuse()


def test_a_file_of_another_family_is_refused(clean, tmp_path):
    sdxl, flux = clean("sdxl"), clean("flux")
    lorry.attach(sdxl, lorry.LoRA(rank=2), targets=TARGETS["sdxl"]).save(tmp_path / "a.safetensors", format="diffusers")
    with pytest.raises(lorry.CheckpointError, match="root 'unet', which was not given"):
        lorry.load(flux, tmp_path / "a.safetensors")
    assert lorry.adapters(flux) == {}
    sd = clean("sd")
    with pytest.raises(lorry.CheckpointError, match="root 'text_encoder_2', which was not given"):
        lorry.load(sd, tmp_path / "a.safetensors")
    assert lorry.adapters(sd) == {}


@pytest.mark.parametrize("format", ["lorry", "diffusers", "kohya"])
@pytest.mark.parametrize("name, root", [("sd", "text_encoder"), ("sdxl", "text_encoder_2"), ("sd3", "text_encoder")])
def test_a_file_with_a_part_for_a_missing_text_encoder_is_refused(name, root, format, clean, tmp_path):
    pipeline = clean(name)
    network = next(iter(TARGETS[name]))
    whole, alone = (tmp_path / (n if format == "lorry" else f"{n}.safetensors") for n in ("whole", "alone"))
    for targets, path in ((TARGETS[name], whole), ({root: TARGETS[name][root]}, alone)):
        bundle = stirred(lorry.attach(pipeline, lorry.LoRA(rank=2), targets=targets))
        bundle.save(path, format=format)
        bundle.detach()
    bare = type(pipeline)(**{**pipeline.components, root: None})
    before = tiny.facts(bare)
    with pytest.raises(
        lorry.CheckpointError, match=f"'{root}', which was not given.*made with it.*'{network}' alone, "
    ):
        lorry.load(bare, whole)
    with pytest.raises(lorry.CheckpointError, match=rf"'{root}', which was not given.*made with it\)\.$"):
        lorry.load(bare, alone)
    assert tiny.facts(bare) == before and lorry.adapters(bare) == {}
    # what the text says to do works, and the network's part is then all there is
    found = lorry.open(whole).components[network].load(getattr(bare, network))
    assert set(lorry.adapters(bare)[found.name].parts) == {network}
    found.detach()


@pytest.mark.parametrize("name, root", [("sd", "text_encoder"), ("sdxl", "text_encoder"), ("flux", "text_encoder_2")])
def test_pictures_without_a_text_encoder_are_refused(name, root, clean):
    pipeline = clean(name)
    stirred(lorry.attach(pipeline, lorry.LoRA(rank=2), targets=TARGETS[name], name="style"))
    bare = type(pipeline)(**{**pipeline.components, root: None})
    before = tiny.facts(bare)
    with pytest.raises(lorry.diffusion.DiffusionError, match=f"has no {root}, which reads.*Make the pipeline with it"):
        lorry.diffusion.sample(bare, PROMPT, compositions="style", seeds=[0], steps=1)
    assert tiny.facts(bare) == before


def test_stable_diffusion_3_reads_prompts_without_its_third_text_encoder(clean):
    pipeline = clean("sd3")
    bare = type(pipeline)(**{**pipeline.components, "text_encoder_3": None, "tokenizer_3": None})
    made = lorry.diffusion.sample(bare, PROMPT, seeds=[0], steps=1, height=16, width=16)
    assert made.pixels.shape[-2:] == (16, 16)
