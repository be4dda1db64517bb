"""What keeps threads apart: calls of one network, and planning from everything else.

A network's states are in one place, so its calls go one after the other. Planning traces networks, for which torch.fx
replaces methods of `nn.Module` for the whole process; so while one thread plans, no other plans or runs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn


class CallLock:
    """Held by the thread that calls a network; the same thread cannot take it twice."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold it; waits for another thread.

        Raises:
            RuntimeError: This thread holds it already.
        """
        if self.is_mine():
            raise RuntimeError(
                "the network was called from within its own call, by a hook or a module of it; its states are between "
                "two steps there, so call it after the call has returned"
            )
        with self._lock:
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = None

    def is_mine(self) -> bool:
        """Whether this thread holds it."""
        return self._owner == threading.get_ident()


_call_locks: WeakKeyDictionary[nn.Module, CallLock] = WeakKeyDictionary()
_call_locks_lock = threading.Lock()


def call_lock(net: nn.Module) -> CallLock:
    """The lock of a network, which all that is compiled from it shares."""
    with _call_locks_lock:
        return _call_locks.setdefault(net, CallLock())


class _Gate:
    """Many threads run, or one plans. A thread that runs may plan meanwhile, and one that plans may run."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running: dict[int, int] = {}  # thread -> how deep
        self._planner: int | None = None
        self._depth = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Wait until no other thread plans; none begins to before this is left."""
        me = threading.get_ident()
        with self._changed:
            # A thread that runs already must not wait for one that waits for it.
            self._changed.wait_for(lambda: self._planner in (None, me) or me in self._running)
            self._running[me] = self._running.get(me, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                self._running[me] -= 1
                if not self._running[me]:
                    del self._running[me]
                self._changed.notify_all()

    @contextmanager
    def planning(self) -> Iterator[None]:
        """Wait until no other thread plans or runs; none does before this is left."""
        me = threading.get_ident()
        with self._changed:
            own = self._running.pop(me, 0)  # stands still here, so another that plans need not wait for it
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._planner in (None, me))
            self._planner, self._depth = me, self._depth + 1
            self._changed.wait_for(lambda: not self._running)
        try:
            yield
        finally:
            with self._changed:
                self._depth -= 1
                if not self._depth:
                    self._planner = None
                if own:
                    self._running[me] = own
                self._changed.notify_all()


_gate = _Gate()
running = _gate.running
planning = _gate.planning
