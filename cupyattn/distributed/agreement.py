"""Before anything is computed: all ranks ask for the same, or all of them raise the same error."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np

from cupyattn.distributed.comm import Comm, RankFailed
from cupyattn.problem import Spec
from cupyattn.reading import refusal

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Statement:
    """What one rank has been asked for."""

    specs: Mapping[str, Spec]
    """Of its own arrays."""
    common: Mapping[str, str]
    """By name, what has to be the same everywhere, as texts."""


def agree(comm: Comm, function: str, state: Callable[[], Statement]) -> list[Mapping[str, Spec]]:
    """The specs of all ranks' arrays, once everything `common` is known to be so.

    Where `state` raises on one rank, all of them raise: that one its own error, the others one that quotes it.
    """
    error: Exception | None = None
    try:
        mine = state()
        text = {"function": function, "specs": {word: list(x) for word, x in mine.specs.items()}, **mine.common}
    except Exception as found:
        error, text = found, {"function": function, "refused": f"{type(found).__name__}: {found}"}
    said = [json.loads(x) for x in _gathered_texts(comm, json.dumps(text))]
    if error is not None:
        raise error
    for rank, other in enumerate(said):
        if "refused" in other:
            raise ValueError(refusal(function, f"rank {rank} was refused its arguments", ("it said", other["refused"])))
    for word in dict.fromkeys(word for other in said for word in other if word != "specs"):
        if len({other.get(word) for other in said}) > 1:
            shown = [(f"rank {rank}", other.get(word, "nothing")) for rank, other in enumerate(said)]
            raise ValueError(refusal(function, f"all ranks have to agree about {word}", *shown))
    found_specs: list[Mapping[str, Spec]] = [
        {word: Spec(name, tuple(shape), dtype) for word, (name, shape, dtype) in other["specs"].items()}
        for other in said
    ]
    _check_words(function, found_specs)
    return found_specs


def _check_words(function: str, of_ranks: list[Mapping[str, Spec]]) -> None:
    """Every rank gives the same arguments, in the same dtypes."""
    for word in dict.fromkeys(word for specs in of_ranks for word in specs):
        if len({specs[word].dtype if word in specs else None for specs in of_ranks}) > 1:
            shown = [
                (f"rank {rank}", specs[word].dtype if word in specs else "nothing")
                for rank, specs in enumerate(of_ranks)
            ]
            raise ValueError(refusal(function, f"all ranks have to agree about the dtype of {word}", *shown))


def check_same_shapes(function: str, of_ranks: list[Mapping[str, Spec]], word: str, but: int | None) -> None:
    """Refuse an argument whose shape is another on another rank, along another axis than `but`."""

    def rest(shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape if but is None else shape[:but] + shape[but + 1 :]

    shapes = [specs[word].shape for specs in of_ranks if word in specs]
    if len({(len(shape), rest(shape)) for shape in shapes}) > 1:
        shown = [(f"rank {rank}", shape) for rank, shape in enumerate(shapes)]
        along = "" if but is None else f", along all axes but {but}"
        raise ValueError(refusal(function, f"all ranks have to agree about the shape of {word}{along}", *shown))


def _gathered_texts(comm: Comm, text: str) -> list[str]:
    own = np.frombuffer(text.encode(), np.uint8)
    lengths = comm.all_gather(np.array([own.size], np.int64))
    found = comm.all_to_all([own] * comm.size, [(int(length[0]),) for length in lengths])
    return [bytes(x).decode() for x in found]


def together(comm: Comm, run: Callable[[], R]) -> R:
    """Do what all ranks do at once; where it fails here, all others are told."""
    try:
        return run()
    except RankFailed as failure:
        comm.abort(str(failure))
        raise
    except BaseException as error:
        comm.abort(f"{type(error).__name__}: {error}")
        raise


def heard(function: Callable[P, R]) -> Callable[P, R]:
    """Others hear of arguments that are none of the function's, too, before it is in any of its own lines.

    They would wait, and take what this rank says next, in another call, for what they wait for.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: P.args, **words: P.kwargs) -> R:
        try:
            signature.bind(*args, **words)
        except TypeError as error:
            comm: Any = words.get("comm")
            if is_comm(comm):
                comm.abort(f"TypeError: {function.__name__}: {error}")
        return function(*args, **words)

    return call


def is_comm(comm: Any) -> bool:
    """Whether this looks like a `Comm`."""
    return all(hasattr(comm, name) for name in ("rank", "size", "send", "receive", "all_to_all", "all_gather", "abort"))
