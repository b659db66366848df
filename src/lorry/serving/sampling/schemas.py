"""What a JSON schema may say: a keyword that is compiled but not enforced is refused, so that each answer is valid."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from lorry.core.errors import OptionError

#: Assertions of JSON Schema that xgrammar leaves out of the grammar without an error.
UNENFORCED = frozenset(
    {
        "multipleOf",
        "uniqueItems",
        "not",
        "if",
        "then",
        "else",
        "contains",
        "minContains",
        "maxContains",
        "dependentRequired",
        "dependentSchemas",
        "dependencies",
    }
)
#: Each of these says all that a schema says, beside what asserts nothing; enum and const may have a type beside them.
ALONE = frozenset({"$ref", "anyOf", "oneOf", "allOf", "enum", "const"})
#: What asserts something about a value of one type; it is enforced where the type is said.
OF_TYPES = frozenset(
    "minLength maxLength pattern minimum maximum exclusiveMinimum exclusiveMaximum minItems maxItems minProperties "
    "maxProperties".split()
)
ASSERTING = OF_TYPES | {"properties", "required", "items", "prefixItems", "additionalProperties", "patternProperties"}
#: Keywords whose value is a schema, a list of them, or has them as values.
ONE = ("items", "additionalProperties", "additionalItems", "propertyNames", "unevaluatedProperties", "unevaluatedItems")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
#: What may stand for itself in a JSON text, by the number of its bytes, so that no other bytes can spell it.
_CHARACTER = r"[\x20\x21\x23-\x5b\x5d-\x7f]|[\x80-\u07ff]|[\u0800-\ud7ff]|[\ue000-\uffff]|[\u{10000}-\u{10ffff}]"
_CLASS = re.compile(r"\[(?:\\.|[^\]\\])*\]")
_QUOTED = re.compile(r'"|\\\\|\\x22|\\x5[cC]|\\u0022|\\u005[cC]')
NAMED = ("properties", "patternProperties", "$defs", "definitions")


def enforced(text: str) -> str:
    """Return a schema whose grammar allows only what the given one does; the same schema but for lengths of texts.

    Raises
    ------
    OptionError
        It is no JSON, or asserts what the grammar would not keep to; names the place and the keyword.
    """
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"Expected a JSON schema, found text that is no JSON: {error}.") from error
    for place, part in _schemas(schema, "#"):
        problem = _problem(part)
        if problem:
            raise OptionError(f"The JSON schema cannot be kept to at {place}: {problem}. Say it in another way.")
        if "minLength" in part or "maxLength" in part:
            # as a pattern, since xgrammar's own form of lengths lets control characters through
            low, high = part.pop("minLength", 0), part.pop("maxLength", "")
            part["pattern"] = f"^({_CHARACTER}){{{low},{high}}}$"
    return json.dumps(schema)


def _schemas(schema: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every schema within this one that is an object, with its place."""
    todo = [(place, schema)]
    while todo:
        place, schema = todo.pop()
        if not isinstance(schema, dict):
            continue
        yield place, schema
        todo += [(f"{place}/{key}", schema[key]) for key in ONE if key in schema]
        for key in LISTS:
            parts = schema.get(key)
            todo += [(f"{place}/{key}/{i}", p) for i, p in enumerate(parts if isinstance(parts, list) else ())]
        for key in NAMED:
            parts = schema.get(key)
            todo += [(f"{place}/{key}/{n}", p) for n, p in (parts.items() if isinstance(parts, dict) else ())]


def _problem(schema: dict[str, Any]) -> str | None:
    """Return what this schema itself asserts that would not be enforced, if anything."""
    for key in schema:
        if key in UNENFORCED:
            return f"the keyword '{key}' is not enforced while text is generated"
    ways = [{"minLength", "maxLength"} & schema.keys(), {"pattern"} & schema.keys(), {"format"} & schema.keys()]
    if sum(map(bool, ways)) > 1:
        named = sorted(key for way in ways for key in way)
        return f"{' and '.join(repr(key) for key in named)} are not enforced together"
    alone = ALONE & schema.keys()
    others = schema.keys() & (ASSERTING if alone <= {"enum", "const"} else ASSERTING | {"type"})
    if len(alone) > 1 or (alone and others):
        return f"{', '.join(repr(key) for key in sorted(alone | others))} are not enforced together"
    untyped = schema.keys() & OF_TYPES
    if untyped and "type" not in schema:
        return f"'{min(untyped)}' is not enforced without a 'type' beside it"
    required = schema.get("required")
    missing = set(required) - set(schema.get("properties", {})) if isinstance(required, list) else set()
    if missing:
        return f"'required' names '{min(missing)}', which is not among 'properties'"
    if isinstance(schema.get("pattern"), str) and _QUOTED.search(_CLASS.sub("", schema["pattern"])):
        return "a quotation mark or a backslash in 'pattern' would have to be escaped in the JSON"
    if len(schema.get("allOf") or ()) > 1:
        return "'allOf' of more than one schema is not enforced"
    if "oneOf" in schema and not _apart(schema["oneOf"]):
        return (
            "the branches of 'oneOf' are not told apart by their types or by a required property with a constant, and "
            "'anyOf' says the same without the promise that only one holds"
        )
    return None


def _apart(branches: Any) -> bool:
    """Whether at most one of these schemas can hold, seen from types and from constants of required properties."""
    if not isinstance(branches, list) or not all(isinstance(b, dict) for b in branches):
        return True  # broken; said when it is compiled
    return all(_disjoint(one, other) for i, one in enumerate(branches) for other in branches[:i])


def _disjoint(one: dict[str, Any], other: dict[str, Any]) -> bool:
    kinds, kinds_of_other = _types(one), _types(other)
    if kinds and kinds_of_other and not kinds & kinds_of_other:
        return True
    values, values_of_other = _values(one), _values(other)
    if values is not None and values_of_other is not None:
        return not values & values_of_other
    if kinds != {"object"} or kinds_of_other != {"object"}:
        return False
    for name in set(one.get("required", ())) & set(other.get("required", ())):
        pair = [_values(schema.get("properties", {}).get(name, {})) for schema in (one, other)]
        if pair[0] is not None and pair[1] is not None and not pair[0] & pair[1]:
            return True
    return False


def _types(schema: dict[str, Any]) -> set[str]:
    said = schema.get("type", ())
    kinds = {said} if isinstance(said, str) else set(said)
    return kinds | {"integer"} if "number" in kinds else kinds


def _values(schema: Any) -> set[str] | None:
    """Return the only values that a schema allows, as text; None if it does not say so."""
    if not isinstance(schema, dict) or not ("const" in schema or "enum" in schema):
        return None
    said = [schema["const"]] if "const" in schema else schema["enum"]
    return {json.dumps(value, sort_keys=True) for value in said} if isinstance(said, list) else None
