"""Schedules that the layers of a step share: what thread blocks have to do depends on lengths, and not on the layer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any

MOST = 8
"""Schedules that are kept: two of a cascade, for layers of some kinds."""


class Schedules:
    """Those that were made last, each found by all that it was made of.

    A schedule is never written to again, and belongs to the lengths themselves, as numbers: whatever happens to a cache
    meanwhile, one of other lengths is not found.  A thread finds its own only, since streams of the same address may
    be different ones in different threads.
    """

    def __init__(self) -> None:
        self._kept: tuple[tuple[Hashable, Any], ...] = ()

    def __reduce__(self) -> tuple[type[Schedules], tuple[()]]:
        """Copies of a cache, in another process or on another device, make their own."""
        return type(self), ()

    def shared(self, lengths: Hashable, what: Hashable, make: Callable[[], Any]) -> Any:
        """That of such lengths and whatever else it depends on, made and queued by `make` if there is none."""
        key = threading.current_thread(), lengths, what
        for known, schedule in self._kept:
            if known == key:
                return schedule
        schedule = make()
        self._kept = ((key, schedule), *self._kept[: MOST - 1])
        return schedule

    def forget(self) -> None:
        """Give their memory back."""
        self._kept = ()
