"""CMLoRA and the samplers beside it (Merge, Switch, Composite), from the promises of its sheet."""

import math
from contextlib import contextmanager

import pytest
import torch
from diffusion import tiny
from diffusion.composing import adapted, latents_of, network, pixels, same_traits, traits

from lorry.core.errors import OptionError, SiteError
from lorry.diffusion import DiffusionError
from lorry.diffusion.samplers import SAMPLERS, Sampler, sampler_from
from lorry.diffusion.samplers.cmlora import CMLoRA
from lorry.diffusion.samplers.frequencies import calibrated_threshold, frequency_order, frequency_profile
from lorry.diffusion.samplers.parts.block_cache import BlockCache
from lorry.diffusion.samplers.parts.dominance import (
    coefficient_at,
    dominance_weights,
    dominant_adapter,
    refresh_steps,
)
from lorry.diffusion.samplers.parts.spectrum import early_change, high_share, split_by_change

BOTH = {"a": 1.0, "b": 1.0}
UNETS = ("sd", "sdxl")


def uncached(**options):
    return {"sampler": "cmlora", "cache": False, **options}


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("c", [1.0, 1.5, 4.5])
def test_weights_sum_to_the_number_of_adapters(n, c):
    for dominant in range(n):
        weights = dominance_weights(n, dominant, c)
        assert math.isclose(sum(weights), n, rel_tol=1e-12)
        assert all(math.isclose(weights[dominant], c * w) for i, w in enumerate(weights) if i != dominant)


@pytest.mark.parametrize(("n", "dominant", "other"), [(2, 1.2, 0.8), (3, 1.667, 0.667), (5, 2.647, 0.588)])
def test_the_weights_of_the_first_refresh_are_those_published(n, dominant, other):
    found = dominance_weights(n, 0, coefficient_at(0, n, None, 0.5, 1.0))
    assert found[0] == pytest.approx(dominant, abs=1e-3)
    assert found[1:] == pytest.approx([other] * (n - 1), abs=1e-3)


def test_the_coefficient_falls_to_its_bound_and_stays_without_decay():
    found = [coefficient_at(k, 5, None, 0.5, 1.0) for k in range(12)]
    assert found[:3] == [4.5, 3.5, 3.0]
    assert all(before >= after >= 1 for before, after in zip(found, found[1:], strict=False))
    assert found[-1] == pytest.approx(2.5, abs=1e-3)  # at most 2 in all
    assert [coefficient_at(k, 2, None, 0.5, 1.0) for k in range(4)] == [1.5, 1.0, 1.0, 1.0]
    assert coefficient_at(50, 2, None, 0.5, None) == pytest.approx(-0.5)
    assert {coefficient_at(k, 3, None, 0.0, 1.0) for k in range(9)} == {2.5}


def test_refresh_steps_by_hand():
    assert refresh_steps("non-uniform", 16) == (0, 2, 4, 6, 9, 12, 14)
    assert refresh_steps("uniform", 7, period=3) == (0, 3, 6)
    assert refresh_steps("every", 3) == (0, 1, 2)
    long = refresh_steps("non-uniform", 220)
    assert long == (*range(0, 83, 2), *range(83, 193, 3), *range(193, 220, 2))
    with pytest.raises(OptionError, match="found 'often'"):
        refresh_steps("often", 4)


def test_the_dominant_adapter_by_hand():
    high, low = ("s", "c", "o"), ("b",)
    early = [dominant_adapter(high, low, k, early=True) for k in range(4)]
    late = [dominant_adapter(high, low, k, early=False) for k in range(4)]
    tail = [dominant_adapter(high, low, k, early=False, pool="tail") for k in range(4)]
    assert (early, late, tail) == (["s", "c", "o", "s"], ["b"] * 4, ["c", "o", "b", "c"])
    assert [dominant_adapter(high, (), k, early=False, pool="tail") for k in range(3)] == ["s", "c", "o"]
    assert dominant_adapter((), low, 3, early=True) == "b"


def test_the_measure_orders_noise_pink_noise_and_a_wave_at_every_size():
    generator = torch.Generator().manual_seed(0)
    for size in (8, 16, 64, 128):
        white = torch.randn(4, 1, size, size, generator=generator)
        waves = torch.fft.fftfreq(size)
        distance = (waves[:, None].square() + waves[None].square()).sqrt()
        distance[0, 0] = distance[0, 1]
        pink = torch.fft.ifft2(torch.fft.fft2(white) / distance).real
        wave = torch.cos(2 * math.pi * torch.arange(size) / size).expand(1, 1, size, size)
        found = [float(high_share(x).mean()) for x in (white, pink, wave)]
        assert all(map(math.isfinite, found))
        assert found[0] > found[1] > found[2]
        assert size < 16 or found[2] < 1e-5
        assert torch.allclose(high_share(white * 37.0), high_share(white), atol=1e-5)


