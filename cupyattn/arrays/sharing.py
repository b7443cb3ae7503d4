"""Calls that the devices of a JAX mesh share out, by the sequences of a dense batch and by heads.

XLA does not know how to share a call of code that is not its own: each device would compute all of it.  It asks us
(`jax.experimental.custom_partitioning`) how operands and results lie, and what each device calls for its part.

Source   JAX's documentation of custom_partitioning; OpenXLA Shardy, sharding rules of operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, NamedTuple, cast

from cupyattn.arrays.library import Arrays, Job
from cupyattn.described import Call
from cupyattn.problem import FLOAT8, Problem, Shape, Spec

BATCH, HEADS = "b", "h"
"""What axes are shared along: sequences, and key heads with all query heads of each, or the query heads of one."""
Axes = Mapping[int, str]
"""Of an array: which of its axes are those."""


class Parts(NamedTuple):
    """Into how many parts a mesh cuts sequences and heads, and along which of its own axes."""

    batch: int
    heads: int
    along: Mapping[str, Any]


def has_a_mesh() -> bool:
    """Several devices, and a JAX that understands what is said here: 0.7 and later."""
    import jax

    return len(jax.devices()) > 1 and hasattr(jax.sharding, "auto_axes")


def objects(call: Call | None) -> bool:
    """Sequences that are no axis, random bits that depend on where a sequence is, and what only GPUs have."""
    if call is None:
        return True
    problem, layout = call.problem, call.problem.layout
    return (
        layout.ragged or layout.cached or layout.page_size is not None or problem.dropout_p > 0.0
        or problem.needs_dropout_mask or problem.dtype == FLOAT8 or not problem.sizes.batch_shape or "" in call.known
        or 0 in (problem.sizes.batch, problem.sizes.num_heads, problem.sizes.num_heads_k, problem.sizes.num_heads_v)
    )  # fmt: skip


def shared(call: Call, made: Callable[[Call], Callable[..., Sequence[Any]]]) -> Callable[..., Any]:
    """``made(call)``, a function of arrays, whose work the devices of a mesh share if they lie so."""
    import jax
    from jax.experimental import custom_partitioning

    untyped: Any = jax
    whole = made(call)
    arrays = {**call.operands, **_known(call)}
    given = [_axes(name, spec.shape, call.problem) for name, spec in arrays.items()]
    found = [_axes(name, spec.shape, call.problem) for name, spec in call.results.items()]

    def partition(mesh: Any, operands: Any, results: Any) -> Any:
        parts = _parts(call.problem, mesh, [*zip(given, operands, strict=True), *zip(found, results, strict=True)])

        def part(*values: Any) -> Any:
            return tuple(
                untyped.lax.psum(x, missing) if (missing := _missing(axes, parts)) else x
                for axes, x in zip(found, made(_part_of(call, given, found, parts))(*values), strict=True)
            )

        return mesh, part, _shardings(mesh, results, found, parts), _shardings(mesh, operands, given, parts)

    def alike(mesh: Any, operands: Any, results: Any) -> Any:
        parts = _parts(call.problem, mesh, [*zip(given, operands, strict=True)])
        return _shardings(mesh, results, found, parts)

    partitioned = cast(Any, custom_partitioning).custom_partitioning(lambda *values: tuple(whole(*values)))
    partitioned.def_partition(
        partition, infer_sharding_from_operands=alike, **_rule(call.problem, arrays, call.results, given, found)
    )

    def one_after_the_other(size: int, is_batched: Sequence[bool], *values: Any) -> Any:
        mapped = untyped.vmap(lambda *own: tuple(whole(*own)), [0 if batched else None for batched in is_batched])
        return mapped(*values), (True,) * len(found)

    call_of_all = untyped.custom_batching.custom_vmap(lambda *values: partitioned(*values))
    call_of_all.def_vmap(one_after_the_other)
    return cast(Callable[..., Any], call_of_all)


def _known(call: Call) -> dict[str, Spec]:
    """What gradients know of the forward pass."""
    state = {**call.problem.state, "dout": call.problem.state["out"], "dlse": call.problem.state["lse"]}
    return {name: state[name] for name in call.known}


def _axes(name: str, shape: Shape, problem: Problem) -> dict[int, str]:
    """Of the operand, or result, of that name; an axis along which it is repeated is none of them."""
    sizes, rank = problem.sizes, len(shape)
    heads = {"q": sizes.num_heads, "k": sizes.num_heads_k, "v": sizes.num_heads_v}.get(name, sizes.num_heads)
    if name in ("sinks", "alibi_slopes"):
        first, of_heads = rank > 1, rank - 1
    elif name in ("seqlens_q", "seqlens_k"):
        return {0: BATCH}
    elif name in ("q", "k", "v", "out", "dout"):
        first, of_heads = rank > 3, 2 if problem.layout.axes == "bshd" else rank - 3
    else:
        first, of_heads = rank == len(sizes.batch_shape) + (2 if name in ("lse", "dlse") else 3), rank - 3
        of_heads += name in ("lse", "dlse")
    found = {0: BATCH} if first and shape[0] == sizes.batch_shape[0] else {}
    units = _units(problem)
    if of_heads >= 0 and units > 1 and shape[of_heads] == heads and heads % units == 0:
        found[of_heads] = HEADS
    return found


def _units(problem: Problem) -> int:
    """How many parts heads could have."""
    of_keys = {problem.sizes.num_heads_k, problem.sizes.num_heads_v}
    return problem.sizes.num_heads if of_keys == {1} else math.gcd(*of_keys)


def _rule(
    problem: Problem,
    arrays: Mapping[str, Spec],
    results: Mapping[str, Spec],
    given: Sequence[Axes],
    found: Sequence[Axes],
) -> dict[str, Any]:
    """The same in the notation of einops: which axes of arrays are cut together; sizes of what is no axis by itself."""
    sizes, others, units = problem.sizes, count(), _units(problem)
    factors: dict[str, int] = {}
    if units > 1 and units not in (sizes.num_heads, sizes.num_heads_k, sizes.num_heads_v):
        factors[HEADS] = units

    def axis(axes: Axes, place: int, size: int) -> str:
        word = axes.get(place)
        if word != HEADS or size == units:
            return word or f"x{next(others)}"
        factors[f"g{size}"] = size // units
        return f"({HEADS} g{size})"

    def words(specs: Mapping[str, Spec], of_each: Sequence[Axes]) -> str:
        each = zip(specs.values(), of_each, strict=True)
        return ", ".join(" ".join(axis(axes, i, n) for i, n in enumerate(spec.shape)) for spec, axes in each)

    return {"sharding_rule": f"{words(arrays, given)} -> {words(results, found)}", **factors}


def _parts(problem: Problem, mesh: Any, arrays: Sequence[tuple[Axes, Any]]) -> Parts:
    """As the first array lies of those that are cut at all; not at all where that does not go into equal parts."""
    sizes, along = problem.sizes, {BATCH: None, HEADS: None}
    whole = {BATCH: sizes.batch_shape[0], HEADS: _units(problem)}
    for axes, array in arrays:
        spec = (*getattr(array.sharding, "spec", ()), *(None,) * len(array.shape))
        for place, word in axes.items():
            cut = spec[place]
            if cut is not None and along[word] is None and whole[word] % _size(mesh, cut) == 0:
                along[word] = cut
    if set(_names(along[BATCH])) & set(_names(along[HEADS])):
        along[HEADS] = None
    return Parts(_size(mesh, along[BATCH]), _size(mesh, along[HEADS]), along)


def _names(cut: Any) -> tuple[str, ...]:
    """Axes of a mesh, as a PartitionSpec has them."""
    return () if cut is None else cut if isinstance(cut, tuple) else (cut,)


def _size(mesh: Any, cut: Any) -> int:
    return math.prod(mesh.shape[name] for name in _names(cut))


def _missing(axes: Axes, parts: Parts) -> tuple[str, ...]:
    """Axes of the mesh along which each device has a part of a sum."""
    return tuple(name for word, cut in parts.along.items() if word not in axes.values() for name in _names(cut))


def _shardings(mesh: Any, arrays: Sequence[Any], of_each: Sequence[Axes], parts: Parts) -> Any:
    from jax.sharding import NamedSharding, PartitionSpec

    def sharding(array: Any, axes: Axes) -> Any:
        along = [parts.along[axes[place]] if place in axes else None for place in range(len(array.shape))]
        return NamedSharding(mesh, cast(Any, PartitionSpec)(*along))

    return tuple(sharding(array, axes) for array, axes in zip(arrays, of_each, strict=True))


def _part_of(call: Call, given: Sequence[Axes], found: Sequence[Axes], parts: Parts) -> Call:
    """The call of one device."""
    problem, divisors = call.problem, {BATCH: parts.batch, HEADS: parts.heads}

    def cut(spec: Spec, axes: Axes) -> Spec:
        shape = tuple(n // divisors[axes[place]] if place in axes else n for place, n in enumerate(spec.shape))
        return spec._replace(shape=shape)

    operands = {name: cut(spec, axes) for (name, spec), axes in zip(call.operands.items(), given, strict=False)}
    results = {name: cut(spec, axes) for (name, spec), axes in zip(call.results.items(), found, strict=True)}
    shapes = {name: operands[name].shape if name in operands else None for name in ("mask", "bias", "alibi_slopes")}
    sizes = replace(
        problem.sizes,
        batch_shape=(problem.sizes.batch_shape[0] // parts.batch, *problem.sizes.batch_shape[1:]),
        num_heads=problem.sizes.num_heads // parts.heads,
        num_heads_k=max(1, problem.sizes.num_heads_k // parts.heads),
        num_heads_v=max(1, problem.sizes.num_heads_v // parts.heads),
    )
    part = replace(
        problem,
        sizes=sizes,
        mask=replace(problem.mask, array=shapes["mask"]),
        edits=replace(problem.edits, bias=shapes["bias"], alibi_slopes=shapes["alibi_slopes"]),
    )
    return call._replace(problem=part, operands=operands, results=results)


# ---- Types that say how arrays lie -----------------------------------------------------------------------------------


def as_types_say(function: Any, job: Job, arrays: Arrays) -> Any:
    """Of arrays whose types say how they lie (`jax.sharding.AxisType.Explicit`): results lie, and say so, alike."""
    import jax

    kinds = {name: getattr(jax.typeof(x), "sharding", None) for name, x in arrays.items()}
    mesh = next((kind.mesh for kind in kinds.values() if kind and getattr(kind.mesh, "explicit_axes", ())), None)
    if mesh is None or not hasattr(jax.sharding, "auto_axes"):
        return function
    specs = tuple(_spec_of(name, spec.shape, job, arrays, kinds) for name, spec in job.results.items())

    def on_mesh(*values: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh):
            return cast(Any, jax.sharding.auto_axes)(function, out_sharding=specs)(*values)

    return on_mesh


def _spec_of(name: str, shape: Shape, job: Job, arrays: Arrays, kinds: Mapping[str, Any]) -> Any:
    """Of a result, along the axes that it has in common with the array it resembles."""
    from jax.sharding import PartitionSpec

    like = name if name in arrays else next(iter(arrays))
    own, spec = tuple(arrays[like].shape), tuple(kinds[like].spec)
    along: list[Any] = [None] * len(shape)
    if len(own) == len(shape):
        along = [axis if mine == its else None for axis, mine, its in zip(spec, own, shape, strict=True)]
    elif job.call is not None and not objects(job.call):
        of_words = {word: spec[place] for place, word in _axes(like, own, job.call.problem).items()}
        for place, word in _axes(name, shape, job.call.problem).items():
            along[place] = of_words.get(word)
    return cast(Any, PartitionSpec)(*along)
