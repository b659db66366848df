"""What ``model`` means: the base, an adapter, or a composition such as ``base+math:0.7+story:0.3``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from lorry.core.errors import near_misses
from lorry.serving.http.errors import ApiError
from lorry.serving.training.names import SERVED

#: What the base is called beside its own name, alone and at the head of a composition.
BASE = "base"
#: Weights beyond, of either sign, would only make a model say nothing at all.
MOST_WEIGHT = 100
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")


def composition_of(model: str | None, base: str) -> dict[str, float]:
    """Return the adapters and weights that a model's name stands for, whether they are served or not.

    Parameters
    ----------
    model
        ``NAME[:WEIGHT][+NAME[:WEIGHT]...]``, with ``base+`` or the base's name before it or not; None for the base.
    base
        The base's name.

    Raises
    ------
    ApiError
        400 for a weight that is no number or a name given twice, 404 for what cannot be the name of an adapter.
    """
    if model is None or model in (BASE, base):
        return {}
    rest = model
    for head in (f"{base}+", f"{BASE}+"):
        rest = rest.removeprefix(head)
    found: dict[str, float] = {}
    for part in rest.split("+"):
        name, weighted, text = part.strip().partition(":")
        if not _NAME.fullmatch(name) or name.startswith(SERVED):
            raise unknown(model, ())
        if name in found:
            raise ApiError(400, f"The composition '{model}' names '{name}' twice; give it one weight.", param="model")
        found[name] = _weight(text, model) if weighted else 1.0
    return found


def _weight(text: str, model: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not abs(weight) <= MOST_WEIGHT:
        message = f"'{text}' in '{model}' is no weight; expected NAME:0.7, at most {MOST_WEIGHT}."
        raise ApiError(400, message, param="model")
    return weight


def unknown(model: str, known: Iterable[str]) -> ApiError:
    """Return the answer to a model that is not served, with names that it may have meant."""
    hint = near_misses(model, known)
    message = f"There is no model '{model}'.{hint} GET /v1/models lists those that are served."
    return ApiError(404, message, code="model_not_found", param="model")