def test_the_measure_by_hand_and_the_radius_of_the_released_code():
    x = torch.zeros(1, 1, 8, 8)
    x[..., ::2] = 1.0  # frequency zero and the highest one along the width, alike in size
    # rings 0 to 5; ring 4 holds the frequencies whose distance is from 4 to below 5, one of which is there
    down, across = torch.meshgrid(torch.arange(8) - 4, torch.arange(8) - 4, indexing="ij")
    rings = (down.square() + across.square()).float().sqrt().floor()
    profile = torch.tensor([1.0, 0, 0, 0, 1 / float((rings == 4).sum()), 0])
    assert float(high_share(x, cut=0.2)) == pytest.approx(float(profile[1:].mean()), rel=1e-5)
    assert torch.isnan(high_share(torch.randn(1, 4, 64, 64), radius=80)).all()
    assert torch.isfinite(high_share(torch.randn(1, 4, 128, 128), radius=80)).all()


def test_adapters_are_split_at_the_widest_gap():
    assert split_by_change({"a": 0.9, "b": 0.1, "c": 1.0, "d": 0.7}) == (("c", "a", "d"), ("b",))
    assert split_by_change({"a": 0.5, "b": 0.5}) == (("a", "b"), ())
    assert early_change(torch.tensor([0.0, 1.0, 0.0, 9.0]), 0.75) == 1.0
    with pytest.raises(OptionError, match="take more steps"):
        early_change(torch.tensor([0.0, 1.0]), 0.5)


@pytest.mark.parametrize("name", UNETS)
def test_a_single_adapter_is_the_ordinary_pipeline_bit_for_bit(name):
    with adapted(name, "a") as pipeline:
        wanted = latents_of(pipeline, compositions=["a"])
        assert not torch.allclose(wanted, latents_of(pipeline, compositions=[None]), atol=1e-2)
        for sampler in ("merge", "switch", "composite", uncached(), {"sampler": "cmlora", "schedule": "every"}):
            found, _ = latents_of(pipeline, compositions=["a"], sampler=sampler)
            assert torch.equal(found, wanted), sampler


def test_equal_weights_without_a_cache_are_composite_exactly_and_neither_knows_an_order():
    with adapted("sd", "a", "b", "c") as pipeline:
        three, other = {"a": 1.0, "b": 0.5, "c": 1.0}, {"c": 1.0, "a": 1.0, "b": 0.5}
        composite, _ = latents_of(pipeline, compositions=[three], sampler="composite")
        flat, _ = latents_of(pipeline, compositions=[three], sampler=uncached(coefficient=1.0))
        assert torch.equal(flat, composite)
        turned, _ = latents_of(pipeline, compositions=[other], sampler="composite")
        assert torch.allclose(turned, composite, atol=1e-5)
        first, _ = latents_of(pipeline, compositions=[three], sampler=uncached())
        second, _ = latents_of(pipeline, compositions=[other], sampler=uncached())
        assert not torch.allclose(first, second, atol=1e-3)


def test_composite_is_the_mean_of_each_adapters_own_prediction():
    with adapted("sd", "a", "b") as pipeline:
        seen = []

        def mean(step):
            each = [step.guided(compositions=[name]) for name in BOTH]
            seen.append(float((each[0] - each[1]).abs().max()))
            return (each[0] + each[1]) / 2

        found, _ = latents_of(pipeline, compositions=[BOTH], sampler="composite")
        assert torch.allclose(found, latents_of(pipeline, compositions=[BOTH], predict=mean), atol=1e-5)
        assert min(seen) > 1e-2


def test_one_adapter_at_a_time_is_all_at_once():
    with adapted("sd", "a", "b") as pipeline:
        for sampler in ("composite", "cmlora"):
            together, counted = latents_of(pipeline, compositions=[BOTH] * 2, prompts=["a", "b"], sampler=sampler)
            options = {"sampler": sampler, "at_once": 1}
            apart, alone = latents_of(pipeline, compositions=[BOTH] * 2, prompts=["a", "b"], sampler=options)
            assert torch.allclose(together, apart, atol=1e-4)
            assert counted == alone


