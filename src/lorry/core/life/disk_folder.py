"""Adapters on disk while nobody needs them: one safetensors file for each, of this process alone."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorry.core.errors import CheckpointError
from lorry.core.forward.entry import TensorHome
from lorry.core.life.images import Image, Plan, host_memory, size_of

_KEY = "bytes"


class DiskFolder:
    """A folder in which adapters are put and from which they are taken.

    Parameters
    ----------
    path
        Made if it does not exist. The files in it are removed when they are no longer needed, at the latest when the
        process ends; other files are left alone.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser().absolute()
        self.files: set[Path] = set()

    def write(self, name: str, image: Image) -> DiskFile:
        """Write an adapter; the file is there whole or not at all.

        Raises
        ------
        CheckpointError
            The disk refuses.
        """
        file = self.path / f"{name}.{os.getpid()}-{secrets.token_hex(4)}.safetensors"
        fresh = file.with_name(f".{file.name}.tmp")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                save_file({_KEY: image.flat}, fresh, {"format": "pt", "content": "placed by lorry, in one piece"})
                os.replace(fresh, file)
            finally:
                fresh.unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"Adapter '{name}' could not be written to '{self.path}' ({error}); it stays where it was. Make room "
                "on the disk, or give the placement another folder."
            ) from error
        self.files.add(file)
        return DiskFile(name, file, image, self.files)


class DiskFile:
    """An adapter on disk.

    Attributes
    ----------
    path
        The file.
    plan
        Where the tensors lie in it.
    """

    def __init__(self, name: str, path: Path, image: Image, files: set[Path]) -> None:
        self.name = name
        self.path = path
        self.plan: Plan = image.plan
        self._files = files
        self._sums = {home: _sum(image.flat[slice(*_span(image.plan, home))]) for home in image.plan}

    def read(self) -> Image:
        """Read everything.

        Raises
        ------
        CheckpointError
            The file is missing, damaged or not the one that was written.
        """
        flat = self._bytes(0, size_of(self.plan))
        for home in self.plan:
            self._check(home, flat[slice(*_span(self.plan, home))])
        return Image(flat, self.plan)

    def part(self, home: TensorHome) -> dict[str, Tensor]:
        """Read the tensors of one home; raises as `read` does."""
        start, stop = _span(self.plan, home)
        flat = self._bytes(start, stop)
        self._check(home, flat)
        return {s.name: s.of(flat[s.start - start : s.stop - start]) for s in self.plan[home]}

    def remove(self) -> None:
        """Remove the file."""
        self._files.discard(self.path)
        with contextlib.suppress(OSError):  # a file that cannot be removed harms nobody
            self.path.unlink(missing_ok=True)

    def _bytes(self, start: int, stop: int) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            # page-locked if it may go on to a CUDA device: that is where adapters are needed if there is one
            flat = host_memory(stop - start, torch.cuda.is_available())
            try:
                with safe_open(self.path, framework="pt") as file:
                    found = file.get_slice(_KEY)
                    if found.get_shape() != [size_of(self.plan)]:
                        raise self._damaged(f"it holds {found.get_shape()} bytes, expected {size_of(self.plan)}")
                    flat.copy_(found[start:stop])  # a copy: the file may change or vanish under a mapping
            except (OSError, SafetensorError) as error:
                raise self._damaged(str(error)) from error
        return flat

    def _check(self, home: TensorHome, flat: Tensor) -> None:
        if _sum(flat) != self._sums[home]:
            raise self._damaged("its contents are not what was written")

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"Adapter '{self.name}' was placed in '{self.path}', and this file is missing or damaged: {what}. Detach "
            "the adapter and load or train it anew; and keep other programs away from the folder."
        )


def _span(plan: Plan, home: TensorHome) -> tuple[int, int]:
    slots = plan[home]
    return (slots[0].start, slots[-1].stop) if slots else (0, 0)


def _sum(flat: Tensor) -> int:
    if not len(flat):
        return 0
    return zlib.crc32((ctypes.c_uint8 * len(flat)).from_address(flat.data_ptr()))
