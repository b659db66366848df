"""What one thread or task has chosen for a model: one object, found through a context variable.

A choice holds for the thread or task that makes it, and for every thread or task that has made none of its own. The
context variable holds nothing but a token of its owner, so neither a model nor an adapter is kept alive by it.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

from lorry.core.errors import AdapterError
from lorry.core.forward.active import Active
from lorry.core.forward.compiled import UNIFORM, Slot
from lorry.core.forward.entry import Member
from lorry.core.forward.history import History, running_node, sequence_number
from lorry.core.method.context import Context
from lorry.core.method.layout import Pass

#: Under which an active set keeps its form for compiled graphs.
UNIFORM_FORM = ("uniform", "")


class Owner:
    """A thread or task that has chosen something; `parent` is the one whose choices it started from."""

    __slots__ = ("__weakref__", "chosen", "parent", "where")

    def __init__(self, where: Callable[[], object], parent: Owner | None) -> None:
        self.where = where
        self.parent = parent
        self.chosen: dict[int, weakref.ref[Runtime]] = {}


_OWNER: ContextVar[Owner | None] = ContextVar("lorry_owner", default=None)


@dataclass(frozen=True)
class Moment:
    """What applied when something was computed."""

    active: Active | None
    context: Context
    passing: Pass | None


class Scope:
    """A composition that holds while a ``with`` block lasts."""

    __slots__ = ("active",)

    def __init__(self, active: Active | None) -> None:
        self.active = active


class Runtime:
    """What applies in the forward passes of one thread or task.

    Attributes
    ----------
    active
        What applies now; None for the bare base.
    context
        What the present forward pass knows.
    inside
        What applies inside a block that runs some rows of the batch alone.
    passing
        What the root was given in the pass under way.
    taps
        Readers by site path.
    follows
        Whether nothing was chosen here, so that what is chosen elsewhere applies here too.
    """

    __slots__ = (
        "__weakref__",
        "_base",
        "_contexts",
        "_dropped",
        "_later",
        "_scopes",
        "active",
        "context",
        "follows",
        "history",
        "inside",
        "passing",
        "taps",
    )

    def __init__(self) -> None:
        self._base: Active | None = None
        self._scopes: list[Scope] = []
        self._contexts: list[Context] = []
        self._dropped: list[Member] = []
        self._later: Active | None | Literal[False] = False
        self.follows = False
        self.active: Active | None = None
        self.context = Context()
        self.inside: Active | None = None
        self.passing: Pass | None = None
        self.taps: dict[str, list[Any]] = {}
        self.history: History[Moment] = History()
        self._note()

    def fork(self) -> Runtime:
        """Return a runtime that goes on from here by itself."""
        twin = Runtime()
        twin._base, twin._scopes, twin._contexts = self._base, self._scopes.copy(), self._contexts.copy()
        twin.active, twin.context = self.active, self.context
        twin.taps = {path: readers.copy() for path, readers in self.taps.items()}
        twin.history = self.history.copy()
        twin._note()
        return twin

    @property
    def base(self) -> Active | None:
        """What applies outside of every ``with`` block."""
        return self._base

    @property
    def scoped(self) -> bool:
        """Whether a ``with`` block decides what applies now."""
        return bool(self._scopes)

    def choose(self, active: Active | None) -> None:
        """Let a composition apply outside of every ``with`` block."""
        self._base, self.follows = active, False
        self._settle()

    def follow(self, active: Active | None) -> None:
        """Let a composition apply that another thread or task chose; a pass under way ends as it began."""
        if self.passing is None:
            self._base = active
            self._choose_active()
        else:
            self._later = active

    def enter(self, active: Active | None) -> Scope:
        """Let a composition apply until `leave` is called with the result."""
        scope = Scope(active)
        self._scopes.append(scope)
        self._settle()
        return scope

    def leave(self, scope: Scope) -> None:
        """End a scope, in whatever order scopes end."""
        if scope in self._scopes:
            self._scopes.remove(scope)
        self._settle()

    def enter_context(self, context: Context) -> None:
        """Let passes know this until `leave_context`."""
        self._contexts.append(context)
        self.set_context(context)

    def leave_context(self, context: Context, outer: Context) -> None:
        """End a context, in whatever order contexts end."""
        self._contexts = [c for c in self._contexts if c is not context]
        self.set_context(self._contexts[-1] if self._contexts else outer)

    def set_context(self, context: Context) -> None:
        """Let passes know this from now on."""
        self.context = context
        self._note()

    def begin(self, seen: Pass) -> None:
        """Begin a pass through the root."""
        seen.outer, self.passing = self.passing, seen
        self._note()

    def end(self) -> None:
        """End the pass through the root, and do what had to wait for it."""
        self.passing = None if self.passing is None else self.passing.outer
        if self.passing is not None:
            self._note()
            return
        if self._later is not False:
            self._base, self._later = self._later, False
        for adapter in self._dropped:
            self._without(adapter)
        self._dropped.clear()
        self._settle()

    def drop(self, adapter: Member, own: bool) -> None:
        """Let an adapter apply no more; where another thread asks for it, after the pass under way."""
        if self.passing is not None and not own:
            self._dropped.append(adapter)
            return
        self._without(adapter)
        self._choose_active()

    def refresh(self, own: bool) -> None:
        """Forget what was worked out for compositions, because adapters or weights changed.

        What was noted for a recomputation is forgotten only by the thread itself: another one may be between its
        forward and its backward pass.
        """
        if self._base is not None:
            self._base = self._base.fresh()
        for scope in self._scopes:
            scope.active = None if scope.active is None else scope.active.fresh()
        self._choose_active()
        if own:
            self.history.clear()
            self._note()

    def _without(self, adapter: Member) -> None:
        if self._base is not None and adapter.name in self._base.members:
            self._base = self._base.without(adapter)
        for scope in self._scopes:
            if scope.active is not None and adapter.name in scope.active.members:
                scope.active = scope.active.without(adapter)

    def _choose_active(self) -> None:
        self.active = self._scopes[-1].active if self._scopes else self._base

    def _settle(self) -> None:
        self._choose_active()
        self._note()

    def _note(self) -> None:
        self.history.note(Moment(self.active, self.context, self.passing))

    def actives(self) -> Iterator[Active]:
        """Yield every composition that may apply again."""
        for active in (self._base, *(scope.active for scope in self._scopes)):
            if active is not None:
                yield active


class Runtimes:
    """The runtimes of one model, by owner.

    Attributes
    ----------
    number
        Of the model in this process; its place in the table that compiled graphs read.
    default
        What applies for threads and tasks that have chosen nothing.
    traced
        What applied where a choice was made last: compiled graphs serve one thread.
    """

    def __init__(self) -> None:
        self._begin(None)

    def _begin(self, active: Active | None) -> None:
        self.slot = Slot()
        self.number = self.slot.number
        self.default = self.traced = Runtime()
        self._owned: weakref.WeakKeyDictionary[Owner, Runtime] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        self.default.choose(active)
        self.default.history.clear()  # no pass was made with it, and it would keep adapters of a copy alive

    def __getstate__(self) -> dict[str, Active | None]:
        """Return what a copy of the model takes along: what applies here now."""
        return {"active": self.current().active}

    def __setstate__(self, state: dict[str, Active | None]) -> None:
        """Begin anew with what applied where the copy was made."""
        self._begin(state["active"])

    def current(self) -> Runtime:
        """Return what applies in this thread or task."""
        owner = _OWNER.get()
        while owner is not None:
            found = owner.chosen.get(self.number)
            if found is not None:
                runtime = found()
                if runtime is not None:
                    return runtime
            owner = owner.parent
        return self.default

    def own(self) -> Runtime:
        """Return this thread's or task's own runtime; it starts from what applied so far."""
        owner, here = _OWNER.get(), _here()
        if owner is None or owner.where() is not here():
            owner = Owner(here, owner)
            _OWNER.set(owner)
        found = owner.chosen.get(self.number)
        runtime = None if found is None else found()
        if runtime is None:
            before = self.current()
            runtime = before.fork()
            runtime.follows = before is self.default
            with self._lock:
                self._owned[owner] = runtime
            owner.chosen[self.number] = weakref.ref(runtime)
        return runtime

    def choose(self, active: Active | None) -> None:
        """Let a composition apply from now on: here, and wherever nothing was chosen."""
        self.own().choose(active)
        for runtime in self.every():
            if runtime is self.default or runtime.follows:
                runtime.follow(active)

    def publish(self, runtime: Runtime) -> None:
        """Let compiled graphs compute what applies in `runtime`.

        Raises
        ------
        AdapterError
            Another thread or task runs the model with something else.
        """
        active = runtime.active
        form = None if active is None else active.kept.get(UNIFORM_FORM)
        if UNIFORM.get(self.number) is not None or form is not None:
            for other in self.every():
                if other is not runtime and other is not self.default and not other.follows:
                    if _members(other.active) != _members(active):
                        raise AdapterError(
                            "A compiled graph serves one thread at a time, and another thread or task has activated "
                            "something else on this model. Use the model uncompiled there, or one model for each."
                        )
        self.traced = runtime
        UNIFORM[self.number] = form

    def every(self) -> list[Runtime]:
        """Return the default and all owned runtimes."""
        with self._lock:
            return [self.default, *self._owned.values()]

    def moment(self) -> Moment:
        """Return what applied when the node was made whose backward pass runs now.

        Raises
        ------
        AdapterError
            The backward pass runs in another thread than the forward pass, and those of several threads come into
            question.
        """
        runtime, number = self.current(), running_node()
        now = Moment(runtime.active, runtime.context, runtime.passing)
        if number is None:
            return now
        if runtime.history.thread == threading.get_ident() and number < sequence_number():
            return runtime.history.at(number) or now
        # the graph was made in another thread: on a GPU the backward pass runs in threads of autograd's own
        found = [r.history.at(number) for r in self.every()[1:] if r is not runtime and r.history.covers(number)]
        moments = {(id(m.active), id(m.context)): m for m in found if m is not None}
        if len(moments) > 1:
            raise AdapterError(
                "A checkpointed segment is computed again in another thread than it was computed in, and the forward "
                "passes of several threads come into question. Run the forward and backward passes of one model in one "
                "thread, or without gradient checkpointing."
            )
        return next(iter(moments.values()), now)


def _members(active: Active | None) -> object:
    return None if active is None else (active.portions, active.layout)


def _here() -> Callable[[], object]:
    """Return a function that gives this task, or this thread if no task runs, and nothing once it is over."""
    asyncio = sys.modules.get("asyncio")
    if asyncio is not None and asyncio._get_running_loop() is not None:
        task = asyncio.current_task()
        if task is not None:
            return weakref.ref(task)
    trio = sys.modules.get("trio")
    if trio is not None:
        try:
            return weakref.ref(trio.lowlevel.current_task())
        except RuntimeError:  # no trio here
            pass
    return weakref.ref(threading.current_thread())
