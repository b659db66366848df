"""Adapters learnt in one go, for whoever wants them on the pipeline and not in a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lorry.core.life.adapter import Adapter
from lorry.diffusion.errors import DiffusionError
from lorry.diffusion.task import fleet


def learn(pipeline: Any, jobs: Sequence[Mapping[str, Any]]) -> dict[str, Adapter]:
    """Train jobs side by side on the network of a pipeline, and keep no files.

    Parameters
    ----------
    pipeline
        Of diffusers.
    jobs
        As for `lorry.diffusion.task.fleet`.

    Returns
    -------
    By job the adapter, on the network, not active.

    Raises
    ------
    DiffusionError
        A job failed; its status is in the message.
    """
    with TemporaryDirectory() as folder:
        found = fleet(pipeline, jobs, Path(folder), progress=False, checkpoint_every=0).train()
    if not found.ok:
        failed = next(each for each in found.report["jobs"] if each["status"].startswith("failed"))
        raise DiffusionError(f"The training of '{failed['name']}' {failed['status']}.")
    return found.adapters
