"""Rotary position embedding, as flash-attn's layers.rotary has it."""

from __future__ import annotations

from typing import Any, overload

import numpy as np

from cupyattn import reading
from cupyattn.arrays import Arrays, Visit, check_pair_apart, enter, recorded, shapes
from cupyattn.corridor import Named
from cupyattn.problem import FLOATS, A, Array, Spec
from cupyattn.reading import refusal
from cupyattn.rounding import narrow, widen


# fmt: off
@overload
def apply_rotary_emb(
    x: tuple[A, A], cos: Array, sin: Array,
    interleaved: bool = ..., inplace: bool = ..., seqlen_offsets: int | Array = ..., cu_seqlens: Array | None = ...,
    max_seqlen: int | None = ...,
) -> tuple[A, A]: ...
@overload
def apply_rotary_emb(
    x: A, cos: Array, sin: Array,
    interleaved: bool = ..., inplace: bool = ..., seqlen_offsets: int | Array = ..., cu_seqlens: Array | None = ...,
    max_seqlen: int | None = ...,
) -> A: ...
# fmt: on
@recorded(shapes.of_rotary, (), always={"inplace": False}, finish=lambda asked, found: _as_asked(**asked, found=found))
def apply_rotary_emb(
    x: Array | tuple[Array, Array],
    cos: Array,
    sin: Array,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Array = 0,
    cu_seqlens: Array | None = None,
    max_seqlen: int | None = None,
) -> Any:
    """Rotate pairs of features of `x` by angles that grow with the position.

    A pair ``(a, b)`` at position ``p`` becomes ``(a cos[p] - b sin[p], a sin[p] + b cos[p])``.  Pairs are
    features ``(i, i + rotary_dim / 2)`` (GPT-NeoX, Llama), or ``(2i, 2i + 1)`` if `interleaved` (GPT-J).

    Parameters
    ----------
    x : array, shape (batch, seqlen, num_heads, head_dim)
        Or (tokens, num_heads, head_dim) with `cu_seqlens`.  Or a pair of such, ``(q, k)``, rotated alike: each row at
        the same position, whatever the numbers of heads.
    cos, sin : array, shape (positions, rotary_dim / 2)
        Floating, of any precision, as from `rotary_tables`.  Features from rotary_dim on stay as they are.  Models of
        transformers have every column twice, of which the first half belongs here.
    interleaved : bool
        Which features make a pair.
    inplace : bool
        Write into `x` (and return it); NumPy, torch and others whose arrays can be written to.
    seqlen_offsets : int or array of int, shape (batch,)
        Position of each sequence's first row.  Under jax.jit an int is fixed when it traces; an array is not.
    cu_seqlens : array of int32, shape (batch + 1,), optional
        Where each sequence starts in a packed `x`.
    max_seqlen : int, optional
        At least the longest sequence of a packed `x`; checked if given.

    Returns
    -------
    array, shape of `x`
        In its library, device and dtype; float64 arithmetic, rounded once.  Of a pair a pair, where with `inplace` both
        are computed before one is written.

    Raises
    ------
    TypeError
        Not arrays, of different libraries, wrong dtypes, or `inplace` where arrays are immutable.
    ValueError
        Shapes do not fit, rotary_dim exceeds head_dim, or a position lies outside cos and sin.  A pair that is to be
        overwritten shares memory; a compiled graph, where nobody knows where arrays lie, writes the second one last.

    References
    ----------
    .. [1] J. Su et al., "RoFormer", 2021, arXiv:2104.09864, section 3.4.2.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> q, k = np.ones((1, 3, 8, 64)), np.ones((1, 3, 2, 64))
    >>> cos, sin = cupyattn.rotary_tables(3, 64)
    >>> q, k = cupyattn.apply_rotary_emb((q, k), cos, sin)
    >>> q.shape, k.shape
    ((1, 3, 8, 64), (1, 3, 2, 64))
    """
    function = "apply_rotary_emb"
    pairs_adjacent = reading.flag(function, "interleaved", interleaved)
    overwrite = reading.flag(function, "inplace", inplace)
    tables = {"cos": ("cos", cos), "sin": ("sin", sin), "cu_seqlens": ("cu_seqlens", cu_seqlens)}
    offset = 0
    if reading.is_one_number(seqlen_offsets):
        offset = reading.integer(function, "seqlen_offsets", seqlen_offsets, low=0)
    else:
        tables["offsets"] = ("seqlen_offsets", seqlen_offsets)
    if max_seqlen is not None:
        max_seqlen = reading.integer(function, "max_seqlen", max_seqlen, low=0)
    parts = _parts(function, x)
    visits = [_entered(function, name, part, tables, max_seqlen, overwrite) for name, part in parts]
    if overwrite and len(visits) > 1:
        check_pair_apart(visits, "x", [part for _, part in parts])
    results = [_turned(visit, offset, max_seqlen, pairs_adjacent) for visit in visits]
    if overwrite:
        for visit, (name, part), result in zip(visits, parts, results, strict=True):
            visit.library.write(function, name, part, result)
        return x
    return tuple(results) if isinstance(x, tuple) else results[0]


