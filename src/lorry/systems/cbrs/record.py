"""The record that a message becomes, its JSON schema, and a normaliser of what models and people write instead.

Source: arXiv 2604.16665. What a message does not say is an empty string or an empty list.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lorry.core.errors import OptionError

GROUPS = ("A+", "A-", "B+", "B-", "AB+", "AB-", "O+", "O-")
ASKED = "is_blood_donation_request"
#: What a message becomes that asks for nothing.
NO_REQUEST: Mapping[str, Any] = {ASKED: "false"}
#: The shape of a record: "" for text, a list of what it holds, a mapping of keys.
SHAPE: Mapping[str, Any] = {
    "blood_group": "",
    "bags_needed": "",
    "patient": {"name": "", "gender": "", "age_group": ""},
    "condition": "",
    "location": "",
    "hospital_name": "",
    "location_markers": [""],
    "probable_day": "",
    "probable_time": "",
    "contacts": [{"name": "", "contact_numbers": [""], "relation_with_patient": ""}],
    "compensation": {"transportation": "", "allowance": ""},
}
#: Texts that can take a few values only, by path.
CHOICES: Mapping[str, tuple[str, ...]] = {
    "blood_group": ("", *GROUPS),
    "patient.gender": ("", "M", "F"),
    "patient.age_group": ("", "child", "teenager", "young", "adult"),
    "compensation.transportation": ("", "Y", "N"),
    "compensation.allowance": ("", "Y", "N"),
}
#: How alike two keys must be, of 100, for one to stand for the other.
ALIKE = 80


def schema() -> dict[str, Any]:
    """Return the JSON schema of a record, with all keys in their order and no others."""
    return _schema_of(SHAPE, "")


def _schema_of(shape: Any, path: str) -> dict[str, Any]:
    if isinstance(shape, Mapping):
        inner = {key: _schema_of(value, f"{path}.{key}".lstrip(".")) for key, value in shape.items()}
        return {"type": "object", "properties": inner, "required": list(inner), "additionalProperties": False}
    if isinstance(shape, list):
        return {"type": "array", "items": _schema_of(shape[0], path)}
    return {"type": "string", "enum": list(CHOICES[path])} if path in CHOICES else {"type": "string"}


def empty() -> dict[str, Any]:
    """Return the record of a request that says nothing."""
    found: dict[str, Any] = _filled({}, SHAPE, "", [])
    return found


def written(record: Mapping[str, Any]) -> str:
    """Return a record as the text that is learned: no spaces, letters of every script as they are."""
    return json.dumps(record, ensure_ascii=False, separators=(",", ":"))


def normalised(value: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return a record with the keys of the schema, and what was changed.

    A key written otherwise (``contact``, ``bag_needed``, ``age-group``) stands for the one it resembles, if that
    one is not there itself; other keys are left out, missing ones are empty, numbers become text, and one value where a
    list is expected becomes a list of it.

    Parameters
    ----------
    value
        Parsed JSON.

    Returns
    -------
    tuple
        The record, or `NO_REQUEST`, and a note for each key that was renamed or left out, as ``path: what``.

    Raises
    ------
    OptionError
        It is no JSON object.
    """
    if not isinstance(value, Mapping):
        raise OptionError(f"A record is a JSON object, found {type(value).__name__}. Drop it, or read it anew.")
    if str(value.get(ASKED, "")).lower() == "false":
        return dict(NO_REQUEST), ()
    notes: list[str] = []
    found = _filled({k: v for k, v in value.items() if k != ASKED}, SHAPE, "", notes)
    return found, tuple(notes)


def _filled(value: Any, shape: Any, path: str, notes: list[str]) -> Any:
    if isinstance(shape, Mapping):
        given = _renamed(value if isinstance(value, Mapping) else {}, list(shape), path, notes)
        return {key: _filled(given.get(key), inner, f"{path}{key}.", notes) for key, inner in shape.items()}
    if isinstance(shape, list):
        several = value if isinstance(value, list) else [] if value in (None, "") else [value]
        return [_filled(each, shape[0], path, notes) for each in several]
    return "" if value is None or isinstance(value, Mapping | list) else str(value).strip()


def _renamed(value: Mapping[str, Any], keys: list[str], path: str, notes: list[str]) -> dict[str, Any]:
    """Give each key the name of the schema that it resembles most."""
    from rapidfuzz import fuzz, process

    found = {key: each for key, each in value.items() if key in keys}
    for key, each in value.items():
        if key in keys:
            continue
        free = [name for name in keys if name not in found]
        plain = key.strip().lower().replace("-", "_").replace(" ", "_")
        best = process.extractOne(plain, free, scorer=fuzz.ratio, score_cutoff=ALIKE)
        if best is None:
            notes.append(f"{path}{key}: left out")
        else:
            notes.append(f"{path}{key}: renamed to {best[0]}")
            found[best[0]] = each
    return found
