"""Checkpoints of a fleet: a folder that appears whole or not at all, of safetensors and JSON alone.

``checkpoints/00000120/`` holds ``state.json`` (what every job has done, and its place in its data) and for
each job ``NAME.safetensors`` with the adapter, the optimizer's state, the gradient of a step under way, and the
best adapter.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorry.core.errors import CheckpointError
from lorry.core.method.registry import method_from

from .aliases import renamed
from .jobs import Job
from .optim import load_optimizer, optimizer_tensors
from .run import DONE, INTERRUPTED, RUNNING, Progress, Run

FORMAT = 1
#: What is called otherwise since checkpoints were written first.
_EARLIER = {"tokens": "size_seen"}
#: Options that may differ when a run is taken up again: they do not change what was done so far.
_FREE = {"data", "eval_data", "steps", "epochs", "eval_every", "eval_batch_size", "patience"}


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is the old one or the new one, never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(name, 0o644)
    os.replace(name, path)


def save(folder: Path, tick: int, runs: Sequence[Run], offsets: Mapping[str, int], keep: int) -> Path:
    """Write a checkpoint and remove older ones.

    Parameters
    ----------
    folder
        Where checkpoints go.
    tick
        Joint passes done.
    runs
        All jobs.
    offsets
        Bytes of each job's metrics file up to here.
    keep
        How many checkpoints stay.

    Returns
    -------
    Path
        The checkpoint's folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{tick:08d}"
    draft = Path(tempfile.mkdtemp(dir=folder, prefix=".draft-"))
    try:
        jobs = {}
        for run in runs:
            jobs[run.name] = {
                "progress": asdict(run.progress),
                "offset": offsets.get(run.name, 0),
                "job": run.job.to_dict(),
            }
            if run.adapter is None or run.prepared is None or run.cursor is None:
                continue
            jobs[run.name] |= {"cursor": run.cursor.state(), "data": run.prepared.fingerprint()}
            jobs[run.name]["methods"] = _changed_methods(run)
            if run.groups is not None:
                jobs[run.name]["groups"] = run.groups.describe()
            save_file(_tensors(run), draft / f"{run.name}.safetensors")
        write_json(draft / "state.json", {"format": FORMAT, "tick": tick, "jobs": jobs})
        draft.chmod(0o755)
        for path in (*draft.iterdir(), draft):
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        if final.exists():  # of a run that was taken up from an earlier one
            shutil.rmtree(final)
        os.replace(draft, final)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    for old in _found(folder)[:-keep]:
        shutil.rmtree(old)
    clear_drafts(folder)
    return final


def clear_drafts(folder: Path) -> None:
    """Remove what a process that was killed left half written."""
    for left in folder.glob(".draft-*"):
        shutil.rmtree(left, ignore_errors=True)


def clear(folder: Path) -> None:
    """Remove all checkpoints in a folder."""
    for old in _found(folder):
        shutil.rmtree(old)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in a folder, or None."""
    found = _found(folder)
    return found[-1] if found else None


def read(path: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises
    ------
    CheckpointError
        It is damaged, or of a newer version.
    """
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"The checkpoint {path} cannot be read ({error}); remove it to go on from the one before."
        ) from error
    if state.get("format") != FORMAT:
        raise CheckpointError(f"The checkpoint {path} has format {state.get('format')!r}, this version reads {FORMAT}.")
    return state


def check_same(run: Run, saved: Mapping[str, Any]) -> None:
    """Check that a job is the one that a checkpoint was written for.

    Raises
    ------
    CheckpointError
        Names the options that differ, or says that the data changed.
    """
    now = json.loads(json.dumps(run.job.to_dict()))
    # options that are younger than the checkpoint had their default value then
    was = {**_defaults(), **renamed(saved["job"], warn=False)}
    changed = [k for k in now if k not in _FREE and now[k] != was.get(k)]
    if changed:
        words = ", ".join(f"{k} was {was.get(k)!r}, now {now[k]!r}" for k in changed)
        raise CheckpointError(
            f"Job '{run.name}' cannot be taken up again: {words}. Use the same options, or another output folder."
        )
    if run.prepared is not None and "data" in saved and saved["data"] != run.prepared.fingerprint():
        raise CheckpointError(
            f"Job '{run.name}' cannot be taken up again: its training examples are not those it began with."
        )


