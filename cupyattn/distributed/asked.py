"""What is asked of all ranks together, read and refused as `attention` would the whole of it."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cupyattn.allowed import Allowed, allowed_by
from cupyattn.arrays import Visit, enter
from cupyattn.corridor import plan_for, under_our_names
from cupyattn.distributed.agreement import Statement, agree, check_same_shapes, is_comm, together
from cupyattn.distributed.comm import Comm
from cupyattn.distributed.rectangles import Band
from cupyattn.distributed.sharding import KINDS, Sharding
from cupyattn.problem import FLOAT8, Problem, Spec
from cupyattn.reading import Options, attention_options, expect, flag, integers, read, refusal

Specs = Mapping[str, Spec]
_WORDS = {"axes": "layout", "window": "window_size"}
"""What callers call our options, where it is something else."""

LIKE = {"dout": "out", "out": "out", "lse": "lse", "dlse": "lse"}
"""What gradients come with, and which result it is like."""
ON_GPUS = ("cupy.ndarray", "torch.Tensor")
"""Titles of libraries whose arrays on a GPU can be sent."""


@dataclass(frozen=True)
class Asked:
    """One call, as one rank sees it."""

    function: str
    comm: Comm
    visit: Visit
    rows: Sharding
    """Of one rank, where all have the same."""
    keys: Sharding
    problem: Problem
    """Of this rank's rows over all keys; its band is that of the whole, and means nothing by itself."""
    band: Band
    allowed: Allowed | None
    packed: bool
    options: Options
    of_ranks: tuple[Specs, ...]
    """Of all ranks' arrays."""
    returns_lse: bool

    @property
    def axis(self) -> int:
        """That of the tokens in the caller's arrays."""
        return 0 if self.packed else {"bshd": 1, "bhsd": 2}[self.options.axes]

    @property
    def compute_dtype(self) -> str:
        """Of the arithmetic, and of what is kept for gradients."""
        return "float32" if self.visit.kind == "cuda" else self.options.compute_dtype or "float64"


def ask(
    function: str,
    comm: Any,
    sharding: Any,
    arrays: Mapping[str, Any],
    known: Mapping[str, Any],
    *,
    replicated_rows: bool,
    implementation: Any,
    return_lse: Any = True,
    seqlens_q: Any = None,
    **scalars: Any,
) -> Asked:
    """Look at a call on all ranks; where one of them cannot mean it, all raise.

    `arrays` are operands, `known` those that gradients come with, `seqlens_q` belongs to rows that all ranks have.
    """
    if not is_comm(comm):
        rule = "comm has to be one of cupyattn.distributed's: by run_ranks, MpiComm, TorchComm or NcclComm; "
        rule += "gradients inside of jax.shard_map are jax.grad's" if known else "inside of jax.shard_map a JaxComm"
        raise TypeError(refusal(function, rule, ("comm", repr(comm), type(comm).__name__)))
    mine: dict[str, Any] = {}

    def state() -> Statement:
        options = attention_options(function, return_lse=True, dropout_p=0.0, **scalars)
        visit = enter(function, under_our_names(**arrays, **known))
        _check_home(visit)
        mine["returns_lse"] = flag(function, "return_lse", return_lse)
        name = sharding_meant(function, sharding, options, comm.size)
        mine.update(options=options, visit=visit, allowed=allowed_by(function, implementation), sharding=name)
        mine["seqlens_q"] = seqlens_meant(function, seqlens_q)
        said = {_WORDS.get(word, word): repr(value) for word, value in options._asdict().items()}
        said |= {"sharding": repr(name), "seqlens_q": repr(mine["seqlens_q"])}
        return Statement(dict(visit.specs), {**said, "device": visit.kind})

    of_ranks = agree(comm, function, state)
    options, sharding = mine["options"], mine["sharding"]
    packed = isinstance(sharding, Sharding) and len(of_ranks[0]["q"].shape) == 3
    axis = 0 if packed else {"bshd": 1, "bhsd": 2}[options.axes]
    for word in ("q", "k", "v", "alibi_slopes", "sinks"):
        check_same_shapes(function, of_ranks, word, axis if word in "qkv" else None)
    check_rank(function, of_ranks[0], packed, sharding, options.axes)
    keys = _layout(function, "k", sharding, of_ranks, axis)
    if replicated_rows:
        rows = rows_everywhere(function, mine["seqlens_q"], _rows(function, of_ranks, axis), keys, packed)
    else:
        rows = _layout(function, "q", sharding, of_ranks, axis)
    problems = [_problem(function, specs, options, rows, keys, axis, packed) for specs in of_ranks]
    _check_known(function, of_ranks, problems, packed, comm.rank)
    right = 0 if options.causal else options.window[1]
    band = Band(options.window[0], right, problems[0].mask.alignment == "bottom-right")
    if mine["visit"].kind == "cuda":  # refused before anything is sent
        together(comm, lambda: plan_for(function, problems[comm.rank], mine["visit"].device(), mine["allowed"]))
    return Asked(
        function, comm, mine["visit"], rows, keys, problems[comm.rank], band, mine["allowed"], packed, options,
        tuple(of_ranks), mine["returns_lse"],
    )  # fmt: skip


