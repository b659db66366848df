"""``lorry.json``: what a checkpoint says beside its tensors.

The number ``format`` counts up with every change; ``readable_by`` is the oldest format whose reader computes
the same. A reader refuses files with a higher ``readable_by``, and passes over unknown fields of the others
with a note. Format 2 added a checksum for every tensor, kernels of convolutions, and components (one adapter over
several roots).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorry.core.errors import CheckpointError, OptionError
from lorry.core.method.base import Method
from lorry.core.method.registry import method_from
from lorry.core.sites.fingerprint import Fingerprint
from lorry.formats.updates import kind_named

FORMAT = 2
#: The oldest reader that computes the same: for an adapter of one root, and for what format 1 did not have.
_READER_OF_1, _READER_OF_2 = 1, 2
_SECTION = frozenset("layout method sites shared fingerprint metadata".split())
_SITE = frozenset("kind shape kernel method".split())
_FIELDS = {
    1: frozenset("format readable_by lorry name tensors dtype digest".split()) | _SECTION,
    2: frozenset("checksums components".split()),
}


@dataclass
class Section:
    """What ``lorry.json`` says of the adapter of one root.

    Attributes
    ----------
    layout
        ``peft`` if the tensors carry PEFT's names and layout, ``lorry`` for Lorry's own.
    methods, kinds, shapes
        By site path, in the order of the model.
    kernels
        ``(channels, *kernel size)`` of convolutions by site path, where the tensors do not tell.
    """

    layout: str
    method: Method
    methods: dict[str, Method]
    kinds: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    shared: tuple[str, ...]
    fingerprint: Fingerprint
    metadata: dict[str, Any]
    kernels: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        sites: dict[str, Any] = {}
        for path, method in self.methods.items():
            sites[path] = {"kind": self.kinds[path], "shape": list(self.shapes[path])}
            if path in self.kernels:
                sites[path]["kernel"] = list(self.kernels[path])
            if method != self.method:
                sites[path]["method"] = method.to_dict()
        return {
            "layout": self.layout,
            "method": self.method.to_dict(),
            "shared": list(self.shared),
            "metadata": self.metadata,
            "fingerprint": self.fingerprint.to_dict(),
            "sites": sites,
        }


@dataclass
class Manifest:
    """The content of ``lorry.json``.

    Attributes
    ----------
    sections
        One under the empty name, or one for each root of a bundle.
    tensors
        How many tensors the file holds.
    digest
        Hash of the tensors that this manifest was written with; the tensor file carries it too.
    checksums
        Name of each tensor in the file -> checksum of its bytes; None for files of format 1.
    """

    name: str
    sections: dict[str, Section]
    tensors: int
    dtype: str
    digest: str
    checksums: dict[str, str] | None
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = field(default=())

    @property
    def bundle(self) -> bool:
        """Whether the adapter spans several roots."""
        return "" not in self.sections

    def to_bytes(self) -> bytes:
        """Return the file's content."""
        kernels = any(section.kernels for section in self.sections.values())
        values: dict[str, Any] = {
            "format": FORMAT,
            "readable_by": _READER_OF_2 if self.bundle or kernels else _READER_OF_1,
            "lorry": getattr(sys.modules.get("lorry"), "__version__", ""),
            "name": self.name,
            "dtype": self.dtype,
            "tensors": self.tensors,
            "digest": self.digest,
        }
        if self.bundle:
            sections = {root: section.to_dict() for root, section in self.sections.items()}
            values |= {"metadata": self.metadata, "components": sections}
        else:
            values |= self.sections[""].to_dict()
        values["checksums"] = self.checksums
        try:
            return json.dumps(values, indent=1).encode()
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"The metadata of adapter '{self.name}' is not plain data: {error}.") from None


def read_manifest(values: Mapping[str, Any], where: str) -> Manifest:
    """Read what a ``lorry.json`` holds.

    Parameters
    ----------
    values
        Its content.
    where
        What errors call the file.

    Raises
    ------
    CheckpointError
        It is damaged, of a newer format, or names a method or an option that this version does not know.
    """
    notes = _check_format(values, where)
    try:
        made: dict[str, Method] = {}
        components = values.get("components")
        if components is None:
            sections = {"": _section(values, made, where)}
        else:
            sections = {
                root: _section(_dict(section, f"component '{root}'"), made, where)
                for root, section in _dict(components, "components").items()
            }
            for root, section in _dict(components, "components").items():
                _refuse_unknown(section.keys() - _SECTION, where, f"component '{root}'")
            if not sections or "" in sections:
                raise TypeError("components must have names")
        checksums = values.get("checksums")
        if checksums is None and values["format"] >= 2:
            raise KeyError("checksums")
        return Manifest(
            name=_want(values["name"], str, "name"),
            sections=sections,
            tensors=_whole(values["tensors"], "tensors"),
            dtype=_want(values.get("dtype", ""), str, "dtype"),
            digest=_want(values.get("digest", ""), str, "digest"),
            checksums=None if checksums is None else _texts(checksums, "checksums"),
            metadata=_dict(values.get("metadata") or {}, "metadata"),
            notes=notes,
        )
    except OptionError as error:
        raise CheckpointError(f"'{where}' was written by Lorry {values.get('lorry', '?')}: {error}") from None
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"'{where}' is damaged: {type(error).__name__} {error}.") from None