def test_merge_adds_up_and_switch_takes_turns():
    with adapted("sd", "a", "b") as pipeline:
        found, told = latents_of(pipeline, compositions=[BOTH], sampler="merge")
        assert torch.equal(found, latents_of(pipeline, compositions=[BOTH]))
        assert told[0]["active"] == ["a+b"] * 4

        def turns(step):
            return step.guided(compositions=[("b", "b", "a", "a")[step.number]])

        switch = {"sampler": "switch", "period": 2, "order": ["b"]}
        found, told = latents_of(pipeline, compositions=[BOTH], sampler=switch)
        assert torch.equal(found, latents_of(pipeline, compositions=[BOTH], predict=turns))
        assert told[0]["active"] == ["b", "b", "a", "a"]


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_shallow_pass_on_fresh_features_is_the_full_pass(name, guidance):
    with adapted(name, "a", "b") as pipeline:
        compared = []

        def twice(step):
            with BlockCache(network(pipeline)) as cache:
                copies = 1 if guidance == 1 else 2
                with cache.recording(["x", "y"], copies):
                    full = step.guided()
                before = cache.blocks
                with cache.replaying(["x", "y"], copies):
                    shallow = step.guided()
                assert cache.blocks - before == 2 < before
                # rows in another order, one of them alone
                with cache.replaying(["x"], copies):
                    one = step.guided(*_rows(step, [0]), latents=step.latents[:1], compositions=["a"])
            compared.append(torch.equal(full, shallow) and torch.allclose(one, full[:1], atol=1e-5))
            return full

        latents_of(pipeline, ["a", "b"], ["a", "b"], guidance=guidance, steps=2, predict=twice)
        assert compared == [True, True]


def _rows(step, rows):
    return step.conditions.take(rows), None if step.negative is None else step.negative.take(rows)


def test_a_refresh_at_every_step_is_no_cache():
    with adapted("sd", "a", "b") as pipeline:
        kept = {"sampler": "composite", "cache_every": 2}
        stale, told = latents_of(pipeline, compositions=[BOTH], sampler=kept)
        fresh, _ = latents_of(pipeline, compositions=[BOTH], sampler="composite")
        assert not torch.allclose(stale, fresh, atol=1e-4)
        assert (told[0]["full_passes"], told[0]["shallow_passes"]) == (4, 4)
        every = {"sampler": "cmlora", "schedule": "every"}
        assert torch.equal(
            latents_of(pipeline, compositions=["a"], sampler=every)[0],
            latents_of(pipeline, compositions=["a"], sampler=uncached())[0],
        )


def test_features_are_kept_for_each_adapter_and_picture_apart():
    with adapted("sd", "a", "b") as pipeline:
        cache = BlockCache(network(pipeline))
        found = []

        def check(step):
            if step.number:
                return step.guided()
            with cache:
                for name in BOTH:
                    with cache.recording([name], 2):
                        step.guided(compositions=[name])
                with cache.replaying(["a"], 2):
                    before = step.guided(compositions=["a"])
                with torch.no_grad():
                    import lorry

                    for parameter in lorry.adapters(network(pipeline))["b"].parameters():
                        parameter.mul_(3)
                with cache.recording(["b"], 2):
                    step.guided(compositions=["b"])
                with cache.replaying(["a"], 2):
                    found.append(torch.equal(step.guided(compositions=["a"]), before))
                with pytest.raises(SiteError, match="'c' with 2 copies"), cache.replaying(["c"], 2):
                    pass
                with pytest.raises(SiteError, match="'a' with 1 copies"), cache.replaying(["a"], 1):
                    pass
            return step.guided()

        latents_of(pipeline, compositions=["a"], steps=2, predict=check)
        assert found == [True]


@pytest.mark.parametrize("steps", [5, 16])
def test_full_passes_are_those_of_the_schedule(steps):
    with adapted("sd", "a", "b", "c") as pipeline:
        ran = []
        inside = network(pipeline).mid_block.resnets[0]
        handle = inside.register_forward_hook(lambda module, args, output: ran.append(len(output)))
        three = {"a": 1.0, "b": 1.0, "c": 1.0}
        try:
            _, told = latents_of(
                pipeline, compositions=[three], sampler={"sampler": "cmlora", "at_once": 1, "low": ["c"]}, steps=steps
            )
        finally:
            handle.remove()
        refreshes = refresh_steps("non-uniform", steps)
        assert len(ran) == told[0]["full_passes"] == 3 + len(refreshes) - 1
        assert told[0]["full_passes"] + told[0]["shallow_passes"] == 3 * steps
        assert told[0]["blocks"] == 5 * told[0]["full_passes"] + 2 * told[0]["shallow_passes"]
        if steps == 16:  # early up to step 8
            turns = {0: "a", 2: "b", 4: "a", 6: "b", 9: "c", 12: "c", 14: "c"}
            expected = [turns[max(k for k in turns if k <= number)] for number in range(16)]
            assert told[0]["dominant"] == expected
            assert told[0]["early"] == [True] * 9 + [False] * 7


