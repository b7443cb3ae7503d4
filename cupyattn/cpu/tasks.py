"""The tasks of a call: in which order they run, and in which they add to sums that they have in common."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

from cupyattn.cpu.machine import is_crowded
from cupyattn.cpu.part import Part
from cupyattn.cpu.scratch import Scratch
from cupyattn.cpu.threads import run_all
from cupyattn.cpu.tiles import TileIndex

LITTLE = 2**20
"""Cost up to which a task is mostly Python, of which only one thread runs at a time."""
BRIEF = 2**28
"""Cost up to which a call is over, on one thread, within about the time that a thread has before others get its core.

Where many want the cores, its caller's thread alone is done then; a helper would begin when one of them has had its
turn, and the caller would wait for it.
"""

Addition = Callable[[], None]
"""What a task has to do yet, to sums that it has in common with others."""
Work = Callable[[Scratch], Addition | None]
Costly = tuple[Part, Sequence[TileIndex], Work]
"""A task and the tiles it is about."""


def run_in_order(tasks: list[Costly], num_workers: int) -> None:
    if len(tasks) == 1:  # a small call, of which every microsecond is seen
        ((part, tiles, task),) = tasks
        run_all([partial(_alone, task)], 1, are_small=num_workers == 1 and part.has_small_products(tiles[0]))
        return
    are_small = num_workers == 1 and all(part.has_small_products(tiles[0]) for part, tiles, _ in tasks)
    if num_workers > 1 and _cost(tasks) <= BRIEF and is_crowded():
        num_workers = 1
    in_turn, first, runs = InTurn(), 0, []
    for group in in_order(tasks, num_workers):
        runs.append(partial(_one_after_the_other, group, first, in_turn))
        first += len(group)
    run_all(runs, num_workers, are_small=are_small)


def _cost(tasks: list[Costly]) -> int:
    return sum(part.cost(where) for part, tiles, _ in tasks for where in tiles)


def _alone(task: Work, scratch: Scratch) -> None:
    addition = task(scratch)
    if addition is not None:
        addition()


def _one_after_the_other(tasks: Sequence[Work], first: int, in_turn: InTurn, scratch: Scratch) -> None:
    for turn, task in enumerate(tasks, first):
        addition = task(scratch)
        if addition is not None:
            in_turn.add(turn, addition)


class InTurn:
    """Additions of tasks in the order of the tasks, whichever ends first, so that sums are the same to the last bit.

    Nobody waits: what comes before its turn is left to those whose turn it is.
    """

    def __init__(self) -> None:
        self._adding = threading.Lock()
        self._waiting: dict[int, Addition] = {}
        self._turn = 0

    def add(self, turn: int, addition: Addition) -> None:
        with self._adding:
            self._waiting[turn] = addition
            while self._turn in self._waiting:
                self._waiting.pop(self._turn)()
                self._turn += 1


def in_order(tasks: list[Costly], num_workers: int) -> list[list[Work]]:
    """Those to run, the dearest first; threads get all those of little cost as one."""
    if len(tasks) < 2:
        return [[task] for _, _, task in tasks]
    dearest = sorted(((sum(map(part.cost, tiles)), task) for part, tiles, task in tasks), key=lambda entry: -entry[0])
    if num_workers == 1 or dearest[-1][0] > LITTLE:
        return [[task] for _, task in dearest]
    together = [task for cost, task in dearest if cost <= LITTLE]
    return [together, *([task] for cost, task in dearest if cost > LITTLE)]
