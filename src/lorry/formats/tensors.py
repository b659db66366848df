"""Reading safetensors files: the header alone, one tensor, or everything in one read.

Loading an adapter must cost little more than reading its bytes, so the whole file goes into one buffer that
all tensors view; one sum over it tells whether every value is finite. The format is eight bytes of header
length, a JSON header, then the data.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
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
#: What the memory of PyTorch's tensors begins at a multiple of.
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in the data part of a file, in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile:
    """A safetensors file that was opened once: its header has been read and checked, the data is read on demand.

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
        The file is truncated, has trailing bytes, or its header is damaged: tensors that overlap, that share bytes or
        leave some out, names that come twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._file = opened(path)
        self._checksums: Mapping[str, str] | None = None
        self._digest = ""
        try:
            self._read_header(path)
        except BaseException:
            self._file.close()
            raise

    def _read_header(self, path: Path) -> None:
        size = self._file.seek(0, 2)
        self._file.seek(0)
        length = int.from_bytes(self._file.read(8), "little")
        if size < 8 or length > min(size - 8, _MOST_HEADER):
            raise CheckpointError(
                f"'{path}' is truncated or no safetensors file: it has {size} bytes, its header should "
                f"have {length}. Copy or save it again."
            )
        self._text = self._file.read(length)
        header = _header(path, self._text)
        self._offset, self._size = 8 + length, size - 8 - length
        self.metadata: dict[str, str] = _text_fields(path, header.pop("__metadata__", None))
        self.places: dict[str, Place] = {name: _place(path, name, entry) for name, entry in header.items()}
        _check_order(path, self.places, self._size)
        self._entries = header

    def close(self) -> None:
        """Give the file back; tensors that were read stay."""
        self._file.close()

    def __del__(self) -> None:
        """Give the file back with the object."""
        if "_file" in self.__dict__:
            self._file.close()

    def expect(self, digest: str, checksums: Mapping[str, str] | None) -> None:
        """Check from now on that what is read is what was written.

        Reading everything compares one hash of everything, reading one tensor its own checksum.

        Parameters
        ----------
        digest
            Of header and data, from the manifest that was written with them.
        checksums
            Tensor name -> `checksum` of its bytes; None for files of format 1, which have the digest alone.

        Raises
        ------
        CheckpointError
            The checksums are not those of these tensors.
        """
        if checksums is not None and checksums.keys() != self.places.keys():
            strange = sorted(checksums.keys() ^ self.places.keys())
            raise CheckpointError(
                f"'{self.path}': the manifest has checksums of {len(checksums)} tensors, the file holds "
                f"{len(self.places)}; they differ in {some(strange)}. Save the adapter again."
            )
        self._checksums, self._digest = checksums, digest

    def load(self) -> Loaded:
        """Read everything in one go, and close the file."""
        data = self._bytes(0, self._size)
        self._check_all(data)
        self.close()
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
        data = self._bytes(place.start, place.end)
        if self._checksums is not None and checksum(data) != self._checksums[name]:
            raise self._changed(name)
        if not data:
            return torch.empty(place.shape, dtype=place.dtype)
        return torch.frombuffer(data, dtype=place.dtype).view(place.shape)

    def _bytes(self, start: int, end: int) -> memoryview:
        """Read bytes to memory that begins at a multiple of 64, as a tensor's own memory does."""
        room = bytearray(end - start + _ALIGNMENT)
        skipped = -torch.frombuffer(room, dtype=torch.uint8).data_ptr() % _ALIGNMENT
        data = memoryview(room)[skipped : skipped + end - start]
        try:
            with self._lock:
                self._file.seek(self._offset + start)
                count = self._file.readinto(data)  # type: ignore[attr-defined]
        except (OSError, ValueError) as error:
            raise CheckpointError(f"'{self.path}' cannot be read any more: {error}. Open it again.") from None
        if count != len(data):
            raise CheckpointError(f"'{self.path}' became shorter while it was read. Copy or save it again.")
        return data

    def _check_all(self, data: memoryview) -> None:
        """Compare everything that was read with what was written; checksums tell which tensor was changed."""
        if not self._digest:
            return
        mark = b'{"__metadata__":' + _compact(self.metadata) + b","
        if self._text.startswith(mark) and _digest(b"{" + self._text[len(mark) :].rstrip(b" "), data) == self._digest:
            return
        # another writer may have set the same header otherwise
        found = _digest(_compact(self._entries), data)
        if found == self._digest:
            return
        for name, place in self.places.items():
            if self._checksums is not None and checksum(data[place.start : place.end]) != self._checksums[name]:
                raise self._changed(name)
        raise CheckpointError(
            f"'{self.path}' was changed after it was written: its digest is {found}, the manifest "
            f"says {self._digest}. Copy or save it again."
        )

    def _changed(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"'{self.path}': the tensor '{name}' was changed after it was written: its checksum is not the one in the "
            "manifest. Copy or save the adapter again."
        )


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


