"""Folders of adapters: finding one safely, and replacing one in a single step."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from lorry.core.errors import CheckpointError, near_misses

TENSORS, MANIFEST, PEFT_CONFIG = "adapter_model.safetensors", "lorry.json", "adapter_config.json"
_OURS = {TENSORS, MANIFEST, PEFT_CONFIG}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def located(path: str | os.PathLike[str]) -> Path:
    """Return the folder or single file that may hold an adapter.

    Raises
    ------
    CheckpointError
        Nothing is there, or it is a pickle.
    """
    given = Path(path)
    if "\0" in str(given):
        raise CheckpointError(f"The path {str(given)!r} contains a NUL character.")
    given = given.expanduser()
    backup = _backup(given)
    if not given.exists() and (backup / TENSORS).is_file():
        # a save was killed between its two renames; the previous adapter is whole under this name
        given = backup
    if given.is_file():
        _refuse_pickle(given)
        if given.name == TENSORS and any((given.parent / n).is_file() for n in (MANIFEST, PEFT_CONFIG)):
            raise CheckpointError(f"'{given}' belongs to the adapter in the folder '{given.parent}'; load the folder.")
        return given
    if not given.is_dir():
        near = sorted(p.name for p in given.parent.iterdir()) if given.parent.is_dir() else []
        raise CheckpointError(
            f"There is no adapter at '{given}'.{near_misses(given.name, near)} Hub names are not downloaded here."
        )
    return given


def no_adapter(given: Path) -> CheckpointError:
    """Return the error for a path that no reader recognises."""
    if given.is_file():
        return CheckpointError(f"'{given}' is neither a folder nor a .safetensors file.")
    if inside(given, TENSORS) is None:
        for entry in sorted(given.iterdir()):
            if entry.name.startswith("adapter_model"):
                _refuse_pickle(entry)
        return CheckpointError(
            f"The folder '{given}' holds no {TENSORS}: it is no adapter, or the save was not finished."
        )
    return CheckpointError(
        f"The folder '{given}' holds {TENSORS} but neither {MANIFEST} nor {PEFT_CONFIG}, so rank, alpha "
        "and method are unknown. Copy the missing file beside it."
    )


def inside(folder: Path, name: str) -> Path | None:
    """Return a file of the folder, or None if there is none.

    Raises
    ------
    CheckpointError
        It is a link that leads out of the folder (the download cache of the Hub, whose links stay in its own
        blobs, excepted).
    """
    path = folder / name
    if not path.is_symlink():
        return path if path.is_file() else None
    target, home = path.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs"
    if target.is_relative_to(home) or (home.parent.name == "snapshots" and target.is_relative_to(blobs)):
        return path if target.is_file() else None
    raise CheckpointError(
        f"'{path}' is a link that leads out of its folder, to '{target}'. It is not followed; copy the file "
        "itself into the folder."
    )


def _refuse_pickle(path: Path) -> None:
    if path.suffix.lower() in _PICKLES:
        raise CheckpointError(
            f"'{path}' is a pickle, which can run any code when it is opened, so Lorry never opens one. If "
            "you trust it, convert it in a sandbox: read its tensors by torch with weights_only=True, write them by "
            f"safetensors.torch.save_file to '{TENSORS}', and load that."
        )


def write_folder(path: Path, files: Mapping[str, bytes], *, overwrite: bool = True) -> None:
    """Write files as a folder in one step: a kill at any moment leaves the old folder whole or the new one.

    Other files that the old folder holds are kept. A folder that contains folders, or that cannot be
    exchanged, is not replaced as a whole; there the files are replaced one by one, and an interruption is
    recognised on reading by the digest that the files share.

    Raises
    ------
    CheckpointError
        The path is a file, a link, or exists and must not be overwritten; or the disk refuses.
    """
    if "\0" in str(path):
        raise CheckpointError(f"The path {str(path)!r} contains a NUL character.")
    path = path.expanduser()
    path = path if path.name not in ("", "..", ".") else path.resolve()
    if path.is_symlink():
        raise CheckpointError(f"'{path}' is a link; saving through it would write elsewhere. Give the folder itself.")
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"'{path}' is a file; an adapter is saved as a folder.")
    if path.is_dir() and not overwrite and any(path.iterdir()):
        raise CheckpointError(f"'{path}' exists. Choose another folder, or pass overwrite=True.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.parent / f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
        fresh.mkdir()
        try:
            for name, content in files.items():
                _write(fresh / name, content)
            _put(fresh, path, files)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"Saving to '{path}' failed: {error}.") from error


def _put(fresh: Path, path: Path, files: Mapping[str, bytes]) -> None:
    """Let the finished folder `fresh` take the place of `path`; what was there lies in `fresh` afterwards,
    or is gone.
    """
    _sync(fresh)
    if not path.exists():
        os.replace(fresh, path)
    elif _shared(path):
        for name in files:  # the manifest last: until it is there, its digest tells that the others are newer
            os.replace(fresh / name, path / name)
        for name in _OURS - files.keys():
            (path / name).unlink(missing_ok=True)
        _sync(path)
    else:
        for other in path.iterdir():
            if other.name not in _OURS:
                _keep(other, fresh / other.name)
        _sync(fresh)
        _exchange(fresh, path)
    _sync(path.parent)


def _shared(path: Path) -> bool:
    """Whether the folder is more than an adapter's: it holds folders, or a process works in it."""
    return (
        any(p.is_dir() for p in path.iterdir())
        or path.resolve() in (Path.cwd(), *Path.cwd().parents)
        or path.is_mount()
    )


def _keep(old: Path, new: Path) -> None:
    if old.is_symlink():
        new.symlink_to(os.readlink(old))
        return
    try:
        os.link(old, new)
    except OSError:
        shutil.copy2(old, new)


def _exchange(fresh: Path, path: Path) -> None:
    """Exchange two folders: atomically where the kernel can, else by two renames that `located` knows how to
    undo.
    """
    if _swap(fresh, path):
        return
    backup = _backup(path)
    shutil.rmtree(backup, ignore_errors=True)
    os.replace(path, backup)
    try:
        os.replace(fresh, path)
    except OSError:
        os.replace(backup, path)
        raise
    shutil.rmtree(backup, ignore_errors=True)


def _swap(first: Path, second: Path) -> bool:
    """Exchange two paths by Linux's renameat2; False where it does not exist."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(second))


def _backup(path: Path) -> Path:
    return path.parent / f".{path.name}.lorry-previous"


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make renames in a folder durable, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
