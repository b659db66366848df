"""Jobs trained together equal jobs trained alone; one that fails leaves the others as they are."""

import json
from dataclasses import replace

import pytest
import torch
from training.results import difference, tensors
from training.tiny_bases import VOCABULARY, class_rows, encoded, stories, tiny_bert, tiny_llama, token_rows

from lorry.core.errors import OptionError, SiteError
from lorry.training import Fleet, Job, train
from lorry.training.report import read_metrics
from lorry.training.rows import Encoded


def four_jobs(steps: int = 50) -> list[Job]:
    """Different methods, ranks, lengths, schedules, optimizers, accumulations."""
    return [
        Job(
            "plain",
            token_rows(40, (5, 12), 1),
            {"method": "lora", "rank": 4, "dropout": 0.1},
            learning_rate=3e-3,
            steps=steps,
            batch_size=3,
            seed=1,
        ),
        Job(
            "dora",
            token_rows(40, (20, 40), 2),
            {"method": "dora", "rank": 8, "dropout": 0.2},
            learning_rate=1e-3,
            steps=steps,
            batch_size=2,
            gradient_accumulation_steps=2,
            schedule="cosine",
            warmup=5,
            seed=2,
        ),
        Job(
            "rank-stabilized",
            token_rows(40, (8, 20), 3),
            {"method": "rslora", "rank": 6, "dropout": 0.05},
            targets="attention",
            learning_rate=2e-3,
            steps=steps,
            batch_size=4,
            schedule="linear",
            warmup=0.1,
            gradient_accumulation_steps=3,
            seed=3,
            max_grad_norm=0.5,
        ),
        Job(
            "plus",
            token_rows(40, (3, 30), 4),
            {"method": "lora-plus", "rank": 2, "rate_ratio": 4.0},
            learning_rate=1e-2,
            optimizer="sgd",
            momentum=0.9,
            steps=steps,
            batch_size=1,
            seed=4,
        ),
    ]


def moved(result, name, model, job):
    """How far an adapter went from its start: an equality of adapters that never moved would say nothing."""
    from lorry.core.life.api import attach

    start = attach(model, job.make_method(), targets=job.targets, name="start", seed=job.seed)
    return difference(tensors(result, name), {n: t.detach() for n, t, _ in start.named_tensors()})


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    return train(tiny_llama(), None, four_jobs(), tmp_path_factory.mktemp("together"))


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    return train(tiny_llama(), None, four_jobs(8), tmp_path_factory.mktemp("short"))


@pytest.mark.parametrize("name", ["plain", "dora", "rank-stabilized", "plus"])
def test_jobs_together_equal_jobs_alone(together, name, tmp_path):
    job = next(j for j in four_jobs() if j.name == name)
    alone = train(tiny_llama(), None, job, tmp_path)
    assert together[name]["steps"] == alone[name]["steps"] == 50
    assert difference(tensors(together, name), tensors(alone, name)) < 1e-5
    assert moved(alone, name, tiny_llama(), job) > 1e-3
    assert together[name]["last_loss"] == pytest.approx(alone[name]["last_loss"], abs=1e-5)


def test_jobs_on_real_weights_and_texts_together_equal_alone(shared, tmp_path):
    shakespeare = {"path": str(shared / "data" / "tinyshakespeare.txt"), "split": "[:400]"}
    boolq = {"path": str(shared / "data" / "boolq_train.json"), "limit": 40}
    common = {"steps": 50, "batch_size": 2, "max_length": 32}
    jobs = [
        Job("verse", shakespeare, {"method": "lora", "rank": 4, "dropout": 0.1}, learning_rate=2e-4, seed=5, **common),
        Job(
            "answers",
            boolq,
            {"method": "dora", "rank": 8, "dropout": 0.1},
            objective="completion",
            learning_rate=2e-4,
            schedule="cosine",
            warmup=4,
            seed=6,
            **{**common, "max_length": 128},
        ),
    ]
    model, tokenizer = stories(shared)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    joint = train(model, tokenizer, jobs, tmp_path / "joint", max_pad_ratio=None)
    assert joint.ok, joint.report
    for job in jobs:
        alone = train(stories(shared)[0], tokenizer, job, tmp_path / job.name)
        assert difference(tensors(joint, job.name), tensors(alone, job.name)) < 1e-5
        assert moved(alone, job.name, stories(shared)[0], job) > 1e-3
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_long_rows_run_in_a_pass_of_their_own(short, tmp_path):
    split = train(tiny_llama(), None, four_jobs(8), tmp_path, max_pad_ratio=1.0)
    bounded = train(tiny_llama(), None, four_jobs(8), tmp_path / "b", max_pad_ratio=None, max_tokens=64)
    for name in short.adapters:
        assert difference(tensors(short, name), tensors(split, name)) < 1e-5
        assert difference(tensors(short, name), tensors(bounded, name)) < 1e-5