def _as_asked(x: Any, found: list[Array], inplace: bool, **others: Any) -> Any:
    """Of an operator's results, which are one or two."""
    if inplace:
        for part, result in zip(x if isinstance(x, tuple) else (x,), found, strict=True):
            part.copy_(result)
        return x
    return tuple(found) if isinstance(x, tuple) else found[0]


def _parts(function: str, x: Any) -> list[tuple[str, Any]]:
    """What is to be rotated, by the name that the caller knows it by."""
    if not isinstance(x, tuple):
        return [("x", x)]
    if len(x) != 2:
        rule = "x has to be an array, or a pair of arrays, (q, k)"
        raise TypeError(refusal(function, rule, ("x", f"of length {len(x)}", "tuple")))
    return [("x[0]", x[0]), ("x[1]", x[1])]


def _entered(function: str, name: str, x: Any, tables: Named, max_seqlen: int | None, overwrite: bool) -> Visit:
    """The arrays of a rotation, checked as far as they can be without their values."""
    visit = enter(function, {"x": (name, x), **tables})
    _check(function, dict(visit.specs), max_seqlen)
    if overwrite:
        visit.library.check_writable(function, name, x)
        visit.arrays["x"] = visit.library.as_it_is_now("x", visit.arrays)
    if visit.kind == "cuda":
        visit.device()
    return visit


def _turned(visit: Visit, offset: int, max_seqlen: int | None, pairs_adjacent: bool) -> Array:
    function, specs = visit.function, dict(visit.specs)  # a graph that keeps what is below keeps no arrays

    def rotation(operands: Arrays) -> tuple[Array, Array, Array]:
        """Positions, and cos and sin at them, broadcasting to (..., rows, heads, rotary_dim / 2)."""
        positions = _positions(function, specs, operands, offset, max_seqlen)
        at = [widen(operands[name], "float64")[positions][..., None, :] for name in ("cos", "sin")]
        return positions, at[0], at[1]

    def forward(operands: Arrays) -> Arrays:
        _, cosine, sine = rotation(operands)
        return {"out": narrow(_rotate(widen(operands["x"], "float64"), cosine, sine, pairs_adjacent), specs["x"].dtype)}

    def backward(operands: Arrays, known: Arrays) -> Arrays:
        positions, cosine, sine = rotation(operands)
        dout, values = widen(known["dout"], "float64"), widen(operands["x"], "float64")
        found = {"x": narrow(_rotate(dout, cosine, -sine, pairs_adjacent), specs["x"].dtype)}
        first, second = _pairs(2 * cosine.shape[-1], pairs_adjacent)
        a, b, da, db = values[..., first], values[..., second], dout[..., first], dout[..., second]
        for name, share in (("cos", da * a + db * b), ("sin", db * a - da * b)):
            total = np.zeros(specs[name].shape)
            rows = share.sum(axis=-2)
            np.add.at(total, np.broadcast_to(positions, rows.shape[:-1]), rows)
            found[name] = narrow(total, specs[name].dtype)
        return found

    return visit.run(forward, backward, {"out": Spec("out", specs["x"].shape, specs["x"].dtype)})["out"]


def rotated(x: Array, cos: Array, sin: Array, positions: Array, adjacent: bool, dtype: str) -> Array:
    """NumPy rows of `dtype`, (..., heads, head_dim), rotated at `positions`, (...), and rounded once."""
    at = [widen(table[positions], "float64")[..., None, :] for table in (cos, sin)]
    return narrow(_rotate(widen(x, "float64"), at[0], at[1], adjacent), dtype)


