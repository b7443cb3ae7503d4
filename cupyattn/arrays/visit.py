"""The arrays of one call: looked at on their way in, handed over as NumPy's, brought home as what they were."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from cupyattn.arrays.library import Arrays, Backward, Forward, Job, Library, Nowhere, Valueless
from cupyattn.arrays.numpy import NUMPY
from cupyattn.arrays.recognition import OTHER, came, library_of
from cupyattn.cpu import num_cores
from cupyattn.described import Call
from cupyattn.problem import Device, Problem, Spec
from cupyattn.reading import check_results, refusal


@dataclass
class Visit:
    """The arrays of one call: who they are and where they live."""

    function: str
    library: Library
    arrays: Arrays
    specs: tuple[tuple[str, Spec], ...]
    kind: str
    """ "cpu" or "cuda"."""
    given: Arrays
    """The arrays as they came, before torch.autocast."""

    def device(self) -> Device:
        """What the planner has to know of the arrays' device."""
        first = next(iter(self.arrays.values()), None)  # `distributed` keeps them elsewhere
        imagined = None if first is None else self.library.imagined(first)
        if imagined is not None:
            return imagined
        if self.kind == "cpu":
            return cpu_device(self.library.num_threads())
        from cupyattn import cuda

        return cuda.device_of(self.function, self.library.title, next(iter(self.arrays.values())))

    def before_work(self, *steps: tuple[Problem, Any]) -> None:
        """Say what is going to be computed, each problem with its plan; a rehearsal ends here."""
        self.library.before_work(self.specs, steps)

    def notes(self, problem: Problem, plan: Any) -> tuple[str, ...]:
        """What is done with these very arrays besides the plan."""
        own = self.library.notes()
        if self.kind == "cpu":
            return own
        from cupyattn import cuda

        return own + cuda.notes(self.library.title, self.arrays, dict(self.specs), problem, plan)

    def run(
        self,
        forward: Forward,
        backward: Backward | None,
        results: Mapping[str, Spec],
        kept: Mapping[str, Spec] | None = None,
        call: Call | None = None,
    ) -> Arrays:
        """Hand the arrays to `forward` as NumPy arrays and bring its results home; `backward` may use those `kept`.

        `call` says in words what both are, where that can be said.
        """
        if self.kind == "cuda":
            rule = "has no CUDA kernel; bring the arrays to the CPU"
            raise NotImplementedError(refusal(self.function, rule, *((x.name, x.shape) for _, x in self.specs)))
        check_results(self.function, dict(self.specs), results)
        job = Job(self.function, tuple(self.arrays), forward, backward, results, kept or {}, call=call)
        return self.library.run(job, self.arrays)

    def run_at_home(
        self,
        forward: Forward,
        backward: Backward | None,
        results: Mapping[str, Spec],
        kept: Mapping[str, Spec] | None = None,
    ) -> Arrays:
        """The same on a GPU, where both passes take the library's own arrays and give back such."""
        job = Job(self.function, tuple(self.arrays), forward, backward, results, kept or {}, at_home=True)
        return self.library.run(job, self.arrays)

    def of_their_kind(self, results: Arrays, into: Container[str] = ()) -> Arrays:
        """Results of another's making, as objects of the type that the library's own functions return for its arrays.

        Those of these names `into` are the caller's own, and stay what they are.
        """
        fresh = {name: array for name, array in results.items() if name not in into}
        return {**results, **self.library.of_their_kind(self.arrays, fresh)}

    def as_given(self, gradients: Arrays) -> Arrays:
        """Gradients, by their arguments' names, in the dtypes in which these came."""
        return gradients if self.given is self.arrays else self.library.as_given(gradients, self.given)


@cache
def cpu_device(most_threads: int | None = None) -> Device:
    """What the planner has to know of this machine's CPU."""
    return Device("cpu", "cpu", num_cores() if most_threads is None else min(num_cores(), most_threads))


OPTIONAL = frozenset(
    (
        "mask",
        "bias",
        "alibi_slopes",
        "sinks",
        "q_descale",
        "k_descale",
        "v_descale",
        "block_table",
        "seqlens_q",
        "seqlens_k",
        "out",
        "lse",
        "dlse",
        "cu_seqlens",
        "unused_mask",
    )
)
"""Our words for arguments that may be None."""

COMPANIONS = frozenset(
    (
        *("mask", "bias", "alibi_slopes", "sinks", "q_descale", "k_descale", "v_descale", "block_table"),
        *(
            "seqlens_q",
            "seqlens_k",
            "cu_seqlens",
            "cu_seqlens_q",
            "cu_seqlens_k",
            "cu_seqlens_k_new",
            "cache_seqlens",
            "cache_batch_idx",
        ),
        *("cache_leftpad", "rotary_seqlens", "offsets", "cos", "sin", "rotary_cos", "rotary_sin"),
        *("attention_mask", "unused_mask", "indices"),
    )
)
"""Our words for what may be NumPy's beside arrays of another library."""