def _section(values: Mapping[str, Any], made: dict[str, Method], where: str) -> Section:
    method = _method(values["method"], made)
    methods: dict[str, Method] = {}
    kinds: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    kernels: dict[str, tuple[int, ...]] = {}
    for site, entry in _dict(values["sites"], "sites").items():
        if not _dict(entry, "a site").keys() <= _SITE:
            _refuse_unknown(entry.keys() - _SITE, where, f"site '{site}'")
        own = entry.get("method")
        methods[site] = method if own is None else _method(own, made)
        kinds[site] = kind_named(entry["kind"], where).name
        shapes[site] = _sizes(entry["shape"], site)
        if "kernel" in entry:
            kernels[site] = _sizes(entry["kernel"], site)
    marks = _dict(values["fingerprint"], "fingerprint")
    return Section(
        layout=_want(values["layout"], str, "layout"),
        method=method,
        methods=methods,
        kinds=kinds,
        shapes=shapes,
        shared=tuple(_want(name, str, "shared") for name in _want(values["shared"], list, "shared")),
        fingerprint=Fingerprint(_texts(marks["sites"], "fingerprint"), _want(marks.get("base", ""), str, "base")),
        metadata=dict(_dict(values.get("metadata") or {}, "metadata")),
        kernels=kernels,
    )


def _refuse_unknown(unknown: set[str], where: str, what: str) -> None:
    if unknown:
        raise CheckpointError(
            f"'{where}': {what} has the unknown fields {sorted(unknown)}; a newer version of Lorry may know them."
        )


def _method(values: Any, made: dict[str, Method]) -> Method:
    key = repr(values)
    if key not in made:
        if not isinstance(values, dict) or not isinstance(values.get("method"), str):
            raise TypeError(f"a method must be an object with its name under 'method', found {key:.80}")
        made[key] = method_from(values)
        hash(made[key])  # methods are told apart by their options, which lists and objects in their place would break
    return made[key]


def _want(value: Any, kind: Callable[..., Any], what: str) -> Any:
    if not isinstance(value, kind):  # type: ignore[arg-type]
        raise TypeError(f"{what} must be of type {kind.__name__}, found {value!r:.80}")
    return value


def _whole(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError(f"{what} must be a whole number of at least 0, found {value!r:.80}")
    return value


def _sizes(value: Any, site: str) -> tuple[int, ...]:
    if type(value) is not list or len(value) < 2 or not all(type(n) is int and n >= 0 for n in value):
        raise TypeError(f"the shape of '{site}' must be two or more whole numbers of at least 0, found {value!r:.80}")
    return tuple(value)


def _dict(value: Any, what: str) -> dict[str, Any]:
    found: dict[str, Any] = _want(value, dict, what)
    return found


def _texts(value: Any, what: str) -> dict[str, str]:
    texts = _dict(value, what)
    if not all(type(text) is str for text in texts.values()):
        raise TypeError(f"{what} must be of type str for each name, found {texts!r:.80}")
    return texts


def _check_format(values: Mapping[str, Any], where: str) -> tuple[str, ...]:
    number = values.get("format")
    if not isinstance(number, int) or isinstance(number, bool):
        raise CheckpointError(f"'{where}' has no format number; it is no manifest of Lorry's.")
    needs = values.get("readable_by", number)
    if not isinstance(needs, int) or isinstance(needs, bool):
        raise CheckpointError(f"'{where}' is damaged: readable_by must be a whole number, found {needs!r:.80}.")
    if needs > FORMAT:
        raise CheckpointError(
            f"'{where}' is of format {number} (Lorry {values.get('lorry', '?')}) and needs a reader of "
            f"format {needs}; this version reads up to {FORMAT}. Update Lorry."
        )
    known = frozenset().union(*(fields for since, fields in _FIELDS.items() if since <= max(number, 1)))
    unknown = sorted(values.keys() - known)
    if not unknown:
        return ()
    if number <= FORMAT:
        raise CheckpointError(f"'{where}' has the unknown fields {unknown}, which its format {number} does not have.")
    return (f"fields of the newer format {number} were left aside: {', '.join(unknown)}",)
