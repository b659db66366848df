"""Fleets on several processes equal fleets on one; what cannot be spread is refused; one failure ends all."""

import json
import shutil

import pytest
import torch
import yaml
from page_blocks import DOCS, PageRunner, blocks
from safetensors.torch import load_file
from training import several
from training.launching import forked, launched
from training.tiny_bases import tiny_llama, token_rows

from lorry.core.errors import OptionError
from lorry.training import Fleet, Job, train
from lorry.training.processes import ProcessError, Processes
from lorry.training.report import read_metrics
from lorry.training.sharding import check_splittable
from lorry.training.split_pass import portions, train_split_pass

JOBS = [job.name for job in several.jobs() if job.name != "wild"]
PLANNED = [job.name for job in several.planned_jobs()]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    forked(several.__name__, (2, folder))
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    train(several.base(), None, several.jobs(), folder / "joined")
    train(several.base(), None, several.planned_jobs(), folder / "planned", planner=several.PLAN)
    return folder


def apart(one, two):
    """How far two adapters on disk lie apart."""
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max()) for n in a)


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("run", ["joined", "resumed"])
def test_a_spread_base_trains_the_adapters_of_one_process(one, two, run, name):
    largest = 1e-7 if name == "joint" else 1e-9  # the vector that its sites share is float32
    assert apart(one / "joined" / name / "adapter", two / run / name / "adapter") < largest
    begun = Fleet(several.base(), None, several.jobs(), two / f"begun-{run}-{name}")
    start = {n: t for n, t, _ in next(r for r in begun.runs if r.name == name).adapter.named_tensors()}
    state = load_file(sorted((one / "joined" / "checkpoints").iterdir())[-1] / f"{name}.safetensors")
    assert max(float((state[f"adapter/{n}"] - t.detach()).abs().max()) for n, t in start.items()) > 1e-3


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("run", ["joined", "resumed"])
def test_losses_and_evaluations_are_those_of_one_process_and_are_written_once(one, two, run, name):
    there, here = (read_metrics(f / name / "metrics.jsonl") for f in (one / "joined", two / run))
    assert len(there) == len(here)
    for a, b in zip(there, here, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"seconds"}:
            assert b[key] == pytest.approx(a[key], rel=1e-9), key


def test_a_job_that_fails_in_one_process_fails_in_all_and_alone(one, two):
    here, there = (json.loads((f / "joined" / "report.json").read_text())["jobs"][-1] for f in (one, two))
    assert here["status"] == there["status"] and here["status"].startswith("failed: at step")
    assert here["steps"] == there["steps"] < 6


def test_the_base_is_spread_and_adapters_are_whole(two):
    found = json.loads((two / "found.json").read_text())
    assert found["spread"] and found["whole"] and found["part"] == 0.5
    assert 0 < found["under way"] < 3


def test_one_process_takes_up_what_two_began(one, two, tmp_path):
    shutil.copytree(two / "joined", tmp_path / "run")
    for path in sorted((tmp_path / "run" / "checkpoints").iterdir())[1:]:
        shutil.rmtree(path)
    train(several.base(), None, several.jobs(), tmp_path / "run", resume=True)
    for name in JOBS:
        assert apart(one / "joined" / name / "adapter", tmp_path / "run" / name / "adapter") < 1e-7


@pytest.mark.parametrize("name", PLANNED)
def test_packed_passes_are_split_too_and_a_base_may_stay_whole(one, two, name):
    assert apart(one / "planned" / name / "adapter", two / "planned" / name / "adapter") < 1e-9


def test_portions_hold_every_example_once_and_are_even(tmp_path):
    fleet = Fleet(several.base(), None, several.planned_jobs(), tmp_path, planner=several.PLAN)
    for run in fleet.runs:
        run.open_step()
    shares = [run.share() for run in fleet.runs]
    for size in (2, 3, 11):
        parts = portions(shares, size)
        assert all(parts)
        for i, share in enumerate(shares):
            seen = [id(e) for own in parts for k, part in own if k == i and part.weight for e in part.examples]
            assert sorted(seen) == sorted(map(id, share.examples))
        loads = [sum(len(e) for _, part in own if part.weight for e in part.examples) for own in parts]
        longest = max(len(e) for share in shares for e in share.examples)
        assert max(loads) - min(loads) <= longest


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dynamics": "dp-sgd"}, "gradient of each row"),
        ({"method": "remix"}, "several draws"),
        ({"dynamics": "lora-ggpo"}, "shard: false"),
    ],
)
def test_what_cannot_be_split_is_refused_by_name(options, words, tmp_path):
    job = Job.from_dict({"name": "job", "data": token_rows(6, (3, 9), 1), "steps": 2, "max_grad_norm": 1.0, **options})
    fleet = Fleet(tiny_llama(), None, [job], tmp_path)
    with pytest.raises(OptionError, match=f"'job'.*{words}"):
        check_splittable(fleet.runs, shard=True)
    if "shard" in words:
        check_splittable(fleet.runs, shard=False)


