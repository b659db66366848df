import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from training.tiny_tokenizers import CHATML, byte_tokenizer

from lorry.training import losses
from lorry.training.batches import collate
from lorry.training.data import DataError
from lorry.training.losses import (
    ClassTally,
    TokenTally,
    causal_loss,
    class_tally,
    classification_loss,
    count_labels,
    token_tally,
)
from lorry.training.objectives import OBJECTIVES, make_objective
from lorry.training.task import Task

IGNORE = -100


def example(seed, n=4, length=7, vocabulary=11, share=0.5, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(n, length, vocabulary, generator=g) * 3).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (n, length), generator=g)
    return logits, torch.where(torch.rand(n, length, generator=g) < share, labels, IGNORE)


def reference(logits, labels):
    flat = logits[:, :-1].float().reshape(-1, logits.shape[-1])
    return F.cross_entropy(flat, labels[:, 1:].reshape(-1), ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize("chunk", [1, 25, 1 << 22])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_loss_is_cross_entropy_with_its_gradient(monkeypatch, chunk, share, dtype):
    monkeypatch.setattr(losses, "_CHUNK", chunk)
    logits, labels = example(0, share=share, dtype=dtype)
    total, count = causal_loss(logits, labels)
    assert total.dtype == torch.float32 and count == count_labels(labels)
    (total / max(count, 1)).backward()
    other = logits.detach().clone().requires_grad_()
    wanted = reference(other, labels)
    (wanted / max(count, 1)).backward()
    torch.testing.assert_close(total, wanted)
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad, other.grad)


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_causal_loss_keeps_no_copy_of_the_logits(monkeypatch, share):
    monkeypatch.setattr(losses, "_CHUNK", 10_000)
    logits, labels = example(2, n=8, length=33, vocabulary=1000, share=share, dtype=torch.bfloat16)
    kept = []

    def pack(tensor):
        if tensor.data_ptr() != logits.data_ptr():
            kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        causal_loss(logits, labels)
    assert 0 < sum(kept) < 0.05 * logits.numel() * logits.element_size()


def test_causal_loss_never_holds_a_float32_copy_of_all_logits(monkeypatch):
    monkeypatch.setattr(losses, "_CHUNK", 10_000)
    logits, labels = example(2, n=8, length=33, vocabulary=1000, share=1.0, dtype=torch.bfloat16)
    with torch.profiler.profile(profile_memory=True) as profile:
        total, _ = causal_loss(logits, labels)
        total.backward()
    largest = max(e.self_cpu_memory_usage for e in profile.events())
    assert largest <= logits.numel() * 2  # the gradient in bfloat16; a float32 copy would be twice that


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 1000), st.floats(0, 1))
def test_a_joint_batch_gives_each_job_its_own_loss_and_gradient(sizes, seed, share):
    logits, labels = example(seed, n=sum(sizes), share=share)
    parts, begin = [], 0
    for size in sizes:
        parts.append(slice(begin, begin + size))
        begin += size
    joint = [causal_loss(logits[p], labels[p]) for p in parts]
    sum(total / max(count, 1) for total, count in joint).backward()
    for p, (total, count) in zip(parts, joint, strict=True):
        alone = logits.detach()[p].clone().requires_grad_()
        loss, n = causal_loss(alone, labels[p].clone())
        (loss / max(n, 1)).backward()
        assert n == count and torch.equal(loss, total)
        assert torch.equal(alone.grad, logits.grad[p])


def test_accumulated_micro_batches_equal_one_batch():
    logits, labels = example(3, n=6)
    whole, count = causal_loss(logits, labels)
    (whole / count).backward()
    other = logits.detach().clone().requires_grad_()
    total = count_labels(labels)
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        (causal_loss(other[part], labels[part])[0] / total).backward()
    torch.testing.assert_close(other.grad, logits.grad)


def test_losses_refuse_what_does_not_fit():
    logits, labels = example(0)
    with pytest.raises(ValueError, match=r"found \(4, 7, 11\) and \(4, 6\)"):
        causal_loss(logits, labels[:, :-1])
    with pytest.raises(ValueError, match="label 11, but the model's vocabulary size is 11: the tokenizer"):
        causal_loss(logits, torch.full_like(labels, 11))
    with pytest.raises(ValueError, match="label 3, but the model's number of classes is 3"):
        classification_loss(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"logits \(n, C\)"):
        classification_loss(torch.zeros(2, 3), torch.tensor([[0, 1]]))


