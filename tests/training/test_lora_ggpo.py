"""LoRA-GGPO and LoRA-MGPO: the law of the noise, what the factors see of the gradient, and where the noise is not."""

import pytest
import torch
from training.results import difference, tensors
from training.test_allora import fleet, full_gradients, gradients
from training.tiny_bases import tiny_llama, token_rows

from lorry.core.life.api import attach
from lorry.training import Job, train
from lorry.training.dynamics.lora_ggpo import LoRAGGPO, Noise, gradient_norms
from lorry.training.dynamics.lora_mgpo import LoRAMGPO
from lorry.training.low_rank import pairs_of

LORA = {"method": "lora", "rank": 4, "alpha": 8.0}


def moment(made, dynamic):
    return made.runs[0]._moment(dynamic)


@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_the_noise_of_a_row_has_the_variance_of_the_law(beta, tmp_path):
    dynamic = LoRAGGPO(sigma=0.3, beta=beta, most=1e9)
    made = fleet(tmp_path, [dynamic], method=LORA)
    at = moment(made, dynamic)
    pair = pairs_of(made.runs[0].adapter, "test")[0]
    at.state[pair.path] = torch.linspace(0.0, 3.0, len(pair.b)).double()
    weight = pair.entry.site.matrix() + 2.0 * pair.b @ pair.a
    n = pair.a.shape[1]
    variances = 0.09 / n * (weight.square().sum(1) + beta * at.state[pair.path].square())
    deviations = dynamic.deviations(at, pair)
    torch.testing.assert_close(deviations.square(), variances, rtol=1e-6, atol=1e-12)
    draws = torch.stack([torch.cat([e for _, e in Noise(deviations, n, 5, s).chunks()]) for s in range(2000)])
    samples = draws.permute(1, 0, 2).flatten(1)  # (rows, draws * width): 64,000 of each row
    torch.testing.assert_close(samples.var(1), variances, rtol=0.03, atol=0)
    assert (samples.mean(1).abs() < 5 * (variances / samples.shape[1]).sqrt()).all()
    correlation = torch.corrcoef(samples) - torch.eye(len(samples), dtype=samples.dtype)
    assert correlation.abs().max() < 0.02


def test_the_part_of_the_gradient_is_bounded(tmp_path):
    dynamic = LoRAGGPO(sigma=0.3, beta=1e6, most=0.5)
    made = fleet(tmp_path, [dynamic])
    at, pair = moment(made, dynamic), pairs_of(made.runs[0].adapter, "test")[0]
    before = dynamic.deviations(at, pair)
    at.state[pair.path] = torch.ones(len(pair.b), dtype=torch.float64)
    torch.testing.assert_close(dynamic.deviations(at, pair), before * 1.5**0.5)


def test_what_the_factors_see_of_the_gradient(tmp_path):
    made = fleet(tmp_path, method=LORA)
    weights = full_gradients(made)
    _, found = gradients(made)
    for pair in pairs_of(made.runs[0].adapter, "test"):
        a, b, da, db = pair.a, pair.b, found[f"{pair.path}.A"], found[f"{pair.path}.B"]
        seen, weight = 2.0 * (b @ da + db @ a), weights[pair.path]
        torch.testing.assert_close(seen, 4.0 * (b @ b.mT @ weight + weight @ a.mT @ a), rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(gradient_norms(pair, found), seen.norm(dim=1).detach(), rtol=1e-6, atol=1e-12)
        alone = {f"{pair.path}.B": db}
        torch.testing.assert_close(gradient_norms(pair, alone), (2.0 * db @ a).norm(dim=1).detach())


@pytest.mark.parametrize("chunk", [0, 5, 512])
def test_a_pass_is_that_of_the_noisy_weight(chunk, tmp_path):
    dynamic = LoRAGGPO(sigma=0.5, beta=0.0, chunk=chunk)
    noisy, plain = fleet(tmp_path / "a", [dynamic]), fleet(tmp_path / "b")
    at = moment(noisy, dynamic)
    for pair in pairs_of(noisy.runs[0].adapter, "test"):
        noise = Noise(dynamic.deviations(at, pair), pair.a.shape[1], chunk, at.generator(pair.path).initial_seed())
        weight = plain.runs[0].adapter.entries[pair.path].site.stored
        with torch.no_grad():
            weight.add_(torch.cat([e for _, e in noise.chunks()]))
    loss, found = gradients(noisy)
    expected_loss, expected = gradients(plain)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-8)