def restore(path: Path, run: Run, saved: Mapping[str, Any]) -> None:
    """Bring a job that has begun to where it was.

    Raises
    ------
    CheckpointError
        Another job's checkpoint, or tensors missing, surplus or misshapen.
    """
    check_same(run, saved)
    known = {f.name for f in fields(Progress)}
    noted = {_EARLIER.get(k, k): v for k, v in saved["progress"].items()}
    progress = Progress(**{k: v for k, v in noted.items() if k in known})
    if run.adapter is None or run.cursor is None or "cursor" not in saved:
        run.progress = progress
        return
    try:
        with safe_open(path / f"{run.name}.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"The checkpoint {path} lacks the tensors of job '{run.name}' ({error}).") from error
    kinds = ("adapter", "optimizer", "frozen", "grad", "best", "acting")
    parts: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        parts[kind][name] = value
    _restore_structure(run, saved, parts)
    load_tensors(run, parts["adapter"])
    longer = progress.status == DONE and progress.step < run.total
    if longer and progress.best_step in (None, progress.step):  # else the last tensors gave way to the best
        progress.status, progress.closed = RUNNING, False
    if progress.status == INTERRUPTED:
        progress.status = RUNNING
    run.progress = progress
    run.best = parts["best"]
    run.cursor.restore(saved["cursor"])
    if run.failed:
        run.groups = None
        return
    assert run.optimizer is not None
    load_optimizer(run.optimizer, run.adapter, parts["optimizer"])
    run.acting.restore(parts["acting"])
    for name, parameter in run.adapter.named_parameters():
        if name in parts["grad"]:
            parameter.grad = parts["grad"][name].to(parameter.device)


def _restore_structure(run: Run, saved: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Bring methods at sites, and the groups of parameters, to what they had become."""
    assert run.adapter is not None and run.groups is not None
    for path, described in saved.get("methods", {}).items():
        method = method_from(described)
        own = {n: parts["adapter"][f"{path}.{n}"] for n in method.layout([run.adapter.entries[path].site]).sites[path]}
        run.groups.replace(path, method, own)
    if "groups" in saved:
        frozen: dict[str, dict[str, Tensor]] = {}
        for full, value in parts["frozen"].items():
            name, _, key = full.rpartition("/")
            frozen.setdefault(name, {})[key] = value
        run.groups.restore(saved["groups"], frozen)


def _changed_methods(run: Run) -> dict[str, Any]:
    """Return the methods of sites that have another one than at the beginning, as plain data."""
    assert run.adapter is not None
    now = {path: entry.method for path, entry in run.adapter.entries.items()}
    return {path: method.to_dict() for path, method in now.items() if run.methods[path] != method}


def _defaults() -> dict[str, Any]:
    values = {f.name: f.default for f in fields(Job) if f.default is not MISSING}
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def load_tensors(run: Run, values: Mapping[str, Tensor]) -> None:
    """Copy tensors into the run's adapter, all of them or none.

    Raises
    ------
    CheckpointError
        A tensor is missing, surplus or misshapen.
    """
    assert run.adapter is not None
    own = {name: tensor for name, tensor, _ in run.adapter.named_tensors()}
    wrong = sorted(own.keys() ^ values.keys()) or sorted(n for n in own if own[n].shape != values[n].shape)
    if wrong:
        raise CheckpointError(
            f"The checkpoint of job '{run.name}' does not fit its adapter: {len(wrong)} tensors differ, "
            f"first '{wrong[0]}'."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(values[name])


def _tensors(run: Run) -> dict[str, Tensor]:
    assert run.adapter is not None
    tensors = {f"adapter/{name}": tensor for name, tensor, _ in run.adapter.named_tensors()}
    if run.groups is not None:
        for name, (resting, _) in run.groups.resting.items():
            tensors |= {f"frozen/{name}/{k}": torch.as_tensor(v) for k, v in resting.items() if v is not None}
        tensors |= {f"acting/{name}": tensor for name, tensor in run.acting.tensors().items()}
        state = optimizer_tensors(run.groups.optimizer, run.adapter)
        tensors |= {f"optimizer/{name}": tensor for name, tensor in state.items()}
        for name, parameter in run.adapter.named_parameters():
            if parameter.grad is not None:
                tensors[f"grad/{name}"] = parameter.grad
    tensors |= {f"best/{name}": tensor for name, tensor in run.best.items()}
    # a copy, because safetensors refuses tensors that share memory
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }


def _found(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.name.isdigit() and (p / "state.json").is_file())
