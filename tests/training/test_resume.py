"""A killed run goes on exactly where it was: metrics and tensors equal to the last bit."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training.tiny_bases import tiny_llama, token_rows

from lorry.core.errors import CheckpointError, OptionError
from lorry.training import Fleet, Job, train
from lorry.training.report import read_metrics

STEPS = 14


def jobs(steps: int = STEPS) -> list[Job]:
    """Dropout, accumulation half done at a checkpoint, momenta, bucketing, evaluation, several epochs."""
    return [
        Job(
            "a",
            token_rows(20, (5, 12), 1),
            {"method": "lora", "rank": 4, "dropout": 0.1},
            learning_rate=3e-3,
            steps=steps,
            batch_size=3,
            eval_data=token_rows(6, (5, 12), 5),
            eval_every=4,
            keep_best=True,
            seed=1,
        ),
        Job(
            "b",
            token_rows(20, (9, 20), 2),
            {"method": "dora", "rank": 2, "dropout": 0.2},
            steps=steps,
            gradient_accumulation_steps=3,
            batch_size=2,
            bucketing=4,
            schedule="cosine",
            warmup=3,
            seed=2,
        ),
        Job(
            "c",
            token_rows(20, (5, 9), 3),
            {"method": "rslora", "rank": 3},
            optimizer="sgd",
            momentum=0.9,
            steps=4,
        ),
    ]


def curves(folder: Path) -> dict:
    """All metrics but the time, as they stand in the files."""
    names = [job.name for job in jobs()]
    rows = {name: read_metrics(folder / name / "metrics.jsonl") for name in names}
    return {n: [{k: v for k, v in row.items() if k != "seconds"} for row in rows[n]] for n in names}


def tensors(adapters) -> dict:
    return {f"{n}.{k}": t.detach().clone() for n, a in adapters.items() for k, t, _ in a.named_tensors()}


def assert_same(adapters, expected) -> None:
    found = tensors(adapters)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in found)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    result = train(tiny_llama(), None, jobs(), folder)
    assert result.ok
    return curves(folder), tensors(result.adapters), result.report


@pytest.mark.parametrize("ticks", [1, 4, 17, 40])
def test_a_run_that_stops_anywhere_goes_on_exactly(whole, tmp_path, ticks):
    first = Fleet(tiny_llama(), None, jobs(), tmp_path, checkpoint_every=ticks)
    with first.base.mode(training=True):
        first._evaluate(first.runs)
        for _ in range(ticks + 1):  # one pass more than the checkpoint knows of
            first._tick()
    second = train(tiny_llama(), None, jobs(), tmp_path, resume=True)
    assert curves(tmp_path) == whole[0]
    assert_same(second.adapters, whole[1])
    for now, then in zip(second.report["jobs"], whole[2]["jobs"], strict=True):
        assert {k: now[k] for k in ("steps", "tokens", "first_loss", "best_loss", "eval", "status")} == {
            k: then[k] for k in ("steps", "tokens", "first_loss", "best_loss", "eval", "status")
        }


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from training.test_resume import jobs
from training.tiny_bases import tiny_llama
from lorry.training import train
train(tiny_llama(), None, jobs(), sys.argv[1], checkpoint_every=3, resume=True, progress=False)
"""


def start(folder: Path) -> subprocess.Popen:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(folder), str(root / "tests")]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)


def until(process: subprocess.Popen, folder: Path, rows: int) -> None:
    """Wait until job b has written some steps."""
    path = folder / "b" / "metrics.jsonl"
    while process.poll() is None:
        if path.exists() and path.read_text().count("\n") >= rows:
            return
        time.sleep(0.005)
    raise AssertionError(process.stderr.read().decode())


def test_a_killed_process_goes_on_exactly(whole, tmp_path):
    process = start(tmp_path)
    until(process, tmp_path, 6)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()
    assert not (tmp_path / "report.json").exists()
    result = train(tiny_llama(), None, jobs(), tmp_path, resume=True)
    assert curves(tmp_path) == whole[0]
    assert_same(result.adapters, whole[1])


def test_ctrl_c_saves_a_checkpoint_first(whole, tmp_path):
    process = start(tmp_path)
    until(process, tmp_path, 3)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode not in (0, None) and b"resume" in said
    report = json.loads((tmp_path / "report.json").read_text())
    states = {job["name"]: job["status"] for job in report["jobs"]}
    assert states["b"] == "interrupted" and states["c"] in ("interrupted", "done")
    train(tiny_llama(), None, jobs(), tmp_path, resume=True)
    assert curves(tmp_path) == whole[0]


def test_a_finished_run_may_go_on_for_longer(tmp_path):
    short = [replace(jobs()[2], steps=4)]
    train(tiny_llama(), None, short, tmp_path)
    longer = train(tiny_llama(), None, [replace(jobs()[2], steps=9)], tmp_path, resume=True)
    straight = train(tiny_llama(), None, [replace(jobs()[2], steps=9)], tmp_path / "straight")
    assert longer["c"]["steps"] == 9
    assert_same(longer.adapters, tensors(straight.adapters))


def test_what_changed_since_the_checkpoint_is_named(tmp_path):
    job = jobs()[2]
    train(tiny_llama(), None, job, tmp_path)
    for changed, words in (
        (replace(job, learning_rate=1.0), "learning_rate was 0.0002, now 1.0"),
        (replace(job, data=token_rows(20, (5, 9), 99)), "training examples"),
        (replace(job, method={"method": "lora", "rank": 5}), "method was"),
    ):
        model = tiny_llama()
        with pytest.raises(CheckpointError, match=words):
            Fleet(model, None, [changed], tmp_path, resume=True)
        assert "_lorry_state" not in model.__dict__


def test_damaged_checkpoints_are_refused(tmp_path):
    job = jobs()[2]
    train(tiny_llama(), None, job, tmp_path)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    tensors_file = folder / "c.safetensors"
    data = tensors_file.read_bytes()
    tensors_file.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="job 'c'"):
        Fleet(tiny_llama(), None, [job], tmp_path, resume=True)
    (folder / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Fleet(tiny_llama(), None, [job], tmp_path, resume=True)


def test_old_checkpoints_and_drafts_go(tmp_path):
    train(tiny_llama(), None, jobs()[2], tmp_path, checkpoint_every=1, keep_checkpoints=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["00000003", "00000004"]
    files = {p.suffix for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()}
    assert files == {".json", ".safetensors"}


def test_two_runs_do_not_share_a_folder_and_nothing_is_touched(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom lorry.training.folder_lock import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OptionError, match=f"Another run writes to .*process {holder.pid}"):
            train(tiny_llama(), None, jobs()[2], tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == [".lock"]
    finally:
        holder.kill()
        holder.wait()
    train(tiny_llama(), None, jobs()[2], tmp_path)  # the lock of a process that was killed is free
    assert not (tmp_path / ".lock").exists() and (tmp_path / "report.json").is_file()


def test_what_a_killed_run_left_half_written_goes_at_the_next_start(tmp_path):
    left = tmp_path / "checkpoints" / ".draft-killed"
    left.mkdir(parents=True)
    (left / "job.safetensors").write_bytes(b"half")
    train(tiny_llama(), None, jobs()[2], tmp_path)
    assert not left.exists()