def test_the_mean_loss_under_noise_is_the_clean_one_and_a_ridge():
    model = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False)).double()
    adapter = attach(model, {"method": "lora", "rank": 2}, name="a", targets=["0"])
    adapter.to(torch.float64)
    generator = torch.Generator().manual_seed(1)
    for p in adapter.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    (pair,) = pairs_of(adapter, "test")
    x, y = (torch.randn(20, n, generator=generator, dtype=torch.float64) for n in (6, 5))
    weight = (pair.entry.site.matrix() + pair.b @ pair.a).detach()
    g, sigma, beta = torch.linspace(0, 2, 5).double(), 0.4, 1.5
    variances = sigma**2 / 6 * (weight.square().sum(1) + beta * g.square())
    clean = (x @ weight.mT - y).square().sum()
    losses = []
    for seed in range(4000):
        e = torch.cat([e for _, e in Noise(variances.sqrt(), 6, 2, seed).chunks()])
        losses.append((x @ (weight + e).mT - y).square().sum())
    expected = clean + (variances.sum() * x.square().sum())
    assert torch.stack(losses).mean().item() == pytest.approx(expected.item(), rel=0.01)


def test_noise_is_drawn_once_for_a_step_and_anew_for_the_next(tmp_path):
    dynamic = {"dynamics": "lora-ggpo", "sigma": 0.3, "beta": 1.0}
    common = {"steps": 4, "seed": 1, "learning_rate": 1e-2}
    data = token_rows(8, (9, 9), 1)  # of one length, so that means over tokens and over rows agree
    whole = Job("job", data, LORA, dynamics=[dynamic], batch_size=4, **common)
    parts = Job("job", data, LORA, dynamics=[dynamic], batch_size=2, gradient_accumulation_steps=2, **common)
    found = [tensors(train(tiny_llama(), None, j, tmp_path / str(i)), "job") for i, j in enumerate((whole, parts))]
    assert difference(*found) < 1e-5
    made = fleet(tmp_path / "c", [LoRAGGPO(sigma=0.3)])
    seeds = []
    for step in (0, 1):
        made.runs[0].progress.step = step
        seeds.append(moment(made, LoRAGGPO()).generator("q").initial_seed())
    assert seeds[0] != seeds[1]


def test_evaluation_is_without_noise_and_the_course_rises(tmp_path):
    results = {}
    for sigma in (0.0, 0.5):
        data = token_rows(8, (9, 9), 1)
        dynamic = LoRAGGPO(sigma=sigma)
        job = Job("job", data, LORA, dynamics=[dynamic], steps=1, eval_data=data, learning_rate=1e-12, seed=1)
        results[sigma] = train(tiny_llama(), None, job, tmp_path / str(sigma))["job"]
    assert results[0.5]["eval"]["start"] == results[0.0]["eval"]["start"]
    assert results[0.5]["first_loss"] != results[0.0]["first_loss"]
    ramp = LoRAGGPO(sigma=0.2, schedule="cosine-ramp")
    assert [round(ramp.strength(t, 10), 6) for t in (0, 5, 10)] == [0.0, 0.1, 0.2]


def test_momentum_moves_the_point_of_the_gradient_and_nothing_else(tmp_path):
    dynamic = LoRAMGPO(rho=0.1, smoothing=0.5)
    made = fleet(tmp_path, [dynamic], optimizer="adamw", exact=False, steps=4)
    run = made.runs[0]
    with made.base.mode(training=True):
        made._tick()
        run.open_step()
        at = moment(made, dynamic)
        parameters = at.groups.parameters()
        before = {n: p.detach().clone() for n, p in parameters.items()}
        with dynamic.around_pass(at):
            for name, p in parameters.items():
                m = at.groups.optimizer.state[p]["exp_avg"]
                moved = p.detach() - before[name]
                if m.norm():
                    torch.testing.assert_close(moved, 0.1 * m / m.norm(), rtol=1e-3, atol=1e-6)  # phi is 1 here
        assert all(torch.equal(p, before[n]) for n, p in parameters.items())
    for name, (now, mean) in at.state.items():
        assert now == mean and name in parameters
    result = train(tiny_llama(), None, Job("job", token_rows(4, (9, 9), 1), LORA, dynamics=["lora-mgpo"], steps=1,
                                           optimizer="sgd"), tmp_path / "sgd")  # fmt: skip
    assert "momentum" in result["job"]["status"]
