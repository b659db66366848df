"""A conversation with a server that speaks OpenAI's interface."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

from lorry.cli.sampling import Sampling, conversation
from lorry.cli.talk import Talk
from lorry.core.errors import CheckpointError, LorryError

#: Seconds to reach a server, and to wait for the next piece of an answer.
_CONNECT, _READ = 5.0, 120.0


class ServerTalk(Talk):
    """A conversation with a model of a server; to be used in a ``with`` statement.

    Parameters
    ----------
    address
        As ``http://127.0.0.1:8000``, with ``/v1`` or without.
    model
        What the server calls it; the first that it lists if not given.
    sampling, seed
        How tokens are chosen.
    longest
        Tokens of an answer, in the place of the sampling's; None for as many as there is room for.
    system
        What the system message says.
    key
        For the server.

    Raises
    ------
    LorryError
        The server is not there, or refuses.
    """

    def __init__(
        self,
        address: str,
        model: str | None,
        sampling: Sampling,
        longest: int | None = None,
        seed: int = 0,
        system: str | None = None,
        key: str | None = None,
    ) -> None:
        import httpx

        super().__init__(system)
        self.address = address.rstrip("/").removesuffix("/v1")
        self.sampling, self.longest, self.seed = sampling, longest, seed
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = httpx.Timeout(_READ, connect=_CONNECT)
        self._client = httpx.Client(base_url=f"{self.address}/v1/", headers=headers, timeout=timeout)
        try:
            listed = self._listed()
            self._base = listed[0]
            self.model = self._known(model) if model is not None else self._base
        except BaseException:
            self._client.close()
            raise

    def __enter__(self) -> ServerTalk:
        """Return the conversation."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connection."""
        self._client.close()

    def names(self) -> Iterable[str]:
        """Return what the server lists beside the base."""
        return self._listed()[1:]

    def switch(self, text: str) -> str:
        """Let another model of the server answer from now on."""
        self.model = self._base if text == "none" else self._known(text)
        return self.model

    def answer(self, text: str) -> str:
        """Write the answer to what the user says, as it comes."""
        said: list[str] = []
        try:
            for piece in self._pieces(text):
                said.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pass  # leaving the stream has told the server
        finally:
            print(flush=True)
        return "".join(said)

    def _pieces(self, text: str) -> Iterator[str]:
        drawn = self.sampling
        body: dict[str, Any] = {
            "model": self.model,
            "messages": conversation(text, self.system, self.messages),
            "stream": True,
            "temperature": drawn.temperature,
            "max_tokens": self.longest,
            "stop": list(drawn.stop) or None,
            "seed": self.seed,
        }
        # names beyond OpenAI's go only where they are wanted, so that any server can be talked to
        beyond = {"top_p": (drawn.top_p, 1.0), "top_k": (drawn.top_k, 0), "min_p": (drawn.min_p, 0.0)}
        beyond["repetition_penalty"] = (drawn.repetition_penalty, 1.0)
        body |= {name: value for name, (value, idle) in beyond.items() if value != idle}
        for line in self._lines(body):
            data = line.removeprefix("data:").strip()
            if not line.startswith("data:") or data == "[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise LorryError(_message(event, "The server failed while it answered."))
            for choice in event["choices"]:
                if piece := choice["delta"].get("content"):
                    yield piece

    def _lines(self, body: dict[str, Any]) -> Iterator[str]:
        import httpx

        try:
            with self._client.stream("POST", "chat/completions", json=body) as response:
                if response.is_error:
                    response.read()
                    raise self._refused(response)
                yield from response.iter_lines()
        except httpx.HTTPError as error:
            raise self._unreached(error) from error

    def _listed(self) -> list[str]:
        return [model["id"] for model in self._get("models")["data"]] or ["base"]

    def _known(self, model: str) -> str:
        self._get(f"models/{model}")
        return model

    def _get(self, path: str) -> Any:
        import httpx

        try:
            response = self._client.get(path)
            if response.is_error:
                raise self._refused(response)
            return response.json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            if isinstance(error, LorryError):
                raise
            raise self._unreached(error) from error

    def _refused(self, response: Any) -> LorryError:
        try:
            found = response.json()
        except ValueError:
            found = {}
        return CheckpointError(_message(found, f"{self.address} answered with the status {response.status_code}."))

    def _unreached(self, error: Exception) -> LorryError:
        return CheckpointError(f"Cannot talk with {self.address}: {error}. Start a server with `lorry serve BASE`.")


def _message(found: Any, otherwise: str) -> str:
    error = found.get("error") if isinstance(found, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return str(message) if message else otherwise
