"""What a server knows beyond its own life: sessions, models, requests with their answers, checkpoints; in SQLite."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorry.core.errors import CheckpointError

_VERSION = 1
_SCHEMA = """
CREATE TABLE sessions (id TEXT PRIMARY KEY, owner TEXT, created REAL, seen REAL, facts TEXT);
CREATE TABLE models (id TEXT PRIMARY KEY, session TEXT, owner TEXT, created REAL, seen REAL, config TEXT, facts TEXT,
    durable INTEGER DEFAULT -1, state TEXT, gone INTEGER DEFAULT 0);
CREATE TABLE requests (model TEXT, seq INTEGER, kind TEXT, payload BLOB, answer BLOB, media TEXT, finished REAL,
    PRIMARY KEY (model, seq)) WITHOUT ROWID;
CREATE TABLE samplers (id TEXT PRIMARY KEY, session TEXT, owner TEXT, path TEXT, joined INTEGER DEFAULT 0);
CREATE TABLE checkpoints (path TEXT PRIMARY KEY, model TEXT, owner TEXT, kind TEXT, created REAL, size INTEGER,
    expires REAL, public INTEGER DEFAULT 0, unnamed INTEGER DEFAULT 0, config TEXT, facts TEXT);
CREATE INDEX checkpoints_of ON checkpoints (model);
"""
#: Seconds for which an answer is kept after it was found.
KEPT_ANSWERS = 3600.0
#: Seconds between two looks for answers that are not kept any longer.
_SWEEP = 60.0


@dataclass(frozen=True)
class Model:
    """A model as it is stored.

    Attributes
    ----------
    config
        What is trained, as plain data.
    facts
        What the client said about it, or None.
    durable
        The last request whose effect is in `state`; -1 for none.
    state
        The folder of weights and optimizer below that of the models; None before the first.
    gone
        Whether it was unloaded.
    """

    id: str
    session: str
    owner: str
    created: float
    seen: float
    config: dict[str, Any]
    facts: dict[str, str] | None
    durable: int
    state: str | None
    gone: bool


@dataclass(frozen=True)
class Entry:
    """A request of a model: what was asked, and what was answered once it was found."""

    model: str
    seq: int
    kind: str
    payload: bytes
    answer: bytes | None = None
    media: str = ""


@dataclass(frozen=True)
class Saved:
    """A checkpoint as it is stored; times are seconds since 1970."""

    path: str
    model: str
    owner: str
    kind: str
    created: float
    size: int
    expires: float | None
    public: bool
    unnamed: bool
    config: dict[str, Any]
    facts: dict[str, str] | None


class Store:
    """The database of a server; methods may be called from any thread.

    Parameters
    ----------
    path
        Its file; made if it is not there.

    Raises
    ------
    CheckpointError
        The file is none of this version's, or another server has it.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()
        self._swept = 0.0
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=1)
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            with self.change():
                if version == 0:
                    for statement in _SCHEMA.split(";"):
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA user_version={_VERSION}")
        except sqlite3.Error as error:
            raise CheckpointError(
                f"Cannot use {path}: {error}. Is another server running on the folder? Stop it, or give another folder."
            ) from error
        if version not in (0, _VERSION):
            raise CheckpointError(f"{path} has version {version}, this one reads {_VERSION}. Give another folder.")

    @contextmanager
    def change(self) -> Iterator[None]:
        """All that is written within happens, or nothing of it."""
        with self._lock:
            if self._db.in_transaction:  # part of a larger change
                yield
                return
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def _all(self, sql: str, *values: Any) -> list[Any]:
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    def _one(self, sql: str, *values: Any) -> Any:
        return next(iter(self._all(sql, *values)), None)

    # -- sessions

    def add_session(self, id: str, owner: str, facts: dict[str, Any]) -> None:
        """Note a session."""
        now = time.time()
        self._all("INSERT INTO sessions VALUES (?, ?, ?, ?, ?)", id, owner, now, now, json.dumps(facts))

    def session(self, id: str, owner: str) -> dict[str, Any] | None:
        """Return what is known of an owner's session, None if there is none."""
        row = self._one("SELECT facts FROM sessions WHERE id = ? AND owner = ?", id, owner)
        return None if row is None else json.loads(row[0])

    def see_session(self, id: str) -> None:
        """Note that a session's client lives."""
        self._all("UPDATE sessions SET seen = ? WHERE id = ?", time.time(), id)

    def sessions(self, owner: str) -> list[str]:
        """Return an owner's sessions, the newest first."""
        return [row[0] for row in self._all("SELECT id FROM sessions WHERE owner = ? ORDER BY created DESC", owner)]

    # -- models

    def add_model(self, id: str, session: str, owner: str, config: dict[str, Any], facts: Any) -> None:
        """Note a model; one that is known already stays as it is."""
        now = time.time()
        self._all(
            "INSERT OR IGNORE INTO models (id, session, owner, created, seen, config, facts) VALUES (?,?,?,?,?,?,?)",
            id, session, owner, now, now, json.dumps(config), json.dumps(facts),
        )  # fmt: skip

    def model(self, id: str) -> Model | None:
        """Return a model, None if there is none."""
        row = self._one("SELECT * FROM models WHERE id = ?", id)
        return None if row is None else _model(row)

    def models(self, owner: str | None = None) -> list[Model]:
        """Return an owner's models, or all of them, the newest first."""
        rows = self._all("SELECT * FROM models WHERE owner = ? OR ? IS NULL ORDER BY created DESC", owner, owner)
        return [_model(row) for row in rows]

    def settle(self, id: str, seq: int, state: str | None = None) -> None:
        """Note that a model's requests up to `seq` need not be done again; what they asked is forgotten.

        `state` is the folder with their effect, None if there was none beyond that of the requests before.
        """
        now = time.time()
        with self.change():
            # the rows since the last time alone, however many the model has
            sql = "UPDATE requests SET payload = x'' WHERE model = ? AND seq <= ? AND payload != x'' AND seq > "
            self._all(f"{sql} (SELECT durable FROM models WHERE id = ?)", id, seq, id)
            self._all("UPDATE models SET durable = ?, state = coalesce(?, state) WHERE id = ?", seq, state, id)
            if self._swept < now - _SWEEP:
                sql = "DELETE FROM requests WHERE finished < ? AND seq < (SELECT durable FROM models WHERE id = model)"
                self._all(sql, now - KEPT_ANSWERS)
                self._swept = now

    def drop_model(self, id: str) -> None:
        """Note that a model was unloaded."""
        self._all("UPDATE models SET gone = 1 WHERE id = ?", id)

    # -- requests

    def add_request(self, entry: Entry) -> bool:
        """Note a request; returns whether it is new."""
        with self.change():
            self._all("UPDATE models SET seen = ? WHERE id = ?", time.time(), entry.model)
            known = self._one("SELECT 1 FROM requests WHERE model = ? AND seq = ?", entry.model, entry.seq)
            if known is None:
                sql = "INSERT INTO requests (model, seq, kind, payload, media) VALUES (?, ?, ?, ?, '')"
                self._all(sql, entry.model, entry.seq, entry.kind, entry.payload)
            return known is None

    def answer(self, model: str, seq: int, answer: bytes, media: str) -> None:
        """Note what a request came to; what was answered before stays."""
        sql = "UPDATE requests SET answer = ?, media = ?, finished = ? WHERE model = ? AND seq = ? AND answer IS NULL"
        self._all(sql, answer, media, time.time(), model, seq)

    def request(self, model: str, seq: int) -> Entry | None:
        """Return a request, None if there is none or its answer is no longer kept."""
        sql = "SELECT model, seq, kind, payload, answer, media FROM requests WHERE model = ? AND seq = ?"
        row = self._one(sql, model, seq)
        return None if row is None else Entry(*row)

    def open_requests(self, model: str, after: int) -> list[Entry]:
        """Return a model's requests after `after`, in their order, answered or not."""
        sql = "SELECT model, seq, kind, payload, answer, media FROM requests WHERE model = ? AND seq > ? ORDER BY seq"
        return [Entry(*row) for row in self._all(sql, model, after)]

    # -- sampling sessions

    def add_sampler(self, id: str, session: str, owner: str, path: str | None) -> None:
        """Note a sampling session; one that is known already stays as it is."""
        sql = "INSERT OR IGNORE INTO samplers (id, session, owner, path) VALUES (?, ?, ?, ?)"
        self._all(sql, id, session, owner, path)

    def sampler(self, id: str, owner: str) -> tuple[str | None] | None:
        """Return the path of an owner's sampling session in a tuple, None if there is no such session."""
        row = self._one("SELECT path FROM samplers WHERE id = ? AND owner = ?", id, owner)
        return None if row is None else (row[0],)

    def join_sampler(self, id: str) -> int:
        """Return a number that no other client of a sampling session has."""
        with self.change():
            self._all("UPDATE samplers SET joined = joined + 1 WHERE id = ?", id)
            return int(self._one("SELECT joined FROM samplers WHERE id = ?", id)[0])

    def samplers(self, session: str) -> list[str]:
        """Return the sampling sessions of a session."""
        return [row[0] for row in self._all("SELECT id FROM samplers WHERE session = ? ORDER BY id", session)]

    # -- checkpoints

    def add_checkpoint(self, saved: Saved) -> None:
        """Note a checkpoint, in the place of one of its path."""
        config, facts = json.dumps(saved.config), json.dumps(saved.facts)
        values = (saved.path, saved.model, saved.owner, saved.kind, saved.created, saved.size, saved.expires)
        marks: Sequence[Any] = (saved.public, saved.unnamed, config, facts)
        self._all("INSERT OR REPLACE INTO checkpoints VALUES (?,?,?,?,?,?,?,?,?,?,?)", *values, *marks)

    def checkpoint(self, path: str) -> Saved | None:
        """Return a checkpoint, None if there is none."""
        row = self._one("SELECT * FROM checkpoints WHERE path = ?", path)
        return None if row is None else _saved(row)

    def checkpoints(self, *, model: str | None = None, owner: str | None = None) -> list[Saved]:
        """Return the checkpoints of a model or of an owner, the newest first."""
        sql = "SELECT * FROM checkpoints WHERE (model = ? OR ? IS NULL) AND (owner = ? OR ? IS NULL) ORDER BY created"
        return [_saved(row) for row in self._all(sql, model, model, owner, owner)][::-1]

    def expired(self) -> list[Saved]:
        """Return the checkpoints whose time is over."""
        return [_saved(row) for row in self._all("SELECT * FROM checkpoints WHERE expires < ?", time.time())]

    def drop_checkpoint(self, path: str) -> None:
        """Forget a checkpoint."""
        self._all("DELETE FROM checkpoints WHERE path = ?", path)


def _model(row: Sequence[Any]) -> Model:
    id, session, owner, created, seen, config, facts, durable, state, gone = row
    return Model(id, session, owner, created, seen, json.loads(config), json.loads(facts), durable, state, bool(gone))


def _saved(row: Sequence[Any]) -> Saved:
    path, model, owner, kind, created, size, expires, public, unnamed, config, facts = row
    read: dict[str, Any] = json.loads(config)
    marks = bool(public), bool(unnamed)
    return Saved(path, model, owner, kind, created, size, expires, *marks, read, json.loads(facts))