def _check_known(function: str, of_ranks: list[Specs], problems: list[Problem], packed: bool, own: int) -> None:
    """Refuse, on all ranks, what gradients come with on one of them and is not like its results."""
    for rank, (specs, problem) in enumerate(zip(of_ranks, problems, strict=True)):
        results = states_of(problem, packed)
        for name, like in LIKE.items():
            if name not in specs:
                continue
            try:
                expect(function, specs[name], results[like].shape, results[like].dtype)
            except (TypeError, ValueError) as error:
                if rank == own:
                    raise
                said = ("it said", f"{type(error).__name__}: {error}")
                raise ValueError(refusal(function, f"rank {rank} was refused its arguments", said)) from None


def states_of(problem: Problem, packed: bool) -> dict[str, Spec]:
    """Out and lse in the caller's layout."""
    return {name: spec._replace(shape=spec.shape[1:]) if packed else spec for name, spec in problem.state.items()}


def _check_home(visit: Visit) -> None:
    """Refuse arrays whose values are not to be had here and now, and those that cannot be sent."""
    if visit.kind == "cuda" and visit.library.title not in ON_GPUS:
        rule = f"takes arrays on a GPU from CuPy and torch, not {visit.library.title}; under jax.shard_map see JaxComm"
        raise ValueError(refusal(visit.function, rule, *((x.name, x.shape) for _, x in visit.specs)))
    if visit.library.is_deferred(visit.arrays):
        rule = "needs the arrays' values now, and they are traced; under jax.shard_map see JaxComm"
        raise ValueError(refusal(visit.function, rule, *((x.name, x.shape) for _, x in visit.specs)))
    specs = dict(visit.specs)
    if specs["q"].dtype == FLOAT8:
        raise TypeError(refusal(visit.function, f"does not take {FLOAT8}", ("q", specs["q"].shape, FLOAT8)))


def sharding_meant(function: str, sharding: Any, options: Options, size: int) -> Sharding | str:
    """The layout, or the name of one; by default that in which all ranks have the same work."""
    if sharding is None:
        return "zigzag" if options.causal else "contiguous"
    if isinstance(sharding, str) and sharding in KINDS:
        return sharding
    if not isinstance(sharding, Sharding):
        rule = f"sharding has to be a Sharding, or one of {', '.join(map(repr, KINDS))}"
        raise ValueError(refusal(function, rule, ("sharding", repr(sharding))))
    if sharding.size != size:
        rule = f"sharding has to be for as many ranks as there are, {size}"
        raise ValueError(refusal(function, rule, ("sharding", sharding)))
    return sharding


