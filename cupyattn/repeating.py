"""Calls on a GPU that are remembered as a whole: the same again is launched without being read.

Most programs ask for the same again and again, of other arrays that lie alike.  What decides what is launched is looked
at before anything is read: the arguments, of arrays shapes, strides, dtypes, devices and whether they start at a
multiple of 16 bytes; which implementations are allowed; and what is going on in their library.  If a call with the same
of all that has been made, its launches are made again, with other addresses in their records.  Everything else goes the
long way: calls that raise, draw a seed, have gradients or copy something are never remembered, and no array is.
"""

from __future__ import annotations

from _thread import allocate_lock
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextvars import ContextVar
from functools import wraps
from inspect import signature
from math import copysign
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import numpy as np

from cupyattn.allowed import currently_allowed
from cupyattn.arrays import Arrays, Library, Visit, library_of_type
from cupyattn.plan import Plan
from cupyattn.problem import Problem
from cupyattn.reading import LARGEST_SIZE

P = ParamSpec("P")
R = TypeVar("R")

MOST_CALLS = 1024
"""That are remembered of each function."""


class Done(NamedTuple):
    """What a call came to: nothing was done besides, and nothing depended on values or addresses."""

    visit: Visit
    problem: Problem
    plan: Plan
    found: Arrays
    """The kernel's results."""
    from_cache: tuple[int, bool, bool] | None = None
    """As `cuda.script_of` takes it."""


_listener: ContextVar[list[Done] | None] = ContextVar("cupyattn.repeating", default=None)


def tell(done: Done) -> None:
    """Say what a public function's call came to, to whoever called that."""
    heard = _listener.get()
    if heard is not None:
        heard.append(done)


class Seen(NamedTuple):
    """A call as it is recognised."""

    key: tuple[Hashable, ...]
    arrays: list[Any]
    addresses: list[int]
    """Those of the arrays; and behind them the number that may be another one in each call, if there is one."""


class Remembered(NamedTuple):
    """How a call is made again."""

    script: Any
    form: str | tuple[str | None, ...]
    """The name of the result, or of each."""
    names: tuple[str, ...]
    """Of the script's results."""
    written: tuple[int, ...]
    """Places of the arrays that results go into: these have to be apart from all others."""
    reach: tuple[tuple[int, int], ...]
    """Of each array, the bytes that are its own: from where to where, counted from its address."""
    overwritten: tuple[int, ...]
    """Places of the arrays whose library wants to know that they have other values now."""
    library: Library

    def is_apart(self, addresses: Sequence[int]) -> bool:
        """No result lies where another array does; where they may, the long way finds out."""
        for one in self.written:
            start, stop = (addresses[one] + end for end in self.reach[one])
            for other, (low, high) in enumerate(self.reach):
                if other != one and start < addresses[other] + high and addresses[other] + low < stop:
                    return False
        return True

    def again(self, seen: Seen) -> Any:
        from cupyattn import cuda

        results = cuda.again(self.script, seen.arrays, seen.addresses)
        for place in self.overwritten:
            self.library.note_overwritten(seen.arrays[place])
        if isinstance(self.form, str):
            return results[self.names.index(self.form)]
        found = dict(zip(self.names, results, strict=True))
        return tuple([None if name is None else found[name] for name in self.form])


_SCALARS = frozenset((bool, int, str, float))


class _AnyNumber:
    """Stands in a key where any number may."""


_ANY_NUMBER = _AnyNumber()


