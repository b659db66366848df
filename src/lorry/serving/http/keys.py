"""Who may ask for what, and how much of it: keys with their adapters, limits and rates."""

from __future__ import annotations

import hashlib
import hmac
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lorry.core.errors import OptionError
from lorry.serving.http.errors import ApiError

Count = Annotated[int, Field(ge=1)]


class KeyRule(BaseModel):
    """A key, and what its holder may do; what is not given is not limited.

    Attributes
    ----------
    name
        Of the holder: requests of one name share a turn in fair queues. It may appear in logs, the key never does.
    key, key_sha256
        The secret, or its SHA-256 as hexadecimal digits.
    adapters
        Names and patterns with ``*``; all if not given.
    base
        Whether the bare base may be used.
    manage
        Whether adapters may be loaded and unloaded.
    max_tokens
        Of one answer, at most.
    concurrent
        Sequences under way at once, at most; a request with ``n: 4`` counts four.
    requests_per_minute, tokens_per_minute
        Rates, each with as much in reserve as one minute brings. Tokens are those of prompts and answers.
    """

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    name: Annotated[str, Field(min_length=1, max_length=100)]
    key: Annotated[str, Field(min_length=8)] | None = Field(None, repr=False)
    key_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = Field(None, repr=False)
    adapters: list[str] | None = None
    base: bool = True
    manage: bool = False
    max_tokens: Count | None = None
    concurrent: Count | None = None
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None

    @model_validator(mode="after")
    def _one_secret(self) -> KeyRule:
        if (self.key is None) == (self.key_sha256 is None):
            raise ValueError("give either key or key_sha256")
        return self

    def digest(self) -> bytes:
        """Return what a key is compared with."""
        return bytes.fromhex(self.key_sha256) if self.key_sha256 is not None else _digest(self.key or "")


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    keys: Annotated[list[KeyRule], Field(min_length=1)]


