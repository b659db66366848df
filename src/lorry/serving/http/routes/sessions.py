"""``/v1/sessions``: roles with adapters of their own that write one text in turns and share its cache."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from lorry.core.errors import AdapterError, OptionError
from lorry.serving.agents.sessions import Session, SessionTurn
from lorry.serving.http.bodies import AppendBody, SessionBody, TurnBody
from lorry.serving.http.errors import ApiError
from lorry.serving.http.events import streamed
from lorry.serving.http.generation import check_output, unless_gone
from lorry.serving.http.keys import Holder
from lorry.serving.http.routes.embeddings import checked
from lorry.serving.http.state import GUARDED, WORKING, Caller, Serving, Shared
from lorry.serving.http.wishes import grammar_of, length_of, sampling_of
from lorry.serving.request import Output

router = APIRouter(tags=["sessions"])
#: Tokens of a turn where the client says nothing.
DEFAULT_TOKENS = 16


@router.post("/v1/sessions", dependencies=WORKING)
async def opened(body: SessionBody, serving: Shared, caller: Caller) -> dict[str, Any]:
    """Begin a text that roles write in turns."""
    roles = {role: _adapter(serving, caller, name) for role, name in body.roles.items()}
    try:
        session = await serving.service.call(lambda: serving.sessions.open(roles, body.policy, caller.name))
    except AdapterError as error:
        served = serving.names()
        absent = next((name for name in roles.values() if name is not None and name not in served), None)
        if absent is None:
            raise
        raise serving.unknown(absent, caller) from error
    return _shown(session)


@router.get("/v1/sessions", dependencies=GUARDED)
async def listed(serving: Shared, caller: Caller) -> dict[str, Any]:
    """List the sessions of the key."""
    found = await serving.service.call(lambda: serving.sessions.of(caller.name))
    return {"object": "list", "data": [_shown(session) for session in found]}


@router.get("/v1/sessions/{id}", dependencies=GUARDED)
async def shown(id: str, serving: Shared, caller: Caller) -> dict[str, Any]:
    """Describe a session, with its tokens and their text."""
    session = await _found(serving, caller, id)
    tokens = list(session.trajectory.tokens)
    return {**_shown(session), "token_ids": tokens, "text": serving.prompts.decode(tokens)}


@router.post("/v1/sessions/{id}/append", dependencies=WORKING)
async def appended(id: str, body: AppendBody, serving: Shared, caller: Caller) -> dict[str, Any]:
    """Add what a user or a tool says; a text becomes tokens here, once and for all."""
    session = await _found(serving, caller, id)
    given, encode = body.input, serving.prompts.encode
    tokens = await asyncio.to_thread(encode, given, body.add_special_tokens) if isinstance(given, str) else tuple(given)
    checked(serving, [tokens], "An input")
    serving.sessions.append(session, tokens)
    return {**_shown(session), "token_ids": list(tokens)}


@router.post("/v1/sessions/{id}/turn", dependencies=WORKING)
async def turn(id: str, body: TurnBody, serving: Shared, caller: Caller, request: Request) -> Response:
    """Let a role go on with the text."""
    session = await _found(serving, caller, id)
    made = _Turn(serving, caller, session, body)
    if body.stream:
        return await streamed(made.pieces())
    return JSONResponse(await unless_gone(request, made.whole()))


@router.delete("/v1/sessions/{id}", dependencies=GUARDED)
async def closed(id: str, serving: Shared, caller: Caller) -> dict[str, Any]:
    """Forget a session."""
    session = await _found(serving, caller, id)
    await serving.service.call(lambda: serving.sessions.close(session))
    return {"id": id, "object": "session", "deleted": True}


class _Turn:
    """A role's turn as an answer."""

    def __init__(self, serving: Serving, caller: Holder, session: Session, body: TurnBody) -> None:
        self.serving, self.caller, self.session, self.body = serving, caller, session, body
        if (body.n or 1) > 1 or body.prompt_logprobs is not None:
            raise OptionError("A turn is one answer to one text: leave out n and prompt_logprobs.")
        for name in {session.roles[body.role]} if body.role in session.roles else ():
            caller.check_model([] if name is None else [name])
        length = length_of(body, len(session.trajectory.tokens), serving.context, caller, DEFAULT_TOKENS)
        grammar = grammar_of(body)
        self.sampling = sampling_of(
            body, max_tokens=max(1, length), logprobs=None, prompt_logprobs=None, grammar=grammar
        )

    async def outputs(self) -> AsyncGenerator[tuple[SessionTurn, Output], None]:
        """Yield what each token adds; tokens that were added stay when the client goes away."""
        serving, session = self.serving, self.session
        await asyncio.to_thread(serving.sessions.check, self.sampling)
        begun = serving.sessions.begin(session, self.body.role, self.sampling)
        grant = None
        watch, count = serving.metrics.watch(), 0
        try:
            grant = self.caller.take(1, begun.read + self.sampling.max_tokens)
            while True:
                output = await serving.service.call(begun.step)
                count += len(output.tokens)
                grant.used = begun.read + count
                watch.saw(output)
                check_output(output)
                yield begun, output
                if output.finish is not None:
                    return
        finally:
            if grant is not None:
                grant.end()
            serving.sessions.end(session)

    async def whole(self) -> dict[str, Any]:
        """Return the turn in one piece."""
        found = {"text": "", "token_ids": []}
        async with aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                found = {**piece, "text": found["text"] + piece["text"],
                         "token_ids": found["token_ids"] + piece["token_ids"]}  # fmt: skip
        return found

    async def pieces(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the turn as it comes; the last piece has the usage."""
        async with aclosing(self.outputs()) as outputs:
            async for begun, output in outputs:
                usage = {"usage": _used(begun, output)} if output.finish is not None else {}
                yield {**self._piece(begun, output), "text": output.text, "token_ids": list(output.tokens), **usage}

    def _piece(self, begun: SessionTurn, output: Output) -> dict[str, Any]:
        return {
            "id": self.session.id,
            "object": "session.turn",
            "role": begun.role,
            "finish_reason": output.finish,
            "stop_reason": output.stop,
        }


def _used(begun: SessionTurn, output: Output) -> dict[str, Any]:
    prompt, completion = output.usage.prompt, output.usage.completion
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": prompt - begun.read},
    }


async def _found(serving: Serving, caller: Holder, id: str) -> Session:
    return await serving.service.call(lambda: serving.sessions.find(id, caller.name))


def _adapter(serving: Serving, caller: Holder, model: str | None) -> str | None:
    """Return the one adapter that a role's model names; None for the base."""
    found = serving.generating(model, caller)
    if len(found) > 1 or any(weight != 1 for weight in found.values()):
        message = f"A role has one adapter, or the base; '{model}' is a composition."
        raise ApiError(400, message, param="roles")
    return next(iter(found), None)


def _shown(session: Session) -> dict[str, Any]:
    trajectory = session.trajectory
    return {
        "id": session.id,
        "object": "session",
        "roles": dict(session.roles),
        "policy": trajectory.policy.name,
        "tokens": len(trajectory.tokens),
        "cache": {"numbers": trajectory.numbers, "bytes": session.bytes},
        "forwarded": dict(trajectory.counts.forwarded),
        "busy": session.busy,
    }