def layout_of(sharding: Sharding | str, size: int, total: int) -> Sharding:
    """A layout, or that of one sequence by its name."""
    return sharding if isinstance(sharding, Sharding) else Sharding(sharding, size, (total,))  # type: ignore[arg-type]


def check_rank(function: str, specs: Specs, packed: bool, sharding: Any, axes: str) -> None:
    """Refuse arrays of too few or too many axes, and what does not go with packed sequences; all ranks do, who are
    known to ask for the same."""
    rank = 3 if packed else 4
    if not packed and isinstance(sharding, Sharding) and len(sharding.seqlens) != 1:
        rule = "packed sequences are (tokens, num_heads, head_dim), and a layout of others has one length"
        raise ValueError(refusal(function, rule, ("q", specs["q"].shape), ("sharding", sharding)))
    for word in ("q", "k", "v"):
        if len(specs[word].shape) != rank:
            rule = f"{word} has to have 4 axes, or 3, (tokens, num_heads, head_dim), where sharding is a Sharding"
            raise ValueError(refusal(function, rule, *((x, specs[x].shape) for x in ("q", "k", "v"))))
    if packed:
        check_packed(function, axes)
        for word in ("mask", "bias"):
            if word in specs:
                rule = f"{word} does not go with packed sequences"
                raise ValueError(refusal(function, rule, (word, specs[word].shape)))


def check_packed(function: str, axes: str) -> None:
    """Refuse packed sequences whose heads come first."""
    if axes != "bshd":
        rule = "packed sequences are (tokens, num_heads, head_dim), and layout is 'bshd'"
        raise ValueError(refusal(function, rule, ("layout", axes)))


def seqlens_meant(function: str, seqlens_q: Any) -> tuple[int, ...] | None:
    """As a tuple, whatever integers came."""
    if seqlens_q is None:
        return None
    if not isinstance(seqlens_q, (tuple, list)):
        rule = "seqlens_q has to be a tuple or list of integers"
        raise TypeError(refusal(function, rule, ("seqlens_q", reprlib.repr(seqlens_q), type(seqlens_q).__name__)))
    return integers(function, "seqlens_q", seqlens_q)


def rows_everywhere(function: str, seqlens_q: Any, num_rows: int, keys: Sharding, packed: bool) -> Sharding:
    """The layout of rows that all ranks have: of one rank."""
    seqlens_q = seqlens_meant(function, seqlens_q)
    if not packed and seqlens_q is not None:
        rule = "seqlens_q is for packed sequences: (tokens, num_heads, head_dim), and a Sharding that has their lengths"
        raise ValueError(refusal(function, rule, ("seqlens_q", seqlens_q)))
    count = len(keys.seqlens)
    if seqlens_q is None:
        if packed and num_rows != count:
            rule = f"seqlens_q has to be given where {count} packed sequences do not have a query each"
            raise ValueError(refusal(function, rule, ("queries", num_rows), ("sharding", keys)))
        seqlens_q = (1,) * count if packed else (num_rows,)
    if len(seqlens_q) != count or sum(seqlens_q) != num_rows:
        rule = f"seqlens_q has to be one length for each of {count} sequences, and to add up to the queries"
        raise ValueError(refusal(function, rule, ("seqlens_q", seqlens_q), ("queries", num_rows)))
    return Sharding("contiguous", 1, seqlens_q)


def check_alignment(function: str, options: Options, has_slopes: bool, rows: Sharding, keys: Sharding) -> None:
    """Refuse a diagonal of which nobody has said where it is, in any of the sequences."""
    has_diagonal = has_slopes or options.causal or options.window != (None, None)
    if options.alignment is not None or not has_diagonal:
        return
    for sequence, (seqlen_q, seqlen_k) in enumerate(zip(rows.seqlens, keys.seqlens, strict=True)):
        if seqlen_q != seqlen_k:
            rule = (
                "alignment has to be chosen where seqlen_q and seqlen_k differ: 'top-left' puts the diagonal at key 0 "
            )
            rule += "of row 0, 'bottom-right' at the last key of the last row"
            which = [("sequence", sequence)] if len(keys.seqlens) > 1 else []
            raise ValueError(refusal(function, rule, *which, ("seqlen_q", seqlen_q), ("seqlen_k", seqlen_k)))


