"""Trajectories that live beside an engine: opened, written by roles in turns, and closed, within limits."""

from __future__ import annotations

import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

from lorry.core.errors import LorryError, OptionError
from lorry.serving.agents.policy import CachePolicy
from lorry.serving.agents.trajectory import Trajectory
from lorry.serving.engine import Engine
from lorry.serving.request import Output, Request, Sampling
from lorry.serving.sampling import Vocabulary, check_sampling, choose
from lorry.serving.sequence import Sequence


class SessionBusy(LorryError):
    """A turn of the session is under way."""


class SessionGone(LorryError):
    """There is no such session, or no more."""


@dataclass(frozen=True)
class SessionLimits:
    """How much sessions may take; beyond, those that were used longest ago are closed.

    Attributes
    ----------
    sessions
        Open at once.
    bytes
        Of all caches together.
    idle
        Seconds without use.
    """

    sessions: int = 64
    bytes: int = 1 << 30
    idle: float = 3600.0


@dataclass
class Session:
    """One trajectory with the adapters that its roles use, which stay the versions that they were when it began.

    Attributes
    ----------
    id, owner
        Of the session, and the name of the key that opened it.
    roles
        Role -> name of the adapter under which it is served, or None for the base.
    used
        When it was used last.
    busy
        Whether a turn is under way.
    """

    id: str
    owner: str
    roles: Mapping[str, str | None]
    trajectory: Trajectory
    held: ExitStack
    used: float
    busy: bool = False

    @property
    def bytes(self) -> int:
        """What its cache takes."""
        return self.trajectory.numbers * next(self.trajectory.model.parameters()).element_size()


@dataclass
class SessionTurn:
    """One role's turn, token by token.

    Attributes
    ----------
    read
        Tokens that its first pass computes.
    """

    engine: Engine
    session: Session
    role: str
    sequence: Sequence
    read: int = field(init=False)

    def __post_init__(self) -> None:
        """Count what the first pass computes."""
        self.read = self.session.trajectory.missing(self.role)

    def step(self) -> Output:
        """Add a token, in a pass between two steps of the engine; its `finish` says whether it was the last."""
        trajectory = self.session.trajectory
        with self.engine.applied({}):
            logits = trajectory.logits(self.role)
        found = choose(logits[None], [self.sequence.chooser])[0]
        output = self.sequence.chosen(found)
        trajectory.append(output.tokens)
        return output


