"""ALLoRA: what the gain is, and what it does to gradients and updates, against plain PyTorch in float64."""

import pytest
import torch
from training.results import difference, tensors
from training.tiny_bases import tiny_llama, token_rows

from lorry.core.errors import OptionError
from lorry.core.life.api import attach
from lorry.training import Fleet, Job, train
from lorry.training.dynamics.allora import ALLoRA
from lorry.training.joint import train_pass
from lorry.training.low_rank import pairs_of

LORA = {"method": "lora", "rank": 4, "alpha": 4.0}


def job(dynamics=(), method=LORA, **more):
    options = {"learning_rate": 0.1, "batch_size": 4, "steps": 1, "seed": 1, "optimizer": "sgd", "max_grad_norm": None}
    return Job("job", token_rows(8, (9, 9), 1), method, dynamics=dynamics, **{**options, **more})


def fleet(folder, dynamics=(), exact=True, **more):
    """Return a fleet of one job, in float64 (then its optimizer must not step), whose adapter was moved."""
    made = Fleet(tiny_llama().double() if exact else tiny_llama(), None, [job(dynamics, **more)], folder)
    adapter, generator = made.runs[0].adapter, torch.Generator().manual_seed(2)
    if exact:
        adapter.to(torch.float64)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.1)
    return made


def gradients(made):
    """Return loss and gradients of the first micro-batch, without a step."""
    run = made.runs[0]
    for p in run.adapter.parameters():
        p.grad = None
    with made.base.mode(training=True):
        run.open_step()
        share = run.share()
        train_pass(made.base, [share], 0)
    assert share.error is None, share.error
    return share.loss, {n: p.grad.clone() for n, p in run.adapter.named_parameters()}


def gains(made, dynamic):
    return {pair.path: dynamic.factor(pair) for pair in pairs_of(made.runs[0].adapter, "allora")}


def full_gradients(made):
    """Return the gradient of each adapted weight: the outputs' gradients by the inputs."""
    run = made.runs[0]
    captured = {}
    handles = []
    for path, entry in run.adapter.entries.items():

        def hook(module, args, output, path=path):
            x = args[0].detach().flatten(0, 1)
            output.register_hook(lambda dy: captured.__setitem__(path, dy.flatten(0, 1).mT @ x))

        handles.append(entry.site.owner.register_forward_hook(hook))
    gradients(made)
    for handle in handles:
        handle.remove()
    return captured


def test_the_gain_is_eta_at_the_start_and_falls_with_the_row():
    adapter = attach(tiny_llama(), LORA, name="a")
    for pair in pairs_of(adapter, "allora"):
        torch.testing.assert_close(ALLoRA(eta2=9.0).factor(pair), torch.full((pair.b.shape[0],), 3.0))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    for pair in pairs_of(adapter, "allora"):
        product = (pair.b @ pair.a).double()
        expected = 1 / (product.norm(dim=1) + 0.25).sqrt()
        torch.testing.assert_close(ALLoRA().factor(pair).double(), expected, rtol=1e-6, atol=1e-6)
        whole = 1 / (product.norm() + 0.25).sqrt()
        torch.testing.assert_close(ALLoRA(gain="matrix").factor(pair).double(), whole, rtol=1e-6, atol=1e-6)
        assert ALLoRA(gain="constant").factor(pair).item() == pytest.approx(2.0)
        assert not ALLoRA().factor(pair).requires_grad


@pytest.mark.parametrize("gain", ["row", "matrix", "constant"])
def test_gradients_are_scaled_by_row_and_the_loss_is_not_changed(gain, tmp_path):
    dynamic = ALLoRA(gain=gain)
    plain, ours = fleet(tmp_path / "a"), fleet(tmp_path / "b", [dynamic])
    weights = full_gradients(plain)
    loss, expected = gradients(plain)
    again, found = gradients(ours)
    assert again == loss
    for pair in pairs_of(ours.runs[0].adapter, "test"):
        c = dynamic.factor(pair).unsqueeze(-1) if gain != "matrix" else dynamic.factor(pair)
        torch.testing.assert_close(found[f"{pair.path}.B"], expected[f"{pair.path}.B"] * c, rtol=1e-8, atol=1e-12)
        a = pair.b.mT @ (weights[pair.path] * c)
        torch.testing.assert_close(found[f"{pair.path}.A"], a.detach(), rtol=1e-8, atol=1e-12)


def test_it_is_not_the_gradient_of_the_loss_but_a_gain_away_from_it(tmp_path):
    dynamic = ALLoRA()
    made = fleet(tmp_path, [dynamic])
    _, found = gradients(made)
    pair = pairs_of(made.runs[0].adapter, "test")[3]
    c, weight = dynamic.factor(pair), 1 / made.runs[0].progress.labels
    for row in (0, 5):
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                pair.b[row, 1] += sign * 1e-2
            losses.append(gradients(made)[0] * weight)
            with torch.no_grad():
                pair.b[row, 1] -= sign * 1e-2
        slope = (losses[0] - losses[1]) / 2e-2
        assert found[f"{pair.path}.B"][row, 1].item() == pytest.approx(
            slope * c[row].item(), rel=2e-2
        )  # norms of this model are worked out in float32
        assert abs(c[row].item() - 1) > 0.01


