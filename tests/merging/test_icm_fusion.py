"""ICM-Fusion: its parts by their facts, and the whole on checkpoints of a real small model trained on two skills."""

import dataclasses

import pytest
import torch
from merging.tiny_adapters import base, distance, filled

import lorry
from lorry.core.errors import OptionError
from lorry.merging import Factors, icm, merge, merge_method_named
from lorry.merging.output import trial_adapter


def layout_and_vector(seed=0):
    generator = torch.Generator().manual_seed(seed)
    layout = icm.Layout({"x": (2, 4, 3), "y": (1, 2, 5)})
    return layout, torch.randn(sum(layout.sizes), generator=generator, dtype=torch.float64)


def test_flattening_round_trip_is_the_identity():
    layout, vector = layout_and_vector()
    factors = layout.unflatten(vector)
    assert factors["x"].shape == (4, 3) and factors["y"].rank == 1
    assert torch.equal(layout.flatten(factors), vector)
    mean, deviation = layout.statistics(vector)
    assert torch.allclose((vector - mean) / deviation * deviation + mean, vector, atol=1e-12)
    flat = torch.zeros_like(vector)
    assert torch.equal(layout.statistics(flat)[1], torch.ones_like(flat))


def test_kl_is_the_monte_carlo_estimate():
    mean, logvar = torch.tensor([[0.5, -1.0]]), torch.tensor([[0.3, -0.7]])
    assert float(icm.kl(torch.zeros(1, 2), torch.zeros(1, 2))) == 0.0
    normal = torch.distributions.Normal(mean, (logvar / 2).exp())
    torch.manual_seed(0)
    draws = normal.sample((200_000,))
    estimate = (normal.log_prob(draws) - torch.distributions.Normal(0, 1).log_prob(draws)).sum(-1).mean()
    assert float(icm.kl(mean, logvar)) == pytest.approx(float(estimate), rel=0.02)


def quadratic(target, deviation=1.0):
    spread = torch.ones_like(target) * deviation
    return icm.TaskLoss(lambda vector: (vector - target).square().sum(), torch.zeros_like(target), spread)


def meta(vae, how, data):
    flat, v, noise, target = data
    return icm.meta_loss(vae, flat, v, noise, quadratic(target, torch.linspace(0.5, 2, 6, dtype=target.dtype)), how)


