"""Training as a task of the fleet: the losses against diffusers' own formulas, and jobs beside each other."""

import json

import pytest
import torch
from diffusion import tiny
from torch.nn import functional as F

import lorry
from lorry.diffusion.data import bucket_of, buckets
from lorry.diffusion.noise import Diffused, Flowing, Times
from lorry.diffusion.sampling import fresh_scheduler
from lorry.diffusion.task import Diffusion, fleet
from lorry.training.data_errors import DataError
from lorry.training.task import Setting

COLORS = [(200, 30, 30), (30, 30, 200), (40, 160, 60)]


@pytest.fixture
def folder(tmp_path):
    """Three pictures: two squares with captions, a wide one."""
    from PIL import Image

    path = tmp_path / "pictures"
    path.mkdir()
    for number, color in enumerate(COLORS):
        Image.new("RGB", (64, 32) if number == 2 else (32, 32), color).save(path / f"{number}.png")
        (path / f"{number}.txt").write_text(f"{['red', 'blue', 'dog'][number]} square\n")
    return path


def job(folder, name="style", **more):
    objective = {"objective": "diffusion", "resolution": 16, **more.pop("task", {})}
    plain = {"method": {"method": "lora", "rank": 2}, "targets": "attention", "steps": 3, "batch_size": 2}
    return {"name": name, "data": str(folder), "objective": objective, "learning_rate": 1e-2, **plain, **more}


def trained(pipeline, jobs, output):
    try:
        result = fleet(pipeline, jobs, output, progress=False).train()
        named = {name: adapter.named_tensors() for name, adapter in result.adapters.items()}
        return result, {name: {k: t.detach().clone() for k, t, _ in each} for name, each in named.items()}
    finally:
        for bundle in lorry.adapters(pipeline).values():
            bundle.detach()


