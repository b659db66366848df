"""torch.compile: one graph, whichever adapters are active and whichever row has which."""

import pytest
import torch
from core.tiny import clear, gradients, llama, off_zero, tokens
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import lorry


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loaded(count=4, training=True, **more):
    model = llama(1, **more)
    for number in range(count):
        adapter = lorry.attach(model, lorry.LoRA(rank=number + 2, alpha=4), name="abcdef"[number])
        off_zero(adapter, number, 0.1).train(training)
    lorry.activate(model, "a")
    return model


SWITCHES = ["a", "b", {"a": 0.5, "c": 1.5}, {"a": 1.0, "b": 1.0, "c": 1.0, "d": -1.0}, "d", "a"]


@pytest.mark.parametrize("training", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("whole", [True, False], ids=["torch.compile", "Module.compile"])
def test_one_graph_over_six_switches(training, whole):
    model, ids, counter = loaded(training=training), tokens(4), CompileCounter()
    # a mixture of adapters in training is traced as it is: its factors change under the compiled form
    switches = ["a", "b", "c", "d", "b", "a"] if training else SWITCHES
    eager = []
    with torch.no_grad():
        for composition in switches:
            lorry.activate(model, composition)
            eager.append(model(ids).logits)
        if whole:
            run = torch.compile(model, backend=counter, fullgraph=True)
        else:
            model.compile(backend=counter, fullgraph=True)
            run = model
        for composition, wanted in zip(switches, eager, strict=True):
            lorry.activate(run, composition)
            torch.testing.assert_close(run(ids).logits, wanted, atol=1e-5, rtol=1e-4)
    assert counter.frame_count == 1


def test_one_graph_over_rows_and_switches():
    model, ids, counter = loaded(training=False), tokens(4), CompileCounter()
    batches = [
        ["a", "b", None, "c"],
        ["d"] * 4,
        [{"a": 0.5, "b": 0.5}, None, None, {"c": 1.0, "d": 2.0}],
        ["b", "a", "b", "a"],
    ]
    run = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for batch in batches:
            with lorry.rows(run, batch):
                mixed = run(ids).logits
            lorry.activate(model, None)
            with lorry.rows(model, batch):
                torch.testing.assert_close(mixed, model(ids).logits, atol=1e-5, rtol=1e-4)
        for composition in SWITCHES:
            lorry.activate(run, composition)
            run(ids)
    assert counter.frame_count == 1


def test_a_layer_that_sees_several_entries_for_each_row():
    """Flattened tokens, beams: entries of a row lie together."""

    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(6, 5)

        def forward(self, x):
            return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    model = Flat()
    for number, name in enumerate("ab"):
        off_zero(lorry.attach(model, lorry.LoRA(rank=2), name=name), number, 0.5)
    x, batch = torch.randn(3, 4, 6), ["b", None, "a"]
    run = torch.compile(model, backend="eager", fullgraph=True)
    with lorry.rows(model, batch):
        wanted = model(x)
    with lorry.rows(run, batch):
        torch.testing.assert_close(run(x), wanted)
    with lorry.rows(run, ["a"]):
        torch.testing.assert_close(run(x[:1]), model(x[:1]))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_training_steps_equal_eager_ones(backend):
    ids, batch = tokens(4), ["a", "b", None, {"a": 0.5, "c": 1.0}]

    def train(compiled):
        model = loaded(3)
        run = torch.compile(model, backend=backend, fullgraph=True) if compiled else model
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer, losses = torch.optim.SGD(parameters, lr=0.5), []
        for step in range(6):
            clear(model)
            if step % 2:
                with lorry.rows(run, batch):
                    loss = run(ids).logits.square().mean()
            else:
                lorry.activate(run, "b" if step % 4 else {"a": 1.0, "b": 0.5})
                loss = run(ids).logits.square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses, [p.detach() for p in parameters]

    for found, wanted in zip(train(True), train(False), strict=True):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_mixture_in_training_follows_its_parameters():
    """The compiled form lays factors side by side; it must not be a copy of what they were at activation."""
    model = loaded(2)
    run = torch.compile(model, backend="eager", fullgraph=True)
    lorry.activate(run, {"a": 1.0, "b": 0.5})
    ids, losses = tokens(), []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        clear(model)
        loss = run(ids).logits.square().mean()
        torch.testing.assert_close(loss, model(ids).logits.square().mean(), atol=1e-6, rtol=1e-5)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[0] > losses[1] > losses[2]


def test_activating_without_gradients_and_training_later():
    model = loaded(2)
    run = torch.compile(model, backend="eager", fullgraph=True)
    with torch.inference_mode():
        lorry.activate(run, "b")
        run(tokens())
    run(tokens()).logits.square().mean().backward()
    assert gradients(lorry.adapters(model)["b"])


def test_bare_base_and_back():
    model, ids = loaded(1), tokens()
    with torch.no_grad():
        bare, counter = llama(1)(ids).logits, CompileCounterWithBackend("aot_eager")
        run = torch.compile(model, backend=counter, fullgraph=True)
        for composition in ("a", None, "a", None):
            lorry.activate(run, composition)
            found = run(ids).logits
            assert torch.allclose(found, bare, atol=1e-5) == (composition is None)
    assert counter.frame_count <= 2


class Mixed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(11, 6)
        self.conv = torch.nn.Conv1d(6, 6, 3, padding=1)
        self.grouped = torch.nn.Conv1d(6, 6, 3, padding=1, groups=2)
        self.out = torch.nn.Linear(6, 4)

    def forward(self, ids):
        return self.out(self.grouped(self.conv(self.table(ids).transpose(1, 2))).transpose(1, 2))


@pytest.mark.parametrize("targets", ["all", ["table", "conv", "out"]], ids=["with a grouped convolution", "packed"])
def test_other_kinds_of_layers(targets):
    torch.manual_seed(0)
    model, ids = Mixed(), tokens(4, 5, vocabulary=11)
    for number, name in enumerate("ab"):
        off_zero(lorry.attach(model, lorry.LoRA(rank=1 + number), targets=targets, name=name), number, 0.3)
    run = torch.compile(model, backend="eager", fullgraph=True)
    for composition in ("a", "b", {"a": 0.5, "b": 2.0}):
        lorry.activate(run, composition)
        torch.testing.assert_close(run(ids), model(ids), atol=1e-5, rtol=1e-4)
    batch = ["b", None, "a", {"a": 1.0, "b": 1.0}]
    with lorry.rows(run, batch):
        torch.testing.assert_close(run(ids), model(ids), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("slug", ["dora", "pissa"])
def test_methods_without_a_packed_form_are_traced(slug):
    model, ids = llama(1), tokens()
    adapter = off_zero(lorry.attach(model, lorry.method_from({"method": slug, "rank": 2})), std=0.1)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    lorry.activate(run, "default")
    results = []
    for f in (run, model):
        clear(model)
        out = f(ids).logits
        out.square().mean().backward()
        results.append((out.detach(), gradients(adapter)))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=1e-4)
    for key, value in results[1][1].items():
        torch.testing.assert_close(results[0][1][key], value, atol=1e-5, rtol=1e-3)


def test_merged_adapters_and_mixtures_with_them():
    model, ids = loaded(3), tokens()
    run = torch.compile(model, backend="eager", fullgraph=True)
    lorry.activate(run, {"b": 1.0, "c": 0.5})
    wanted = model(ids).logits
    lorry.adapters(model)["b"].fuse()
    torch.testing.assert_close(run(ids).logits, wanted, atol=1e-5, rtol=1e-4)