def test_a_refresh_drops_the_features_of_the_new_dominant_adapter_only():
    with adapted("sd", "a", "b") as pipeline:
        options = {"sampler": "cmlora", "schedule": "uniform", "period": 1, "at_once": 1}
        _, told = latents_of(pipeline, compositions=[BOTH], sampler=options)
        assert told[0]["dominant"] == ["a", "b", "a", "b"]
        assert (told[0]["full_passes"], told[0]["shallow_passes"]) == (2 + 3, 3)
        _, told = latents_of(pipeline, compositions=[BOTH], sampler={**options, "early": 0.25, "refresh_late": False})
        assert (told[0]["full_passes"], told[0]["shallow_passes"]) == (3, 5)


def test_online_and_async_dominance():
    with adapted("sd", "a", "b", "c") as pipeline:
        options = {"schedule": "every", "low": ["c"], "phase": "online"}
        three = {"a": 1.0, "b": 1.0, "c": 1.0}
        _, told = latents_of(pipeline, compositions=[three], sampler=uncached(threshold=0.0, **options))
        assert told[0]["dominant"] == ["a", "b", "a", "b"]
        assert told[0]["measures"][0] == 1.0 and all(0 < m < 1 for m in told[0]["measures"][1:])
        _, told = latents_of(pipeline, compositions=[three], sampler=uncached(threshold=0.999, **options))
        assert told[0]["dominant"] == ["a", "c", "c", "c"]
        _, told = latents_of(pipeline, compositions=[three], sampler=uncached(threshold=2.0, pool="tail", **options))
        assert told[0]["dominant"] == ["b", "c", "b", "c"]
        turns = uncached(phase="async", async_period=2, schedule="every", low=["c"])
        _, told = latents_of(pipeline, compositions=[three], sampler=turns)
        assert told[0]["dominant"] == ["a", "a", "b", "b"]


def test_the_presets_are_the_paper_and_the_released_code():
    with adapted("sd", "a", "b") as pipeline:
        _, told = latents_of(pipeline, compositions=[BOTH], sampler={"sampler": "cmlora", "preset": "released"})
        assert told[0]["shallow_passes"] == 0  # its non-uniform schedule keeps nothing
        assert told[0]["coefficients"] == [1.5] * 4  # its decay never reaches the weights
        assert told[0]["early"] == [True, False, False, False]  # a mean of nothing is never above the threshold
        assert all(math.isnan(m) for m in told[0]["measures"][1:])
        _, told = latents_of(pipeline, compositions=[BOTH], sampler={"sampler": "cmlora", "preset": "specified"})
        assert told[0]["shallow_passes"] > 0 and told[0]["coefficients"][-1] == 1.0
    assert sampler_from({"sampler": "cmlora", "preset": "specified"}) == CMLoRA()
    with pytest.raises(OptionError, match="Did you mean 'released'"):
        sampler_from({"sampler": "cmlora", "preset": "release"})


def test_a_picture_does_not_depend_on_those_beside_it():
    with adapted("sd", "a", "b") as pipeline:
        each = [BOTH, {"b": 1.0}, None]
        options = {"sampler": "cmlora", "phase": "online", "threshold": 0.5}
        made = pixels(pipeline, ["a", "b", "c"], each, seeds=[1, 2, 3], sampler=options)
        for row, composition in enumerate(each):
            alone = pixels(pipeline, "abc"[row], composition, seeds=row + 1, sampler=options)
            difference = (made[row].pixels.int() - alone[0].pixels.int()).abs().max()
            assert difference <= 1
            told, other = made[row].facts, alone[0].facts
            assert {k: v for k, v in told.items() if k != "measures"} == {
                k: v for k, v in other.items() if k != "measures"
            }
        assert made[0].recipe["sampler"] == {"sampler": "cmlora", "phase": "online", "threshold": 0.5}


