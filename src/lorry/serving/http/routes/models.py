"""``/v1/models``: what ``model`` may name."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from lorry.serving.http.keys import Holder
from lorry.serving.http.names import composition_of
from lorry.serving.http.state import GUARDED, Caller, Serving, Shared

router = APIRouter(dependencies=GUARDED, tags=["models"])


@router.get("/v1/models")
async def models(serving: Shared, caller: Caller) -> dict[str, Any]:
    """List the base and the adapters that the key may use."""
    cards = [_card(serving, name) for name in serving.names() if caller.may_use(name)]
    base = [] if caller.rule is not None and not caller.rule.base else [_card(serving, None)]
    return {"object": "list", "data": base + cards}


@router.get("/v1/models/{model:path}")
async def model(model: str, serving: Shared, caller: Caller) -> dict[str, Any]:
    """Describe a model; a composition is one, too."""
    composition = composition_of(model, serving.base)
    _check(serving, caller, model, composition)
    return _card(serving, model if composition else None)


def _check(serving: Serving, caller: Holder, model: str, composition: dict[str, float]) -> None:
    caller.check_model(composition)
    if not composition.keys() <= set(serving.names()):
        raise serving.unknown(model, caller)


def _card(serving: Serving, name: str | None) -> dict[str, Any]:
    return {
        "id": name or serving.base,
        "object": "model",
        "created": serving.created,
        "owned_by": "lorry",
        "root": name or serving.base,
        "parent": serving.base if name else None,
        "max_model_len": serving.context,
    }
