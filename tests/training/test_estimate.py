"""Estimates of memory and work, held against what real runs allocate as torch's own profiler counts it."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from training.tiny_bases import tiny_bert, tiny_llama
from transformers import LlamaConfig, LlamaForCausalLM

import lorry
from lorry.core.errors import OptionError
from lorry.core.method.registry import methods
from lorry.training.estimate import Work, estimate_serving, estimate_training, largest
from lorry.training.fleet import attach_job
from lorry.training.jobs import Job
from lorry.training.joint import Base, Share, train_pass
from lorry.training.machine import Machine, calibrate
from lorry.training.optim import make_optimizer
from lorry.training.rows import Encoded, EncodedSet, EncodeReport
from lorry.training.task import Prepared, Setting
from lorry.training.trace import on_meta

LENGTH = 96


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=2000, max_position_embeddings=256,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def jobs(count=1, **options) -> list[Job]:
    return [Job.from_dict({"name": f"job-{i}", "data": [], "batch_size": 3, **options}) for i in range(count)]


def share(job: Job, short: int = 0) -> Share:
    """Rows of random tokens; the first one may be shorter than the others."""
    rows = []
    for i in range(job.batch_size):
        ids = torch.randint(5, 90, (LENGTH - (short if i == 0 else 0),), dtype=torch.int32)
        rows.append(Encoded(ids, label=i % 2) if job.objective == "classification" else Encoded(ids, ids))
    examples = EncodedSet(tuple(rows), EncodeReport(len(rows), len(rows), len(rows), {}, 0, 0, 0))
    return Share(job.name, Prepared(job.make_objective(), examples), rows, weight=1e-3)


def allocated(action) -> int:
    """The most bytes that an action has from torch's allocator at once, beyond what there was."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        kept = action()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    assert kept is not None
    return most


def steps(model: nn.Module, given: list[Job], short: int):
    """Two whole training steps of a fleet; returns what lives on, so that nothing of it is freed before."""
    adapters = [attach_job(model, job) for job in given]
    optimizers = [make_optimizer(job, adapter) for job, adapter in zip(given, adapters, strict=True)]
    base = Base(Setting(model))
    with base.mode(training=True):
        for step in range(2):
            for _ in range(given[0].gradient_accumulation_steps):
                made = [share(job, short) for job in given]
                train_pass(base, made, step)
                assert [s.error for s in made] == [None] * len(made)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    return adapters, optimizers


def weights(model: nn.Module) -> int:
    return sum(t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())