@pytest.mark.parametrize("sampler", ["merge", "switch", "composite", "cmlora"])
def test_the_pipeline_is_as_before_also_after_an_exception(sampler):
    with adapted("sd", "a", "b") as pipeline:
        import lorry

        model = network(pipeline)
        lorry.activate(model, "b")
        before, output = traits(model), latents_of(pipeline, compositions=[None], predict=lambda s: _as_is(model, s))
        made, _ = latents_of(pipeline, compositions=[BOTH], sampler=sampler)
        assert same_traits(before, traits(model))
        runs = []

        def broken(module, args):
            runs.append(1)
            if len(runs) > 2:
                raise KeyboardInterrupt

        handle = model.up_blocks[-1].register_forward_pre_hook(broken)
        try:
            with pytest.raises(KeyboardInterrupt):
                latents_of(pipeline, compositions=[BOTH], sampler=sampler)
        finally:
            handle.remove()
        assert same_traits(before, traits(model))
        again = latents_of(pipeline, compositions=[None], predict=lambda s: _as_is(model, s))
        assert torch.equal(output, again)  # what was active still is
        assert torch.equal(latents_of(pipeline, compositions=[BOTH], sampler=sampler)[0], made)


def _as_is(model, step):
    """Run the network with whatever is active on it."""
    import dataclasses

    return dataclasses.replace(step, compositions=None).guided()


def test_profiles_orders_and_calibrated_thresholds():
    with adapted("sd", "a", "b") as pipeline:
        settings = {"steps": 8, "height": tiny.SIZE, "width": tiny.SIZE, "seeds": [0, 1]}
        profile = frequency_profile(pipeline, "a", "a red square", **settings)
        assert profile.shape == (7,) and (profile > 0).all() and (profile < 1).all()
        assert not torch.equal(profile, frequency_profile(pipeline, "b", "a red square", **settings))
        high, low = frequency_order(pipeline, ["a", "b"], {"a": "a cat", "b": "a dog"}, **settings)
        assert sorted((*high, *low)) == ["a", "b"] and len(high) == 1
        with pytest.raises(DiffusionError, match="offline"):  # a network without training adds noise
            calibrated_threshold(pipeline, "a", "a red square", early=0.5, **settings)
        smooth = {"sampler": Smoothing(), **settings}
        profile = frequency_profile(pipeline, "a", "a red square", **smooth)
        g = calibrated_threshold(pipeline, "a", "a red square", early=0.5, **smooth)
        assert profile[4] < g < profile[3]  # step 4 is the last one early, and sees what step 3 left
        with pytest.raises(DiffusionError, match="take more steps"):
            calibrated_threshold(pipeline, "a", "a red square", early=0.05, **smooth)


class Smoothing(Sampler):
    """Takes fine detail for noise, so that latents grow smoother from step to step."""

    def described(self):
        return {}

    @contextmanager
    def begin(self, pipeline, orders):
        class Course:
            def predict(self, step):
                return step.latents - torch.nn.functional.avg_pool2d(step.latents, 3, 1, 1, count_include_pad=False)

            def reports(self):
                return [{} for _ in orders]

        yield Course()


def test_what_is_asked_wrongly_is_refused():
    assert set(SAMPLERS) >= {"merge", "switch", "composite", "cmlora"}
    with pytest.raises(DiffusionError, match="Did you mean 'cmlora'"):
        sampler_from("cm-lora")
    with pytest.raises(OptionError, match="no option 'perid'"):
        sampler_from({"sampler": "switch", "perid": 3})
    with pytest.raises(OptionError, match="'a' is in the high set and in the low set"):
        CMLoRA(high=("a",), low=("a",))
    with pytest.raises(OptionError, match="runs away"):
        CMLoRA(decay=1.0, least=None)
    with adapted("sd", "a", "b") as pipeline:
        with pytest.raises(DiffusionError, match="Did you mean 'b'"):
            pixels(pipeline, compositions=BOTH, sampler={"sampler": "cmlora", "low": ["bb"]})
        with pytest.raises(DiffusionError, match="Give each picture a composition"):
            pixels(pipeline, compositions={0: "a", 1: "b"}, sampler="composite")
        with pytest.raises(DiffusionError, match="give one of them"):
            pixels(pipeline, compositions=BOTH, sampler="composite", predict=lambda step: step.guided())
    with adapted("flux", "a", "b", targets=("attn.to_q", "attn.to_k")) as pipeline:
        with pytest.raises(SiteError, match="cache=False"):
            pixels(pipeline, compositions=BOTH, sampler="cmlora")
        made = pixels(pipeline, compositions=BOTH, sampler=uncached(), steps=2)
        assert made[0].facts["full_passes"] == 4