class Sessions:
    """The open sessions of an engine.

    Parameters
    ----------
    engine
        Whose model and adapters they use.
    limits
        How many, and how large.
    clock
        Seconds that only grow.
    """

    def __init__(
        self, engine: Engine, limits: SessionLimits | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.engine = engine
        self.limits = SessionLimits() if limits is None else limits
        self._clock = clock
        self._open: OrderedDict[str, Session] = OrderedDict()
        self._vocabulary: Vocabulary | None = None

    def open(self, roles: Mapping[str, str | None], policy: str | CachePolicy, owner: str = "") -> Session:
        """Begin a trajectory; sessions that were used longest ago make room for it.

        Parameters
        ----------
        roles
            Role -> name of a served adapter, or None for the base.
        policy
            What roles share of the cache, as for `Trajectory`.
        owner
            Who may use it.

        Raises
        ------
        AdapterError
            An adapter that is not served, or that the scheme cannot share.
        OptionError
            An unknown scheme, no roles, or no sessions at all.
        SessionBusy
            All sessions that there may be have a turn under way.
        """
        if not self.limits.sessions:
            raise OptionError("This server keeps no sessions.")
        held = ExitStack()
        try:
            names = {name: 1.0 for name in roles.values() if name is not None}
            model, versions = held.enter_context(self.engine.holding(names))
            with self.engine.applied({}):
                own = {role: None if name is None else versions[name] for role, name in roles.items()}
                trajectory = Trajectory(model, own, policy)
            self._vocabulary = self._vocabulary or Vocabulary.of(model, self.engine.tokenizer)
            self._make_room()
        except BaseException:
            held.close()
            raise
        id = f"session-{uuid.uuid4().hex}"
        self._open[id] = Session(id, owner, dict(roles), trajectory, held, self._clock())
        return self._open[id]

    def find(self, id: str, owner: str = "") -> Session:
        """Return a session of an owner, used now.

        Raises
        ------
        SessionGone
            There is none, or no more.
        """
        self._expire()
        session = self._open.get(id)
        if session is None or session.owner != owner:
            raise SessionGone("There is no such session; it may have made room for others since. Open a new one.")
        session.used = self._clock()
        self._open.move_to_end(id)
        self._fit(keep=session)
        return session

    def of(self, owner: str) -> list[Session]:
        """Return the sessions of an owner, the one that was used longest ago first."""
        self._expire()
        return [session for session in self._open.values() if session.owner == owner]

    def append(self, session: Session, tokens: tuple[int, ...]) -> None:
        """Add what a user or a tool says.

        Raises
        ------
        OptionError
            More tokens than the model sees.
        SessionBusy, SessionGone
            A turn is under way, or the session was closed.
        """
        self._check_free(session)
        total = len(session.trajectory.tokens) + len(tokens)
        if total > self.engine.context:
            raise OptionError(
                f"The session would have {total} tokens, but the model sees {self.engine.context} at most. Open a "
                "session with a shorter text."
            )
        session.trajectory.append(tokens)

    def check(self, sampling: Sampling) -> None:
        """Raise `OptionError` for options that mean nothing; a grammar is compiled here, and kept."""
        if self._vocabulary is not None:
            check_sampling(sampling, self._vocabulary)

    def begin(self, session: Session, role: str, sampling: Sampling) -> SessionTurn:
        """Begin a role's turn; `end` must follow.

        Raises
        ------
        OptionError
            An unknown role, an empty session, or options that mean nothing.
        SessionBusy, SessionGone
            A turn is under way, or the session was closed.
        """
        self._check_free(session)
        trajectory = session.trajectory
        if role not in session.roles:
            raise OptionError(f"There is no role '{role}' here; there are: {', '.join(session.roles)}.")
        if not trajectory.tokens:
            raise OptionError("There is no text to go on with yet; append some first.")
        assert self._vocabulary is not None
        self.check(sampling)
        request = Request(session.id, tuple(trajectory.tokens), {}, sampling)
        turn = SessionTurn(self.engine, session, role, Sequence(request, (), self._vocabulary, self.engine.tokenizer))
        session.busy = True
        return turn

    def end(self, session: Session) -> None:
        """Take note that a turn has ended, however it did; what it has added stays."""
        session.busy = False
        session.used = self._clock()

    def close(self, session: Session) -> None:
        """Forget a session.

        Raises
        ------
        SessionBusy, SessionGone
            A turn is under way, or it was closed before.
        """
        self._check_free(session)
        del self._open[session.id]
        session.held.close()

    def _check_free(self, session: Session) -> None:
        if self._open.get(session.id) is not session:
            raise SessionGone("This session has made room for others; open a new one.")
        if session.busy:
            raise SessionBusy("A turn of this session is under way; wait until it has ended.")

    def _make_room(self) -> None:
        while len(self._open) >= self.limits.sessions:
            oldest = next((session for session in self._open.values() if not session.busy), None)
            if oldest is None:
                raise SessionBusy(f"All {len(self._open)} sessions that this server keeps have a turn under way.")
            self.close(oldest)

    def _fit(self, keep: Session) -> None:
        """Close sessions that were used longest ago while all caches together are too large."""
        left = sum(session.bytes for session in self._open.values())
        for session in list(self._open.values()):
            if left <= self.limits.bytes:
                return
            if not session.busy and session is not keep:
                left -= session.bytes
                self.close(session)

    def _expire(self) -> None:
        late = self._clock() - self.limits.idle
        for session in [s for s in self._open.values() if s.used < late and not s.busy]:
            self.close(session)
