"""A save that is killed leaves the old folder whole, or the new one."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from files.tiny_models import llama, output, stir

import lorry
from lorry.formats import folders


def fresh(seed):
    model = llama()
    return stir(lorry.attach(model, lorry.LoRA(rank=2), targets=["q_proj"]), seed)


def content(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def test_a_failing_rename_leaves_the_old_folder(tmp_path, monkeypatch):
    fresh(0).save(tmp_path / "a")
    before = content(tmp_path / "a")
    monkeypatch.setattr(folders, "_swap", lambda first, second: False)
    real, calls = os.replace, []

    def failing(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(5, "disk")
        real(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(lorry.CheckpointError, match="disk"):
        fresh(1).save(tmp_path / "a")
    assert len(calls) == 3  # to the side, in (fails), back
    assert content(tmp_path / "a") == before and [p.name for p in tmp_path.iterdir()] == ["a"]
    monkeypatch.undo()
    fresh(1).save(tmp_path / "a")
    assert content(tmp_path / "a") != before and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_first_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def failing(source, target):
        raise OSError(28, "no space")

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(lorry.CheckpointError, match="no space"):
        fresh(0).save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_kill_between_two_renames_is_healed_on_loading(tmp_path):
    fresh(0).save(tmp_path / "a")
    os.replace(tmp_path / "a", folders._backup(tmp_path / "a"))
    assert lorry.load(llama(), tmp_path / "a").receipt.tensors_applied == 6


@pytest.mark.parametrize("swap", [True, False])
def test_a_process_killed_at_any_moment_leaves_a_whole_folder(swap, tmp_path):
    folder = tmp_path / "a"
    fresh(0).save(folder)
    script = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        from files.test_atomic import fresh
        from lorry.formats import folders
        if not {swap}:
            folders._swap = lambda first, second: False
        adapters = [fresh(1), fresh(2)]
        print("ready", flush=True)
        while True:
            for adapter in adapters:
                adapter.save({str(folder)!r})
    """)
    paths = os.pathsep.join(sys.path)
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    wanted = []
    for seed in (0, 1, 2):
        adapter = fresh(seed)
        wanted.append(output(adapter.state.root))
    try:
        for _ in range(20):
            process.send_signal(signal.SIGSTOP)
            model = llama()
            lorry.load(model, folder)
            found = output(model)
            assert any(torch.equal(found, w) for w in wanted)
            process.send_signal(signal.SIGCONT)
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    model = llama()
    lorry.load(model, folder)
    assert any(torch.equal(output(model), w) for w in wanted)


def test_other_files_are_kept_and_folders_with_folders_are_not_replaced(tmp_path):
    folder = tmp_path / "a"
    fresh(0).save(folder)
    (folder / "README.md").write_text("mine")
    fresh(1).save(folder)
    assert (folder / "README.md").read_text() == "mine"
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "optimizer").write_text("state")
    number = folder.stat().st_ino
    adapter = fresh(2)
    adapter.save(folder, format="lorry")
    assert folder.stat().st_ino == number and (folder / "checkpoint-1" / "optimizer").read_text() == "state"
    assert not (folder / "adapter_config.json").exists()
    model = llama()
    lorry.load(model, folder)
    assert torch.equal(output(model), output(adapter.state.root))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_an_interruption_among_files_is_recognised(tmp_path, monkeypatch):
    folder = tmp_path / "a"
    fresh(0).save(folder)
    (folder / "sub").mkdir()
    real = os.replace

    def failing(source, target):
        if Path(target).name == "lorry.json":
            raise OSError(5, "killed")
        real(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(lorry.CheckpointError):
        fresh(1).save(folder)
    with pytest.raises(lorry.CheckpointError, match="a save was interrupted"):
        lorry.load(llama(), folder)


def test_bad_destinations(tmp_path):
    adapter = fresh(0)
    (tmp_path / "file").write_text("x")
    with pytest.raises(lorry.CheckpointError, match="is a file"):
        adapter.save(tmp_path / "file")
    adapter.save(tmp_path / "deep" / "er" / "a")
    with pytest.raises(lorry.CheckpointError, match="overwrite=True"):
        adapter.save(tmp_path / "deep" / "er" / "a", overwrite=False)
    (tmp_path / "link").symlink_to(tmp_path / "deep")
    with pytest.raises(lorry.CheckpointError, match="is a link"):
        adapter.save(tmp_path / "link")
    with pytest.raises(lorry.CheckpointError, match="NUL"):
        adapter.save(str(tmp_path / "a\0b"))
    with pytest.raises(lorry.OptionError, match="'peft'"):
        adapter.save(tmp_path / "b", format="pefft")


def test_what_cannot_be_loaded_is_not_written(tmp_path):
    adapter = fresh(0)
    adapter.save(tmp_path / "a")
    before = content(tmp_path / "a")
    next(iter(adapter.parameters())).data[0, 0] = float("nan")
    with pytest.raises(lorry.CheckpointError, match="Nothing was written"):
        adapter.save(tmp_path / "a")
    assert content(tmp_path / "a") == before


def test_peft_format_that_is_not_exact_is_refused_by_reason(tmp_path):
    adapter = lorry.attach(llama(), lorry.PiSSA(rank=2), targets=["q_proj"])
    with pytest.raises(lorry.CheckpointError, match="pissa.*export_plain"):
        adapter.save(tmp_path / "a", format="peft")
    assert not (tmp_path / "a").exists()
    receipt = adapter.save(tmp_path / "a")
    assert "Lorry's format only" in receipt.notes[0] and not (tmp_path / "a" / "adapter_config.json").exists()
