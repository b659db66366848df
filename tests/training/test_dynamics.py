"""Dynamics act on the training of a job; what they change survives in company and in a resumed run."""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from training.results import difference, tensors
from training.tiny_bases import tiny_llama, token_rows

from lorry.core.errors import AdapterError, OptionError, SiteError
from lorry.core.life.api import attach
from lorry.core.options import option
from lorry.training import Dynamic, Fleet, Job, train
from lorry.training.groups import ParameterGroups
from lorry.training.hooks import DYNAMICS
from lorry.training.joint import Share, train_pass
from lorry.training.optim import make_optimizer
from lorry.training.report import read_metrics
from lorry.training.row_gradients import RowGradients

LORA = {"method": "lora", "rank": 4}


@dataclass(frozen=True)
class RowClipping(Dynamic):
    """DP-SGD (Abadi et al. 2016): each row's gradient is clipped, then noise is added."""

    name: ClassVar[str] = "row-clipping"
    row_gradients: ClassVar[bool] = True
    bound: float = option(1.0, "Largest norm of a row's part of the gradient, times the rows of the step.", above=0)
    noise: float = option(0.0, "Standard deviation of the noise, in bounds.", at_least=0)

    def after_pass(self, at, rows):
        squares = sum(g.flatten(1).square().sum(1) for g in rows.values())
        factors = (self.bound / (squares.sqrt() * at.examples).clamp_min(1e-12)).clamp_max(1.0)
        for name, each in rows.items():
            clipped = torch.einsum("n,n...->...", factors, each)
            at.state[name] = at.state[name] + clipped if name in at.state else clipped

    def before_step(self, at):
        for name, parameter in at.groups.parameters().items():
            noise = torch.randn(parameter.shape, generator=at.generator(name))
            parameter.grad = at.state.pop(name) + noise * (self.noise * self.bound / at.examples)


@dataclass(frozen=True)
class Growing(Dynamic):
    """Gives every site more rank at a stage: new rows of A are drawn, new columns of B are zero."""

    name: ClassVar[str] = "growing"
    rank: int = option(8, "Rank from then on.", at_least=1)
    stage: str = option("grow", "When.")

    def at_stage(self, at, stage):
        if stage != self.stage:
            return
        for path, entry in list(at.adapter.entries.items()):
            old, more = entry.home.tensors(), self.rank - entry.method.rank
            drawn = torch.randn(more, old["A"].shape[1], generator=at.generator(path)) * 0.1
            made = {
                "A": torch.cat([old["A"].detach(), drawn]),
                "B": torch.nn.functional.pad(old["B"].detach(), (0, more)),
            }
            at.groups.replace(path, entry.method.with_options(rank=self.rank, alpha=float(self.rank)), made)


@dataclass(frozen=True)
class Sharpness(Dynamic):
    """Moves the adapter's tensors for the pass and back again, as sharpness-aware rules do."""

    name: ClassVar[str] = "sharpness"
    radius: float = option(0.01, "How far.", at_least=0)

    @contextmanager
    def around_pass(self, at):
        moved = []
        with torch.no_grad():
            for name, p in at.groups.parameters().items():
                moved.append((p, p.detach().clone()))
                p.add_(torch.randn(p.shape, generator=at.generator(name, at.micro)), alpha=self.radius)
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value in moved:
                    p.copy_(value)


def job(name="job", dynamics=(), steps=8, **more):
    options = {"learning_rate": 1e-2, "batch_size": 3, "gradient_accumulation_steps": 2, "seed": 1, **more}
    return Job(name, token_rows(20, (5, 14), 1), LORA, steps=steps, dynamics=dynamics, **options)


def company(steps=8):
    return Job("beside", token_rows(20, (9, 20), 2), {"method": "dora", "rank": 2}, steps=steps, seed=2)


CASES = {
    "noise": dict(dynamics=[{"dynamics": "gradient-noise", "eta": 0.01}]),
    "factors": dict(dynamics=[{"dynamics": "rate-factors", "factors": {"*.B": 4, "*q_proj*": 0.5}}]),
    "freezing": dict(dynamics=["freezing"], stages={"freeze": 3, "thaw": 6}),
    "clipping": dict(dynamics=[RowClipping(bound=0.2, noise=0.1)]),
    "growing": dict(dynamics=[Growing()], stages={"grow": 0.5}),
    "sharpness": dict(dynamics=[Sharpness()]),
    "all": dict(
        dynamics=[Sharpness(), Growing(), "freezing", {"dynamics": "gradient-noise"}],
        stages={"freeze": 2, "grow": 4, "thaw": 6},
    ),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tensors(train(tiny_llama(), None, job(), tmp_path_factory.mktemp("plain")), "job")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    made = {}

    def run(case):
        if case not in made:
            folder = tmp_path_factory.mktemp(case)
            made[case] = train(tiny_llama(), None, job(**CASES[case]), folder), folder
        return made[case]

    return run


def curve(folder, name="job"):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(folder / name / "metrics.jsonl")]