def _pairs(rotary_dim: int, adjacent: bool) -> tuple[slice, slice]:
    if adjacent:
        return slice(0, rotary_dim, 2), slice(1, rotary_dim, 2)
    return slice(0, rotary_dim // 2), slice(rotary_dim // 2, rotary_dim)


def _rotate(x: Array, cosine: Array, sine: Array, adjacent: bool) -> Array:
    first, second = _pairs(2 * cosine.shape[-1], adjacent)
    out = np.array(x, order="C")
    with np.errstate(all="ignore"):
        out[..., first] = x[..., first] * cosine - x[..., second] * sine
        out[..., second] = x[..., first] * sine + x[..., second] * cosine
    return out


def too_wide(name: str, columns: int, head_dim: int) -> str:
    """The rule that a table of so many columns breaks, and what to do with one as transformers has it."""
    rule = f"rotary_dim, twice the columns of {name}, must not exceed head_dim, {head_dim}"
    if columns != head_dim:
        return rule
    return f"{rule}; where every column comes twice, as in transformers, pass {name}[:, :{head_dim // 2}]"


def _check(function: str, specs: dict[str, Spec], max_seqlen: int | None) -> None:
    x, cos, sin = specs["x"], specs["cos"], specs["sin"]
    for spec in (x, cos, sin):
        if spec.dtype not in FLOATS:
            rule = f"{spec.name} has to be one of {', '.join(FLOATS)}"
            raise TypeError(refusal(function, rule, (spec.name, spec.shape, spec.dtype)))
    packed = "cu_seqlens" in specs
    axes = reading.AXES["thd" if packed else "bshd"]
    if len(x.shape) != (3 if packed else 4):
        raise ValueError(refusal(function, f"{x.name} has to be {axes}", (x.name, x.shape)))
    if len(cos.shape) != 2 or cos.shape != sin.shape:
        rule = "cos and sin have to be of one shape, (positions, rotary_dim / 2)"
        raise ValueError(refusal(function, rule, ("cos", cos.shape), ("sin", sin.shape)))
    if 2 * cos.shape[1] > x.shape[-1]:
        rule = too_wide("cos", cos.shape[1], x.shape[-1])
        raise ValueError(refusal(function, rule, (x.name, x.shape), ("cos", cos.shape)))
    if packed:
        spec = specs["cu_seqlens"]
        if spec.dtype != "int32":
            raise TypeError(refusal(function, reading.int32_rule(spec.name), (spec.name, spec.shape, spec.dtype)))
        if len(spec.shape) != 1 or spec.shape[0] < 1:
            raise ValueError(refusal(function, "cu_seqlens has to be (batch + 1,)", (spec.name, spec.shape)))
    elif max_seqlen is not None:
        rule = "max_seqlen belongs to a packed x, with cu_seqlens"
        raise ValueError(refusal(function, rule, ("max_seqlen", max_seqlen)))
    if "offsets" in specs:
        spec = specs["offsets"]
        batch = specs["cu_seqlens"].shape[0] - 1 if packed else x.shape[0]
        if spec.dtype not in ("int32", "int64"):
            raise TypeError(refusal(function, "seqlen_offsets has to be int32 or int64", (spec.name, spec.dtype)))
        if spec.shape != (batch,):
            rule = f"seqlen_offsets has to be an int, or to hold one position per sequence, ({batch},)"
            raise ValueError(refusal(function, rule, (spec.name, spec.shape)))


def _positions(function: str, specs: dict[str, Spec], operands: Arrays, offset: int, max_seqlen: int | None) -> Array:
    """The position of every row: (batch | 1, seqlen), or (tokens,) if packed."""
    x = specs["x"].shape
    if "cu_seqlens" in specs:
        starts = operands["cu_seqlens"].astype(np.int64)
        steps = np.diff(starts)
        if starts[0] != 0 or (steps < 0).any() or starts[-1] != x[0]:
            rule = "cu_seqlens has to start with 0, must not decrease, and has to end with the rows of x"
            raise ValueError(refusal(function, rule, ("cu_seqlens", reading.short(starts.tolist())), ("x", x)))
        if max_seqlen is not None and steps.max(initial=0) > max_seqlen:
            rule = "a sequence of cu_seqlens is longer than max_seqlen"
            raise ValueError(refusal(function, rule, ("longest", int(steps.max())), ("max_seqlen", max_seqlen)))
        first = operands["offsets"].astype(np.int64) if "offsets" in specs else np.full(steps.shape, offset)
        positions = np.arange(x[0]) - np.repeat(starts[:-1] - first, steps)
    else:
        first = operands["offsets"].astype(np.int64) if "offsets" in specs else np.array([offset])
        positions = first[:, None] + np.arange(x[1])
    known = specs["cos"].shape[0]
    if positions.size and (positions.min() < 0 or positions.max() >= known):
        rule = f"positions have to be from 0 to {known - 1}, the rows of cos and sin"
        came = (("positions", f"{positions.min()} to {positions.max()}"), ("cos", specs["cos"].shape))
        raise ValueError(refusal(function, rule, *came))
    return np.asarray(positions)
