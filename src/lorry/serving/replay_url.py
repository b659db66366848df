"""A workload replayed over HTTP, against any server of OpenAI's completions with token ids."""

from __future__ import annotations

import json
import time
from collections.abc import Coroutine, Sequence
from typing import Any

from lorry.core.errors import LorryError
from lorry.serving.replay import Replayed, Timing, drawn, when_due
from lorry.serving.scheduling.workload import Workload

#: Whose tokens the prompts are drawn from.
_TEXT = "The quick brown fox jumps over the lazy dog: 0123456789, reverse, star, swap > banana"
_PATIENCE = 600.0


class Unanswered(LorryError):
    """A server is not there, or refuses."""


class Remote:
    """A server that is asked over HTTP.

    Parameters
    ----------
    url
        Where it listens, with or without ``/v1``.
    key
        Sent as ``Authorization: Bearer KEY``.

    Attributes
    ----------
    base, adapters
        What it lists: the first model, and the others.
    context
        Tokens that prompt and answer may have together.

    Raises
    ------
    Unanswered
        It is not there, or does not take the key.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        import httpx

        self.url = url.rstrip("/").removesuffix("/v1")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            with httpx.Client(base_url=self.url, headers=self.headers, timeout=30) as client:
                models = _read(client.get("/v1/models"))["data"]
                self.base: str = models[0]["id"]
                self.adapters: list[str] = [each["id"] for each in models[1:]]
                found = _read(client.post("/tokenize", json={"model": self.base, "prompt": _TEXT}))
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError) as error:
            raise Unanswered(
                f"Cannot replay against {self.url}: {error}. Start a server with `lorry serve`."
            ) from error
        self.context = int(found["max_model_len"])
        self.tokens: list[int] = sorted(set(found["tokens"]))

    async def replay(self, workload: Workload, names: Sequence[str] = ()) -> Replayed:
        """Send a workload's requests when they are due and wait for the last answer; see `lorry.serving.replay`.

        Raises
        ------
        OptionError
            Names and the workload's number of adapters differ.
        """
        import httpx

        timings, prompts = drawn(workload, names, self.tokens)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(
            base_url=self.url, headers=self.headers, timeout=_PATIENCE, limits=limits
        ) as client:
            start = time.monotonic()

            def ask(place: int, timing: Timing) -> Coroutine[Any, Any, None]:
                name = names[timing.arrival.adapter] if names else self.base
                return self._ask(client, name, prompts[place], timing, start)

            await when_due(timings, start, ask)
        return Replayed(workload, timings, [], time.monotonic() - start)

    async def _ask(self, client: Any, model: str, prompt: list[int], timing: Timing, start: float) -> None:
        """Send one request and note when its answer comes."""
        import httpx

        body = {
            "model": model, "prompt": prompt, "max_tokens": timing.arrival.output, "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        try:
            async with client.stream("POST", "/v1/completions", json=body) as response:
                if response.is_error:
                    await response.aread()
                    timing.why = _message(response)
                    return
                async for line in response.aiter_lines():
                    data = line.removeprefix("data: ")
                    if data == line or data == "[DONE]":
                        continue
                    piece = json.loads(data)
                    now = time.monotonic() - start
                    if "error" in piece:
                        timing.why = str(piece["error"].get("message", "error"))
                        return
                    if piece.get("choices") and timing.first is None:
                        timing.first = now
                    if piece.get("usage"):
                        timing.tokens, timing.end = int(piece["usage"]["completion_tokens"]), now
        except (httpx.HTTPError, ValueError) as error:
            timing.why = str(error) or type(error).__name__


def _read(response: Any) -> Any:
    if response.is_error:
        raise ValueError(_message(response))
    return response.json()


def _message(response: Any) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"the status is {response.status_code}"