@pytest.mark.parametrize("case", CASES)
def test_a_dynamic_acts_in_company_as_alone(case, whole, plain, tmp_path):
    alone = tensors(whole(case)[0], "job")
    together = train(tiny_llama(), None, [company(), job(**CASES[case])], tmp_path)
    assert together.ok, together.report
    assert difference(tensors(together, "job"), alone) < 1e-5
    changed = alone.keys() != plain.keys() or any(
        alone[n].shape != plain[n].shape or not torch.equal(alone[n], plain[n]) for n in plain
    )
    assert changed
    bare = train(tiny_llama(), None, company(), tmp_path / "bare")
    assert difference(tensors(together, "beside"), tensors(bare, "beside")) < 1e-5


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ticks", [3, 8, 13])
def test_a_resumed_run_is_exact(case, ticks, whole, tmp_path):
    first = Fleet(tiny_llama(), None, [job(**CASES[case])], tmp_path)
    with first.base.mode(training=True):
        for _ in range(ticks):
            first._tick()
    first.save_checkpoint()
    second = train(tiny_llama(), None, job(**CASES[case]), tmp_path, resume=True)
    assert curve(tmp_path) == curve(whole(case)[1])
    assert difference(tensors(second, "job"), tensors(whole(case)[0], "job")) == 0


@pytest.mark.parametrize(
    "dynamics",
    [
        [{"dynamics": "gradient-noise", "eta": 0.0}],
        ["rate-factors"],
        [{"dynamics": "rate-factors", "factors": {"*": 1}}],
        ["freezing"],
        [Growing()],
        [Sharpness(radius=0.0)],
    ],
)
def test_neutral_options_are_plain_training_to_the_last_bit(dynamics, plain, tmp_path):
    assert difference(tensors(train(tiny_llama(), None, job(dynamics=dynamics), tmp_path), "job"), plain) == 0


def test_rate_factors_are_lora_plus(tmp_path):
    data = token_rows(20, (5, 14), 1)
    common = {"steps": 5, "learning_rate": 1e-3, "optimizer": "sgd", "seed": 3, "batch_size": 4}
    plus = Job("job", data, {"method": "lora-plus", "rank": 4, "rate_ratio": 16.0}, **common)
    factors = [{"dynamics": "rate-factors", "factors": {"*.B": 16}}]
    ours = Job("job", data, LORA, dynamics=factors, **common)
    a, b = (tensors(train(tiny_llama(), None, j, tmp_path / str(i)), "job") for i, j in enumerate((plus, ours)))
    assert difference(a, b) < 1e-7 and max(float(t.abs().max()) for n, t in b.items() if n.endswith("B")) > 0


def test_frozen_tensors_stand_still_and_move_again(tmp_path):
    fleet = Fleet(tiny_llama(), None, [job(**CASES["freezing"], optimizer="adamw")], tmp_path)
    seen = []
    with fleet.base.mode(training=True):
        for _ in range(16):
            fleet._tick()
            seen.append({n: t.detach().clone() for n, t, _ in fleet.runs[0].adapter.named_tensors()})
    steps = seen[1::2]
    a = [{n: t for n, t in s.items() if n.endswith(".A")} for s in steps]
    assert difference(a[1], a[2]) > 0 and difference(a[2], a[5]) == 0 and difference(a[5], a[6]) > 0
    assert difference(steps[2], steps[5]) > 0  # the others moved on


def test_grown_adapters_are_saved_whole(whole):
    from lorry.formats.load import load

    result, folder = whole("growing")
    grown = result.adapters["job"]
    assert {e.method.rank for e in grown.entries.values()} == {8}
    assert all(bool(t[4:].abs().sum()) for n, t in tensors(result, "job").items() if n.endswith(".A"))
    assert all(bool(t[:, 4:].abs().sum()) for n, t in tensors(result, "job").items() if n.endswith(".B"))
    loaded = load(tiny_llama(), folder / "job" / "adapter", name="job")
    assert difference({n: t for n, t, _ in loaded.named_tensors()}, tensors(result, "job")) == 0


def test_growth_leaves_the_model_as_it_was(tmp_path):
    fleet = Fleet(tiny_llama(), None, [job(**CASES["growing"])], tmp_path)
    run, ids = fleet.runs[0], torch.arange(1, 12)[None]
    with fleet.base.mode(training=True):
        for _ in range(8):
            fleet._tick()

    def logits():
        from lorry.core.life.api import activate

        activate(fleet.model, "job")
        with torch.no_grad():
            return fleet.model(ids).logits

    before = logits()
    moments = {n: s["exp_avg"].clone() for n, s in named_state(run).items()}
    Growing(stage="now").at_stage(run._moment(Growing()), "now")
    torch.testing.assert_close(logits(), before, rtol=1e-5, atol=1e-6)
    for name, state in named_state(run).items():
        old = moments[name]
        assert torch.equal(state["exp_avg"][: old.shape[0], : old.shape[1]], old)
        assert state["exp_avg"].sum() == pytest.approx(float(old.sum()), abs=1e-6) and state["step"] == 4


