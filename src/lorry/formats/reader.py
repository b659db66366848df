"""Readers: each recognises one form in which adapters are kept and opens it; a registry asks them in turn."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from lorry.core.errors import CheckpointError
from lorry.core.registry import Registry
from lorry.formats.file import AdapterFile
from lorry.formats.folders import TENSORS, inside, located, no_adapter
from lorry.formats.peft_config import read_json
from lorry.formats.tensors import TensorFile


class Location:
    """A folder or file that may hold an adapter; what one reader looked at, the next need not read again.

    Attributes
    ----------
    path
        The folder or file. It exists, is no pickle, and its links were not followed out of a folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._json: dict[str, dict[str, Any]] = {}
        self._tensors: TensorFile | None = None

    def has(self, name: str) -> bool:
        """Whether this is a folder with a file of this name; a link that leads out of it is an error."""
        return self.path.is_dir() and inside(self.path, name) is not None

    def json(self, name: str) -> dict[str, Any]:
        """Return the JSON object in a file of the folder."""
        if name not in self._json:
            if not self.has(name):
                raise CheckpointError(f"The folder '{self.path}' holds no {name}.")
            self._json[name] = read_json(self.path / name)
        return self._json[name]

    def tensors(self) -> TensorFile:
        """Return the safetensors file: the path itself, or the adapter's in the folder. It is opened once."""
        if self._tensors is None:
            self._tensors = TensorFile(self.path / TENSORS if self.path.is_dir() else self.path)
        return self._tensors

    def close(self) -> None:
        """Give the tensor file back if it was opened."""
        if self._tensors is not None:
            self._tensors.close()


class Reader(ABC):
    """Opens adapters of one form. A new form is one file with a subclass, and ``READERS.add(name, Subclass())``.

    Attributes
    ----------
    precedence
        Readers with a higher one are asked first; among equals the names decide.
    """

    precedence: ClassVar[int] = 0

    @abstractmethod
    def recognises(self, location: Location) -> bool:
        """Whether this reader opens what lies there; cheap, and without a look at tensors."""

    @abstractmethod
    def read(self, location: Location) -> AdapterFile:
        """Open it.

        Raises
        ------
        CheckpointError
            It is damaged, or holds what Lorry does not understand.
        """


READERS: Registry[Reader] = Registry("format to read", error=CheckpointError)


def open_adapter(path: str | os.PathLike[str] | AdapterFile) -> AdapterFile:
    """Open an adapter as data, without a model; ``lorry.open`` is this function.

    Parameters
    ----------
    path
        Lorry's or PEFT's folder, a single ``.safetensors`` file in kohya's or diffusers' naming, or what a registered
        reader knows. An opened adapter is returned as it is.

    Returns
    -------
    AdapterFile
        Its tensors are read when they are asked for.

    Raises
    ------
    CheckpointError
        It is missing, damaged, unsafe, or holds what Lorry does not understand; each with its own message.
    """
    if isinstance(path, AdapterFile):
        return path
    location = Location(located(path))
    for _, reader in sorted(READERS.items(), key=lambda item: -item[1].precedence):
        if reader.recognises(location):
            try:
                return reader.read(location)
            except BaseException:
                location.close()
                raise
    raise no_adapter(location.path)
