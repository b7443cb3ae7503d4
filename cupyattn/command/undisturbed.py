"""Imports that Ctrl-C does not cut in two: torch and JAX abort the process then, or swallow it."""

from __future__ import annotations

import signal
from importlib import import_module
from types import ModuleType
from typing import Any


def import_undisturbed(name: str) -> ModuleType:
    """A package; Ctrl-C in between counts when it is there.

    Raises
    ------
    KeyboardInterrupt
        Somebody pressed it.
    Exception
        Whatever the import raises.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return import_module(name)  # somebody else decides what Ctrl-C does
    pressed: list[Any] = []
    try:
        signal.signal(signal.SIGINT, lambda *what: pressed.append(what))
    except ValueError:  # not in the main thread, which is the one that Ctrl-C interrupts
        return import_module(name)
    try:
        module = import_module(name)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if pressed:
            raise KeyboardInterrupt
    return module
