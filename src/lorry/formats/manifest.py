"""``lorry.json``: what a checkpoint says beside its tensors.

The number ``format`` counts up with every change; ``readable_by`` is the oldest format whose reader computes
the same. A reader refuses files with a higher ``readable_by``, and passes over unknown fields of the others
with a note.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorry.core.errors import CheckpointError, OptionError
from lorry.core.method.base import Method
from lorry.core.method.registry import method_from
from lorry.core.sites.fingerprint import Fingerprint
from lorry.core.sites.kinds import current_name
from lorry.formats.peft_config import read_json

FORMAT = 1
_FIELDS = frozenset(
    "format readable_by lorry name layout method sites shared tensors dtype fingerprint metadata digest".split()
)


@dataclass
class Manifest:
    """The content of ``lorry.json``.

    Attributes
    ----------
    layout
        ``peft`` if the tensors carry PEFT's names and layout, ``lorry`` for Lorry's own.
    methods, kinds, shapes
        By site path, in the order of the model.
    digest
        Hash of the tensors that this manifest was written with; the tensor file carries it too.
    """

    name: str
    layout: str
    method: Method
    methods: dict[str, Method]
    kinds: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    shared: tuple[str, ...]
    tensors: int
    dtype: str
    fingerprint: Fingerprint
    metadata: dict[str, Any]
    digest: str
    notes: tuple[str, ...] = field(default=())

    def to_bytes(self) -> bytes:
        """Return the file's content."""
        sites: dict[str, Any] = {}
        for path, method in self.methods.items():
            sites[path] = {"kind": self.kinds[path], "shape": list(self.shapes[path])}
            if method != self.method:
                sites[path]["method"] = method.to_dict()
        values = {
            "format": FORMAT,
            "readable_by": FORMAT,
            "lorry": getattr(sys.modules.get("lorry"), "__version__", ""),
            "name": self.name,
            "layout": self.layout,
            "method": self.method.to_dict(),
            "dtype": self.dtype,
            "tensors": self.tensors,
            "shared": list(self.shared),
            "digest": self.digest,
            "metadata": self.metadata,
            "fingerprint": self.fingerprint.to_dict(),
            "sites": sites,
        }
        try:
            return json.dumps(values, indent=1).encode()
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"The metadata of adapter '{self.name}' is not plain data: {error}.") from None


def read_manifest(path: Path) -> Manifest:
    """Read ``lorry.json``.

    Raises
    ------
    CheckpointError
        It is damaged, of a newer format, or names a method or an option that this version does not know.
    """
    values = read_json(path)
    notes = _check_format(values, path)
    try:
        made: dict[str, Method] = {}
        method = _method(values["method"], made)
        methods, kinds, shapes = {}, {}, {}
        for site, entry in values["sites"].items():
            unknown = entry.keys() - {"kind", "shape", "method"}
            if unknown:
                raise CheckpointError(
                    f"'{path}': site '{site}' has the unknown fields {sorted(unknown)}; a newer version of "
                    "Lorry may know them."
                )
            own = entry.get("method")
            methods[site] = method if own is None else _method(own, made)
            kinds[site] = current_name(entry["kind"])
            shapes[site] = tuple(entry["shape"])
        marks = values["fingerprint"]
        return Manifest(
            name=str(values["name"]),
            layout=str(values["layout"]),
            method=method,
            methods=methods,
            kinds=kinds,
            shapes=shapes,
            shared=tuple(values["shared"]),
            tensors=int(values["tensors"]),
            dtype=str(values.get("dtype", "")),
            fingerprint=Fingerprint(dict(marks["sites"]), str(marks.get("base", ""))),
            metadata=dict(values.get("metadata") or {}),
            digest=str(values.get("digest", "")),
            notes=notes,
        )
    except OptionError as error:
        raise CheckpointError(f"'{path}' was written by Lorry {values.get('lorry', '?')}: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"'{path}' is damaged: {type(error).__name__} {error}.") from None


def _method(values: Any, made: dict[str, Method]) -> Method:
    key = repr(values)
    if key not in made:
        made[key] = method_from(values)
    return made[key]


def _check_format(values: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    number = values.get("format")
    if not isinstance(number, int):
        raise CheckpointError(f"'{path}' has no format number; it is no manifest of Lorry's.")
    needs = values.get("readable_by", number)
    if needs > FORMAT:
        raise CheckpointError(
            f"'{path}' is of format {number} (Lorry {values.get('lorry', '?')}) and needs a reader of "
            f"format {needs}; this version reads up to {FORMAT}. Update Lorry."
        )
    unknown = sorted(values.keys() - _FIELDS)
    if not unknown:
        return ()
    if number <= FORMAT:
        raise CheckpointError(f"'{path}' has the unknown fields {unknown}, which its format {number} does not have.")
    return (f"fields of the newer format {number} were left aside: {', '.join(unknown)}",)
