"""Errors as OpenAI's clients expect them: ``{"error": {"message", "type", "param", "code"}}`` and a status."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from lorry.core.errors import LorryError, near_misses
from lorry.serving.agents.sessions import SessionBusy, SessionGone
from lorry.serving.http.bodies import Body
from lorry.serving.service import Draining, Overloaded

#: What OpenAI calls the errors of a status.
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    501: "not_implemented_error",
    503: "service_unavailable_error",
}
#: Seconds after which it is worth trying again when the server is full or going down.
RETRY_AFTER = 1
_LONGEST_MESSAGE = 2000


class ApiError(Exception):
    """An answer that is an error.

    Parameters
    ----------
    status
        Of HTTP.
    message
        What was expected, what was found, what to do next.
    code
        A word that programs can tell errors apart by.
    param
        The field of the request that is concerned.
    retry_after
        Seconds after which the same request may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """Return what is sent."""
        return error_body(self.status, self.message, self.code, self.param)

    def response(self) -> JSONResponse:
        """Return the answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, round(self.retry_after + 0.5)))}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """Return an error in OpenAI's shape; what no JSON text can hold is written otherwise."""
    text = message.encode("utf-8", "backslashreplace").decode()
    if len(text) > _LONGEST_MESSAGE:
        text = text[:_LONGEST_MESSAGE] + " ..."
    return {"error": {"message": text, "type": TYPES.get(status, "server_error"), "param": param, "code": code}}


def of_lorry(error: LorryError) -> ApiError:
    """Return the answer to an error that Lorry raised on purpose: the request's fault, but for a full server."""
    if isinstance(error, Draining):
        return ApiError(503, str(error), code="draining", retry_after=RETRY_AFTER)
    if isinstance(error, Overloaded):
        return ApiError(503, str(error), code="overloaded", retry_after=RETRY_AFTER)
    if isinstance(error, SessionGone):
        return ApiError(404, str(error), code="session_not_found")
    if isinstance(error, SessionBusy):
        return ApiError(409, str(error), code="session_busy", retry_after=RETRY_AFTER)
    return ApiError(400, str(error))


def of_validation(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """Return the answer to a body that is not what an endpoint takes; what the client sent is not repeated."""
    first = problems[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    param = ".".join(where)[:200] or None
    kind = str(first["type"])
    if kind == "json_invalid":
        return ApiError(400, "The body is not valid JSON.", code="invalid_json")
    if not where and kind in ("missing", "model_attributes_type", "dict_type", "model_type"):
        message = "The body must be a JSON object, sent with the header Content-Type: application/json."
        return ApiError(400, message, code="invalid_json")
    if kind == "extra_forbidden":
        name = where[-1][:100]
        hint = near_misses(name, Body.fields_by_name()) if len(where) == 1 else ""
        return ApiError(400, f"Unrecognized request argument: {name}.{hint}", code="unknown_parameter", param=param)
    if len(problems) > 1 and where:  # a field that may be one of several things is wrong for each in another way
        param = where[0]
        problems = [each for each in problems if [str(part) for part in each["loc"][1:2]] == where[:1]]
    said = " Or: ".join(dict.fromkeys(_sentence(str(each["msg"])) for each in problems))
    return ApiError(400, f"{param or 'The body'}: {said}", param=param)


def _sentence(text: str) -> str:
    text = text.removeprefix("Value error, ").rstrip(".")
    return f"{text[:1].upper()}{text[1:]}."


def install(app: FastAPI) -> None:
    """Let every error of an app have this shape."""

    @app.exception_handler(ApiError)
    async def api(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(LorryError)
    async def lorry(_: Request, error: LorryError) -> JSONResponse:
        return of_lorry(error).response()

    @app.exception_handler(RequestValidationError)
    async def validation(_: Request, error: RequestValidationError) -> JSONResponse:
        return of_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 404:
            return ApiError(404, f"There is no endpoint {request.url.path}; GET /docs lists them.").response()
        if error.status_code == 405:
            return ApiError(405, f"{request.url.path} does not take {request.method}; GET /docs lists what it takes."
                            ).response()  # fmt: skip
        return ApiError(error.status_code, f"{error.detail}.").response()

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, error: Exception) -> JSONResponse:
        # the server above writes the traceback to its log
        message = f"The server failed at this request ({type(error).__name__}); its log says more."
        return ApiError(500, message).response()