def losses(output, name):
    rows = [json.loads(line) for line in (output / name / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("name", tiny.MAKERS)
def test_every_family_learns_and_its_adapter_comes_back(name, folder, tmp_path):
    pipeline = tiny.pipeline(name)
    more = {"hold_out": 0.34, "eval_every": 3}
    result, tensors = trained(pipeline, [job(folder, task={"trigger": "sks"}, **more)], tmp_path / "out")
    assert result.ok, result["style"]["status"]
    assert any(t.abs().max() > 0 for k, t in tensors["style"].items() if k.endswith(".B"))
    bundle = lorry.load(pipeline, tmp_path / "out" / "style" / "adapter")
    assert set(bundle.parts) == {"unet" if name in ("sd", "sdxl") else "transformer"}
    for k, t, _ in next(iter(bundle.parts.values())).named_tensors():
        assert torch.equal(t, tensors["style"][k])
    bundle.detach()


def test_jobs_beside_each_other_end_as_alone(folder, tmp_path):
    pipeline = tiny.pipeline("sd")
    jobs = [
        job(folder, "one", task={"weighting": "min-snr"}),
        job(folder, "two", task={"trigger": "sks", "prediction": "v_prediction"}, seed=3, batch_size=1),
        job(folder, "three", task={"prior_data": str(folder), "prior_weight": 0.5}),
    ]
    _, together = trained(pipeline, jobs, tmp_path / "together")
    for each in jobs:
        _, alone = trained(pipeline, [each], tmp_path / each["name"])
        name = each["name"]
        for key, tensor in alone[name].items():
            torch.testing.assert_close(together[name][key], tensor, atol=2e-5, rtol=1e-3)
        wanted = losses(tmp_path / name, name)
        assert losses(tmp_path / "together", name) == pytest.approx(wanted, rel=1e-4)


def test_checkpointing_changes_no_result_and_leaves_no_trace(folder, tmp_path):
    pipeline = tiny.pipeline("sdxl")
    _, plain = trained(pipeline, [job(folder)], tmp_path / "plain")
    before = {k: "_gradient_checkpointing_func" in vars(m) for k, m in pipeline.unet.named_modules()}
    _, saved = trained(pipeline, [job(folder, task={"checkpointing": True})], tmp_path / "saved")
    for key, tensor in plain["style"].items():
        torch.testing.assert_close(saved["style"][key], tensor, atol=1e-6, rtol=1e-4)
    assert not pipeline.unet.is_gradient_checkpointing
    assert before == {k: "_gradient_checkpointing_func" in vars(m) for k, m in pipeline.unet.named_modules()}


def test_the_loss_is_that_of_diffusers_example_for_dreambooth(folder):
    """The formulas of ``train_dreambooth_lora.py``: add_noise, the prediction, min-SNR, the prior's loss."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    pipeline = tiny.pipeline("sd")
    task = Diffusion(resolution=16, weighting="min-snr", prior_data=str(folder), prior_weight=0.3)
    setting = Setting(pipeline.unet, pipeline)
    examples = task.examples(setting, [{"image": str(folder / "0.png"), "text": "red square"}] * 2)
    drawn = task.draw(examples.examples, torch.Generator().manual_seed(1), setting, "x")
    batch = task.collate(setting, drawn)
    found, counts = task.losses(task.forward(setting, batch), batch.targets)
    assert counts.tolist() == [1, 1]

    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    times, conditions = batch.inputs["times"].long(), batch.inputs["conditions"]
    noise = batch.targets["target"]
    alphas = scheduler.alphas_cumprod[times][:, None, None, None]
    latents = (batch.inputs["latents"] - (1 - alphas).sqrt() * noise) / alphas.sqrt()
    noisy = scheduler.add_noise(latents, noise, times)
    torch.testing.assert_close(noisy, batch.inputs["latents"], atol=1e-4, rtol=1e-4)
    prediction = pipeline.unet(noisy, times, conditions["text"]).sample
    snr = compute_snr(scheduler, times)
    weights = torch.stack([snr, 5.0 * torch.ones_like(snr)], dim=1).min(dim=1)[0] / snr
    rows = F.mse_loss(prediction, noise, reduction="none").mean(dim=(1, 2, 3)) * weights
    torch.testing.assert_close(found, rows[0::2] + 0.3 * rows[1::2], atol=1e-5, rtol=1e-3)


def test_the_loss_of_a_flow_is_that_of_diffusers_example():
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    pipeline = tiny.pipeline("sd3")
    scheduler = fresh_scheduler(pipeline)  # a call of the pipeline leaves its times in the pipeline's own
    noising = Flowing(scheduler)
    picture, noise = torch.randn(4, 3, 3), torch.randn(4, 3, 3)
    time = float(scheduler.timesteps[300])
    sigma = scheduler.sigmas[300]
    noisy, target = noising.mixed(picture, noise, time)
    torch.testing.assert_close(noisy, (1.0 - sigma) * picture + sigma * noise)
    assert torch.equal(target, noise - picture)
    for ours, theirs in (("sigma-sqrt", "sigma_sqrt"), ("cosmap", "cosmap"), ("none", "none")):
        wanted = float(compute_loss_weighting_for_sd3(theirs, sigma.reshape(1)))
        assert noising.weight(Times(weighting=ours), time) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("density, theirs", [("logit-normal", "logit_normal"), ("mode", "mode"), ("uniform", "none")])
def test_times_are_drawn_as_diffusers_draws_them(density, theirs):
    from diffusers.training_utils import compute_density_for_timestep_sampling

    times = Times(density=density, mean=0.3, std=0.8, mode_scale=1.29)
    generator = torch.Generator().manual_seed(0)
    ours = torch.tensor([times.level(generator) for _ in range(4000)]).sort().values
    torch.manual_seed(0)
    wanted = compute_density_for_timestep_sampling(theirs, 4000, logit_mean=0.3, logit_std=0.8, mode_scale=1.29)
    assert (ours - wanted.sort().values).abs().max() < 0.05


def test_times_stay_in_their_range():
    scheduler = tiny.pipeline("sd").scheduler
    generator = torch.Generator().manual_seed(0)
    for noising in (Diffused(scheduler), Flowing(tiny.pipeline("flux").scheduler)):
        found = [noising.draw(Times(low=200, high=300), generator) for _ in range(50)]
        assert min(found) >= 200 and max(found) < 300 and len(set(found)) > 10


def test_velocity_is_the_schedulers_own():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(tiny.pipeline("sd").scheduler.config)
    picture, noise = torch.randn(4, 3, 3), torch.randn(4, 3, 3)
    _, target = Diffused(scheduler, "v_prediction").mixed(picture, noise, 400.0)
    wanted = scheduler.get_velocity(picture[None], noise[None], torch.tensor([400]))[0]
    torch.testing.assert_close(target, wanted)


def test_pictures_of_several_shapes_lie_in_buckets(folder, tmp_path):
    pipeline = tiny.pipeline("sd")
    assert bucket_of((512, 1024), buckets(512, 64)) == (320, 704) or bucket_of((512, 1024), buckets(512, 64))[0] < 512
    assert all(h * w <= 512 * 512 and h % 64 == w % 64 == 0 for h, w in buckets(512, 64))
    task = Diffusion(resolution=16, aspect_buckets=True, bucket_step=4)
    records = [{"image": str(folder / f"{i}.png"), "text": "a cat"} for i in range(3)]
    examples = task.examples(Setting(pipeline.unet, pipeline), records)
    assert [task.kin(e) for e in examples.examples][:2] == [(8, 8), (8, 8)]
    wide = task.kin(examples[2])
    assert wide[1] > wide[0]
    jobs = [
        job(folder, n, task={"aspect_buckets": True, "bucket_step": 4}, steps=4, seed=s)
        for n, s in (("a", 0), ("b", 5))
    ]
    result, together = trained(pipeline, jobs, tmp_path / "out")
    assert result.ok
    _, alone = trained(pipeline, jobs[1:], tmp_path / "alone")
    for key, tensor in alone["b"].items():
        torch.testing.assert_close(together["b"][key], tensor, atol=2e-5, rtol=1e-3)


def test_evaluations_see_the_same_noise(folder, tmp_path):
    pipeline = tiny.pipeline("flux")
    frozen = job(folder, learning_rate=1e-12, hold_out=0.34, eval_every=1)
    result, _ = trained(pipeline, [frozen], tmp_path / "out")
    found = result["style"]["eval"]
    assert found["count"] >= 3 and found["end"]["loss"] == pytest.approx(found["start"]["loss"], rel=1e-5)


def test_captions_and_metadata(folder, tmp_path):
    from lorry.training.data import load_records

    assert [r["text"] for r in load_records(folder)] == ["red square", "blue square", "dog square"]
    (folder / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "another"}\n')
    assert load_records(str(folder)) == [{"image": str(folder / "1.png"), "text": "another"}]
    (folder / "metadata.jsonl").write_text('{"file_name": "9.png"}\n')
    with pytest.raises(DataError, match="names the picture 9.png, which is not in"):
        load_records(folder)


def test_a_folder_of_datasets(folder, tmp_path):
    import datasets

    data = datasets.Dataset.from_dict({"image": [str(folder / "0.png")] * 2, "text": ["a cat", "a dog"]})
    data.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "data"))
    result, _ = trained(tiny.pipeline("sd"), [job(tmp_path / "data")], tmp_path / "out")
    assert result.ok, result["style"]["status"]


@pytest.mark.parametrize(
    "spoil, match",
    [
        (lambda f: (f / "1.png").write_bytes(b"no picture"), r"Record 1: .*1.png is no picture that can be read"),
        (lambda f: (f / "1.txt").unlink(), "Record 1 has no caption"),
    ],
)
def test_bad_pictures_fail_their_job_and_name_the_file(spoil, match, folder, tmp_path):
    spoil(folder)
    result, _ = trained(tiny.pipeline("sd"), [job(folder)], tmp_path / "out")
    import re

    assert not result.ok and re.search(match, result["style"]["status"]), result["style"]["status"]
    assert lorry.adapters(tiny.pipeline("sd")) == {}


def test_what_does_not_fit_is_refused(folder):
    sd, flux = tiny.pipeline("sd"), tiny.pipeline("flux")
    with pytest.raises(DataError, match="needs a pipeline of diffusers"):
        Diffusion().check_model(Setting(sd.unet, None))
    with pytest.raises(DataError, match="must be the pipeline's unet"):
        Diffusion().check_model(Setting(flux.transformer, sd))
    with pytest.raises(DataError, match="weighting 'min-snr' is not for FluxPipeline"):
        Diffusion(weighting="min-snr").check_model(Setting(flux.transformer, flux))
    with pytest.raises(DataError, match="no prediction 'epsilom'"):
        Diffusion(prediction="epsilom").check_model(Setting(sd.unet, sd))
    with pytest.raises(DataError, match="asks for {trigger}"):
        Diffusion(prompt="a {trigger}").examples(Setting(sd.unet, sd), [{"image": str(folder / "0.png")}])
