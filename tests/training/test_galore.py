"""GaLore: Adam's step in the directions of the gradient, with moments of that size alone."""

import torch
from training.tiny_bases import tiny_llama, token_rows

from lorry.training import Fleet, Job, train
from lorry.training.dynamics.galore import directions

LORA = {"method": "lora", "rank": 4}


def fleet(folder, dynamics, **more):
    """Return a fleet of one job that trains the head beside an adapter."""
    options = {"learning_rate": 1e-2, "batch_size": 4, "steps": 8, "seed": 1, "modules_to_save": ["lm_head"], **more}
    data = token_rows(16, (9, 9), 1)
    return Fleet(tiny_llama(), None, [Job("job", data, LORA, dynamics=dynamics, **options)], folder)


def test_steps_are_those_of_adam_on_the_projected_gradient(tmp_path):
    made = fleet(tmp_path, [{"dynamics": "galore", "rank": 3, "every": 100, "scale": 0.5, "tensors": "lm_head*"}],
                 weight_decay=0.1, max_grad_norm=None)  # fmt: skip
    run = made.runs[0]
    (name,) = run.groups.names("lm_head*")
    parameter = run.groups.parameters()[name]
    value, basis, gradients = parameter.detach().clone(), None, []
    before_step = run.finish_step

    def finish():
        gradients.append(parameter.grad.clone())
        return before_step()

    run.finish_step = finish
    shadow = None
    with made.base.mode(training=True):
        for _ in range(4):
            made._tick()
            flat = gradients[-1].mT  # taller than wide: projected on the right
            if basis is None:
                basis = torch.linalg.svd(flat)[0][:, :3]
                shadow = torch.nn.Parameter(torch.zeros(3, flat.shape[1]))
                adam = torch.optim.Adam([shadow], lr=1e-2)
            shadow.grad, old = basis.mT @ flat, shadow.detach().clone()
            adam.step()
            value = value * (1 - 1e-3) + 0.5 * (basis @ (shadow.detach() - old)).mT
            torch.testing.assert_close(parameter.detach(), value, rtol=1e-4, atol=1e-6)
    assert parameter not in run.optimizer.state  # no moments of the whole matrix
    assert run.acting.state["galore"][f"{name}/exp_avg"].shape == (3, 97)


def test_directions_are_found_anew_and_keep_their_signs(tmp_path):
    made = fleet(tmp_path, ["galore:rank=3:every=2"])
    (name,), found = made.runs[0].groups.names("lm_head*"), []
    with made.base.mode(training=True):
        for _ in range(4):
            made._tick()
            found.append(made.runs[0].acting.state["galore"][f"{name}/directions"].clone())
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])
    assert not torch.equal(found[1], found[2])
    flat = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    u = directions(flat, 3, None)
    torch.testing.assert_close(directions(flat, 3, -u), -u)


def test_what_does_not_fit_is_said(tmp_path):
    for folder, more, words in (
        ("a", {"dynamics": ["galore"]}, "whole weights"),
        ("b", {"dynamics": ["galore:rank=2"], "optimizer": "sgd"}, "SGD"),
    ):
        result = train(
            tiny_llama(), None, Job("job", token_rows(4, (9, 9), 1), LORA, steps=1, **more), tmp_path / folder
        )
        assert words in result["job"]["status"]
