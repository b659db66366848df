"""Messages from a file, a folder or a webhook, each answered once, also after a crash at any moment.

What has come in is on disk before it is acknowledged, and what was done is on disk before the next message is looked
at: a journal with a line for each answered message. After a restart messages in the journal are skipped. A line that a
crash cut off is removed, and its message is answered again, so nothing is lost and nothing stands there twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from lorry.core.errors import CheckpointError, OptionError

#: Longest message that the webhook takes, in bytes.
LONGEST = 64 * 1024


@dataclass(frozen=True)
class Message:
    """A message.

    Attributes
    ----------
    id
        The same after a restart, and no other message's.
    text
        What it says.
    """

    id: str
    text: str


class Journal:
    """Lines of JSON that are on disk when `add` returns.

    Parameters
    ----------
    path
        The file; it is made. A last line without its end is removed.

    Raises
    ------
    CheckpointError
        A whole line is no JSON object with an ``id``.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.read_bytes() if path.exists() else b""
        whole = written.rfind(b"\n") + 1
        if whole < len(written):
            os.truncate(path, whole)
        self.entries: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(written[:whole].splitlines(), 1):
            try:
                entry = json.loads(line)
                self.entries[entry["id"]] = entry
            except (ValueError, TypeError, KeyError):
                raise CheckpointError(
                    f"{path}, line {number} is no JSON object with an id: {line[:80]!r}. Mend or remove the line."
                ) from None
        self._file = path.open("ab")

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def add(self, entry: dict[str, Any]) -> bool:
        """Append an entry, unless there is one with its ``id``; return whether it was appended."""
        with self._lock:
            if entry["id"] in self.entries:
                return False
            self._file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            self.entries[entry["id"]] = entry
            return True

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def of_file(path: Path) -> Iterator[Message]:
    """Yield the messages of a file: lines of text, or of JSON with ``text`` and perhaps ``id``.

    A message without an id has the place of its first byte for one, so that lines may be appended, not inserted. A last
    line without its end is still being written, and left for the next time.

    Raises
    ------
    OptionError
        There is no such file.
    """
    if not path.is_file():
        raise OptionError(f"There is no file {path} to read messages from.")
    place = 0
    for line in path.read_bytes().split(b"\n")[:-1]:
        text, name = line.decode("utf-8", "replace").strip(), f"{path.name}:{place}"
        place += len(line) + 1
        if text.startswith("{"):
            try:
                value = json.loads(text)
                text, name = str(value["text"]), str(value.get("id", name))
            except (ValueError, KeyError):
                pass  # text that begins with a brace
        if text:
            yield Message(name, text)


def of_folder(folder: Path) -> Iterator[Message]:
    """Yield a message for each ``.txt`` file, by name; whoever adds files renames them into the folder when whole.

    Raises
    ------
    OptionError
        There is no such folder.
    """
    if not folder.is_dir():
        raise OptionError(f"There is no folder {folder} to read messages from.")
    for file in sorted(folder.glob("*.txt")):
        yield Message(file.name, file.read_text(encoding="utf-8", errors="replace").strip())


def answer_all(messages: Iterable[Message], answer: Callable[[str], dict[str, Any]], journal: Journal) -> int:
    """Answer what the journal does not hold yet, and return how many messages that were.

    Parameters
    ----------
    messages
        Old and new ones.
    answer
        From a message's text to what is noted beside its id.
    journal
        What was done.
    """
    done = 0
    for message in messages:
        if message.id in journal:
            continue
        done += journal.add({"id": message.id, **answer(message.text)})
    return done


def webhook(inbox: Journal) -> Any:
    """Return an ASGI application whose ``POST /messages`` takes ``{"id": ..., "text": ...}`` into an inbox.

    It answers 202 when the message is on disk, 200 if it was there before, 400 for what is no message and 413 for one
    that is too long. `of_file` reads the inbox.
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def take(request: Request) -> JSONResponse:
        body = await request.body()
        if len(body) > LONGEST:
            return JSONResponse({"error": f"A message has at most {LONGEST} bytes."}, 413)
        try:
            value = json.loads(body)
            entry = {"id": value["id"], "text": value["text"]}
        except (ValueError, KeyError, TypeError):
            entry = {}
        if not all(isinstance(entry.get(key), str) and entry[key] for key in ("id", "text")):
            return JSONResponse({"error": "Expected JSON with an id and a text, both strings and not empty."}, 400)
        new = await run_in_threadpool(inbox.add, entry)
        return JSONResponse({"id": entry["id"]}, 202 if new else 200)

    return Starlette(routes=[Route("/messages", take, methods=["POST"])])
