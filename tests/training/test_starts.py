"""Starts and probes: what an adapter begins with may depend on calibration data."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from training.tiny_bases import tiny_llama, token_rows

import lorry
from lorry.core.errors import AdapterError, OptionError, SiteError
from lorry.core.life.calibrate import calibrate, observe
from lorry.core.life.probes import PROBES
from lorry.training import Fleet, Job, Start, train
from lorry.training.optim import OPTIMIZERS, optimizer_class
from lorry.training.schedule import SCHEDULES, rate_factor

SITE = "model.layers.0.mlp.up_proj"
IDS = torch.stack([r.input_ids.long() for r in token_rows(6, (12, 12), 1).examples])


def loss(model, ids):
    return model(input_ids=ids, labels=ids).loss


def job(start=None, **more):
    options = {"steps": 4, "batch_size": 3, "seed": 1, **more}
    return Job("job", token_rows(12, (5, 14), 1), {"method": "lora", "rank": 4}, start=start, **options)


def test_probes_see_inputs_gradients_and_gradients_of_outputs():
    model = tiny_llama().double()
    adapter = lorry.attach(model, "lora", name="a")
    site = adapter.entries[SITE].site
    seen = observe(
        adapter, {name: [site] for name in ("gradient", "input", "output gradient")}, [IDS[:3], IDS[3:]], loss
    )
    plain = tiny_llama().double().eval()
    inputs, gradients = [], []
    module = plain.get_submodule(SITE)
    module.register_forward_pre_hook(lambda m, args: inputs.append(args[0].detach().reshape(-1, 32)))
    module.register_full_backward_hook(lambda m, i, o: gradients.append(o[0].detach().reshape(-1, 64)))
    for part in (IDS[:3], IDS[3:]):
        loss(plain, part).backward()
    expected = module.weight.grad / 2
    torch.testing.assert_close(seen["gradient"][SITE].gradient, expected.float(), rtol=1e-5, atol=1e-8)
    for name, vectors in (("input", torch.cat(inputs)), ("output gradient", torch.cat(gradients))):
        found = seen[name][SITE]
        centred = vectors - vectors.mean(0)
        scale = float((centred.T @ centred).abs().max())
        torch.testing.assert_close(
            (found.inputs.T @ found.inputs).double(), centred.T @ centred, rtol=1e-4, atol=1e-5 * scale
        )
        assert found.count == len(vectors) == 72
    assert not any(p.grad is not None for p in model.parameters())


def test_a_probe_that_moves_the_weights_watches_alone():
    adapter = lorry.attach(tiny_llama(), "lora", name="a")
    for name in PROBES:
        both = {name: adapter.sites, "weight change": adapter.sites}
        if name != "weight change":
            with pytest.raises(AdapterError, match="'weight change' moves the weights"):
                observe(adapter, both, [IDS[:3]], loss)


def test_a_start_is_chosen_apart_from_the_method(tmp_path):
    made = {}
    for start in (None, "orthogonal", "input-directions"):
        fleet = Fleet(tiny_llama(), None, [job(start)], tmp_path / str(start))
        made[start] = {n: t.detach().clone() for n, t, _ in fleet.runs[0].adapter.named_tensors()}
        assert all(not t.any() for n, t in made[start].items() if n.endswith(".B"))
    for name in (n for n in made[None] if n.endswith(".A")):
        a = made["orthogonal"][name]
        gram = a @ a.T
        torch.testing.assert_close(gram, gram.diagonal().mean() * torch.eye(4), atol=1e-5, rtol=1e-5)
        directions = made["input-directions"][name]
        torch.testing.assert_close(directions @ directions.T, torch.eye(4), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(a, made[None][name])


def test_input_directions_are_those_of_eva(tmp_path):
    data = token_rows(12, (12, 12), 1)
    runs = [
        Job("job", data, {"method": "lora", "rank": 4}, start="input-directions", steps=1, batch_size=3),
        Job("job", data, {"method": "eva", "rank": 4, "rho": 1.0}, steps=1, batch_size=3),
    ]
    ours, eva = (
        {n: t.detach() for n, t, _ in Fleet(tiny_llama(), None, [j], tmp_path / str(i)).runs[0].adapter.named_tensors()}
        for i, j in enumerate(runs)
    )
    for name in (n for n in ours if n.endswith(".A")):
        assert torch.allclose((ours[name] * eva[name]).sum(1).abs(), torch.ones(4), atol=1e-3)


@pytest.mark.parametrize("start", ["orthogonal", "input-directions", "pissa", "lora-ga"])
def test_a_run_with_a_start_is_resumed_exactly(start, tmp_path):
    whole = train(tiny_llama(), None, job(start), tmp_path / "whole")
    first = Fleet(tiny_llama(), None, [job(start)], tmp_path / "part")
    with first.base.mode(training=True):
        first._tick()
        first._tick()
    first.save_checkpoint()
    second = train(tiny_llama(), None, job(start), tmp_path / "part", resume=True)
    pairs = zip(whole.adapters["job"].named_tensors(), second.adapters["job"].named_tensors(), strict=True)
    assert all(torch.equal(a, b) for (_, a, _), (_, b, _) in pairs)


def test_a_start_of_ones_own(tmp_path):
    @dataclass(frozen=True)
    class Steepest(Start):
        """A is the first right singular directions of the gradient, as in LoRA-GA."""

        name: ClassVar[str] = "steepest"
        probes: ClassVar[tuple[str, ...]] = ("gradient",)

        def set(self, entry, seen, generator):
            a = entry.tensors()["A"]
            a.copy_(torch.linalg.svd(seen["gradient"].gradient)[2][: len(a)])

    fleet = Fleet(tiny_llama(), None, [job(Steepest())], tmp_path)
    a = fleet.runs[0].adapter.entries[SITE].tensors()["A"]
    torch.testing.assert_close((a @ a.T).detach(), torch.eye(4), atol=1e-5, rtol=1e-5)
    assert fleet.train().ok
    with pytest.raises(OptionError, match="orthogonal"):
        job("orthogonl")


@pytest.mark.parametrize(
    "method, start, reason",
    [
        ("shira", "orthogonal", "shira.*no factors A and B.*low-rank method"),
        ("melora", "orthogonal", "melora.*no A of .rank, in.*Take LoRA"),
        ("pissa", "pissa", "pissa.*a start of its own.*Take the method lora"),
        ("smora", "pissa", "smora.*gates.*frozen pair.*whose B is zero"),
        ({"method": "lora-xs", "rank": 4}, "kaiming", "lora-xs.*never trains"),
        ({"method": "lora", "rank": 9}, "lora-ga", "k_proj' is 16 x 32.*rank must be at most 8, found 9"),
    ],
    ids=lambda v: v["method"] if isinstance(v, dict) else v.split(".")[0],
)
def test_a_start_says_where_it_cannot_be_used(method, start, reason, tmp_path):
    model = tiny_llama()
    with pytest.raises(SiteError, match=reason):
        Fleet(model, None, [Job("job", token_rows(12, (5, 14), 1), method, start=start, steps=1)], tmp_path)
    assert "_lorry_state" not in model.__dict__


def test_calibration_does_not_overwrite_what_was_learned(tmp_path):
    method = {"method": "eva", "rank": 2}
    batches = [IDS[:3], IDS[3:]]
    model = tiny_llama()
    adapter = lorry.attach(model, method, name="a")
    with torch.no_grad():
        adapter.entries[SITE].tensors()["B"].add_(0.1)
    kept = adapter.entries[SITE].tensors()["B"].detach().clone()
    with pytest.raises(AdapterError, match=r"'a' is not as it was attached.*again=True"):
        calibrate(adapter, batches, loss)
    assert torch.equal(adapter.entries[SITE].tensors()["B"], kept)
    calibrate(adapter, batches, loss, again=True)
    with pytest.raises(AdapterError, match="was calibrated already"):
        calibrate(adapter, batches, loss)
    adapter.save(tmp_path / "a")
    loaded = lorry.load(tiny_llama(), tmp_path / "a", name="b")
    del loaded.metadata["calibration"]
    with pytest.raises(AdapterError, match="'b' was trained or loaded"):
        calibrate(loaded, batches, loss)
    for fresh in ({"method": "shira", "mask": "grad"}, method):
        calibrate(lorry.attach(tiny_llama(), fresh, name="a", dtype=torch.bfloat16), batches, loss)


def test_optimizers_and_schedules_of_ones_own(tmp_path):
    class Signs(torch.optim.Optimizer):
        def __init__(self, params, lr=1e-3):
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad.sign(), alpha=group["lr"])

    OPTIMIZERS.add("test-signs", Signs)
    assert optimizer_class("test-signs") is Signs and optimizer_class("AdamW") is torch.optim.AdamW
    result = train(tiny_llama(), None, job(optimizer="test-signs", learning_rate=1e-3, steps=1), tmp_path)
    b = result.adapters["job"].entries[SITE].tensors()["B"].detach()
    torch.testing.assert_close(b.abs().unique(), torch.tensor([1e-3]))
    assert {"constant", "linear", "cosine", "constant-then-linear"} <= set(SCHEDULES)
    falling = job(schedule="constant-then-linear", schedule_options={"decay": 0.5}).make_schedule()
    assert [rate_factor(falling, s, 8) for s in (0, 4, 6, 8)] == [1.0, 1.0, 0.5, 0.0]
    with pytest.raises(OptionError, match="decay"):
        job(schedule="linear", schedule_options={"decay": 0.5})
