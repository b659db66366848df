"""Methods found by what they declare instead of by their slug: plain LoRA, PEFT's forms, whole modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorry.core.errors import OptionError
from lorry.core.method.base import Method
from lorry.core.method.registry import METHODS
from lorry.core.options import from_options


def whole_module() -> Method:
    """Return the method that trains a copy of a whole module (it declares ``whole = True``)."""
    for info in METHODS.values():
        if info.cls.whole:
            return info.cls()
    raise OptionError("No registered method declares whole = True, so whole modules cannot be carried.")


def peft_method(config: Mapping[str, Any], options: Mapping[str, Any], start: str = "") -> Method:
    """Return the method that PEFT's LoRA config says, by the forms that methods declare.

    Parameters
    ----------
    config
        Fields of the config; of several forms that fit, the one that asks for most decides.
    options
        Options of the method (``rank``, ``alpha``, ...).
    start
        Value of ``init_lora_weights``, in lower case; a form with a start fits only values that begin with it.

    Raises
    ------
    OptionError
        No method declares such a form, or an option is out of its range.
    """
    best: tuple[int, int] | None = None
    found: type[Method] | None = None
    for info in METHODS.values():
        form = info.cls.peft_form
        if form is None or not start.startswith(form.start):
            continue
        if all(config.get(key) == value for key, value in form.config.items()):
            rank = (len(form.config), len(form.start))
            if best is None or rank > best:
                best, found = rank, info.cls
    if found is None:
        raise OptionError(f"No registered method declares the form of PEFT's LoRA that {dict(config)!r} asks for.")
    return from_options(found, options)


def plain_lora(rank: int, alpha: float | None = None, **options: Any) -> Method:
    """Return plain LoRA, ``ΔW = alpha/rank · B A``: the method whose form in PEFT needs no field of its own."""
    return peft_method({}, {"rank": rank, "alpha": alpha, **options})


def peft_starts() -> tuple[str, ...]:
    """Return the beginnings of ``init_lora_weights`` that a method can compute from the base weight again."""
    forms = (info.cls.peft_form for info in METHODS.values())
    return tuple(form.start for form in forms if form is not None and form.start)