def _layout(function: str, word: str, sharding: Sharding | str, of_ranks: list[Specs], axis: int) -> Sharding:
    """Whose tokens are where, once every rank's arrays are known to be as long as that says."""
    lengths = tuple(specs[word].shape[axis] for specs in of_ranks)
    if sharding == "contiguous":
        layout = Sharding("contiguous", len(lengths), (sum(lengths),), lengths)
    else:
        layout = layout_of(sharding, len(lengths), sum(lengths))
    for rank, length in enumerate(lengths):
        if length != layout.length(rank):
            shown = [(f"rank {i}", n, f"{layout.length(i)} expected") for i, n in enumerate(lengths)]
            rule = f"{word} of rank {rank} is not as long as the layout says, {layout.length(rank)}"
            raise ValueError(refusal(function, rule, ("sharding", layout), *shown))
    return layout


def _rows(function: str, of_ranks: list[Specs], axis: int) -> int:
    """How many rows all ranks have."""
    lengths = [specs["q"].shape[axis] for specs in of_ranks]
    if len(set(lengths)) > 1:
        rule = "all ranks have to have the same queries"
        raise ValueError(refusal(function, rule, *((f"rank {i}", n) for i, n in enumerate(lengths))))
    return lengths[0]


def _problem(
    function: str, specs: Specs, options: Options, rows: Sharding, keys: Sharding, axis: int, packed: bool
) -> Problem:
    """A rank's rows over all keys, as `attention` would read it; packed sequences as a batch of one."""
    total_q, total_k = sum(rows.seqlens), sum(keys.seqlens)
    if packed:
        check_alignment(function, options, "alibi_slopes" in specs, rows, keys)
    elif options.alignment is None and total_q != total_k:  # whose rows are a part: their own number says nothing
        read(function, tuple(_whole(specs, axis, total_q, total_k).items()), options)
    whole = dict(specs)
    for word in ("k", "v"):
        spec = specs[word]
        own = specs["k"].shape[axis]
        length = total_k if spec.shape[axis] == own else spec.shape[axis]
        whole[word] = spec._replace(shape=(*spec.shape[:axis], length, *spec.shape[axis + 1 :]))
    operands = {word: spec for word, spec in whole.items() if word not in ("dout", "out", "lse", "dlse")}
    if packed:
        operands = batch_of_one(function, operands, keys)
    alignment = options.alignment or "bottom-right"
    return read(function, tuple(operands.items()), options._replace(alignment=alignment))


def _whole(specs: Specs, axis: int, total_q: int, total_k: int) -> dict[str, Spec]:
    def longer(spec: Spec, length: int) -> Spec:
        return spec._replace(shape=(*spec.shape[:axis], length, *spec.shape[axis + 1 :]))

    found = {word: longer(specs[word], total_q if word == "q" else total_k) for word in ("q", "k", "v")}
    return found | {word: specs[word] for word in ("alibi_slopes",) if word in specs}


def batch_of_one(function: str, specs: Specs, sharding: Sharding) -> dict[str, Spec]:
    """Packed sequences, as `attention` would read them."""
    found = {word: x._replace(shape=(1, *x.shape)) if word in ("q", "k", "v") else x for word, x in specs.items()}
    slopes = specs.get("alibi_slopes")
    if slopes is not None and len(slopes.shape) == 2:
        if slopes.shape[0] != len(sharding.seqlens):
            rule = f"alibi_slopes have to be (num_heads,) or (sequences, num_heads), with {len(sharding.seqlens)}"
            raise ValueError(refusal(function, rule, ("alibi_slopes", slopes.shape)))
        found["alibi_slopes"] = slopes._replace(shape=(1, slopes.shape[1]))
    return found