def enter(function: str, arrays: Mapping[str, tuple[str, Any]], in_place: tuple[str, ...] = ()) -> Visit:
    """Look at the arrays of a call, given as {our word: (the caller's name, array or None)}.

    What goes with q, k and v may be NumPy's: it is copied to where they are.  Arrays that are written to, those
    `in_place`, stay what they are under torch.autocast, too.

    Raises
    ------
    TypeError
        Something is not an array, or the arrays are of different libraries.
    ValueError
        The arrays are on different devices, or on one nothing here can work on.
    NotImplementedError
        The call is being traced, and its results would be constants of the trace.
    """
    present = {word: entry for word, entry in arrays.items() if entry[1] is not None or word not in OPTIONAL}
    found = [library_of(function, name, array) for name, array in present.values()]
    library = found[0]
    if any(other is not library for other in found):
        return enter(function, _gathered(function, present, found), in_place)
    library.check_call(function)
    for name, array in present.values():
        _check(function, library, name, array)
    given = {word: array for word, (_, array) in present.items()}
    if library is NUMPY:
        return Visit(function, library, given, _specs(library, present, given), "cpu", given)
    library.check_kinds(function, dict(present.values()))
    kind = _place(function, library, present)
    called = library.as_called(given, kind, in_place)
    return Visit(function, library, called, _specs(library, present, called), kind, given)


Present = Mapping[str, tuple[str, Any]]


def _check(function: str, library: Library, name: str, array: Any) -> None:
    objection = library.refuses(array)
    if objection:
        kind = Valueless if library.has_no_values(array) else TypeError
        raise kind(refusal(function, f"{name} {objection}", (name, *came(array))))


def _specs(library: Library, present: Present, arrays: Arrays) -> tuple[tuple[str, Spec], ...]:
    return tuple(
        [(word, Spec(present[word][0], library.shape(array), library.dtype(array))) for word, array in arrays.items()]
    )


def _gathered(function: str, present: Present, found: list[Library]) -> Present:
    """Arrays of two libraries as those of one: NumPy's that go with others, copied to where these are."""
    strangers = {
        word: array
        for (word, (_, array)), library in zip(present.items(), found, strict=True)
        if library is NUMPY and word.rstrip("0123456789") in COMPANIONS
    }
    if len(set(found) - {NUMPY}) > 1 or len(strangers) < found.count(NUMPY):
        shown = [(name, came(x)[1]) for name, x in present.values()]
        raise TypeError(refusal(function, "all arrays have to be of one library", *shown))
    visit = enter(function, {word: entry for word, entry in present.items() if word not in strangers})
    if visit.kind == "cuda":
        visit.device()  # or CuPy would say in its own words what is missing
    values, brought = list(visit.arrays.values()), {}
    like = next((array for array in values if visit.library.place(array)[1] != "traced"), values[0])
    for word, array in strangers.items():
        name = present[word][0]
        _check(function, NUMPY, name, array)
        try:
            brought[word] = visit.library.bring(array.astype(array.dtype.newbyteorder("=")), like)
        except (TypeError, ValueError) as error:
            rule = f"{name} is of a dtype that {visit.library.title} does not have"
            raise TypeError(refusal(function, rule, (name, array.shape, str(array.dtype)))) from error
        kind = visit.library.dtype(brought[word])
        if array.dtype.kind in "iu" and kind != array.dtype.name and (array.astype(kind) != array).any():
            rule = f"{name} holds numbers that are too large for {kind}, as which {visit.library.title} takes it"
            raise ValueError(refusal(function, rule, (name, array.shape, str(array.dtype))))
    return {word: (name, brought.get(word, array)) for word, (name, array) in present.items()}


def _place(function: str, library: Library, present: Present) -> str:
    """ "cpu" or "cuda", where all of them are."""
    if library is OTHER:
        import array_api_compat

        try:
            array_api_compat.array_namespace(*(array for _, array in present.values()))
        except TypeError:
            shown = [(name, f"{type(x).__module__}.{type(x).__name__}") for name, x in present.values()]
            raise TypeError(refusal(function, "all arrays have to be of one library", *shown)) from None
    places = [library.place(array) for _, array in present.values()]
    if any(place != places[0] for place in places):
        known = [place for place in places if place[1] != "traced"]
        if any(place != known[0] for place in known):
            shown = [(name, place[1]) for (name, _), place in zip(present.values(), places, strict=True)]
            raise ValueError(refusal(function, "all arrays have to be on one device", *shown))
    kind = places[0][0]
    if kind not in ("cpu", "cuda"):
        name, array = next(iter(present.values()))
        error = Nowhere if library.has_no_values(array) else ValueError
        raise error(refusal(function, "arrays have to be on the CPU or on a CUDA device", (name, places[0][1])))
    return kind


def cuda_lane(function: str, library: Library, like: Any) -> Any:
    """Between the memory of a GPU, where `like` is, and the host's; see `cuda.lanes`."""
    from cupyattn import cuda

    return cuda.lane(function, library.title, like)