def checksum(data: bytes | bytearray | memoryview) -> str:
    """Return the checksum of a tensor's bytes: blake2b of 64 bits, 16 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _compact(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


def _digest(text: bytes, data: memoryview) -> str:
    """Return the hash of a file of this header and this data, without what the header says of the writer."""
    text += b" " * (-len(text) % 8)
    whole = hashlib.blake2b(len(text).to_bytes(8, "little") + text, digest_size=8)
    whole.update(data)
    return whole.hexdigest()


def opened(path: Path) -> BinaryIO:
    """Open a file to read its bytes; `CheckpointError` if that fails."""
    try:
        return path.open("rb")
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror}.") from error


def parsed(text: bytes, what: str, *, single_names: bool = False) -> dict[str, Any]:
    """Return a JSON object; with `single_names`, one in which no name comes twice.

    Raises
    ------
    CheckpointError
        It is something else; the text begins with `what`.
    """
    try:
        values = json.loads(text, object_pairs_hook=_single_names if single_names else None)
        if not isinstance(values, dict):
            raise ValueError(f"it is {type(values).__name__}, no object")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} ({error}).") from None
    return values


def _single_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name '{next(n for n in names if names.count(n) > 1)}' comes twice")
    return values


def _header(path: Path, text: bytes) -> dict[str, Any]:
    """Return the header, in which no name comes twice."""
    what = f"'{path}' is no safetensors file, or damaged: its header is not JSON"
    values = parsed(text, what)
    entries = len(values) - ("__metadata__" in values)
    # as many of each field as there are tensors, and no name in other letters: then none can have come twice
    fields = (b'"data_offsets"', b'"shape"', b'"dtype"')
    if (
        b"\\" not in text
        and all(text.count(field) == entries for field in fields)
        and text.count(b'"__metadata__"') < 2
    ):
        return values
    return parsed(text, what, single_names=True)


def _text_fields(path: Path, values: Any) -> dict[str, str]:
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
        raise CheckpointError(f"'{path}' is damaged: the metadata of its header must be texts by name.")
    return values


def _place(path: Path, name: str, entry: Any) -> Place:
    try:
        start, end = entry["data_offsets"]
        shape, text = entry["shape"], entry["dtype"]
        dtype = _DTYPES.get(text)
        if dtype is None:
            raise CheckpointError(f"'{path}': tensor '{name}' is of dtype {text}, known are {', '.join(_DTYPES)}.")
        if len(entry) != 3:
            raise ValueError(f"it has the fields {sorted(entry)}")
        size = dtype.itemsize
        for number in shape:
            if type(number) is not int or number < 0:
                raise ValueError(f"the sizes must be whole numbers of at least 0, found {shape}")
            size *= number
        if type(start) is not int or type(end) is not int or type(shape) is not list or start < 0:
            raise ValueError(f"offsets must be whole numbers of at least 0, found {start} and {end}")
        if end - start != size:
            raise ValueError(f"{end - start} bytes for shape {shape}")
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"'{path}' is damaged: the header entry of tensor '{name}' is wrong ({error}).") from None
    return Place(dtype, tuple(shape), start, end)


def _check_order(path: Path, places: Mapping[str, Place], size: int) -> None:
    """Raise unless the tensors lie one behind the other: none overlaps another or leaves bytes out."""
    end = 0
    for name, place in sorted(places.items(), key=lambda item: (item[1].start, item[1].end)):
        if place.start != end:
            what = "shares bytes with another tensor" if place.start < end else "leaves bytes out before it"
            raise CheckpointError(
                f"'{path}' is damaged: the tensor '{name}' {what} (at {place.start}, expected {end})."
            )
        end = place.end
    if end != size:
        what = "is truncated" if end > size else "has trailing bytes that belong to no tensor"
        raise CheckpointError(
            f"'{path}' {what}: its header describes {end} bytes of tensors, the file has {size}. Copy or save it again."
        )


def places_of(blob: bytes) -> tuple[dict[str, Place], int]:
    """Return where the tensors of a serialised safetensors file lie, and where its data part begins."""
    length = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + length])
    header.pop("__metadata__", None)
    return {name: _place(Path("memory"), name, entry) for name, entry in header.items()}, 8 + length


def with_metadata(blob: bytes, metadata: Mapping[str, str]) -> bytes:
    """Return a serialised safetensors file with text fields added to its header."""
    length = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + length])
    header = {"__metadata__": {**header.pop("__metadata__", {}), **metadata}, **header}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + blob[8 + length :]