class Memory:
    """The calls of one function."""

    def __init__(self, words: tuple[str, ...], number: str | None) -> None:
        self._words = words
        self._number = number
        """The argument that, as an int, is told to kernels and decides nothing."""
        self._calls: dict[Hashable, Remembered] = {}
        self._lock = allocate_lock()
        _ALL.append(self)

    def __len__(self) -> int:
        return len(self._calls)

    def clear(self) -> None:
        with self._lock:
            self._calls = {}

    def find(self, seen: Seen) -> Remembered | None:
        return self._calls.get(seen.key)

    def look(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Seen | None:
        """A call as it is recognised; None: none like it is ever remembered."""
        values: Sequence[Any] = [*args, *kwargs.values()] if kwargs else args
        number = None
        if self._number is not None:
            values, number = self._without_number(values, len(args), kwargs)
        arrays, addresses = list[Any](), list[int]()
        facts: list[Hashable] = [currently_allowed(), len(args), *kwargs]
        library = None
        for value in values:
            kind: Any = type(value)
            if kind in _SCALARS:
                facts += (kind, value)
                if kind is float and value == 0.0:  # of which there are two
                    facts.append(copysign(1.0, value))
            elif value is None or value is _ANY_NUMBER:
                facts.append(value)
            elif kind is tuple:
                for each in value:
                    if type(each) not in _SCALARS and each is not None:
                        return None
                facts.append((*map(type, value), repr(value)))
            else:
                its = library_of_type(kind)
                if its is None:
                    return None
                if its is not library:
                    library, surroundings = its, its.surroundings(value)
                    if surroundings is None:
                        return None
                    facts.append(surroundings)
                glanced = its.glance(value)
                if glanced is None:
                    return None
                facts.append(glanced[0])
                arrays.append(value)
                addresses.append(glanced[1])
        if number is not None:
            addresses.append(number)
        return Seen(tuple(facts), arrays, addresses) if arrays else None

    def _without_number(
        self, values: Sequence[Any], positional: int, kwargs: Mapping[str, Any]
    ) -> tuple[Sequence[Any], int | None]:
        name = cast(str, self._number)
        if name in kwargs:
            number, place = kwargs[name], None
        elif (place := self._words.index(name)) < positional:
            number = values[place]
        else:
            return values, None
        if type(number) is not int or not 0 <= number <= LARGEST_SIZE:
            return values, None
        if place is None:
            place = positional + list(kwargs).index(name)
        return [*values[:place], _ANY_NUMBER, *values[place + 1 :]], number

    def learn(self, seen: Seen, args: tuple[Any, ...], kwargs: Mapping[str, Any], done: Done, result: Any) -> None:
        """Remember a call by what it came to, if it can be made again."""
        given = dict(zip([*self._words[: len(args)], *kwargs], [*args, *kwargs.values()], strict=True))
        names = [name for name, value in given.items() if any(value is array for array in seen.arrays)]
        remembered = _remembered(seen, names, self._number if len(seen.addresses) > len(names) else None, done, result)
        if remembered is None:
            return
        with self._lock:
            while len(self._calls) >= MOST_CALLS:
                del self._calls[next(iter(self._calls))]
            self._calls[seen.key] = remembered


_ALL: list[Memory] = []
"""Of all functions."""


def forget() -> None:
    """All calls: for tests and benchmarks, which put something else in the driver's place."""
    for memory in _ALL:
        memory.clear()


def _remembered(seen: Seen, names: list[str], number: str | None, done: Done, result: Any) -> Remembered | None:
    from cupyattn import cuda

    visit, found = done.visit, done.found
    form = _form_of(result, found)
    places = {word: names.index(spec.name) for word, spec in visit.specs if spec.name in names}
    if form is None or len(names) != len(seen.arrays) or len(places) < len(visit.specs):
        return None
    if any(seen.arrays[places[word]] is not array for word, array in visit.arrays.items()):
        return None  # something was cast, or brought from elsewhere
    goes_into = {word: names.index(name) for word, name in INTO.items() if name in names}
    if any(seen.arrays[place] is not found.get(word) for word, place in goes_into.items()):
        return None
    if len(places) + len(goes_into) < len(names):
        return None
    if number is not None:
        places["cache_seqlen"] = len(seen.arrays)
    specs, count = dict(visit.specs), len(seen.addresses)
    script = cuda.script_of(
        visit.library.title, visit.arrays, specs, done.plan, done.problem, places, goes_into, count, done.from_cache
    )
    if script is None:
        return None
    written = tuple(goes_into.values())
    caches = tuple(places[word] for word in ("k", "v")) if "k_new" in specs else ()
    reach = tuple(visit.library.reach(array) for array in seen.arrays) if written else ()
    return Remembered(script, form, tuple(done.problem.results), written, reach, (*written, *caches), visit.library)


INTO = {"out": "out", "lse": "lse_out"}
"""Results, and the arguments that they go into."""


def _form_of(result: Any, found: Arrays) -> str | tuple[str | None, ...] | None:
    """Which results are returned, each as the kernel left it; None: something else is."""

    def name_of(array: Any) -> str | None:
        return next((name for name, own in found.items() if own is array), None)

    if not isinstance(result, tuple):
        return name_of(result)
    form = tuple(name_of(array) for array in result)
    return form if all(name or array is None for name, array in zip(form, result, strict=True)) else None


def repeated(number: str | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A public function whose calls are remembered; those differ in nothing that differ in the `number` only."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        memory = Memory(tuple(signature(function).parameters), number)

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if args and type(args[0]) is np.ndarray:  # of which none is: every microsecond of a small call is seen
                return function(*args, **kwargs)
            seen = memory.look(args, kwargs)
            if seen is None:
                return function(*args, **kwargs)
            remembered = memory.find(seen)
            if remembered is not None and remembered.is_apart(seen.addresses):
                return cast(R, remembered.again(seen))
            heard: list[Done] = []
            token = _listener.set(heard)
            try:
                result = function(*args, **kwargs)
            finally:
                _listener.reset(token)
            if len(heard) == 1:
                memory.learn(seen, args, kwargs, heard[0], result)
            return result

        return call

    return decorate