def test_packed_rows_beside_plain_ones_equal_packed_rows_alone(tmp_path):
    def packed():
        rows = token_rows(30, (16, 16), 9).rows
        counts = torch.cat([torch.arange(6), torch.arange(10)]).int()
        return encoded([Encoded(r.input_ids, r.labels.clone(), counts) for r in rows])

    def jobs():
        return [
            Job("packed", packed(), {"method": "lora", "rank": 4}, learning_rate=3e-3, steps=15, batch_size=4),
            Job("plain", token_rows(30, (9, 20), 8), {"method": "lora", "rank": 4}, learning_rate=3e-3, steps=15),
        ]

    both = train(tiny_llama(), None, jobs(), tmp_path / "both")
    for job in jobs():
        alone = train(tiny_llama(), None, job, tmp_path / job.name)
        assert difference(tensors(both, job.name), tensors(alone, job.name)) < 1e-5
    # the borders matter: without them the result is another one
    borderless = encoded([Encoded(r.input_ids, r.labels) for r in packed().rows])
    other = train(tiny_llama(), None, replace(jobs()[0], data=borderless), tmp_path / "other")
    assert difference(tensors(both, "packed"), tensors(other, "packed")) > 1e-4


def test_accumulation_equals_one_large_batch(tmp_path):
    rows = token_rows(32, (4, 24), 11)
    common = {"method": {"method": "lora", "rank": 4}, "learning_rate": 3e-3, "epochs": 3}
    small = Job("job", rows, batch_size=2, gradient_accumulation_steps=4, **common)
    large = Job("job", rows, batch_size=8, **common)
    a, b = (train(tiny_llama(), None, j, tmp_path / str(j.batch_size)) for j in (small, large))
    assert a["job"]["steps"] == b["job"]["steps"] == 12
    assert difference(tensors(a, "job"), tensors(b, "job")) < 1e-5


def test_a_job_that_diverges_stops_alone_and_says_why(short, tmp_path):
    wild = Job(
        "wild",
        token_rows(40, (5, 25), 7),
        {"method": "lora", "rank": 4},
        learning_rate=1e30,
        steps=8,
        max_grad_norm=None,
    )
    jobs = [four_jobs(8)[0], wild, *four_jobs(8)[1:]]
    result = train(tiny_llama(), None, jobs, tmp_path)
    assert result["wild"]["status"].startswith("failed: at step ")
    assert "nan" in result["wild"]["status"] or "inf" in result["wild"]["status"]
    assert 0 < result["wild"]["steps"] < 8 and result["wild"]["adapter"] is None and not result.ok
    for name in short.adapters:
        assert result[name]["status"] == "done"
        assert difference(tensors(short, name), tensors(result, name)) < 1e-5


def bad_jobs(tmp_path):
    rows = token_rows(4, (5, 9), 0)
    foreign = token_rows(4, (5, 9), 0).rows[0]
    foreign.input_ids[1] = VOCABULARY
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\nnot json\n')
    (tmp_path / "fine.jsonl").write_text('{"text": "fine"}\n')
    return {
        "token": (Job("bad", encoded([foreign])), "97"),
        "length": (Job("bad", token_rows(2, (70, 70), 0)), "64"),
        "task": (Job("bad", class_rows(4, 2, 0), objective="classification"), "classification head"),
        "missing": (Job("bad", tmp_path / "nowhere.jsonl"), "nowhere.jsonl"),
        "text": (Job("bad", tmp_path / "fine.jsonl"), "tokenizer"),
        "held out": (Job("bad", encoded(list(rows.rows[:1])), hold_out=0.5), "at least 2"),
    }


@pytest.mark.parametrize("case", ["token", "length", "task", "missing", "text", "held out"])
def test_a_job_with_bad_data_stops_alone_and_says_why(short, tmp_path, case):
    bad, word = bad_jobs(tmp_path)[case]
    result = train(tiny_llama(), None, [bad, four_jobs(8)[0]], tmp_path / "out")
    assert result["bad"]["status"].startswith("failed: ") and word in result["bad"]["status"]
    assert result["plain"]["status"] == "done" and set(result.adapters) == {"plain"}
    assert difference(tensors(short, "plain"), tensors(result, "plain")) < 1e-5


def test_bad_lines_of_a_file_are_named(shared, tmp_path):
    model, tokenizer = stories(shared)
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\nnot json\n')
    good = Job("good", [{"text": "Once upon a time there was a girl."}] * 4, steps=2, batch_size=2)
    result = train(model, tokenizer, [Job("bad", str(tmp_path / "bad.jsonl")), good], tmp_path / "out")
    assert "bad.jsonl:2" in result["bad"]["status"] and result["good"]["status"] == "done"


def test_options_that_do_not_fit_leave_the_model_as_it_was(tmp_path):
    model = tiny_llama()
    before, kinds = model.state_dict(), [type(m) for m in model.modules()]
    good = Job("good", token_rows(4, (5, 9), 0), steps=1)
    for error, bad in (
        (SiteError, Job("bad", token_rows(4, (5, 9), 0), targets="q_prj")),
        (OptionError, Job("bad", token_rows(4, (5, 9), 0), optimizer="adamq")),
    ):
        with pytest.raises(error):
            Fleet(model, None, [good, bad], tmp_path)
        assert [type(m) for m in model.modules()] == kinds and model.state_dict().keys() == before.keys()
        assert all(p.requires_grad for p in model.parameters())