class Bucket:
    """A rate for each minute, with a minute's worth in reserve.

    Parameters
    ----------
    per_minute
        What flows in, and how much there is room for.
    clock
        Seconds that only grow.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self.room, self._clock = float(per_minute), clock
        self._level, self._at = self.room, clock()

    def level(self) -> float:
        """Return how much there is now."""
        now = self._clock()
        self._level = min(self.room, self._level + (now - self._at) * self.room / 60)
        self._at = now
        return self._level

    def wait(self, amount: float) -> float:
        """Return the seconds until there will be so much; 0 if there is."""
        return max(0.0, (amount - self.level()) * 60 / self.room)

    def take(self, amount: float) -> None:
        """Take out, or put back what is negative."""
        self._level = min(self.room, self.level() - amount)


class Holder:
    """A key's holder at this server: what the rule allows, and what of it is used up.

    Parameters
    ----------
    rule
        None for a server without keys: everything is allowed.
    clock
        Seconds that only grow.
    """

    def __init__(self, rule: KeyRule | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.rule, self.name = rule, "" if rule is None else rule.name
        self._lock = threading.Lock()
        self._running = 0
        self._requests = _bucket(rule.requests_per_minute if rule else None, clock)
        self._tokens = _bucket(rule.tokens_per_minute if rule else None, clock)

    @property
    def max_tokens(self) -> int | None:
        """Of one answer, at most."""
        return None if self.rule is None else self.rule.max_tokens

    @property
    def tokens_per_minute(self) -> int | None:
        """Of prompts and answers, at most."""
        return None if self.rule is None else self.rule.tokens_per_minute

    def may_use(self, adapter: str) -> bool:
        """Whether an adapter, be it there or not, is among those of the key."""
        if self.rule is None or self.rule.adapters is None:
            return True
        return any(fnmatchcase(adapter, pattern) for pattern in self.rule.adapters)

    def check_model(self, adapters: Iterable[str]) -> None:
        """Raise 403 unless the key may use these adapters, or the bare base if there are none."""
        names = list(adapters)
        for name in names:
            if not self.may_use(name):
                raise ApiError(403, f"This key may not use the adapter '{name}'.", code="adapter_not_allowed")
        if not names and self.rule is not None and not self.rule.base:
            raise ApiError(403, "This key may not use the base without an adapter.", code="base_not_allowed")

    def check_manage(self, *names: str) -> None:
        """Raise 403 unless the key may load and unload adapters, of these names in particular."""
        if names:
            self.check_model(names)
        if self.rule is not None and not self.rule.manage:
            raise ApiError(403, "This key may not load or unload adapters.", code="manage_not_allowed")

    def take(self, sequences: int, tokens: int) -> Grant:
        """Return leave for a request, which must be given back; raise 429 if it would be too much.

        Parameters
        ----------
        sequences
            That are generated at once.
        tokens
            Of prompts and answers, at most.
        """
        with self._lock:
            most = self.rule.concurrent if self.rule is not None else None
            if most is not None and sequences > most:
                raise ApiError(
                    400, f"The request has {sequences} sequences; this key may have {most} under way. Ask for fewer."
                )
            if most is not None and self._running + sequences > most:
                message = f"This key has {self._running} sequences under way, of {most}; wait until some have ended."
                raise ApiError(429, message, code="concurrency_limit", retry_after=1)
            self._check_rate(self._requests, 1, "requests")
            self._check_rate(self._tokens, tokens, "tokens")
            if self._requests is not None:
                self._requests.take(1)
            if self._tokens is not None:
                self._tokens.take(tokens)
            self._running += sequences
        return Grant(self, sequences, tokens)

    def _check_rate(self, bucket: Bucket | None, amount: int, what: str) -> None:
        if bucket is None:
            return
        if amount > bucket.room:
            message = f"The request may take {amount} {what}; this key has {bucket.room:.0f} in a minute. Ask for less."
            raise ApiError(429, message, code=f"{what}_per_minute")
        wait = bucket.wait(amount)
        if wait > 0:
            message = f"This key's {bucket.room:.0f} {what} in a minute are used up; try again in {wait:.0f} seconds."
            raise ApiError(429, message, code=f"{what}_per_minute", retry_after=wait)

    def give_back(self, sequences: int, tokens: int) -> None:
        """Take note that sequences have ended, and that so many tokens were not used."""
        with self._lock:
            self._running -= sequences
            if self._tokens is not None:
                self._tokens.take(-tokens)


class Grant:
    """Leave for one request.

    Attributes
    ----------
    used
        Tokens so far; what was reserved beyond goes back at the end.
    """

    def __init__(self, holder: Holder, sequences: int, tokens: int) -> None:
        self._holder, self._sequences, self._tokens = holder, sequences, tokens
        self.used = 0
        self._ended = False

    def end(self) -> None:
        """Give it back; a second time does nothing."""
        if not self._ended:
            self._ended = True
            self._holder.give_back(self._sequences, max(0, self._tokens - self.used))


class Keys:
    """The keys of a server; with none, everybody may do everything.

    Parameters
    ----------
    rules
        One for each key.
    clock
        Seconds that only grow.

    Raises
    ------
    OptionError
        Two holders of one name, or one key for two.
    """

    def __init__(self, rules: Sequence[KeyRule] = (), clock: Callable[[], float] = time.monotonic) -> None:
        self.required = bool(rules)
        self._anyone = Holder(None, clock)
        self._holders = [(rule.digest(), Holder(rule, clock)) for rule in rules]
        for what, found in (("name", [r.name for r in rules]), ("key", [digest for digest, _ in self._holders])):
            if len(set(found)) < len(found):
                raise OptionError(f"Two entries of the keys have the same {what}; give each its own.")

    @classmethod
    def read(cls, path: Path) -> Keys:
        """Return the keys of a YAML file: ``keys:`` and a list of rules (`KeyRule`).

        Raises
        ------
        OptionError
            The file cannot be read, or holds something else.
        """
        try:
            found: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"Cannot read the keys in {path}: {error}.") from error
        except yaml.YAMLError:
            raise OptionError(f"The keys in {path} are no valid YAML.") from None
        try:
            return cls(_File.model_validate(found).keys)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise OptionError(f"The keys in {path} are not as expected: {where or 'file'}: {first['msg']}.") from None

    @classmethod
    def single(cls, secret: str) -> Keys:
        """Return one key that may do everything."""
        if len(secret) < 8:
            raise OptionError("An API key must have at least 8 characters.")
        return cls([KeyRule(name="key", key=secret, key_sha256=None, manage=True)])

    def holder(self, authorization: str | None) -> Holder:
        """Return who sent a header ``Authorization: Bearer KEY``; raise 401 if nobody known did."""
        if not self.required:
            return self._anyone
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            raise ApiError(401, "A key is needed: send the header Authorization: Bearer KEY.", code="missing_api_key")
        digest, found = _digest(secret.strip()), None
        for known, holder in self._holders:  # all of them, so that the time tells nothing
            if hmac.compare_digest(digest, known):
                found = holder
        if found is None:
            raise ApiError(401, "This key is not known here.", code="invalid_api_key")
        return found


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def _bucket(per_minute: int | None, clock: Callable[[], float]) -> Bucket | None:
    return None if per_minute is None else Bucket(per_minute, clock)
