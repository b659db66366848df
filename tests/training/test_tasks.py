"""The engine trains whatever a task says: pictures, noise, pairs; together as alone, and resumed exactly."""

import json

import pytest
import torch
from training.other_tasks import Denoising, EvenPolicy, Margins, PictureClasses, Preference
from training.results import difference, tensors
from training.tiny_bases import tiny_llama, token_rows

from lorry.training import DataError, Examples, Fleet, Job, train
from lorry.training.report import read_metrics
from lorry.training.task import TASKS, MeanTally, PlainReport, digest, split


def tiny_vit():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    return ViTForImageClassification(config)


def tiny_unet():
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def pictures(count, seed):
    """Pictures whose class is their brightest channel."""
    generator = torch.Generator().manual_seed(seed)
    records = []
    for _ in range(count):
        label = int(torch.randint(0, 3, (), generator=generator))
        picture = torch.randn(3, 8, 8, generator=generator) * 0.3
        picture[label] += 1
        records.append({"picture": picture, "label": label})
    return records


def pairs(count, seed):
    good, bad = token_rows(count, (5, 14), seed).examples, token_rows(count, (5, 14), seed + 50).examples
    return Examples(tuple(zip(good, bad, strict=True)), PlainReport(count, count))


def curve(folder, name):
    rows = read_metrics(folder / name / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def picture_jobs(steps=12):
    lora = {"method": "lora", "rank": 4}
    return [
        Job(
            "classes", pictures(40, 1), {**lora, "dropout": 0.1}, objective=PictureClasses(), steps=steps, batch_size=4,
            learning_rate=1e-2, eval_data=pictures(20, 2), seed=1, modules_to_save=["classifier"],
        ),
        Job("more", pictures(40, 3), lora, objective=PictureClasses(), steps=steps, batch_size=3, seed=2),
        Job("margins", pictures(40, 4), lora, objective=Margins(), steps=steps, batch_size=5, seed=3),
    ]  # fmt: skip


def noise_jobs(steps=10):
    lora = {"method": "lora", "rank": 2}
    return [
        Job(
            "noise", pictures(24, 1), {**lora, "dropout": 0.1}, objective=Denoising(), steps=steps, batch_size=4,
            learning_rate=3e-3, gradient_accumulation_steps=2, hold_out=0.25, eval_every=4, seed=1,
        ),
        Job("beside", pictures(24, 2), lora, objective=Denoising(), steps=steps, batch_size=3, seed=2),
    ]  # fmt: skip


@pytest.mark.parametrize(("make", "jobs"), [(tiny_vit, picture_jobs), (tiny_unet, noise_jobs)])
def test_jobs_of_several_tasks_together_equal_jobs_alone(make, jobs, tmp_path):
    together = train(make(), None, jobs(), tmp_path / "together")
    assert together.ok, together.report
    for job in jobs():
        alone = train(make(), None, job, tmp_path / job.name)
        assert difference(tensors(together, job.name), tensors(alone, job.name)) < 1e-5
        assert together[job.name]["pictures"] == alone[job.name]["pictures"] > 0
        if job.eval_data is not None or job.hold_out:
            mine, theirs = together[job.name]["eval"], alone[job.name]["eval"]
            assert mine["end"]["loss"] == pytest.approx(theirs["end"]["loss"], abs=1e-5)


def test_pictures_are_learned(tmp_path):
    (job, *_) = picture_jobs(60)
    held = train(tiny_vit(), None, job, tmp_path)["classes"]["eval"]
    assert held["end"]["loss"] < 0.5 * held["start"]["loss"] and held["end"]["count"] == 20
    assert (tmp_path / "classes" / "adapter" / "lorry.json").exists()
    assert read_metrics(tmp_path / "classes" / "metrics.jsonl")[1]["pictures"] == 4


@pytest.mark.parametrize("ticks", [3, 8])
def test_noise_of_a_resumed_run_is_what_it_would_have_been(ticks, tmp_path):
    whole = train(tiny_unet(), None, noise_jobs(), tmp_path / "whole")
    first = Fleet(tiny_unet(), None, noise_jobs(), tmp_path / "part")
    with first.base.mode(training=True):
        first._evaluate(first.runs)
        for _ in range(ticks):
            first._tick()
    first.save_checkpoint()
    second = train(tiny_unet(), None, noise_jobs(), tmp_path / "part", resume=True)
    for job in noise_jobs():
        assert difference(tensors(second, job.name), tensors(whole, job.name)) == 0
        assert curve(tmp_path / "part", job.name) == curve(tmp_path / "whole", job.name)


def test_other_pictures_are_not_taken_for_those_of_the_run(tmp_path):
    job = noise_jobs(2)[1]
    train(tiny_unet(), None, job, tmp_path)
    with pytest.raises(ValueError, match="training examples"):
        Fleet(tiny_unet(), None, [Job(**{**vars(job), "data": pictures(24, 9)})], tmp_path, resume=True)


def test_pairs_go_through_one_pass_with_plain_text(tmp_path):
    lora = {"method": "lora", "rank": 4}

    def jobs():
        return [
            Job("text", token_rows(30, (5, 12), 1), lora, steps=10, learning_rate=3e-3, batch_size=3, seed=1),
            Job(
                "pairs", pairs(30, 7), lora, objective=Preference(), steps=10, learning_rate=3e-3, batch_size=2, seed=2
            ),
        ]

    seen = []
    model = tiny_llama()
    model.register_forward_pre_hook(lambda module, args, given: seen.append(len(given["input_ids"])), with_kwargs=True)
    together = train(model, None, jobs(), tmp_path / "together", max_pad_ratio=None)
    assert together.ok, together.report
    assert seen == [3 + 2 * 2] * 10
    for job in jobs():
        alone = train(tiny_llama(), None, job, tmp_path / job.name)
        assert difference(tensors(together, job.name), tensors(alone, job.name)) < 1e-5
    assert together["pairs"]["last_loss"] < together["pairs"]["first_loss"]


def sharp_llama():
    """In float64, since drawing is choosing; with a head whose logits can be far apart."""
    model = tiny_llama().double()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def even_share(result, model):
    """How likely the adapter makes an even token after each of some prompts."""
    from lorry.core.life.api import rows

    ids = torch.stack([e.input_ids.long() for e in token_rows(16, (8, 8), 3).examples])
    with rows(model, ["policy"] * 16), torch.no_grad():
        return float(model.eval()(ids).logits[:, -1].softmax(-1)[:, ::2].sum(-1).mean())


def test_a_policy_learns_from_its_own_draws_beside_text_as_alone(tmp_path):
    def jobs():
        lora = {"method": "lora", "rank": 4}
        policy = Job("policy", token_rows(24, (5, 10), 3), lora, objective=EvenPolicy(), steps=25, batch_size=8, seed=1,
                     learning_rate=1e-2)  # fmt: skip
        return [Job("text", token_rows(20, (5, 12), 1), lora, steps=25, seed=2), policy]

    models = [sharp_llama(), sharp_llama()]
    together = train(models[0], None, jobs(), tmp_path / "together")
    assert together.ok, together.report
    alone = train(models[1], None, jobs()[1], tmp_path / "alone")
    assert difference(tensors(together, "policy"), tensors(alone, "policy")) < 1e-5
    assert even_share(together, models[0]) > 0.7


def test_the_gradient_of_a_pass_is_that_of_plain_pytorch(tmp_path):
    """One micro-batch of one job, against the model with the dense weights in float64."""
    job = Job("job", pictures(4, 1), {"method": "lora", "rank": 2}, objective=PictureClasses(), steps=1, batch_size=4)
    fleet = Fleet(tiny_vit().double(), None, [Job(**{**vars(job), "data": [
        {**r, "picture": r["picture"].double()} for r in job.data]})], tmp_path)  # fmt: skip
    run = fleet.runs[0]
    adapter = run.adapter.to(torch.float64)
    from lorry.training.groups import ParameterGroups
    from lorry.training.joint import train_pass
    from lorry.training.optim import make_optimizer

    run.groups = ParameterGroups(make_optimizer(run.job, adapter), adapter)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.1)
    run.open_step()
    with fleet.base.mode(training=True):
        train_pass(fleet.base, [run.share()], 0)
    plain = tiny_vit().double().eval()
    leaves = {}
    for path, entry in adapter.entries.items():
        module = plain.get_submodule(path)
        a, b = (entry.tensors()[n].detach().clone().requires_grad_() for n in "AB")
        leaves[path] = (a, b)
        weight = module.weight.detach()
        del module.weight
        module.weight = weight + entry.method.scale(entry.site) * b @ a
    data = run.prepared.train.examples
    logits = plain(torch.stack([p for p, _ in data])).logits
    torch.nn.functional.cross_entropy(logits, torch.tensor([y for _, y in data])).backward()
    for path, (a, b) in leaves.items():
        mine = adapter.entries[path].tensors()
        torch.testing.assert_close(mine["A"].grad, a.grad, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(mine["B"].grad, b.grad, rtol=1e-9, atol=1e-12)


def test_tasks_are_found_by_name():
    assert {"causal", "completion", "chat", "classification"} <= set(TASKS)
    with pytest.raises(DataError, match="(?i)completion"):
        Job("job", "x.jsonl", objective="completio")
    with pytest.raises(ValueError, match="Task"):
        Job("job", "x.jsonl", objective=3)


def test_digests_tell_what_differs():
    one = [(torch.arange(4), {"a": 1.0}), (torch.ones(2, dtype=torch.bool), {"a": None})]
    assert digest(one) == digest([(t.clone(), dict(d)) for t, d in one])
    others = [
        [(torch.arange(4).float(), {"a": 1.0}), one[1]],
        [(torch.arange(4).view(2, 2), {"a": 1.0}), one[1]],
        [one[0], (torch.ones(2, dtype=torch.bool), {"a": 0})],
        [one[1], one[0]],
    ]
    assert len({digest(o) for o in [one, *others]}) == 5


def test_trees_are_split_along_rows():
    parts = split({"x": torch.arange(6), "y": (torch.arange(12).view(6, 2), None)}, [1, 2, 3])
    assert [p["x"].tolist() for p in parts] == [[0], [1, 2], [3, 4, 5]]
    assert parts[2]["y"][0].tolist() == [[6, 7], [8, 9], [10, 11]] and parts[0]["y"][1] is None


def test_a_mean_of_nothing_is_no_number():
    tally = MeanTally(3.0, 2) + MeanTally(1.0, 2)
    assert tally.metrics() == {"loss": 1.0, "count": 4}
    assert json.dumps(MeanTally().metrics()["loss"]) == "NaN"
