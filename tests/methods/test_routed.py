"""What every routed method owes the core: checkpointing replays routes, rows are as alone, padding does not
count.
"""

import pytest
import torch
from core.tiny import gradients, llama, off_zero, same_bytes, tokens

import lorry
from lorry.core.life.api import log_probability

CASES = {
    "flylora": ({"rank": 8, "top_k": 3}, "all-linear"),
    "smora": ({"rank": 8, "top_k": 4, "partition": 2}, "all-linear"),
    "lora-mixer": ({"rank": 4, "training_mode": "sparse", "preserve": 0.1}, "attention"),
    "remix": ({"rank": 2, "experts": 5, "top_k": 2, "router_std": 0.1, "entropy_bonus": 0.1}, "attention"),
    "comol": ({"rank": 4, "experts": 3}, "all-linear"),
    "ept": ({"rank": 4, "temperature": 1.0, "gate": "token+task"}, "all-linear"),
    "mixlora": ({"rank": 4, "experts": 4, "jitter": 0.1, "z_loss": 0.1}, "all-linear"),
}


def adapted(slug, dropout=0.0, model=None, name="default"):
    options, targets = CASES[slug]
    model = model if model is not None else llama()
    adapter = lorry.attach(model, {"method": slug, **options, "dropout": dropout}, targets=targets, name=name)
    return model, off_zero(adapter, std=0.2)


def loss_of(model, ids, adapter="default", recording=False, **facts):
    """A loss that uses every channel: outputs, auxiliary losses, log-probabilities."""
    with lorry.context(model, recording=recording, **facts) as context:
        logits = model(ids, use_cache=False).logits
        loss = logits.square().mean()
        extra, chosen = lorry.auxiliary_loss(model, adapter), log_probability(model, adapter)
        if extra is not None:
            loss = loss + extra
        if chosen is not None:
            loss = loss + (chosen * torch.arange(1.0, len(chosen) + 1)).mean()
    return loss, context


def labels(ids):
    return torch.arange(len(ids))