def test_classifiers_learn_with_their_own_heads_and_equal_those_alone(tmp_path):
    def jobs():
        common = {"objective": "classification", "modules_to_save": ["classifier"], "learning_rate": 5e-3, "steps": 50}
        return [
            Job(
                "two",
                class_rows(64, 2, 1),
                {"method": "lora", "rank": 4, "dropout": 0.1},
                eval_data=class_rows(40, 2, 2),
                **common,
            ),
            Job("three", class_rows(64, 3, 3), {"method": "lora", "rank": 2}, batch_size=16, **common),
        ]

    model = tiny_bert(labels=3)
    head = model.classifier.weight.clone()
    both = train(model, None, jobs(), tmp_path / "both")
    assert torch.equal(model.classifier.weight, head)
    for job in jobs():
        alone = train(tiny_bert(labels=3), None, job, tmp_path / job.name)
        mine = tensors(both, job.name)
        assert difference(mine, tensors(alone, job.name)) < 1e-5
        trained = next(t for n, t in mine.items() if n.startswith("classifier.") and t.shape == head.shape)
        assert not torch.equal(trained, head)
    held = both["two"]["eval"]
    assert held["start"]["accuracy"] < 0.8 and held["end"]["accuracy"] > 0.95
    assert held["end"]["count"] == 40


def test_more_classes_than_the_head_has_are_refused(tmp_path):
    job = Job("many", class_rows(30, 4, 1), objective="classification", steps=1)
    result = train(tiny_bert(labels=2), None, job, tmp_path)
    assert "4 classes" in result["many"]["status"] and "num_labels=4" in result["many"]["status"]


def test_early_stopping_keeps_the_best(tmp_path):
    # held-out rows of another language: the more is learned, the worse they get
    job = Job(
        "job",
        token_rows(16, (8, 12), 1),
        {"method": "lora", "rank": 8},
        eval_data=encoded([Encoded(r.input_ids.flip(0), r.labels) for r in token_rows(16, (8, 12), 2).rows]),
        learning_rate=2e-2,
        steps=200,
        eval_every=5,
        patience=3,
        keep_best=True,
    )
    result = train(tiny_llama(), None, job, tmp_path)
    report = result["job"]
    assert report["status"] == "stopped early" and report["steps"] < 200
    rows = [r for r in read_metrics(tmp_path / "job" / "metrics.jsonl") if "eval_loss" in r]
    values = {r["step"]: r["eval_loss"] for r in rows}
    best = min(values, key=values.get)
    assert report["steps"] == best + 15
    assert report["eval"]["best"]["step"] == report["eval"]["end"]["step"] == best
    assert report["eval"]["end"]["loss"] == pytest.approx(values[best], abs=1e-6)


def test_metrics_report_and_curves_say_what_happened(together):
    folder = together.report["curves"].rpartition("/")[0]
    report = json.loads(open(f"{folder}/report.json").read())
    assert report["jobs"] == together.report["jobs"] and report["version"] == 1
    assert open(f"{folder}/losses.png", "rb").read(8) == b"\x89PNG\r\n\x1a\n"
    from pathlib import Path

    rows = read_metrics(Path(folder) / "dora" / "metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(1, 51))
    assert {"loss", "rate", "grad_norm", "tokens", "seconds", "epoch"} <= rows[0].keys()
    assert rows[0]["rate"] == pytest.approx(1e-3 / 5) and rows[4]["rate"] == pytest.approx(1e-3)
    assert rows[-1]["rate"] < 1e-5
    assert rows[-1]["loss"] == together["dora"]["last_loss"]
    assert rows[-1]["tokens"] == together["dora"]["tokens"]
    assert rows[39]["epoch"] == 4.0  # 40 rows, 2 x 2 in each step


def test_bars_and_table_are_drawn_on_a_console(tmp_path):
    import io

    from rich.console import Console

    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=160)
    train(tiny_llama(), None, four_jobs(3)[:2], tmp_path, progress=True, console=console)
    shown = text.getvalue()
    assert all(word in shown for word in ("plain", "dora", "loss", "tokens", "2 jobs on LlamaForCausalLM"))


def test_the_model_is_active_as_it_was_and_in_the_mode_it_was_in(tmp_path):
    model = tiny_llama().eval()
    fleet = Fleet(model, None, four_jobs(2)[:1], tmp_path)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        before = model(ids).logits
        fleet.train()
        assert torch.equal(model(ids).logits, before) and not any(m.training for m in model.modules())


def test_an_output_folder_in_use_is_refused(tmp_path):
    train(tiny_llama(), None, four_jobs(2)[:1], tmp_path)
    with pytest.raises(OptionError, match="resume"):
        train(tiny_llama(), None, four_jobs(2)[:1], tmp_path)
    assert train(tiny_llama(), None, four_jobs(3)[:1], tmp_path, overwrite=True)["plain"]["steps"] == 3


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(short, tmp_path, reentrant):
    model = tiny_llama()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    result = train(model, None, four_jobs(8), tmp_path)
    for name in short.adapters:
        assert difference(tensors(short, name), tensors(result, name)) < 1e-5