CASES = {
    "one job": ({}, {}),
    "padded rows": ({}, {"padded": True}),
    "fleet": ({"count": 3, "method": {"method": "lora", "rank": 16}}, {}),
    "checkpointing": ({"batch_size": 6}, {"checkpointing": True}),
    "accumulation": ({"gradient_accumulation_steps": 2, "method": {"method": "lora", "rank": 32}}, {}),
    "plain sgd": ({"optimizer": "sgd", "method": {"method": "lora", "rank": 32}}, {}),
    "dora": ({"method": "dora"}, {}),
    "head": ({"modules_to_save": ["lm_head"], "targets": "attention"}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_training_memory_is_what_a_run_allocates(case):
    options, how = CASES[case]
    given = jobs(**options)
    model = llama()
    estimate = estimate_training(model, given, length=LENGTH, **{"padded": False, **how})
    if how.get("checkpointing"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    held = weights(model)  # adapters join the parameters
    real = held + allocated(lambda: steps(model, given, 8 if how.get("padded") else 0))
    assert estimate.memory.weights == held
    assert estimate.memory.total == pytest.approx(real, rel=0.2)


def test_a_classifier():
    given = jobs(objective="classification", max_length=LENGTH // 2)
    model = tiny_bert()
    estimate = estimate_training(model, given, padded=False, length=48)
    assert estimate.rows == 3 and estimate.tokens == 3 * 48
    assert estimate.memory.adapters > 0 and estimate.memory.activations > 0


def test_a_mask_costs_a_copy_in_each_layer():
    model = llama()
    full, padded = (estimate_training(model, jobs(), length=LENGTH, padded=p).memory for p in (False, True))
    assert padded.activations - full.activations >= 3 * 3 * LENGTH**2 * 4  # layers, rows, scores in float32


def test_nothing_is_touched():
    model = tiny_llama()
    before = {n: (id(p), p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    flags, random = [m.training for m in model.modules()], torch.random.get_rng_state()
    estimate_training(model, jobs(2), length=16, checkpointing=True)
    estimate_serving(model, [{"method": "lora"}], requests=2, length=16)
    for name, parameter in model.named_parameters():
        was = before[name]
        assert id(parameter) == was[0] and torch.equal(parameter, was[1]) and parameter.requires_grad == was[2]
    assert [m.training for m in model.modules()] == flags and not lorry.adapters(model)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert {p.device.type for p in on_meta(model).parameters()} == {"meta"}


#: They read data: products of sparse matrices, norms of the base, tokens counted by expert.
WITHOUT = {"shira", "shira-dora", "mixlora"}
#: Their default rank is larger than the smallest layer.
WIDE = {"hira", "shira-dora"}


@pytest.mark.parametrize("slug", sorted(set(methods()) - {"full"}))  # that one is whole modules: see "head" above
def test_every_method_can_be_estimated_or_says_why_not(slug):
    method = {"method": slug, "rank": 8} if slug == "miss" else slug  # whose rank divides the width
    job = {"method": method, "batch_size": 2, "targets": "q_proj" if slug in WIDE else "all-linear"}
    if slug in WITHOUT:
        with pytest.raises(OptionError, match="cannot be estimated"):
            estimate_training(tiny_llama(), job, length=12)
        return
    estimate = estimate_training(tiny_llama(), job, length=12)
    assert estimate.memory.optimizer > estimate.memory.gradients > 0 and estimate.work.flops > 0


def test_work_grows_with_recomputation():
    once, twice = (estimate_training(llama(), jobs(), length=LENGTH, checkpointing=c) for c in (False, True))
    assert twice.memory.activations < once.memory.activations
    assert 1.2 < twice.work.flops / once.work.flops < 1.6  # one more forward pass, beside one forward and a backward


def test_products_are_those_of_a_real_pass():
    from lorry.bench._count import flops

    model, given = llama(), jobs()
    estimate = estimate_training(model, given, length=LENGTH, padded=False)
    attach_job(model, given[0])
    rows = share(given[0])
    base = Base(Setting(model))
    with base.mode(training=True):
        assert estimate.work.flops == flops(lambda: train_pass(base, [rows], 0))


def test_serving_memory_is_what_generating_allocates():
    model, length, requests = llama().eval(), 64, 4
    estimate = estimate_serving(model, [{"method": "lora"}] * 2, requests=requests, length=length)
    config = model.config
    assert (
        estimate.cache_per_request == length * config.num_hidden_layers * 2 * 2 * 16 * 4
    )  # k and v, heads, size, bytes
    assert estimate.memory.cache == requests * estimate.cache_per_request
    adapters = [attach_job(model, job) for job in jobs(2)]
    assert estimate.memory.adapters == sum(p.nbytes for a in adapters for p in a.parameters())
    ids = torch.randint(5, 90, (requests, length))

    def generate():
        with torch.no_grad(), lorry.rows(model, ["job-0", "job-1"] * 2):
            cache = None
            for i in range(requests):  # one request at a time fills the cache
                with lorry.rows(model, ["job-0"]):
                    out = model(ids[i : i + 1], use_cache=True, logits_to_keep=1)
                    cache = [*(cache or []), out.past_key_values]
                    del out
        return cache

    estimated = estimate.memory.total - estimate.memory.weights - estimate.memory.adapters
    assert estimated == pytest.approx(allocated(generate), rel=0.2)


def test_the_largest_number_is_the_largest():
    for memory in (lambda n: 100 + 7 * n, lambda n: 50 + n * n, lambda n: 100 + 7 * n + 40 * (n > 9), lambda n: 500):
        asked = []

        def seen(n, memory=memory, asked=asked):
            asked.append(n)
            return memory(n)

        found = largest(seen, 400, most=1000)
        wanted = max((n for n in range(1, 1001) if memory(n) <= 400), default=0)
        assert found == wanted and len(asked) < 40


def test_the_largest_batch_fits_and_the_next_does_not():
    base = on_meta(llama())

    def total(n):
        return estimate_training(base, {"batch_size": n}, length=LENGTH).memory.total

    limit = 60 << 20
    found = largest(total, limit)
    assert found > 1 and total(found) <= limit < total(found + 1)


def test_a_machine_is_the_slower_of_products_and_bytes():
    machine = Machine(flops=100.0, bandwidth=10.0, overhead=0.5)
    assert Work({(200, 10): 2, (0, 50): 1}).seconds(machine) == 2 * (2 + 0.5) + (5 + 0.5)
    here = calibrate(size=64)
    assert here.flops > 0 and here.bandwidth > 0 and here.overhead > 0


def test_what_cannot_be_estimated_says_so():
    model = tiny_llama()
    lorry.attach(model, "lora", name="there")
    with pytest.raises(OptionError, match="adapters already"):
        estimate_training(model, {})
    with pytest.raises(OptionError, match="at least 1"):
        estimate_serving(tiny_llama(), {}, requests=0)