@pytest.mark.parametrize("slug", CASES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_routes_and_losses(slug, reentrant):
    ids = tokens()
    found = []
    for checkpointed in (False, True):
        model, adapter = adapted(slug, dropout=0.3)
        model.train()
        if checkpointed:
            # the state of torch's generator is not put back, so only kept routes can be the same
            kept = {"use_reentrant": reentrant, "preserve_rng_state": slug not in ("remix",)}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kept)
            model.enable_input_require_grads()
        if slug == "remix":
            adapter.configure(dropout=0.0)
        torch.manual_seed(3)
        loss, context = loss_of(model, ids, task_ids=labels(ids))
        counts = {k: v.clone() for k, v in context.records.items()}
        # outside the context, as training loops do
        loss.backward()
        assert counts.keys() == context.records.keys()
        assert all(torch.equal(counts[k], context.records[k]) for k in counts)
        found.append((loss.detach(), gradients(adapter)))
    torch.testing.assert_close(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("slug", CASES)
def test_rows_are_as_alone(slug):
    model = llama()
    lorry.attach(model, {"method": "lora", "rank": 3}, targets="all-linear", name="plain")
    off_zero(lorry.adapters(model)["plain"])
    _, adapter = adapted(slug, model=model, dropout=0.2, name="routed")
    ids = tokens(4)
    who = ["plain", "routed", None, "routed"]
    tasks = torch.tensor([0, 1, 2, 3])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 5:] = mask[0, 3:] = False
    model.train()
    results = []
    for rows, names in (([1, 3], ["routed"] * 2), ([0, 1, 2, 3], who)):
        with (
            lorry.context(model, padding_mask=mask[rows], task_ids=tasks[rows]) as context,
            lorry.rows(model, names, seeds={"routed": 7, "plain": 8}),
        ):
            logits = model(ids[rows]).logits
            mine = logits if len(rows) == 2 else logits[[1, 3]]
            loss = mine.square().mean()
            extra, chosen = lorry.auxiliary_loss(model, "routed"), log_probability(model, "routed")
            loss = loss + (0 if extra is None else extra) + (0 if chosen is None else chosen.mean())
            loss.backward()
        results.append((mine.detach(), gradients(adapter), dict(context.records)))
        for parameter in adapter.parameters():
            parameter.grad = None
    (alone, first, counts), (mixed, second, others) = results
    torch.testing.assert_close(mixed, alone, atol=1e-5, rtol=1e-5)
    assert counts.keys() == others.keys()
    for key, value in counts.items():
        assert torch.equal(value, others[key])
    for name, gradient in first.items():
        torch.testing.assert_close(second[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("slug", CASES)
def test_padding_counts_nowhere(slug):
    """Losses, log-probabilities, counts and statistics are those of the batch without its padding."""
    model, _ = adapted(slug)
    model.train()
    ids = tokens(3, 5)
    padded = torch.cat([ids, torch.full((3, 4), 9)], 1)
    mask = torch.arange(9).expand(3, -1) < 5
    found = []
    for batch, facts in ((ids, {}), (padded, {"padding_mask": mask})):
        with (
            lorry.context(model, recording=True, task_ids=labels(ids), **facts) as context,
            lorry.rows(model, ["default"] * 3, seeds={"default": 5}),
        ):
            model(batch)
            extra, chosen = lorry.auxiliary_loss(model), log_probability(model, "default")
        found.append([*context.records.values(), *(v for v in (extra, chosen) if v is not None)])
    assert len(found[0]) > 8
    for short, long in zip(*found, strict=True):
        torch.testing.assert_close(short, long, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("slug", CASES)
def test_evaluation_leaves_no_state_and_no_loss(slug):
    model, _ = adapted(slug)
    with lorry.context(model, task_ids=labels(tokens())) as context, torch.no_grad():
        model(tokens())
    assert not context.losses and not context.left and not context.records


@pytest.mark.parametrize("slug", CASES)
def test_saved_and_loaded_is_bit_equal(slug, tmp_path):
    model, adapter = adapted(slug)
    ids = tokens()
    with lorry.context(model, task_ids=labels(ids)), torch.no_grad():
        before = model(ids).logits
    adapter.save(tmp_path / "a")
    fresh = llama()
    # trained further, its tensors are copies; those of a frozen adapter lie in the file, where products may
    # round otherwise
    loaded = lorry.load(fresh, tmp_path / "a", trainable=True)
    with lorry.context(fresh, task_ids=labels(ids)), torch.no_grad():
        assert same_bytes(fresh(ids).logits, before)
    assert loaded.method == adapter.method
    assert [n for n, _, _ in loaded.named_tensors()] == [n for n, _, _ in adapter.named_tensors()]


@pytest.mark.parametrize("slug", CASES)
def test_refuses_to_merge(slug):
    _, adapter = adapted(slug)
    with pytest.raises(lorry.AdapterError, match="cannot be fused"):
        adapter.fuse()


@pytest.mark.parametrize("slug", CASES)
def test_works_in_bfloat16(slug):
    model = llama(dtype=torch.bfloat16)
    _, adapter = adapted(slug, model=model)
    model.train()
    loss, _ = loss_of(model, tokens(), task_ids=labels(tokens()))
    loss.backward()
    with lorry.context(model, task_ids=labels(tokens())):
        assert model(tokens()).logits.dtype is torch.bfloat16
    gradients(adapter)


@pytest.mark.parametrize("slug", CASES)
def test_cached_generation_equals_one_pass(slug):
    """Routing depends on the present token alone, so the cache of keys and values holds."""
    model, _ = adapted(slug)
    ids = tokens(2)
    with lorry.context(model, task_ids=labels(ids)), torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :4], use_cache=True)
        rest = model(ids[:, 4:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 4:], atol=1e-5, rtol=1e-5)
