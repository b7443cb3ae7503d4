"""Doors that open late: a room is imported when something that is in it is first asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def opened_late(door: str, rooms: Mapping[str, tuple[str, ...]]) -> Callable[[str], Any]:
    """The `__getattr__` of a module: {room: names that are in it, or none}; the rooms themselves can be asked for, too.

    What was found stays in the module, so that a name costs nothing the second time, and can be replaced there.
    """
    homes = {name: room for room, names in rooms.items() for name in names}

    def ask(name: str) -> Any:
        if name in homes:
            found = vars(sys.modules[door])[name] = getattr(import_module(f"{door}.{homes[name]}"), name)
            return found
        if name in rooms:
            return import_module(f"{door}.{name}")
        raise AttributeError(f"module {door!r} has no attribute {name!r}")

    return ask
