"""Sessions, what the server can do, and the answers to requests."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from lorry.serving.http.errors import ApiError
from lorry.serving.http.training.bodies import NewSession, OfSession, Retrieve
from lorry.serving.http.training.state import GUARDED, Owner, Taking
from lorry.serving.training.errors import Missing
from lorry.serving.training.trainer import JSON

router = APIRouter(prefix="/api/v1", tags=["training"], dependencies=GUARDED)


@router.get("/healthz")
def healthz() -> dict[str, str]:
    """Say that the server is there."""
    return {"status": "ok"}


@router.get("/get_server_capabilities")
def capabilities(desk: Taking) -> dict[str, Any]:
    """Say which base can be trained and sampled from."""
    base = {"model_name": desk.base, "max_context_length": desk.trainer.positions}
    return {"supported_models": [{**base, "trainable": True, "sampleable": True}]}


@router.post("/client/config")
def config(request: Request) -> dict[str, Any]:
    """Tell a client how to speak with this server: keys as they are, and no more in a body than it takes."""
    most = getattr(request.app.state, "most_bytes", 4 << 20)
    return {
        "pjwt_auth_enabled": False,
        "custom_loss_server_side": False,
        "sample_use_retrieve_futures": False,
        "sample_join_sampling_session": True,
        "proto_compress_fwdbwd": False,
        "use_pyqwest_transport": False,
        "fwdbwd_max_chunk_bytes_count": int(most * 0.75),
    }


@router.post("/client/dynamic_config")
def dynamic_config() -> dict[str, Any]:
    """Tell a client what may change while it runs."""
    return {"refresh_interval_sec": 300, "sample_cancel_enabled": True}


@router.post("/telemetry")
def telemetry() -> dict[str, str]:
    """Take what a client tells of itself, and keep nothing of it."""
    return {"status": "accepted"}


@router.post("/create_session")
def create_session(body: NewSession, desk: Taking, owner: Owner) -> dict[str, Any]:
    """Open a session."""
    facts = {"tags": body.tags, "user_metadata": body.user_metadata, "display_name": body.display_name}
    return {"type": "create_session", "session_id": desk.open_session(owner.name, facts)}


@router.post("/session_heartbeat")
def heartbeat(body: OfSession, desk: Taking, owner: Owner) -> dict[str, str]:
    """Note that a client lives."""
    desk.session(body.session_id, owner.name)
    desk.store.see_session(body.session_id)
    return {"type": "session_heartbeat"}


@router.get("/sessions")
def sessions(desk: Taking, owner: Owner, limit: int = 20, offset: int = 0) -> dict[str, Any]:
    """List sessions, the newest first."""
    return {"sessions": desk.store.sessions(owner.name)[max(0, offset) :][: max(0, limit)]}


@router.get("/sessions/{session}")
def session(session: str, desk: Taking, owner: Owner) -> dict[str, Any]:
    """Say what a session has."""
    facts = desk.session(session, owner.name)
    models = [model.id for model in desk.store.models(owner.name) if model.session == session]
    told = {"user_metadata": facts.get("user_metadata"), "display_name": facts.get("display_name")}
    return {"training_run_ids": models[::-1], "sampler_ids": desk.store.samplers(session), **told}


@router.post("/retrieve_future")
async def retrieve_future(body: Retrieve, desk: Taking, owner: Owner) -> Response:
    """Return the answer to a request when it is there; after a while, ask the client to ask again."""
    try:
        found = await desk.answer(owner.name, body.request_id)
    except Missing as error:
        raise ApiError(410, str(error), code="gone") from error
    if found is None:
        waiting = {"type": "try_again", "request_id": body.request_id, "queue_state": "active"}
        return JSONResponse(waiting, 408)
    answer, media = found
    return Response(answer, media_type=media or JSON)


@router.post("/cancel_future")
async def cancel_future(body: Retrieve, desk: Taking, owner: Owner) -> dict[str, Any]:
    """Give up a request for samples."""
    desk.cancel(owner.name, body.request_id)
    return {}