def named_state(run):
    names = {id(p): n for n, p in run.adapter.named_parameters()}
    return {names[id(p)]: s for p, s in run.optimizer.state.items()}


@pytest.mark.parametrize("method", [LORA, {"method": "matryoshka-lora", "rank": 4}, {"method": "lora-xs", "rank": 4}])
def test_row_gradients_are_those_of_one_backward_pass_for_each_row(method, tmp_path):
    model = tiny_llama().double()
    jobs = [Job("job", token_rows(8, (5, 14), 1), method, steps=1, batch_size=4, seed=1), company(1)]
    fleet = Fleet(model, None, jobs, tmp_path)
    run, other = fleet.runs
    generator = torch.Generator().manual_seed(2)
    run.adapter.to(torch.float64)
    with torch.no_grad():
        for p in run.adapter.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.1)
    rows = RowGradients(run.adapter)
    run.open_step()
    other.open_step()
    share, beside = run.share(), other.share()
    share.around = lambda place: rows.watching(place.start, place.stop, place.total)
    with fleet.base.mode(training=True):
        train_pass(fleet.base, [beside, share], 0)
        assert share.error is None and len(rows.found) == len(run.adapter.parameters())
        sums = {n: p.grad.clone() for n, p in run.adapter.named_parameters()}
        each = []
        for example in share.examples:
            for p in run.adapter.parameters():
                p.grad = None
            train_pass(fleet.base, [Share("job", run.prepared, [example], weight=share.weight)], 0)
            each.append({n: p.grad.clone() for n, p in run.adapter.named_parameters()})
    for name, found in rows.found.items():
        torch.testing.assert_close(found, torch.stack([g[name] for g in each]), rtol=1e-7, atol=1e-11)
        torch.testing.assert_close(found.sum(0), sums[name], rtol=1e-7, atol=1e-11)


def test_row_gradients_say_where_they_cannot_be_had(tmp_path):
    for method in ({"method": "dora"}, {**LORA, "dropout": 0.1}, {"method": "uni-lora"}, {"method": "remix"}):
        adapter = attach(tiny_llama(), method, name="a")
        with pytest.raises(SiteError, match="single rows"):
            RowGradients(adapter)


def test_a_bound_that_nobody_reaches_clips_nothing(plain, tmp_path):
    result = train(tiny_llama(), None, job(dynamics=[RowClipping(bound=1e6)]), tmp_path)
    assert difference(tensors(result, "job"), plain) < 1e-5


def test_a_dynamic_that_cannot_act_stops_its_job_alone(tmp_path):
    bad = job("bad", [{"dynamics": "rate-factors", "factors": {"*.C": 2}}])
    result = train(tiny_llama(), None, [bad, company(3)], tmp_path)
    assert "matches no trained tensor" in result["bad"]["status"] and result["beside"]["status"] == "done"


def test_names_and_options_of_dynamics_are_checked():
    assert {"freezing", "gradient-noise", "rate-factors"} <= set(DYNAMICS)
    for dynamics, words in (
        ("gradient-noize", "gradient-noise"),
        ([{"dynamics": "gradient-noise", "eat": 1}], "eta"),
        ([{"dynamics": "gradient-noise", "eta": -1.0}], "at least 0"),
        (["freezing", "freezing"], "twice"),
        ([{"dynamics": "rate-factors", "factors": {"*": 0}}], "above 0"),
    ):
        with pytest.raises(OptionError, match=words):
            job(dynamics=dynamics)
    with pytest.raises(OptionError, match="stage"):
        job(stages={"grow": -1})


def test_groups_keep_the_state_of_the_others():
    adapter = attach(tiny_llama(), LORA, name="job")
    groups = ParameterGroups(make_optimizer(job(), adapter), adapter)

    def step(seed):
        generator = torch.Generator().manual_seed(seed)
        for p in groups.parameters().values():
            p.grad = torch.randn(p.shape, generator=generator)
        groups.optimizer.step()

    step(0)
    names = groups.names("*.A")
    state = {n: groups.optimizer.state[p]["exp_avg"].clone() for n, p in groups.parameters().items()}
    groups.move(names[:3], factor=2.0, weight_decay=0.1)
    assert groups.options(names[0])["factor"] == 2.0 and groups.options(names[3])["factor"] == 1.0
    groups.freeze(names[1:5])
    assert set(names[1:5]) == set(groups.resting) and not set(names[1:5]) & set(groups.names())
    with pytest.raises(AdapterError, match="frozen"):
        groups.options(names[1])
    for name, p in groups.parameters().items():
        assert torch.equal(groups.optimizer.state[p]["exp_avg"], state[name])
    step(1)
    groups.thaw(names[1:5])
    assert groups.options(names[1])["factor"] == 2.0 and groups.options(names[3])["factor"] == 1.0
    assert all(torch.equal(groups.optimizer.state[groups.parameters()[n]]["exp_avg"], state[n]) for n in names[1:5])
    step(2)
    assert sorted(groups.names()) == sorted(n for n, _ in adapter.named_parameters())
    with pytest.raises(AdapterError, match="was not frozen"):
        groups.thaw(names[:1])
