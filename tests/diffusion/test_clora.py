"""CLoRA, from the promises of its sheet: maps, contrast, masks, fusion, and a pipeline that stays as it was."""

import functools
import math

import pytest
import torch
from diffusion import tiny
from diffusion.composing import TARGETS, adapted, latents_of, network, pixels, same_traits, traits
from torch.nn import functional as F

import lorry
from lorry.core.errors import OptionError
from lorry.diffusion import DiffusionError, joined
from lorry.diffusion.samplers import sampler_from
from lorry.diffusion.samplers.parts.attention_maps import MapStore, MapWatch, find_map_sites
from lorry.diffusion.samplers.parts.contrast import normed_maps, nt_xent
from lorry.diffusion.samplers.parts.masks import blended, branch_masks, enlarged, shaped
from lorry.diffusion.samplers.parts.passes import rows_of
from lorry.diffusion.words import replaced, word_positions

PROMPT = "a cat and a dog"
BOTH = {"a": 1.0, "b": 1.0}
JOINT = ("attn.to_q", "attn.to_k")


@functools.cache
def localised():
    """A pipeline on the sheet's tiny U-Net, whose cross-attention lies on the 16 x 16 grid of its latents."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(5)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
    ).eval()
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    parts = (tiny.vae(), tiny.clip_text(), tiny.clip_tokenizer(), unet, scheduler)
    made = StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def clora(**options):
    return {"sampler": "clora", "concepts": {"a": "cat", "b": "dog"}, **options}


def run(pipeline, sampler, composition=BOTH, prompt=PROMPT, **more):
    more = {"steps": 1, "size": 32 if pipeline is localised() else tiny.SIZE, **more}
    if pipeline is localised():
        sampler = {"divisor": 1, **sampler}
    return latents_of(pipeline, [prompt], [composition], sampler=sampler, **more)


def test_with_everything_off_it_is_the_mean_of_the_branches_exactly():
    with adapted(localised(), "a", "b") as pipeline:

        def mean(step):
            total = 0
            for composition in (None, "a", "b"):
                both, latents = joined([step.negative, step.conditions]), torch.cat([step.latents, step.latents])
                total = total + step.run(both, latents=latents, compositions=[composition], copies=2) * (1 / 3)
            return step.family.guide(total[1:], total[:1], step.guidance)

        found, told = run(pipeline, clora(rate=0.0, masks_after=99))
        wanted = latents_of(pipeline, [PROMPT], [BOTH], predict=mean, steps=1, size=32)
        assert torch.equal(found, wanted)
        assert told[0]["losses"] == [] and told[0]["masks"][0].all()


def test_a_branch_alone_is_the_ordinary_pipeline_with_its_adapter():
    with adapted(localised(), "a", "b") as pipeline:
        # the first picture has no adapter with a concept: its only branch is the base with a style
        options = {"sampler": "clora", "concepts": {"b": "dog"}, "rate": 0.0}
        made, told = latents_of(pipeline, [PROMPT] * 2, [{"a": 0.7}, {"b": 1.0}], sampler=options, steps=1, size=32)
        assert torch.equal(made[:1], latents_of(pipeline, [PROMPT], [{"a": 0.7}], steps=1, size=32))
        assert told[0]["branches"] == [(None, PROMPT)] and told[0]["masks"][0].all()


def test_the_loss_of_four_vectors_by_hand():
    vectors = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 2.0], [-1.0, 1.0]], dtype=torch.float64)
    labels, tau = [0, 0, 1, 1], 0.5

    def s(i, j):
        return float(F.cosine_similarity(vectors[i], vectors[j], dim=0)) / tau

    terms = []
    for a, p in [(0, 1), (1, 0), (2, 3), (3, 2)]:
        others = sum(math.exp(s(a, q)) for q in range(4) if labels[q] != labels[a])
        terms.append(-math.log(math.exp(s(a, p)) / (math.exp(s(a, p)) + others)))
    assert float(nt_xent(vectors, labels, tau)) == pytest.approx(sum(terms) / 4, rel=1e-12)
    order = torch.tensor([1, 0, 3, 2])
    assert float(nt_xent(vectors[order], labels, tau)) == pytest.approx(sum(terms) / 4, rel=1e-12)
    assert float(nt_xent(vectors, [7, 7, 3, 3], tau)) == pytest.approx(sum(terms) / 4, rel=1e-12)
    assert float(nt_xent(vectors, [0, 1, 0, 1], tau)) != pytest.approx(sum(terms) / 4, rel=1e-3)


def test_maps_alike_everywhere_give_the_logarithm_of_the_negatives():
    assert float(nt_xent(torch.ones(6, 3), [0, 0, 0, 1, 1, 1])) == pytest.approx(math.log(1 + 3), rel=1e-6)
    with pytest.raises(OptionError, match="two vectors"):
        nt_xent(torch.ones(2, 3), [0, 1])
    with pytest.raises(OptionError, match="found 1"):
        nt_xent(torch.ones(2, 3), [0])


def test_other_positives_do_not_stand_in_the_denominator():
    near = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, -0.1], [0.0, 1.0]], dtype=torch.float64)
    far = near.clone()
    far[2] = torch.tensor([-1.0, 0.0])
    own = [nt_xent(x[[0, 1, 3]], [0, 0, 1]) for x in (near, far)]
    assert own[0] == own[1]
    three = nt_xent(near, [0, 0, 0, 1])
    pairs = [nt_xent(near[[i, j, 3]], [0, 0, 1]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert torch.allclose(three, torch.stack(pairs).mean())


def test_flat_maps_and_lone_concepts_have_finite_gradients():
    maps = torch.full((4, 9), 0.2, requires_grad=True)
    loss = nt_xent(normed_maps(maps), [0, 0, 1, 1])
    assert torch.isfinite(torch.autograd.grad(loss, maps)[0]).all()
    maps = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = nt_xent(normed_maps(maps), [0, 0])
    assert float(loss.detach()) == 0.0
    assert not torch.autograd.grad(loss, maps)[0].any()


def test_moving_latents_lowers_the_loss_and_the_other_way_raises_it():
    with adapted(localised(), "a", "b") as pipeline:
        _, told = run(pipeline, clora(until=1, repeat_at=[0], repeats=5))
        down = told[0]["losses"]
        assert len(down) == 6 and down[-1] < down[0] - 1e-3
        assert all(after < before for before, after in zip(down, down[1:], strict=False))
        _, told = run(pipeline, clora(until=1, repeat_at=[0], repeats=2, rate=-20.0))
        assert told[0]["losses"][0] == pytest.approx(down[0]) and told[0]["losses"][-1] > down[0] + 1e-4


def test_predictions_and_masks_are_of_the_pass_before_the_last_move():
    with adapted(localised(), "a", "b") as pipeline:
        seen = []

        def keep(step):
            with sampler_from(clora(until=1, divisor=1)).begin(pipeline, [_order()]) as course:
                before = step.latents
                moved = course.predict(step)
                seen.append((before, step.latents, moved, course.reports()[0]["masks"][0]))
            return moved

        latents_of(pipeline, [PROMPT], [BOTH], predict=keep, steps=1, size=32)
        before, after, moved, masks = seen[0]
        assert not torch.equal(before, after)

        def still(step):
            with sampler_from(clora(rate=0.0, divisor=1)).begin(pipeline, [_order()]) as course:
                found = course.predict(step)
                assert torch.allclose(found, moved, atol=1e-5)
                assert torch.equal(course.reports()[0]["masks"][0], masks)
            return found

        latents_of(pipeline, [PROMPT], [BOTH], predict=still, steps=1, size=32)


def _order():
    from lorry.diffusion.making import Order

    return Order(PROMPT, None, BOTH)


def test_branches_together_are_branches_one_by_one_and_hold_fewer_graphs():
    live, peaks = [0], []

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor.detach()  # an output would hold the graph that holds it
            live[0] += tensor.numel()
            peaks[-1] = max(peaks[-1], live[0])

        def __del__(self):
            live[0] -= self.tensor.numel()

    with adapted(localised(), "a", "b") as pipeline:
        found = []
        for at_once in (0, 1):
            peaks.append(0)
            with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
                found.append(run(pipeline, clora(until=1, at_once=at_once)))
        (together, first), (apart, second) = found
        assert torch.allclose(together, apart, atol=1e-4)
        assert first[0]["losses"] == pytest.approx(second[0]["losses"], abs=1e-5)
        assert (first[0]["passes"], second[0]["passes"]) == (3, 6)
        assert live == [0] and peaks[1] < 0.5 * peaks[0]


def test_masks_cover_everything_and_the_base_has_what_nobody_claims():
    generator = torch.Generator().manual_seed(0)
    maps = [torch.rand(6, 5, 4, generator=generator) for _ in range(3)]
    tokens = [(), (1, 2), (3,)]
    before = None
    for threshold in (0.1, 0.5, 0.9, 1.0):
        masks = branch_masks(maps, tokens, threshold)
        assert (masks.sum(0) >= 1).all()
        assert torch.equal(masks[0].bool(), ~masks[1:].bool().any(0))
        by_hand = (maps[1][:, :, 1] > threshold * maps[1][:, :, 1].max()) | (
            maps[1][:, :, 2] > threshold * maps[1][:, :, 2].max()
        )
        assert torch.equal(masks[1].bool(), by_hand)
        assert before is None or (masks[1:] <= before[1:]).all()
        before = masks
    assert masks[0].all()  # nothing lies above its own largest value


def test_masks_grow_and_shrink_by_squares():
    dot = torch.zeros(1, 5, 5)
    dot[0, 2, 2] = 1
    square = torch.zeros(1, 5, 5)
    square[0, 1:4, 1:4] = 1
    assert torch.equal(shaped(dot, "dilate"), square) and torch.equal(shaped(square, "erode"), dot)
    assert not shaped(dot, "opening").any() and torch.equal(shaped(dot, "closing"), dot)
    assert torch.equal(shaped(square, "opening"), square) and torch.equal(shaped(dot, "none"), dot)
    with pytest.raises(OptionError, match="found 'melt'"):
        shaped(dot, "melt")
    large = enlarged(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), 4, 6)
    assert torch.equal(large[0, 0], torch.tensor([1.0, 1, 1, 0, 0, 0])) and large.shape == (1, 4, 6)


def test_fused_predictions_lie_between_those_of_the_branches():
    generator = torch.Generator().manual_seed(0)
    each = [torch.randn(2, 4, 3, 3, generator=generator) for _ in range(3)]
    apart = [torch.zeros(3, 3) for _ in range(3)]
    for index in range(3):
        apart[index][index] = 1
    found = blended(each, apart)
    assert all(torch.equal(found[:, :, row], each[row][:, :, row]) for row in range(3))
    masks = [torch.ones(3, 3), torch.randint(0, 2, (3, 3), generator=generator).float(), torch.ones(3, 3)]
    found, whole = blended(each, masks), torch.stack(each)
    assert (found <= whole.amax(0) + 1e-6).all() and (found >= whole.amin(0) - 1e-6).all()
    assert torch.allclose(found, sum(m * e for m, e in zip(masks, each, strict=True)) / sum(masks), atol=1e-6)


def test_exchanged_branches_make_the_same_picture():
    with adapted(localised(), "a", "b") as pipeline:
        options = {"until": 1, "triggers": {"a": "sks cat"}, "threshold": 0.9}
        first, told = run(pipeline, clora(**options))
        second, other = run(pipeline, {"sampler": "clora", "concepts": {"b": "dog", "a": "cat"}, **options})
        assert torch.allclose(first, second, atol=1e-4)
        assert [b for b, _ in told[0]["branches"]] == [None, "a", "b"]
        assert [b for b, _ in other[0]["branches"]] == [None, "b", "a"]
        assert dict(told[0]["branches"])["a"] == "a sks cat and a dog"
        swapped, _ = run(pipeline, {"sampler": "clora", "concepts": {"a": "dog", "b": "cat"}, "until": 1})
        assert not torch.allclose(first, swapped, atol=1e-3)


@pytest.mark.parametrize("trainable", [False, True])
def test_nothing_of_the_pipeline_changes_also_after_an_interruption(trainable):
    with adapted(localised(), "a", "b") as pipeline:
        model = network(pipeline)
        lorry.adapters(model)["a"].train(trainable)
        model.conv_out.requires_grad_(trainable)
        lorry.activate(model, "b")
        before = traits(model)
        run(pipeline, clora(until=1))
        assert same_traits(before, traits(model))
        runs = []

        def broken(module, args):
            runs.append(torch.is_grad_enabled())
            if len(runs) == 6:
                raise KeyboardInterrupt

        handle = model.mid_block.register_forward_pre_hook(broken)
        try:
            with pytest.raises(KeyboardInterrupt):
                run(pipeline, clora(until=1))
        finally:
            handle.remove()
        assert runs[-1]  # in the middle of a pass with gradients
        assert same_traits(before, traits(model))
        assert torch.is_grad_enabled()
        model.conv_out.requires_grad_(False)


def _maps(pipeline, divisor=None, targets=None, size=32):
    """Sites of one step, and a store that saw it."""
    found = []

    def look(step):
        sites = find_map_sites(rows_of(step, [0]), divisor, targets)
        store = MapStore(sites, step.conditions["text"].shape[1])
        with MapWatch(step.network, sites) as watching:
            step.run()  # seen by nobody
            with watching.into(store):
                found.append((sites, store, step.run()))
        return step.guided()

    latents_of(pipeline, [PROMPT], [None], predict=look, steps=1, size=size)
    return found[0]


def test_the_store_sees_cross_attention_of_one_grid_alone():
    pipeline = localised()
    before = traits(network(pipeline))
    sites, store, _ = _maps(pipeline, divisor=1)
    assert same_traits(before, traits(network(pipeline)))
    # one in the down block and two in the up block; self-attention has as many queries, and the mid block fewer
    assert store.captured == len(sites.paths) == 3
    assert all(".attn2" in path and not path.startswith("mid") for path in sites.paths)
    assert (sites.height, sites.width) == (16, 16)
    assert store.maps().shape == (1, 16, 16, 16)
    assert torch.allclose(store.maps().sum(-1), torch.ones(1, 16, 16), atol=1e-4)
    # without being told, the grid nearest to a fourth
    assert _maps(pipeline)[0].paths == ("mid_block.attentions.0.transformer_blocks.0.attn2",)
    assert len(_maps(pipeline, targets=["down_blocks.*"])[0].paths) == 1
    with pytest.raises(DiffusionError, match="Divisors that there are: 1, 2"):
        _maps(pipeline, divisor=8)


def test_maps_are_the_probabilities_of_a_plain_computation():
    pipeline = localised()
    model, kept = network(pipeline), {}
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    layer = model.get_submodule(path)
    handle = layer.register_forward_pre_hook(
        lambda module, args, kwargs: kept.update(x=args[0], text=kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    try:
        _, store, _ = _maps(pipeline, 1, [path])
    finally:
        handle.remove()
    # the last pass was guided: its half with the prompt is the one that the store saw
    x, text = kept["x"][1:].double(), kept["text"][1:].double()
    q = (x @ layer.to_q.weight.double().T).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    k = (text @ layer.to_k.weight.double().T).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    wanted = (q @ k.mT * layer.scale).softmax(-1).mean(1).unflatten(1, (16, 16))
    assert torch.allclose(store.maps().double(), wanted, atol=1e-5)


@pytest.mark.parametrize(("name", "targets", "text_first"), [("flux", JOINT, True), ("sd3", JOINT, False)])
def test_attention_over_text_and_picture_together(name, targets, text_first):
    with adapted(name, "a", "b", targets=targets) as pipeline:
        sites, store, _ = _maps(pipeline, size=tiny.SIZE)
        assert sites.text_first is text_first and (sites.height, sites.width) == (4, 4)
        assert store.captured == len(sites.paths) >= 2
        assert (store.maps().sum(-1) < 0.999).all()  # the rest looks at the picture
        moved, told = run(pipeline, clora(until=1, repeat_at=[0], repeats=1))
        assert told[0]["losses"][1] < told[0]["losses"][0]
        still, _ = run(pipeline, clora(rate=0.0))
        assert not torch.allclose(moved, still, atol=1e-4)


def test_maps_of_both_halves_and_of_the_half_with_the_prompt():
    with adapted(localised(), "a", "b", size=1.0) as pipeline:
        _, both = run(pipeline, clora(until=1))
        _, prompt = run(pipeline, clora(until=1, averaged="prompt"))
        _, unguided = run(pipeline, clora(until=1), guidance=1.0)
        assert both[0]["losses"][0] != pytest.approx(prompt[0]["losses"][0], abs=1e-4)
        assert unguided[0]["losses"][0] == pytest.approx(prompt[0]["losses"][0], abs=1e-5)


def test_a_network_with_two_text_inputs():
    with adapted("sdxl", "a", "b") as pipeline:
        made, told = run(pipeline, clora(until=1))
        assert told[0]["masks"][0].shape == (3, 8, 8) and torch.isfinite(made).all()
        assert not torch.allclose(made, run(pipeline, clora(rate=0.0))[0], atol=1e-4)


def test_eight_concepts_with_a_style_in_every_branch():
    words = ("red", "blue", "square", "circle", "cat", "dog", "photo", "picture")
    names = [f"l{i}" for i in range(8)]
    with adapted("sd", *names, "ink", targets=("attn2.to_q", "attn2.to_k")) as pipeline:
        options = {"sampler": "clora", "concepts": dict(zip(names, words, strict=True)), "until": 1, "at_once": 0}
        every = dict.fromkeys([*names, "ink"], 1.0)
        made, told = run(pipeline, options, every, " ".join(words))
        assert len(told[0]["branches"]) == 9 and told[0]["masks"][0].shape == (9, 8, 8)
        assert math.isfinite(told[0]["losses"][0]) and torch.isfinite(made).all()
        without, _ = run(pipeline, options, {**every, "ink": 0.0}, " ".join(words))
        assert not torch.allclose(made, without, atol=1e-3)


def test_adapters_of_text_encoders_apply_where_they_are_asked_to():
    with adapted("sd", "a", "b") as pipeline:
        encoder = pipeline.text_encoder
        own = lorry.attach(encoder, {"method": "lora", "rank": 2}, targets=["q_proj", "v_proj"], name="a")
        try:
            with torch.no_grad():
                for parameter in own.parameters():
                    parameter.normal_(generator=torch.Generator().manual_seed(0))
            lorry.activate(encoder, None)
            plain, _ = run(pipeline, clora(rate=0.0))
            told, _ = run(pipeline, clora(rate=0.0, text_encoders=True))
            style, _ = run(pipeline, {"sampler": "clora", "concepts": {"b": "dog"}, "rate": 0.0})
        finally:
            own.detach()
        bare, _ = run(pipeline, clora(rate=0.0))
        assert torch.equal(plain, bare)
        assert not torch.allclose(told, bare, atol=1e-3)
        without, _ = run(pipeline, {"sampler": "clora", "concepts": {"b": "dog"}, "rate": 0.0})
        assert not torch.allclose(style, without, atol=1e-3)


def test_words_are_found_with_the_start_token_counted():
    pipeline = tiny.pipeline("sd")
    assert word_positions(pipeline, PROMPT, "cat") == (2,)
    assert word_positions(pipeline, PROMPT, "Dog") == (5,)
    assert word_positions(pipeline, "a sks cat and a cat", "cat") == (3, 6)
    assert word_positions(pipeline, "a sks cat and a cat", "sks cat") == (2, 3)
    ids = pipeline.tokenizer("a zebra and a dog").input_ids
    places = word_positions(pipeline, "a zebra and a dog", "zebra")
    assert len(places) > 1
    assert "".join(pipeline.tokenizer.convert_ids_to_tokens(ids)[p] for p in places) == "zebra</w>"
    assert word_positions(tiny.pipeline("flux"), PROMPT, "cat") == (2,)
    assert word_positions(tiny.pipeline("sd3"), PROMPT, "cat") == (2, 18)  # in CLIP's 16 tokens, and in T5's after them
    assert replaced("Cat, cat and catalogue", "cat", "sks cat") == "sks cat, sks cat and catalogue"


def test_a_word_that_is_not_found_is_refused():
    pipeline = tiny.pipeline("sd")
    with pytest.raises(DiffusionError, match="Did you mean 'cat'.*Put it into the prompt"):
        word_positions(pipeline, PROMPT, "cats")
    with pytest.raises(DiffusionError, match="has no 'bird'"):
        word_positions(pipeline, PROMPT, "bird")
    with pytest.raises(DiffusionError, match="cut off"):
        word_positions(pipeline, "a photo of " * 6 + "cat", "cat")
    with adapted("sd", "a", "b") as pipeline:
        before = traits(network(pipeline))
        with pytest.raises(DiffusionError, match="has no 'dog'"):
            pixels(pipeline, "a cat", BOTH, sampler=clora())
        with pytest.raises(DiffusionError, match="'c', of which no picture"):
            pixels(pipeline, PROMPT, BOTH, sampler={"sampler": "clora", "concepts": {"c": "cat"}})
        assert same_traits(before, traits(network(pipeline)))
    for wrong, words in (({}, "no concept"), ({"concepts": {"a": 3}}, "words for each"), ({"concepts": {}}, "no con")):
        with pytest.raises(OptionError, match=words if wrong else "needs a value for 'concepts'"):
            sampler_from({"sampler": "clora", **wrong})
    with pytest.raises(OptionError, match="'c' has a trigger"):
        sampler_from(clora(triggers={"c": "sks"}))


def test_a_scheduler_that_remembers_is_warned_of():
    from diffusers import DPMSolverMultistepScheduler

    with adapted("sd", "a", "b", targets=TARGETS[:1]) as pipeline:
        own = pipeline.scheduler
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(own.config)
        try:
            with pytest.warns(UserWarning, match="DDIM"):
                run(pipeline, clora(until=1))
        finally:
            pipeline.scheduler = own


def test_pictures_know_their_masks_and_recipe():
    with adapted("sd", "a", "b") as pipeline:
        made = pixels(pipeline, PROMPT, [BOTH, BOTH], seeds=[3, 4], sampler=clora(until=1), steps=2)
        alone = pixels(pipeline, PROMPT, BOTH, seeds=4, sampler=clora(until=1), steps=2)
        assert (made[1].pixels.int() - alone[0].pixels.int()).abs().max() <= 1
        assert [m.shape for m in made[0].facts["masks"]] == [(3, 8, 8)] * 2
        assert made[0].recipe["sampler"] == clora(until=1)
