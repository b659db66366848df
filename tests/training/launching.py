"""Several processes for a test: started by torchrun on a free port, and ended whatever becomes of the test."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def launched(processes: int, *command: str, limit: float = 240) -> subprocess.CompletedProcess:
    """Run ``python -m module arguments`` or ``python file arguments`` in processes of torchrun."""
    return _ended("torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *command, limit=limit)


def forked(module: str, *runs: tuple[int, Path], limit: float = 240) -> None:
    """Run ``MODULE.worker(folder)`` in some processes, once for each number of them and folder; see `forking`."""
    flat = [str(part) for pair in runs for part in pair]
    done = _ended("training.forking", module, *flat, limit=limit)
    assert done.returncode == 0, done.stderr[-4000:]


def _ended(*command: str, limit: float) -> subprocess.CompletedProcess:
    """Run a module of Python; stdout and stderr are read, and all its processes are over afterwards."""
    paths = f"{ROOT / 'src'}:{ROOT / 'tests'}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "COLUMNS": "200"}
    begun = subprocess.Popen(
        [sys.executable, "-m", *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = begun.communicate(timeout=limit)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(begun.pid, signal.SIGKILL)
        begun.wait()
    return subprocess.CompletedProcess(begun.args, begun.returncode, out, err)
