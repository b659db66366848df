"""The public face: every name of ``import lorry``, gathered here so that the package itself costs nothing to import."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lorry.diffusion  # noqa: F401  what it registers is known from here on
import lorry.methods  # noqa: F401  the methods' files are known from here on
import lorry.protection  # noqa: F401  what it registers is known from here on
from lorry.core.errors import (
    AdapterError,
    CheckpointError,
    FingerprintError,
    LorryError,
    OptionError,
    SiteError,
)
from lorry.core.forward.weights import BySite, ByStep, ByTimestep
from lorry.core.life.adapter import Adapter
from lorry.core.life.api import auxiliary_loss, methods, tap
from lorry.core.life.page_pool import PagePool
from lorry.core.life.placement import placement
from lorry.core.life.plan import Plan, plan
from lorry.core.method.registry import method_from
from lorry.core.method.registry import methods as registered
from lorry.core.receipt import Receipt
from lorry.formats.file import AdapterFile
from lorry.formats.reader import open_adapter as open
from lorry.roots import Bundle, Roots, activate, adapters, attach, context, load, rows

if TYPE_CHECKING:
    from lorry.methods.dora import DoRA
    from lorry.methods.lora import LoRA
    from lorry.methods.pissa import PiSSA

__all__ = [
    "Adapter",
    "AdapterFile",
    "AdapterError",
    "Bundle",
    "BySite",
    "ByStep",
    "ByTimestep",
    "CheckpointError",
    "DoRA",
    "FingerprintError",
    "LoRA",
    "LorryError",
    "OptionError",
    "PagePool",
    "PiSSA",
    "Plan",
    "Receipt",
    "Roots",
    "SiteError",
    "activate",
    "adapters",
    "attach",
    "auxiliary_loss",
    "context",
    "load",
    "method_from",
    "methods",
    "open",
    "placement",
    "plan",
    "rows",
    "tap",
]


def __getattr__(name: str) -> Any:
    """Find a method's class by its name, so that ``lorry.LoRA`` and any method added later need no line here."""
    if not name.startswith("_"):
        for info in registered().values():
            if info.cls.__name__ == name:
                return info.cls
    raise AttributeError(f"module 'lorry' has no attribute '{name}'")
