"""YAML as people write it, with errors that name the place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lorry.core.errors import OptionError


class StrictLoader(yaml.SafeLoader):
    """YAML as people mean it: ``1e-4`` is a number, and a key that stands twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of a node, refusing doubled keys."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def yaml_mapping(path: Path, holding: str) -> Mapping[str, Any]:
    """Return the mapping that a file holds.

    Parameters
    ----------
    path
        Of the file.
    holding
        The most important keys, for the error of a file that holds something else.

    Raises
    ------
    OptionError
        Not there, not YAML (with the line), a doubled key, or no mapping.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=StrictLoader)  # noqa: S506  a SafeLoader
    except OSError as error:
        raise OptionError(f"Cannot read {path}: {error.strerror or error}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise OptionError(f"{path}{where} is not YAML: {getattr(error, 'problem', None) or error}.") from error
    if not isinstance(values, Mapping):
        raise OptionError(f"{path} must hold a mapping with {holding}; found {type(values).__name__}.")
    return values


def plain_yaml(text: str, flag: str) -> Any:
    """Return the value of a flag that is written as in the YAML; raises `OptionError` if it is none."""
    try:
        return yaml.load(text, Loader=StrictLoader)  # noqa: S506  a SafeLoader
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise OptionError(f"{flag} expects a name or a YAML mapping, found {text!r} ({problem}).") from error
