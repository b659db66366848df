"""Several processes for a test: started by torchrun on a free port, and ended whatever becomes of the test."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def launched(processes: int, *command: str, limit: float = 240) -> subprocess.CompletedProcess:
    """Run ``python -m module arguments`` or ``python file arguments`` in some processes; stdout and stderr are read."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    paths = f"{ROOT / 'src'}:{ROOT / 'tests'}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "COLUMNS": "200"}
    begun = subprocess.Popen(
        [*launch, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = begun.communicate(timeout=limit)
    finally:
        if begun.poll() is None:
            os.killpg(begun.pid, signal.SIGKILL)
            begun.wait()
    return subprocess.CompletedProcess(begun.args, begun.returncode, out, err)