@pytest.mark.parametrize("first_order", [True, False])
def test_inner_steps_are_gradient_steps_of_the_adapters_own_numbers(first_order):
    """Equation 8, whatever the statistics that the VAE's numbers are normalised with."""
    generator = torch.Generator().manual_seed(3)
    mean, goal, raw = (torch.randn(4, generator=generator, dtype=torch.float64) for _ in range(3))
    deviation = torch.tensor([1e-3, 0.05, 1.0, 20.0], dtype=torch.float64)
    curve = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    task = icm.TaskLoss(lambda point: (curve * (point - goal).square()).sum(), mean, deviation)
    how = icm.Training(1, 1e-3, 0.0, 3, 0.01, False, first_order, 1)
    adapted = task.adapted(((raw - mean) / deviation)[None].requires_grad_(), how)
    assert adapted.requires_grad is not first_order
    expected = raw.clone()
    for _ in range(3):
        expected = expected - 0.01 * 2 * curve * (expected - goal)
    torch.testing.assert_close((adapted * deviation + mean)[0], expected)
    one = icm.Training(1, 1e-3, 0.0, 1, 0.01, True, first_order, 1)
    moved = (task.adapted(((raw - mean) / deviation)[None].requires_grad_(), one) * deviation + mean)[0] - raw
    slope = 2 * curve * (raw - goal)
    torch.testing.assert_close(moved, -0.01 * raw.norm() * slope / slope.norm(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("steps, first_order", [(0, True), (2, True), (2, False)])
def test_meta_gradient_against_finite_differences(steps, first_order):
    generator = torch.Generator().manual_seed(0)
    vae = icm.FusionVAE(6, 3, 2, 8).double()
    icm.initialise(vae, generator)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    data = (draw(2, 6), draw(2, 3), (draw(2, 2), draw(2, 2)), draw(6))
    how = icm.Training(1, 1e-3, 0.01, steps, 0.05, False, first_order, 2)
    weight = vae.decoder[3].bias
    (gradient,) = torch.autograd.grad(meta(vae, how, data), weight)
    place = (0,) * weight.ndim
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[place] += sign * 1e-5
        values.append(float(meta(vae, how, data).detach()))
        with torch.no_grad():
            weight[place] -= sign * 1e-5
    numeric = (values[0] - values[1]) / 2e-5
    exact = float(gradient[place]) == pytest.approx(numeric, rel=1e-6, abs=1e-9)
    # the first-order form leaves out the way through the inner loop
    assert exact == (not steps or not first_order)


def test_no_inner_step_is_the_plain_conditional_vae():
    vae = icm.FusionVAE(6, 3, 2, 8)
    icm.initialise(vae, torch.Generator().manual_seed(0))
    flat, v = torch.ones(1, 6), torch.ones(1, 3)
    noise = (torch.full((1, 2), 9.0), torch.full((1, 2), 0.5))
    how = icm.Training(1, 1e-3, 0.1, 0, 0.05, True, True, 1)
    mean, logvar = vae.encode(flat, v)
    rebuilt = vae.decode(mean + noise[1] * (logvar / 2).exp(), v)
    plain = (rebuilt - flat).square().mean() + 0.1 * icm.kl(mean, logvar)
    found = icm.meta_loss(vae, flat, v, noise, None, how)
    assert torch.allclose(found, plain)


@pytest.fixture(scope="module")
def pocket():
    """The pocket model with checkpoints of two skills, from one start, taken during real training."""
    from lorry.pocket import loading, world

    model, tokenizer = loading.load()
    batches, tasks, final = {}, {}, {}
    for skill in ("previous", "ends"):
        examples = world.examples(skill, "train", 32, seed=0)
        batches[skill] = [encoded(tokenizer, examples[:16]), encoded(tokenizer, examples[16:])]
        checkpoints = []
        for stage in range(4):
            adapter = lorry.attach(
                model, {"method": "lora", "rank": 2}, targets=["v_proj"], name=f"{skill}-{stage}", seed=0
            )
            if checkpoints:
                for path, entry in adapter.entries.items():
                    for name, value in checkpoints[-1].entries[path].tensors().items():
                        entry.tensors()[name].data.copy_(value)
            optimizer = torch.optim.Adam(adapter.parameters(), lr=0.01)
            for _ in range(3 if checkpoints else 10):
                optimizer.zero_grad()
                model(**batches[skill][0]).loss.backward()
                optimizer.step()
            checkpoints.append(adapter.train(False))
        final[skill] = checkpoints[-1]

        def loss(carrier, batch=batches[skill][1]):
            return carrier(**batch).loss

        tasks[skill] = icm.Task(checkpoints, loss)
    lorry.activate(model, None)
    return model, tasks, final


def encoded(tokenizer, examples):
    texts = [e.prompt + e.answer + tokenizer.eos_token for e in examples]
    batch = tokenizer(texts, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


def test_fusion_of_trained_checkpoints(pocket):
    model, tasks, final = pocket
    options = {
        "epochs": 150,
        "latent": 8,
        "hidden": 64,
        "few_shot_steps": 2,
        "refine_steps": 1,
        "inner_steps": 0,
        "seed": 1,
    }
    merged = merge(final, method="icm-fusion", options=options, model=model, extras={"tasks": tasks})
    facts = merged.receipt.facts
    assert facts["vae"]["loss_last"] < facts["vae"]["loss_first"] / 3
    assert max(facts["vae"]["error_train"].values()) < 0.1
    assert set(facts["vae"]["error_held_out"]) == set(final)
    losses = facts["support_losses"]
    assert losses["latent, refined"] <= losses["latent"]
    assert losses["latent"] < losses["base"]
    for name in ("factor average", "task arithmetic, tuned weights", "factor average, refined"):
        assert losses[name] == losses[name] and losses[name] > 0
    assert not [n for n in lorry.adapters(model) if n.startswith("merge-trial")]


def test_another_tasks_vector_decodes_another_adapter(pocket):
    model, tasks, final = pocket
    sites = {path: entry.site for path, entry in final["ends"].entries.items()}
    shapes = {path: (site.out_features, site.in_features) for path, site in sites.items()}
    data = icm.collect(tasks, list(sites), shapes, None, "none", 8)
    generator = torch.Generator().manual_seed(0)
    vae = icm.FusionVAE(sum(data.layout.sizes), 8, 8, 64)
    icm.initialise(vae, generator)
    icm.train_vae(vae, data, {}, by_default(epochs=150, inner_steps=0), generator, 0)

    @torch.no_grad()
    def loss(skill, condition):
        own = data.conditions[skill]
        code, _ = vae.encode(data.vectors[skill][-1:], own[None])
        flat = vae.decode(code, condition[None])[0] * data.deviation[skill] + data.mean[skill]
        tensors = {p: {"A": f.a.float(), "B": f.b.float()} for p, f in data.layout.unflatten(flat).items()}
        with trial_adapter(model, tensors):
            return float(tasks[skill].loss(model))

    for skill, other in (("previous", "ends"), ("ends", "previous")):
        own = data.conditions[skill]
        right = loss(skill, own)
        noise = [0.05 * torch.randn(own.shape, generator=generator) * own.square().mean().sqrt() for _ in range(3)]
        near = max(abs(loss(skill, own + one) - right) for one in noise)
        assert abs(loss(skill, data.conditions[other]) - right) > near


def test_order_of_tasks_does_not_matter(pocket):
    model, tasks, final = pocket
    options = {"epochs": 2, "latent": 4, "hidden": 16, "alternatives": False, "batch": 1}
    results = [
        merge(given, method="icm-fusion", options=options, model=model, extras={"tasks": tasks})
        for given in (final, dict(reversed(final.items())))
    ]
    assert distance(*results) == 0.0


@pytest.fixture(scope="module")
def learned(pocket):
    """A VAE that was trained on the checkpoints without an inner loop, and the task losses as the merge makes them."""
    model, tasks, final = pocket
    sites = {path: entry.site for path, entry in final["ends"].entries.items()}
    shapes = {path: (site.out_features, site.in_features) for path, site in sites.items()}
    data = icm.collect(tasks, list(sites), shapes, None, "none", 8)
    generator = torch.Generator().manual_seed(0)
    vae = icm.FusionVAE(sum(data.layout.sizes), 8, 8, 64)
    icm.initialise(vae, generator)
    icm.train_vae(vae, data, {}, by_default(epochs=150, inner_steps=0), generator, 0)
    support = icm.Support(data.layout, tasks, model)
    return vae, data, {name: support.task_loss(data, name) for name in tasks}


def by_default(**changed):
    """The knobs of the training as the merge method has them, but for some."""
    values = merge_method_named("icm-fusion").parse(changed)
    return icm.Training(**{field.name: values[field.name] for field in dataclasses.fields(icm.Training)})


def test_the_inner_loop_lowers_the_task_losses_by_default(learned):
    vae, data, losses = learned
    for name, loss in losses.items():
        before, after = icm.inner_losses(vae, data, name, loss, by_default())
        assert after < 0.97 * before
        same, still = icm.inner_losses(vae, data, name, loss, by_default(inner_rate=1e-20))
        assert same == before and still == pytest.approx(before, rel=1e-6)


def test_what_the_network_learns_depends_on_the_inner_steps(learned):
    """With the same draws, only what the steps did can differ, and it grows with their rate."""
    vae, data, losses = learned
    flat, v = data.vectors["ends"][-1:], data.conditions["ends"][None]
    noise = (torch.ones(1, 8), torch.full((1, 8), -0.5))

    def value(rate):
        how = by_default(inner_rate=rate, kl_weight=1.0)
        return float(icm.meta_loss(vae, flat, v, noise, losses["ends"], how).detach())

    still = value(1e-20)
    moved = [abs(value(rate) - still) for rate in (1e-3, 1e-2)]
    assert 1e-5 * still < moved[0] and 3 * moved[0] < moved[1]


def test_a_merge_uses_and_reports_the_inner_loop(pocket):
    model, tasks, final = pocket
    options = {"epochs": 1, "latent": 4, "hidden": 16, "alternatives": False, "batch": 1}
    there = set(lorry.adapters(model))
    merged = merge(final, method="icm-fusion", options=options, model=model, extras={"tasks": tasks})
    steps = merged.receipt.facts["vae"]["inner_losses"]
    assert set(steps) == set(final) and all(after < before for before, after in steps.values())
    assert set(lorry.adapters(model)) == there
    options["inner_steps"] = 0
    plain = merge(final, method="icm-fusion", options=options, model=model, extras={"tasks": tasks})
    assert plain.receipt.facts["vae"]["inner_losses"] == {}


def test_a_kept_network_gives_what_training_it_anew_gives(pocket):
    _, tasks, final = pocket
    asked = [0]

    def counted(task):
        def loss(carrier):
            asked[0] += 1
            return task.loss(carrier)

        return icm.Task(task.checkpoints, loss)

    mine, kept = {name: counted(task) for name, task in tasks.items()}, {}

    def made(strength, kept=None, **options):
        asked[0] = 0
        options = {"epochs": 2, "latent": 4, "hidden": 16, "alternatives": False, **options}
        extras = {"tasks": mine} | ({} if kept is None else {"kept": kept})
        weights = dict.fromkeys(final, strength)
        return merge(final, method="icm-fusion", options=options, weights=weights, model=pocket[0], extras=extras)

    first = made(0.5, kept)
    trained = asked[0]
    again = made(1.0, kept, few_shot_steps=1)
    assert trained > 0 and asked[0] == 4  # losses of two tasks before and after the one step
    anew = made(1.0, few_shot_steps=1)
    assert asked[0] == trained + 4
    for path, tensors in anew.tensors.items():
        assert all(torch.equal(value, again.tensors[path][name]) for name, value in tensors.items())
    assert first.receipt.facts["vae"] == again.receipt.facts["vae"] == anew.receipt.facts["vae"]
    made(0.5, kept, epochs=1)
    assert asked[0] > 0 and len(kept) == 2


def test_one_task_is_its_reconstruction(pocket):
    model, tasks, final = pocket
    merged = merge(
        {"ends": final["ends"]},
        method="icm-fusion",
        options={
            "epochs": 300,
            "latent": 8,
            "hidden": 64,
            "alternatives": False,
            "held_out": 0,
            "kl_weight": 0.0,
            "inner_steps": 0,
        },
        model=model,
        extras={"tasks": {"ends": tasks["ends"]}},
    )
    error = merged.receipt.facts["vae"]["error_train"]["ends"]
    assert error < 0.05
    assert distance(merged, final["ends"]) < 3 * error**0.5


def test_task_vectors_are_the_last_states():
    model = base()
    ids = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    found = icm.hidden_state_vector(model, [{"input_ids": ids, "attention_mask": mask}])
    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
    assert torch.allclose(found, (states[0, 2] + states[1, 3]) / 2, atol=1e-6)


def test_misuse_is_said():
    model = base()
    a, b = filled(model, "a"), filled(model, "b", seed=2)
    with pytest.raises(OptionError, match="needs tasks"):
        merge([a, b], method="icm-fusion")
    tasks = {"a": icm.Task([a]), "b": icm.Task([b])}
    with pytest.raises(OptionError, match="no negative weights"):
        merge([a, b], weights=[1.0, -1.0], method="icm-fusion", extras={"tasks": tasks})
    with pytest.raises(OptionError, match="one task for each input"):
        merge([a, b], method="icm-fusion", extras={"tasks": {"a": tasks["a"]}})
    with pytest.raises(OptionError, match="have a task vector"):
        vector = {"a": icm.Task([a], vector=torch.ones(3)), "b": icm.Task([b])}
        merge([a, b], method="icm-fusion", extras={"tasks": vector})
    assert isinstance(icm.Layout({"x": (1, 2, 2)}).unflatten(torch.zeros(4))["x"], Factors)