def test_the_gain_of_each_token_by_its_output(tmp_path):
    plain, ours = fleet(tmp_path / "a"), fleet(tmp_path / "b", [ALLoRA(gain="output")])
    run, seen, handles = plain.runs[0], {}, []
    for path, entry in run.adapter.entries.items():

        def hook(module, args, output, path=path):
            output.register_hook(lambda dy: seen.__setitem__(path, (args[0].detach().flatten(0, 1), dy.flatten(0, 1))))

        handles.append(entry.site.owner.register_forward_hook(hook))
    gradients(plain)
    _, found = gradients(ours)
    for pair in pairs_of(run.adapter, "test"):
        x, dy = seen[pair.path]
        c = ((x @ pair.a.mT @ pair.b.mT).norm(dim=1, keepdim=True) + 0.25).rsqrt()
        expected = (c * dy).mT @ (x @ pair.a.mT)
        torch.testing.assert_close(found[f"{pair.path}.B"], expected, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(found[f"{pair.path}.A"], ((c * dy) @ pair.b).mT @ x, rtol=1e-8, atol=1e-12)


def test_earlier_layers_may_see_the_gain_too(tmp_path):
    made = {}
    for through in (False, True):
        made[through] = gradients(fleet(tmp_path / str(through), [ALLoRA(scale_input_grad=through)]))[1]
    last = "model.layers.1.mlp.down_proj.B"
    torch.testing.assert_close(made[True][last], made[False][last])
    first = "model.layers.0.self_attn.q_proj.B"
    assert (made[True][first] - made[False][first]).abs().max() > 1e-3 * made[False][first].abs().max()


def test_the_first_step_of_sgd_is_eta_times_that_of_lora(tmp_path):
    plain = tensors(train(tiny_llama(), None, job(), tmp_path / "a"), "job")
    ours = tensors(train(tiny_llama(), None, job([ALLoRA(eta2=16.0)]), tmp_path / "b"), "job")
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value * 4 if name.endswith("B") else value)
    one = tensors(train(tiny_llama(), None, job([ALLoRA(eta2=1.0)]), tmp_path / "c"), "job")
    assert difference(one, plain) < 1e-6


def test_adam_divides_a_constant_gain_out_and_not_that_of_the_update(tmp_path):
    adam = {"optimizer": "adamw", "learning_rate": 1e-3, "steps": 5}
    plain = tensors(train(tiny_llama(), None, job(**adam), tmp_path / "a"), "job")
    ours = tensors(train(tiny_llama(), None, job([ALLoRA(gain="constant")], **adam), tmp_path / "b"), "job")
    update = ALLoRA(gain="constant", where="update")
    other = tensors(train(tiny_llama(), None, job([update], **adam), tmp_path / "c"), "job")

    def apart(found):  # relative to how far the tensors B moved, from zero
        names = [n for n in plain if n.endswith(".B")]
        return sum((found[n] - plain[n]).norm() for n in names) / sum(plain[n].norm() for n in names)

    assert apart(ours) < 0.02 < 0.5 < apart(other)


def test_updates_are_scaled_by_row_and_by_the_mean(tmp_path):
    dynamic = ALLoRA(where="update")
    more = {"optimizer": "adamw", "exact": False}
    plain, ours = fleet(tmp_path / "a", **more), fleet(tmp_path / "b", [dynamic], **more)
    c = gains(ours, dynamic)
    before = {n: p.detach().clone() for n, p in ours.runs[0].adapter.named_parameters()}
    stepped = []
    for made in (plain, ours):
        with made.base.mode(training=True):
            made._tick()
        stepped.append({n: p.detach() - before[n] for n, p in made.runs[0].adapter.named_parameters()})
    for name, step in stepped[0].items():
        path, _, key = name.rpartition(".")
        factor = c[path].unsqueeze(-1) if key == "B" else c[path].mean()
        torch.testing.assert_close(stepped[1][name], step * factor, rtol=1e-4, atol=1e-6)
    assert not ours.runs[0].acting.tensors()


def test_rows_that_grew_learn_more_slowly(tmp_path):
    made = fleet(tmp_path, [ALLoRA()])
    pair = pairs_of(made.runs[0].adapter, "test")[0]
    with torch.no_grad():
        pair.b[3] *= 50
    c, norms = ALLoRA().factor(pair), pair.row_norms()
    assert c.argmin() == 3
    assert torch.corrcoef(torch.stack([c.log(), norms.log()]))[0, 1] < -0.9


def test_what_does_not_fit_is_said(tmp_path):
    with pytest.raises(OptionError, match="where: grad"):
        ALLoRA(where="update", gain="output")
    for method, words in (({**LORA, "dropout": 0.1}, "dropout=0.1"), ({"method": "dora"}, "plain low rank")):
        result = train(tiny_llama(), None, job(["allora"], method=method), tmp_path / words, progress=False)
        assert words in result["job"]["status"]
