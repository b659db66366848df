"""Saved weights: who may have them, where they lie, and when they go."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorry.serving.training.errors import Missing, Refused
from lorry.serving.training.names import Address
from lorry.serving.training.samplers import Samplers
from lorry.serving.training.store import Saved, Store

#: Seconds that a client may let a checkpoint live: an hour to ten years.
_LEAST, _MOST = 3600, 10 * 365 * 86400


class Checkpoints:
    """Saved weights by path.

    Parameters
    ----------
    store, root
        What is known of them, and the folder in which they lie.
    samplers
        Is told of weights that change or go.
    """

    def __init__(self, store: Store, root: Path, samplers: Samplers) -> None:
        self.store, self.root, self.samplers = store, root, samplers
        self._secret = secrets.token_bytes(32)

    def save(
        self,
        address: Address,
        owner: str,
        config: dict[str, Any],
        write: Callable[[Path], int],
        *,
        overwrite: bool = False,
        lifetime: int | None = None,
        facts: dict[str, str] | None = None,
        unnamed: bool = False,
    ) -> Saved:
        """Let `write` fill the folder of a path and return its size.

        Raises
        ------
        Refused
            Something lies there already, or the lifetime is out of bounds.
        CheckpointError
            The disk refuses.
        """
        expires = expiry(lifetime)
        self.sweep()
        if not overwrite and self.store.checkpoint(address.path) is not None:
            raise Refused(f"There is a checkpoint {address.path}. Give another name, or overwrite=True.")
        size = write(address.below(self.root))
        saved = Saved(
            address.path, address.model, owner, address.kind, time.time(), size, expires, False, unnamed, config, facts
        )
        self.store.add_checkpoint(saved)
        self.samplers.forget(address.path)
        return saved

    def readable(self, path: str, owner: str) -> Saved:
        """Return a checkpoint that an owner may load; raise `Missing` if there is none."""
        saved = self.store.checkpoint(Address.parse(path).path)
        if saved is None or not (saved.public or saved.owner == owner) or _over(saved):
            raise Missing(f"There is no checkpoint {path[:300]} that this key may use.")
        return saved

    def own(self, address: Address, owner: str) -> Saved:
        """Return a checkpoint of an owner; raise `Missing` if it is none."""
        saved = self.readable(address.path, owner)
        if saved.owner != owner:
            raise Missing(f"There is no checkpoint {address.path} of this key.")
        return saved

    def folder(self, saved: Saved) -> Path:
        """Return where a checkpoint lies."""
        return Address.parse(saved.path).below(self.root)

    def files(self, saved: Saved) -> dict[str, Path]:
        """Return the files of a checkpoint by their name within it."""
        folder = self.folder(saved)
        return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}

    def signature(self, saved: Saved, file: str, expires: int) -> str:
        """Return what lets its holder fetch a file until a time; it is of no use after this server's end."""
        text = json.dumps([saved.path, saved.created, file, expires])
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()

    def fetched(self, path: str, file: str, expires: int, signature: str) -> Path:
        """Return the file that a signature is for; raise `Missing` if it is for none, or no longer."""
        saved = self.store.checkpoint(Address.parse(path).path)
        if saved is not None and expires > time.time():
            found = self.files(saved).get(file)
            if found is not None and hmac.compare_digest(self.signature(saved, file, expires), signature):
                return found
        raise Missing("There is no such file, or the link to it is over. Ask for a new one.")

    def delete(self, saved: Saved) -> None:
        """Remove a checkpoint."""
        self.store.drop_checkpoint(saved.path)
        self.samplers.forget(saved.path)
        shutil.rmtree(self.folder(saved), ignore_errors=True)

    def change(self, saved: Saved, **fields: Any) -> None:
        """Note other facts of a checkpoint."""
        self.store.add_checkpoint(replace(saved, **fields))

    def keep_unnamed(self, model: str, most: int) -> None:
        """Remove the oldest of a model's weights that were saved for sampling without a name."""
        unnamed = [saved for saved in self.store.checkpoints(model=model) if saved.unnamed]
        for saved in unnamed[most:]:
            self.delete(saved)

    def sweep(self) -> None:
        """Remove what is over."""
        for saved in self.store.expired():
            self.delete(saved)


def _over(saved: Saved) -> bool:
    return saved.expires is not None and saved.expires < time.time()


def expiry(lifetime: int | None) -> float | None:
    """Return when something ends that lives so many seconds; raise `Refused` for less than an hour or ten years."""
    if lifetime is None:
        return None
    if not _LEAST <= lifetime <= _MOST:
        raise Refused(f"ttl_seconds must be between {_LEAST} and {_MOST}, found {lifetime}; leave it out for no end.")
    return time.time() + lifetime
