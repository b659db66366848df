"""Reading safetensors files: the header alone, one tensor, or everything in one read.

Loading an adapter must cost little more than reading its bytes, so the whole file goes into one buffer that
all tensors view; one sum over it tells whether every value is finite. The format is eight bytes of header
length, a JSON header, then the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lorry.core.errors import CheckpointError, some

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MOST_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in the data part of a file, in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile:
    """A safetensors file whose header has been read and checked; the data is read on demand.

    Attributes
    ----------
    path
        The file.
    places
        Name -> dtype, shape and position of every tensor.
    metadata
        The text fields of the header.

    Raises
    ------
    CheckpointError
        The file is truncated, has trailing bytes, or its header is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _opened(path) as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MOST_HEADER):
                raise CheckpointError(
                    f"'{path}' is truncated or no safetensors file: it has {size} bytes, its header should "
                    f"have {length}. Copy or save it again."
                )
            header = _header(path, file.read(length))
        self._offset, self._size = 8 + length, size - 8 - length
        self.metadata: dict[str, str] = {str(k): str(v) for k, v in (header.pop("__metadata__", None) or {}).items()}
        self.places: dict[str, Place] = {}
        end = 0
        for name, entry in header.items():
            place = _place(path, name, entry)
            self.places[name] = place
            if place.end > end:
                end = place.end
        if end != self._size:
            what = "is truncated" if end > self._size else "has trailing bytes that belong to no tensor"
            raise CheckpointError(
                f"'{path}' {what}: its header describes {end} bytes of tensors, the file has {self._size}. "
                "Copy or save it again."
            )

    def load(self) -> Loaded:
        """Read everything in one go."""
        data = bytearray(self._size)
        with _opened(self.path) as file:
            file.seek(self._offset)
            count = file.readinto(data)  # type: ignore[attr-defined]
        if count != self._size:
            raise CheckpointError(f"'{self.path}' became shorter while it was read. Copy or save it again.")
        if not self._size:
            return Loaded(self, {name: torch.empty(p.shape, dtype=p.dtype) for name, p in self.places.items()}, None)
        flat = torch.frombuffer(data, dtype=torch.uint8)
        views: dict[torch.dtype, Tensor] = {}
        tensors = {}
        for name, place in self.places.items():
            width = place.dtype.itemsize
            if place.start % width or not place.end - place.start:
                own = flat[place.start : place.end].clone()
                tensors[name] = own.view(place.dtype).view(place.shape)
                continue
            view = views.get(place.dtype)
            if view is None:
                view = views[place.dtype] = flat[: self._size // width * width].view(place.dtype)
            tensors[name] = view[place.start // width : place.end // width].view(place.shape)
        whole = next(iter(views.values())) if len(views) == 1 and len(tensors) == len(self.places) else None
        return Loaded(self, tensors, whole)

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        place = self.places[name]
        data = bytearray(place.end - place.start)
        with _opened(self.path) as file:
            file.seek(self._offset + place.start)
            file.readinto(data)  # type: ignore[attr-defined]
        if not data:
            return torch.empty(place.shape, dtype=place.dtype)
        return torch.frombuffer(data, dtype=place.dtype).view(place.shape)


class Loaded:
    """All tensors of a file, as views of one buffer."""

    def __init__(self, file: TensorFile, tensors: dict[str, Tensor], flat: Tensor | None) -> None:
        self.file = file
        self.tensors = tensors
        self._flat = flat

    def check_finite(self) -> None:
        """Raise `CheckpointError` naming the tensors that hold NaN or infinity."""
        flat = self._flat
        if flat is not None and flat.is_floating_point() and flat.dtype.itemsize > 1:
            kind = flat.dtype if flat.dtype.itemsize >= 4 else torch.float32
            # a sum of finite values may overflow, but one that holds NaN or infinity is never finite
            if math.isfinite(flat.sum(dtype=kind).item()):
                return
        check_finite(self.tensors, self.file.path)


def check_finite(tensors: Mapping[str, Tensor], where: object) -> None:
    """Raise `CheckpointError` if a tensor holds NaN or infinity."""
    broken = [
        name
        for name, t in tensors.items()
        if t.is_floating_point() and not torch.isfinite(t if t.dtype.itemsize > 1 else t.float()).all()
    ]
    if broken:
        raise CheckpointError(
            f"'{where}' holds NaN or infinite values in {len(broken)} of {len(tensors)} tensors: "
            f"{some(broken)}. The training run that wrote it diverged; use an earlier checkpoint."
        )


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror}.") from error


def _header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ValueError("no object")
    except ValueError as error:
        raise CheckpointError(
            f"'{path}' is no safetensors file, or damaged: its header is not JSON ({error})."
        ) from None
    return header


def _place(path: Path, name: str, entry: Any) -> Place:
    try:
        start, end = entry["data_offsets"]
        shape, text = tuple(entry["shape"]), entry["dtype"]
        dtype = _DTYPES.get(text)
        if dtype is None:
            raise CheckpointError(f"'{path}': tensor '{name}' is of dtype {text}, known are {', '.join(_DTYPES)}.")
        if start < 0 or end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{end - start} bytes for shape {shape}")
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"'{path}' is damaged: the header entry of tensor '{name}' is wrong ({error}).") from None
    return Place(dtype, shape, start, end)


def with_metadata(blob: bytes, metadata: Mapping[str, str]) -> bytes:
    """Return a serialised safetensors file with text fields added to its header."""
    length = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + length])
    header = {"__metadata__": {**header.pop("__metadata__", {}), **metadata}, **header}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + blob[8 + length :]