def test_classification_loss_sums_over_examples():
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.tensor([0, 1, 2, IGNORE, 1, 0])
    loss, count = classification_loss(logits, labels)
    assert count == 5 and loss.dtype == torch.float32
    assert torch.allclose(loss, F.cross_entropy(logits.float(), labels) * 5)


def test_token_metrics_add_up_over_batches():
    logits, labels = example(5, n=6)
    whole = token_tally(logits, labels).metrics()
    parts = token_tally(logits[:2], labels[:2]) + token_tally(logits[2:], labels[2:])
    assert parts.metrics() == pytest.approx(whole)
    kept = labels[:, 1:] != IGNORE
    right = (logits[:, :-1].argmax(-1) == labels[:, 1:])[kept]
    assert whole["token_accuracy"] == pytest.approx(right.float().mean().item())
    assert whole["loss"] == pytest.approx(reference(logits, labels).item() / int(kept.sum()))
    assert whole["perplexity"] == pytest.approx(math.exp(whole["loss"]))
    assert whole["count"] == int(kept.sum())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=20))
def test_class_metrics_equal_scikit_learn(pairs):
    metrics = pytest.importorskip("sklearn.metrics")
    labels = torch.tensor([a for a, _ in pairs])
    predicted = torch.tensor([b for _, b in pairs])
    logits = F.one_hot(predicted, 4).float()
    half = len(pairs) // 2
    tally = class_tally(logits[:half], labels[:half]) + class_tally(logits[half:], labels[half:])
    found = tally.metrics()
    assert found["count"] == len(pairs)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(labels, predicted))
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(labels, predicted, average="macro"))


def test_metrics_of_nothing():
    for tally in (TokenTally(), ClassTally(), class_tally(torch.zeros(2, 2), torch.tensor([IGNORE, IGNORE]))):
        found = tally.metrics()
        assert found.pop("count") == 0
        assert all(math.isnan(v) for v in found.values())
    assert TokenTally(loss=1e6, count=1).metrics()["perplexity"] == math.inf


def test_registry_and_options():
    assert set(OBJECTIVES) >= {"causal", "completion", "chat", "classification"}
    for name in RECORDS:
        objective = make_objective(name, {"max_length": 99})
        assert isinstance(objective, Task) and objective.name == name and objective.max_length == 99
        assert hash(objective) == hash(make_objective(name, {"max_length": 99}))
    with pytest.raises(DataError, match="(?i)unknown objective 'completions'; did you mean 'completion'"):
        make_objective("completions")
    with pytest.raises(DataError, match="(?i)'causal' has no option 'packin'; did you mean 'packing'"):
        make_objective("causal", {"packin": True})


RECORDS = {
    "causal": [{"text": "the lorry carries the load"}, {"text": "yes no"}] * 4,
    "completion": [
        {"prompt": "the town? ", "completion": "yes"},
        {"prompt": "the load? ", "completion": "no"},
    ]
    * 4,
    "chat": [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "yes"}]}] * 8,
    "classification": [{"text": "the town", "label": "yes"}, {"text": "the load", "label": "no"}] * 4,
}


@pytest.mark.parametrize("name", list(RECORDS))
def test_each_objective_can_be_learned(name):
    """A tiny Llama, from records to a falling loss, by nothing but the public calls."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    tokenizer = byte_tokenizer(template=CHATML)
    objective = make_objective(name)
    encoded = objective.encode(tokenizer, RECORDS[name])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=2,
    )
    torch.manual_seed(0)
    causal = objective.task == "causal-lm"
    model = (LlamaForCausalLM if causal else LlamaForSequenceClassification)(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = collate(encoded.rows, tokenizer.pad_token_id)
    labels = batch.pop("labels")
    before = objective.tally(model(**batch).logits, labels).metrics()
    for _ in range(30):
        total, count = objective.loss(model(**batch).logits, labels)
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = objective.tally(model(**batch).logits, labels).metrics()
    assert after["loss"] < 0.3 * before["loss"]
    metric, direction = objective.best
    assert (after[metric] > before[metric]) == (direction == "max") or after[metric] == before[metric] == 1.0
