"""Scalings and presets: chosen apart from the method, in Python, YAML and flags, and refused where they contradict."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from methods.small import stack
from training.tiny_bases import tiny_llama, token_rows

import lorry
from lorry.core.method.families import Bottleneck
from lorry.core.method.registry import presets
from lorry.training import Fleet, Job
from lorry.training.hooks import DYNAMICS
from lorry.training.presets import COMBINATIONS
from lorry.training.scalings import SCALINGS
from lorry.training.starts import STARTS

ROWS = [{"text": "a"}]
SCALED = [slug for slug in lorry.methods() if lorry.method_from(slug).alpha_rank is not None]


def job(method=None, **options):
    return Job("job", ROWS, method, **options)


def update(method):
    """The update of one layer, whose tensors do not depend on the method's scale."""
    model = stack()
    adapter = lorry.attach(model, method, targets="layers.0.up", seed=3)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in adapter.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=draw))
    return next(delta for _, delta in adapter.deltas())


@pytest.mark.parametrize("slug", SCALED)
def test_each_scaling_gives_its_factor_for_every_method_that_has_an_alpha_over_a_rank(slug):
    made = lorry.method_from({"method": slug, "alpha": 3.0})
    rank = made.alpha_rank
    if isinstance(made, Bottleneck) and slug not in ("lora-mixer", "offset"):
        site = lorry.attach(stack(), "lora", targets="layers.0.up").sites[0]
        found = {n: s().of(made).scale(site) for n, s in SCALINGS.items() if n != "constant"}
        assert found == pytest.approx({"lora": 3.0 / rank, "rslora": 3.0 / math.sqrt(rank)})
        assert SCALINGS["constant"](value=0.25).of(lorry.method_from(slug)).scale(site) == pytest.approx(0.25)
    for name, scaling in SCALINGS.items():
        scaled = scaling().of(made if name != "constant" else lorry.method_from(slug))
        assert type(scaled) is type(made) and scaled.alpha_rank == rank


@pytest.mark.parametrize("method", ["lora", "hira", "loha", "lokr", "mos-lora", "melora"])
def test_the_update_grows_by_the_factor(method):
    plain = {"method": method, "rank": 4, "alpha": 2.0}
    one, root = (update(job(plain, scaling=name).make_method()) for name in ("lora", "rslora"))
    assert torch.equal(one, update(lorry.method_from(plain)))
    torch.testing.assert_close(root, 2 * one)
    fixed = update(job({"method": method, "rank": 4}, scaling={"scaling": "constant", "value": 0.25}).make_method())
    torch.testing.assert_close(fixed, one / 2)


@pytest.mark.parametrize(
    "method, scaling, said",
    [
        ("vera", "rslora", "no scale of alpha over its rank"),
        ("rslora", "lora", "rank_stabilized, which is the scaling 'rslora'"),
        ({"method": "lora", "alpha": 3.0}, "constant", "does away with alpha"),
        ("hira", "rslora", "needs alpha"),
        ("lora", "rs-lora", "Did you mean .*'rslora'"),
    ],
)
def test_what_contradicts_a_scaling_is_refused_with_the_reason(method, scaling, said):
    with pytest.raises(lorry.OptionError, match=said):
        job(method, scaling=scaling)


def test_a_job_takes_a_scaling_in_yaml_and_in_short():
    wanted = lorry.LoRA(rank=4, alpha=4.0)
    written = {"name": "a", "data": ROWS, "rank": 4, "scaling": "constant", "scaling_options": {"value": 1.0}}
    assert Job.from_dict(written).make_method() == wanted
    assert job({"method": "lora", "rank": 4}, scaling="constant:value=1.0").make_method() == wanted
    assert json.dumps(Job.from_dict(written).to_dict())


@pytest.mark.parametrize("name", [*COMBINATIONS, *presets()])
def test_every_preset_makes_a_job_and_its_parts_are_what_it_says(name):
    by_method, by_preset = (None if name in COMBINATIONS else job(name)), job(preset=name)
    if by_method is None:
        by_method = job(name)
        assert by_method == by_preset
        said = COMBINATIONS[name]
        assert by_preset.make_method().info.slug == said.method["method"]
        assert by_preset.start == said.start and by_preset.scaling == said.scaling
        assert [d.name for d in by_preset.make_dynamics()] == [
            d if isinstance(d, str) else d["dynamics"] for d in said.dynamics
        ]
    assert by_preset.make_method() == by_method.make_method()
    assert Job(**{k: v for k, v in vars(by_preset).items()}) == by_preset


def test_presets_have_names_of_their_own_and_parts_that_exist():
    assert not set(COMBINATIONS) & {*lorry.methods(), *presets()}
    for found in COMBINATIONS.values():
        assert found.start is None or found.start in STARTS
        assert all(d if isinstance(d, str) else d["dynamics"] in DYNAMICS for d in found.dynamics)


def test_what_a_job_says_beside_a_preset_is_added_or_refused():
    both = job({"rank": 4}, preset="lora-ga", dynamics=["lora-plus"])
    assert both.make_method() == lorry.LoRA(rank=4, rank_stabilized=True) and both.make_start().name == "lora-ga"
    assert job("lora-ga", start={"start": "lora-ga", "scale": "unit"}).make_start().scale == "unit"
    assert [d.name for d in job("relora", dynamics={"dynamics": "relora", "every": 9}).make_dynamics()] == ["relora"]
    for options, said in (
        ({"method": "dora"}, "method 'lora', found 'dora'"),
        ({"start": "pissa"}, "start 'lora-ga', found 'pissa'"),
        ({"scaling": "lora"}, "scaling 'rslora', found 'lora'"),
        ({"dynamics": ["relora", "plora"]}, "cannot act together"),
    ):
        with pytest.raises(lorry.OptionError, match=said):
            job(**{"preset": "lora-ga", **options})
    with pytest.raises(lorry.OptionError, match="Did you mean .*'lora-ga'"):
        job(preset="lora_ga")


def variants():
    """The names that the page of choices promises."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "choices.md").read_text(encoding="utf-8")
    return re.findall(r"`([\w-]+)`", " ".join(re.findall(r"^\| .* \| (`.*) \|$", page, re.M)))


def test_every_variant_of_the_unified_study_is_a_preset():
    names = variants()
    assert len(names) == len(set(names)) > 50
    for name in names:
        job(preset=name)


def test_every_combination_is_trained_in_one_fleet(tmp_path):
    options = {"steps": 2, "batch_size": 2, "calibration": 2, "targets": "attention"}
    jobs = [Job(n, token_rows(4, (5, 8), 1), {"rank": 2}, preset=n, **options) for n in COMBINATIONS]
    fleet = Fleet(tiny_llama(), None, jobs, tmp_path)
    assert fleet.train().ok
    for run in fleet.runs:
        assert run.adapter.metadata.get("start") == COMBINATIONS[run.job.name].start


def test_a_combination_that_does_not_fit_is_refused_with_the_reason(tmp_path):
    asked = Job("a", token_rows(4, (5, 8), 1), "lora", start="nlora", steps=1, targets="attention")
    with pytest.raises(lorry.SiteError, match="no mixer between A and B. Take the method mos-lora"):
        Fleet(tiny_llama(), None, [asked], tmp_path)
