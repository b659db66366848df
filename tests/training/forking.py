"""``python -m training.forking MODULE PROCESSES FOLDER ...``: run MODULE.worker(FOLDER) in some processes, and again.

The processes are forked after all imports, which are most of the work of a small test; torch starts no threads before.
They meet at a store on a port that the system chooses, as under torchrun.
"""

import importlib
import os
import signal
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist


def run(worker, processes: int, folder: Path) -> None:
    """Run a function in some processes; all end once one fails."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    children = []
    for rank in range(processes):
        child = os.fork()
        if not child:
            os.environ.update(common, RANK=str(rank), WORLD_SIZE=str(processes))
            code = 1
            try:
                worker(folder)
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:
            for other in children:
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
            sys.exit(1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    module = importlib.import_module(sys.argv[1])
    for processes, folder in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
        run(module.worker, int(processes), Path(folder))
