"""The adapters that a server on several replicas knows, and what one request says about them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorry.serving.http.errors import ApiError
from lorry.serving.http.names import composition_of

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@dataclass(frozen=True)
class Place:
    """An adapter as it was made known: under which name, where it lies, and the how manieth under the name."""

    name: str
    path: Path
    version: int

    @property
    def id(self) -> str:
        """What Ray Serve routes by; no name contains an @."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class Call:
    """A request of HTTP on its way to a replica.

    Attributes
    ----------
    method, path, query, headers, body
        As it came.
    places
        The adapters of its composition.
    missing
        Adapters that it names and that are not served.
    names
        All names that are served, where the answer may depend on them; else those of `places`.
    """

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    places: tuple[Place, ...] = ()
    missing: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    def header(self, name: bytes) -> str | None:
        """Return a header, None where there is none."""
        return next((value.decode("latin-1") for key, value in self.headers if key == name), None)


@dataclass(frozen=True)
class Head:
    """The beginning of an answer.

    Attributes
    ----------
    status, headers
        Of HTTP.
    loaded
        Where the adapter lies that this request made known.
    """

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    loaded: Path | None = None


class Catalogue:
    """What adapters there are.

    Parameters
    ----------
    base
        The base's name.
    adapters
        Name -> folder or file, for a start.
    """

    def __init__(self, base: str, adapters: Mapping[str, Path]) -> None:
        self.base = base
        self._versions: dict[str, int] = {}
        self.places: dict[str, Place] = {}
        for name, path in adapters.items():
            self.add(name, path)

    def add(self, name: str, path: Path) -> None:
        """Make an adapter known, in the place of another one if its name was taken."""
        self._versions[name] = self._versions.get(name, 0) + 1
        self.places[name] = Place(name, path, self._versions[name])

    def about(self, call: Call) -> Call:
        """Return a request with what is known of the adapters that it names."""
        fields = fields_of(call.body)
        named = self._composition(fields.get("lora_name" if call.path == UNLOAD else "model"))
        places = tuple(self.places[name] for name in named if name in self.places)
        missing = tuple(name for name in named if name not in self.places)
        names = self.places if missing or not named else named  # an answer to a name that is wrong says which are right
        return replace(call, places=places, missing=missing, names=tuple(names))

    def answered(self, call: Call, head: Head) -> None:
        """Take note of what an answer changed."""
        name = fields_of(call.body).get("lora_name")
        if head.status != 200 or not isinstance(name, str):
            return
        if call.path == UNLOAD:
            self.places.pop(name, None)
        elif head.loaded is not None:
            self.add(name, head.loaded)

    def _composition(self, model: object) -> list[str]:
        if not isinstance(model, str):
            return []
        try:
            return list(composition_of(model, self.base))
        except ApiError:  # the replica says what is wrong
            return []


def fields_of(body: bytes) -> dict[str, Any]:
    """Return the fields of a JSON object, none of anything else."""
    try:
        found = json.loads(body) if body else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
