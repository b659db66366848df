"""What samplers that replace parts of the loop rely on, and that nothing is left behind."""

import pytest
import torch
from diffusion import tiny
from diffusion.test_pipelines import PROMPT, TARGETS, stirred
from diffusion.test_sampling import own_call

import lorry
from lorry.diffusion import (
    DiffusionError,
    denoise,
    family_of,
    following,
    prompted,
    sample,
    text_blocks,
    within,
)

SETTINGS = {"steps": 3, "guidance": 3.0, "height": 16, "width": 16}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_behind_when_a_sample_breaks_off(error, clean):
    pipeline = clean("sd")
    bundle = stirred(lorry.attach(pipeline, lorry.LoRA(rank=2), targets=TARGETS["sd"], name="style"))
    lorry.activate(pipeline, None)
    before, wanted = tiny.facts(pipeline), own_call(pipeline, "sd", PROMPT, [1])

    def stop(done, total):
        if done == 2:
            raise error

    def inside(*_):
        raise error

    with pytest.raises(error):
        sample(pipeline, PROMPT, compositions="style", callback=stop, **SETTINGS)
    handle = pipeline.unet.mid_block.register_forward_hook(inside)
    with pytest.raises(error):
        sample(pipeline, PROMPT, compositions="style:0.5", **SETTINGS)
    with pytest.raises(error), lorry.rows(pipeline, ["style"]), following(pipeline):
        own_call(pipeline, "sd", PROMPT, [1])
    handle.remove()
    assert tiny.facts(pipeline) == before
    assert torch.equal(own_call(pipeline, "sd", PROMPT, [1]), wanted)
    assert set(bundle.parts) == {"unet", "text_encoder"}


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_weights_by_time_in_the_loop_and_in_the_pipelines_own_call(name, clean):
    pipeline = clean(name)
    root = "unet" if name == "sd" else "transformer"
    stirred(lorry.attach(pipeline, lorry.LoRA(rank=2), targets={root: "attention"}, name="a"), size=0.8)
    more = {"negative": "dog", "distilled": 3.5} if name == "flux" else {}
    found = {
        text: sample(pipeline, PROMPT, compositions=text, seeds=1, **SETTINGS, **more).pixels
        for text in ("none", "a", "a@0-2000", "a@500-1001", "a@0-500")
    }
    assert torch.equal(found["a@0-2000"], found["a"])
    assert len({hash(found[t].numpy().tobytes()) for t in ("none", "a", "a@500-1001", "a@0-500")}) == 4
    with lorry.activate(pipeline, {"a": within(500, 1001)}), following(pipeline):
        own = own_call(pipeline, name, PROMPT, [1])
    assert (own.float() - found["a@500-1001"].float()).abs().max() <= 1


def test_gradients_reach_latents_through_a_step_and_other_compositions(clean):
    pipeline = clean("sd")
    stirred(lorry.attach(pipeline, lorry.LoRA(rank=2), targets={"unet": "attention"}, name="a"))
    family = family_of(pipeline)
    conditions = family.encode(pipeline, PROMPT)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    moved = []

    def predict(step):
        with torch.enable_grad():
            latents = step.latents.detach().requires_grad_()
            mine = step.run(latents=latents, compositions=["a"])
            (gradient,) = torch.autograd.grad(mine.square().mean(), latents)
        moved.append(float(gradient.abs().sum()))
        step.latents = latents - 0.1 * gradient
        return (mine + step.run(compositions=[None])) / 2

    found = denoise(pipeline, noise, conditions, steps=2, predict=predict)
    assert len(moved) == 2 and min(moved) > 0 and not found.requires_grad
    plain = denoise(pipeline, noise, conditions, steps=2, compositions=[None])
    assert (found - plain).abs().max() > 1e-4


def test_another_prompt_in_blocks(clean):
    pipeline = clean("sdxl")
    family, network = family_of(pipeline), pipeline.unet
    one, two = (
        family.sized(family.encode(pipeline, [text]), [(16, 16)], [(0, 0)], (16, 16))
        for text in ("a photo of a cat", "red square")
    )
    two = one.with_(text=two["text"])
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        run = lambda conditions: family.predict(network, noise, torch.tensor([500.0]), conditions)  # noqa: E731
        plain, wanted = run(one), run(two)
        with prompted(network, dict.fromkeys(text_blocks(network), two["text"])):
            assert torch.equal(run(one), wanted)
        with prompted(network, {"up_blocks.0.attentions.1": two["text"]}):
            single = run(one)
        assert not torch.equal(single, plain) and not torch.equal(single, wanted)
        assert torch.equal(run(one), plain)
    with pytest.raises(DiffusionError, match="no block 'up_blocks.7'"), prompted(network, {"up_blocks.7": two["text"]}):
        pass
    flux = tiny.pipeline("flux").transformer
    with pytest.raises(DiffusionError, match="hands its text on"), prompted(flux, {"transformer_blocks.0": noise}):
        pass


def test_what_cannot_be_made_is_refused(clean):
    pipeline = clean("sd")
    for options, match in (
        ({"compositions": "nobody:0.3"}, "'nobody'"),
        ({"compositions": [{"nobody": 1.0}]}, "'nobody'"),
        ({"height": 17}, "multiples of 2"),
        ({"seeds": [1, 2], "compositions": [None] * 3}, "3 pictures, but 2 seeds"),
        ({"steps": 0}, "at least 1 step"),
    ):
        with pytest.raises(DiffusionError, match=match):
            sample(pipeline, PROMPT, **{**SETTINGS, **options})
    with pytest.raises(DiffusionError, match="Expected a pipeline of diffusers"):
        sample(pipeline.unet, PROMPT)