def test_quantised_weights_are_not_spread_but_may_stay_whole(tmp_path):
    job = Job.from_dict({"name": "job", "data": token_rows(6, (3, 9), 1), "steps": 2})
    fleet = Fleet(tiny_llama(), None, [job], tmp_path)
    layer = fleet.runs[0].adapter.sites[0].owner
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(OptionError, match="int8.*shard: false"):
        check_splittable(fleet.runs, shard=True)
    check_splittable(fleet.runs, shard=False)


def test_methods_with_losses_over_the_rows_of_a_pass_are_refused_by_name(tmp_path):
    job = Job.from_dict({"name": "job", "data": token_rows(6, (3, 9), 1), "steps": 2, "method": "mixlora"})
    fleet = Fleet(tiny_llama(), None, [job], tmp_path)
    fleet.runs[0].open_step()
    with fleet.base.mode(training=True), pytest.raises(OptionError, match="mixlora.*one process"):
        train_split_pass(fleet.base, [fleet.runs[0].share()], 0, Processes(1, 2))


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    """The run of the guide, its data cut to a few examples and its training to two steps."""
    folder, page = tmp_path_factory.mktemp("file"), DOCS / "guides" / "several-machines.md"
    runner = PageRunner(folder, steps=2)
    for block in blocks(page):
        if block.language == "python" or block.title == "run.yaml":
            runner.run(block)
    made = yaml.safe_load((folder / "run.yaml").read_text())
    made["defaults"]["batch_size"], made["out"] = 3, str(folder / "out")
    for job in made["jobs"]:
        data = folder / job["data"]
        data.write_text("".join(data.read_text().splitlines(keepends=True)[:12]))
        job["data"] = str(data)
    (folder / "run.yaml").write_text(yaml.safe_dump(made))
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def commands(run_file):
    """Two runs of the command: one that goes well, and one in which a process fails."""
    script = run_file.with_name("commands.py")
    script.write_text(
        "import os, sys\n"
        "from lorry.cli.main import app\n"
        "from lorry.training import rounds\n"
        "app(['train', *sys.argv[1:], '--json'], standalone_mode=False)\n"
        "plain = rounds.train_split_pass\n"
        "def failing(*args):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise RuntimeError('no memory left here')\n"
        "    plain(*args)\n"
        "rounds.train_split_pass = failing\n"
        "app(['train', *sys.argv[1:], '--overwrite'])\n"
    )
    return launched(2, str(script), str(run_file))


def test_the_command_under_torchrun_reports_once(commands, run_file):
    report = json.loads(commands.stdout)
    assert [job["status"] for job in report["jobs"]] == ["done", "done"]
    assert commands.stderr.count("report, metrics and curves") == 1
    assert {p.name for p in (run_file.parent / "out").iterdir()} >= {"star", "unrotate", "report.json"}


def test_a_process_that_fails_ends_all_with_one_message(commands):
    assert commands.returncode == 1
    errors = [line for line in commands.stderr.splitlines() if line.startswith("error:")]
    assert errors == ["error: Process 1 of 2 failed: RuntimeError: no memory left here"]


def test_what_all_find_wrong_is_said_by_one():
    store, wrong = torch.distributed.HashStore(), OptionError("rank must be at least 1.")
    with pytest.raises(OptionError, match="rank must be"), Processes(1, 2, store=store).one_end():
        raise wrong
    with pytest.raises(ProcessError) as caught, Processes(0, 2, store=store).one_end():
        raise wrong
    assert not caught.value.own


def test_a_process_that_was_killed_is_told_from_one_that_failed():
    with pytest.raises(ProcessError, match="lost contact.*--resume") as caught:
        with Processes(0, 2, store=torch.distributed.HashStore()).one_end():
            raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711")
    assert caught.value.own
