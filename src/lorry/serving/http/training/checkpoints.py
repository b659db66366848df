"""Saved weights and training runs: listed, published, copied, deleted, downloaded."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse

from lorry.serving.http.training.bodies import Copy, Lifetime, OfPath
from lorry.serving.http.training.state import GUARDED, Owner, Taking
from lorry.serving.training.checkpoints import expiry
from lorry.serving.training.names import KINDS, Address
from lorry.serving.training.store import Model, Saved, Store

router = APIRouter(prefix="/api/v1", tags=["training"], dependencies=GUARDED)
#: Files behind links that are signed.
links = APIRouter(prefix="/api/v1", tags=["training"])
#: Seconds for which a link is good.
_LINKS = 3600
_RUN = "/training_runs/{run}/checkpoints"
_ONE = _RUN + "/{kind}/{name}"


@router.get("/training_runs")
def training_runs(desk: Taking, owner: Owner, limit: int = 20, offset: int = 0) -> dict[str, Any]:
    """List models, the newest first."""
    models = desk.store.models(owner.name)
    page = [_run(model, desk.base, desk.store) for model in models[max(0, offset) :][: max(0, limit)]]
    return {"training_runs": page, "cursor": {"offset": offset, "limit": limit, "total_count": len(models)}}


@router.get("/training_runs/{run}")
def training_run(run: str, desk: Taking, owner: Owner) -> dict[str, Any]:
    """Say what a model is, and what was saved of it."""
    return _run(desk.model(run, owner.name, gone=True), desk.base, desk.store)


@router.get(_RUN)
def run_checkpoints(run: str, desk: Taking, owner: Owner) -> dict[str, Any]:
    """List what was saved of a model, the newest first."""
    desk.checkpoints.sweep()
    desk.model(run, owner.name, gone=True)
    return {"checkpoints": [_checkpoint(saved) for saved in desk.store.checkpoints(model=run)]}


@router.get("/checkpoints")
def all_checkpoints(desk: Taking, owner: Owner, limit: int = 100, offset: int = 0) -> dict[str, Any]:
    """List all saved weights of a key, the newest first."""
    desk.checkpoints.sweep()
    found = desk.store.checkpoints(owner=owner.name)
    page = [_checkpoint(saved) for saved in found[max(0, offset) :][: max(0, limit)]]
    return {"checkpoints": page, "cursor": {"offset": offset, "limit": limit, "total_count": len(found)}}


@router.delete(_ONE, status_code=204)
def delete(run: str, kind: str, name: str, desk: Taking, owner: Owner) -> None:
    """Delete saved weights."""
    desk.checkpoints.delete(desk.checkpoints.own(Address.of(run, f"{kind}/{name}"), owner.name))


@router.post(_ONE + "/publish", status_code=204)
def publish(run: str, kind: str, name: str, desk: Taking, owner: Owner) -> None:
    """Let every key of this server load saved weights and sample from them."""
    saved = desk.checkpoints.own(Address.of(run, f"{kind}/{name}"), owner.name)
    desk.checkpoints.change(saved, public=True)


@router.delete(_ONE + "/publish", status_code=204)
def unpublish(run: str, kind: str, name: str, desk: Taking, owner: Owner) -> None:
    """Keep saved weights for their own key."""
    saved = desk.checkpoints.own(Address.of(run, f"{kind}/{name}"), owner.name)
    desk.checkpoints.change(saved, public=False)


@router.put(_ONE + "/ttl", status_code=204)
def lifetime(run: str, kind: str, name: str, body: Lifetime, desk: Taking, owner: Owner) -> None:
    """Say how long saved weights live from now on."""
    saved = desk.checkpoints.own(Address.of(run, f"{kind}/{name}"), owner.name)
    desk.checkpoints.change(saved, expires=expiry(body.ttl_seconds))


@router.get(_ONE + "/external_weights_urls")
def urls(run: str, kind: str, name: str, desk: Taking, owner: Owner, request: Request) -> dict[str, Any]:
    """Return links to the files of saved weights, good for an hour and without a key."""
    saved = desk.checkpoints.own(Address.of(run, f"{kind}/{name}"), owner.name)
    expires = int(time.time()) + _LINKS
    found = {}
    for file in desk.checkpoints.files(saved):
        link = request.url_for("fetch", run=run, kind=kind, name=name, file=file)
        signature = desk.checkpoints.signature(saved, file, expires)
        found[file] = str(link.include_query_params(expires=expires, signature=signature))
    return {"urls": found, "expires": _time(expires)}


@links.get("/files/{run}/{kind}/{name}/{file:path}")
def fetch(run: str, kind: str, name: str, file: str, desk: Taking, expires: int, signature: str) -> FileResponse:
    """Return a file of saved weights to whoever has a link to it."""
    address = Address.of(run, f"{kind}/{name}")
    return FileResponse(desk.checkpoints.fetched(address.path, file, expires, signature))


@router.post("/weights_info")
def weights_info(body: OfPath, desk: Taking, owner: Owner) -> dict[str, Any]:
    """Say what is needed to go on from saved weights."""
    config = desk.checkpoints.readable(body.tinker_path, owner.name).config
    layers = {"train_unembed": config["unembed"], "train_mlp": config["mlp"], "train_attn": config["attention"]}
    return {"base_model": desk.base, "is_lora": True, "lora_rank": config["rank"], **layers}


@router.post("/copy_weights")
def copy_weights(body: Copy, desk: Taking, owner: Owner) -> dict[str, Any]:
    """Copy saved weights into a run of one's own."""
    path = desk.copy(owner.name, body.source_path, body.session_id, body.model_seq_id, body.ttl_seconds)
    return {"tinker_path": path}


def _run(model: Model, base: str, store: Store) -> dict[str, Any]:
    saved = store.checkpoints(model=model.id)
    latest = {kind: next((each for each in saved if each.kind == kind), None) for kind in KINDS}
    return {
        "training_run_id": model.id,
        "base_model": base,
        "model_owner": model.owner or "anyone",
        "is_lora": True,
        "lora_rank": model.config["rank"],
        "last_request_time": _time(model.seen),
        "last_checkpoint": _checkpoint(latest["weights"]),
        "last_sampler_checkpoint": _checkpoint(latest["sampler_weights"]),
        "user_metadata": model.facts,
    }


def _checkpoint(saved: Saved | None) -> dict[str, Any] | None:
    if saved is None:
        return None
    address = Address.parse(saved.path)
    return {
        "checkpoint_id": address.checkpoint,
        "checkpoint_type": KINDS[address.kind],
        "time": _time(saved.created),
        "tinker_path": saved.path,
        "size_bytes": saved.size,
        "public": saved.public,
        "user_metadata": saved.facts,
        "expires_at": None if saved.expires is None else _time(saved.expires),
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
