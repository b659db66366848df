"""One run at a time in a folder: two would write each other's checkpoints and metrics."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed

from lorry.core.errors import OptionError

try:
    import fcntl
except ImportError:  # only systems with POSIX locks have it; elsewhere nothing is locked
    fcntl = None  # type: ignore[assignment]

_NAME = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the system gives it back should the process die.

    Of the processes of one distributed run the first alone holds it.

    Raises
    ------
    OptionError
        Another run holds it; the folder is as it was.
    """
    spread = torch.distributed.is_available() and torch.distributed.is_initialized()
    if fcntl is None or (spread and torch.distributed.get_rank() > 0):
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _NAME
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise OptionError(
                f"Another run writes to {folder} (process {file.read().strip() or 'unknown'}). Wait for it, or choose "
                "another folder."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
