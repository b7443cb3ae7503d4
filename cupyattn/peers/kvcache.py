"""flash-attn's flash_attn_with_kvcache: attention of new tokens over a cache, which takes their keys and values in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, overload

from cupyattn import reading
from cupyattn.allowed import currently_allowed
from cupyattn.arrays import Arrays, Visit, check_destinations, destinations_of, enter, recorded, shapes
from cupyattn.corridor import Rotation, answer_from_cache, plan_for, views_on_gpu
from cupyattn.peers.appending import INDICES, Appended, check_new
from cupyattn.peers.flash_call import check_hints
from cupyattn.peers.overlap import Memory
from cupyattn.plan import with_num_splits
from cupyattn.problem import A, Array, Problem, Shape
from cupyattn.reading import Options, refusal
from cupyattn.repeating import repeated

FUNCTION = "flash_attn_with_kvcache"
NO_GRADIENTS = "has no gradients, as in flash-attn, and knows no transforms; call it under torch.no_grad()"
OF_CACHES: Any = {"takes_float8": True, "cached": True}


# fmt: off
@overload
def flash_attn_with_kvcache(
    q: A, k_cache: A, v_cache: A, k: A | None = ..., v: A | None = ..., rotary_cos: Array | None = ...,
    rotary_sin: Array | None = ..., cache_seqlens: int | Array | None = ..., cache_batch_idx: Array | None = ...,
    cache_leftpad: Array | None = ..., block_table: Array | None = ..., softmax_scale: float | None = ...,
    causal: bool = ..., window_size: tuple[int | None, int | None] = ..., softcap: float = ...,
    rotary_interleaved: bool = ..., alibi_slopes: Array | None = ..., num_splits: int = ...,
    return_softmax_lse: Literal[False] = ..., *, cu_seqlens_q: Array | None = ..., max_seqlen_q: int | None = ...,
    cu_seqlens_k_new: Array | None = ..., rotary_seqlens: Array | None = ..., page_table: Array | None = ...,
    q_descale: Array | None = ..., k_descale: Array | None = ..., v_descale: Array | None = ...,
    scheduler_metadata: Array | None = ..., pack_gqa: bool | None = ..., sm_margin: int = ...,
    attention_chunk: int = ..., qv: A | None = ...,
    sinks: Array | None = ..., compute_dtype: Any = ..., check_indices: bool = ..., out: A | None = ...,
    lse_out: A | None = ...,
) -> A: ...
@overload
def flash_attn_with_kvcache(
    q: A, k_cache: A, v_cache: A, k: A | None = ..., v: A | None = ..., rotary_cos: Array | None = ...,
    rotary_sin: Array | None = ..., cache_seqlens: int | Array | None = ..., cache_batch_idx: Array | None = ...,
    cache_leftpad: Array | None = ..., block_table: Array | None = ..., softmax_scale: float | None = ...,
    causal: bool = ..., window_size: tuple[int | None, int | None] = ..., softcap: float = ...,
    rotary_interleaved: bool = ..., alibi_slopes: Array | None = ..., num_splits: int = ...,
    *, return_softmax_lse: Literal[True], cu_seqlens_q: Array | None = ..., max_seqlen_q: int | None = ...,
    cu_seqlens_k_new: Array | None = ..., rotary_seqlens: Array | None = ..., page_table: Array | None = ...,
    q_descale: Array | None = ..., k_descale: Array | None = ..., v_descale: Array | None = ...,
    scheduler_metadata: Array | None = ..., pack_gqa: bool | None = ..., sm_margin: int = ...,
    attention_chunk: int = ..., qv: A | None = ...,
    sinks: Array | None = ..., compute_dtype: Any = ..., check_indices: bool = ..., out: A | None = ...,
    lse_out: A | None = ...,
) -> tuple[A, A]: ...
@overload
def flash_attn_with_kvcache(
    q: A, k_cache: A, v_cache: A, k: A | None = ..., v: A | None = ..., rotary_cos: Array | None = ...,
    rotary_sin: Array | None = ..., cache_seqlens: int | Array | None = ..., cache_batch_idx: Array | None = ...,
    cache_leftpad: Array | None = ..., block_table: Array | None = ..., softmax_scale: float | None = ...,
    causal: bool = ..., window_size: tuple[int | None, int | None] = ..., softcap: float = ...,
    rotary_interleaved: bool = ..., alibi_slopes: Array | None = ..., num_splits: int = ...,
    return_softmax_lse: bool = ..., *, cu_seqlens_q: Array | None = ..., max_seqlen_q: int | None = ...,
    cu_seqlens_k_new: Array | None = ..., rotary_seqlens: Array | None = ..., page_table: Array | None = ...,
    q_descale: Array | None = ..., k_descale: Array | None = ..., v_descale: Array | None = ...,
    scheduler_metadata: Array | None = ..., pack_gqa: bool | None = ..., sm_margin: int = ...,
    attention_chunk: int = ..., qv: A | None = ...,
    sinks: Array | None = ..., compute_dtype: Any = ..., check_indices: bool = ..., out: A | None = ...,
    lse_out: A | None = ...,
) -> A | tuple[A, A]: ...
# fmt: on
@recorded(
    shapes.of_kvcache,
    ("out", "lse"),
    always={"return_softmax_lse": True},
    finish=lambda asked, found: tuple(found) if asked["return_softmax_lse"] else found[0],
    destinations=("out", "lse_out"),
    overwrites=("k_cache", "v_cache"),
    has_gradients=False,
    no_gradients=NO_GRADIENTS,
)
@repeated(number="cache_seqlens")
def flash_attn_with_kvcache(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    k: Array | None = None,
    v: Array | None = None,
    rotary_cos: Array | None = None,
    rotary_sin: Array | None = None,
    cache_seqlens: int | Array | None = None,
    cache_batch_idx: Array | None = None,
    cache_leftpad: Array | None = None,
    block_table: Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Array | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    cu_seqlens_q: Array | None = None,
    max_seqlen_q: int | None = None,
    cu_seqlens_k_new: Array | None = None,
    rotary_seqlens: Array | None = None,
    page_table: Array | None = None,
    q_descale: Array | None = None,
    k_descale: Array | None = None,
    v_descale: Array | None = None,
    scheduler_metadata: Array | None = None,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    attention_chunk: int = 0,
    qv: Array | None = None,
    sinks: Array | None = None,
    compute_dtype: Any = None,
    check_indices: bool = False,
    out: Array | None = None,
    lse_out: Array | None = None,
) -> Any:
    """flash-attn's flash_attn_with_kvcache: append to a cache in place, then attend over old keys and new.

    Positional order and defaults are flash-attn 2's; after ``*`` come flash-attn 3's additions, from `cu_seqlens_q`
    to `qv`, and then what is ours.

    Parameters
    ----------
    q : array, shape (batch, seqlen_q, num_heads, head_dim)
        Or (total_q, num_heads, head_dim) with `cu_seqlens_q`.  float16, bfloat16, float32, float64 or float8_e4m3fn.
    k_cache : array, shape (batch, seqlen, num_heads_kv, head_dim)
        Or pages, (num_pages, page_size, num_heads_kv, head_dim), any page size, if `block_table` is given.
    v_cache : array, shape (batch, seqlen, num_heads_kv, head_dim_v)
        Or pages.  All of q, caches and new keys and values are of one dtype; torch.autocast casts all but the caches.
    k, v : array, shapes (batch, seqlen_new, num_heads_kv, head_dim), (batch, seqlen_new, num_heads_kv, head_dim_v)
        Optional: written into the caches, places ``cache_seqlens .. cache_seqlens + seqlen_new - 1`` of each
        sequence.  Or (total_new, ...) with `cu_seqlens_k_new`.
    rotary_cos, rotary_sin : array, shape (positions, rotary_dim / 2), optional
        Rotate `k` at positions from cache_seqlens on, and `q` likewise if there is a causal mask or a window; without
        one, all rows of `q` at cache_seqlens.  At least as many rows as a sequence has places.  Only with `k`.
    cache_seqlens : int or array of int32, shape (batch,), optional
        Places of each sequence that are taken, its left padding included.  Default: all; needed if `k` is given.
    cache_batch_idx : array of int32, shape (batch,), optional
        The sequence of the cache that each sequence of `q` is.  Not with `block_table`.
    cache_leftpad : array of int32, shape (batch,), optional
        Places at the start of each sequence that hold no keys.
    block_table : array of int32, shape (batch, pages of a sequence), optional
        The page of each page_size places; entries past a sequence's last page are not looked at.
    softmax_scale, causal, softcap, alibi_slopes, sinks, compute_dtype
        As for `attention`; causal masks are aligned bottom-right, to the last key after appending.
    window_size : (left, right)
        As for `flash_attn_func`.
    rotary_interleaved : bool
        Pairs of features are neighbours (GPT-J), not halves (GPT-NeoX, Llama).
    num_splits : int
        Splits of a sequence's keys on a GPU, at most; 0: chosen there.  With 1 the result of a sequence does not
        depend on the rest of the batch.  The CPU does not split.
    return_softmax_lse : bool
        Return (out, lse).
    cu_seqlens_q, cu_seqlens_k_new : array of int32, shape (batch + 1,), optional
        Where each sequence starts in a packed `q`, in packed `k` and `v`.
    max_seqlen_q : int, optional
        At least the longest sequence of a packed `q`; needed for one.
    rotary_seqlens : array of int32, shape (batch,), optional
        The position of each sequence's first new token, instead of cache_seqlens.
    page_table
        `block_table`, as flash-attn 3 calls it.
    q_descale, k_descale, v_descale : array of float32, optional
        Factors of float8_e4m3fn numbers, and of no others; they broadcast to (batch, num_heads_kv).  The batch is that
        of `q`, also with `cache_batch_idx`.  Default 1.
    scheduler_metadata : array of int32, optional
        Of `get_scheduler_metadata`, for calls with these lengths: on a GPU it is not made again.  With metadata of
        other lengths results are right all the same, and thread blocks have unequal shares.  That for other sizes
        is refused if it has another length; if not, results are wrong, and nothing outside of the arrays is touched.
    pack_gqa, sm_margin, attention_chunk, qv
        As for `flash_attn_func`.
    check_indices : bool
        On a GPU, wait for the values of all index arrays and refuse wrong ones, as the CPU always does.

    out, lse_out : array, optional
        Memory for the results, as for `attention`; apart from the caches, too.

    Returns
    -------
    out : array, shape (batch, seqlen_q, num_heads, head_dim_v) or (total_q, num_heads, head_dim_v)
        In the dtype of q, or bfloat16 if that is float8_e4m3fn.
    lse : array, shape (batch, num_heads, seqlen_q) or (num_heads, total_q)
        -inf where a query sees no key.

    Raises
    ------
    TypeError
        As `attention`; an index array is not int32, or the caches cannot be overwritten: JAX's and dask's cannot.
    ValueError
        As `attention`; a cache is read-only or has no room, an index leads out of an array, or two new tokens would be
        written to one place, or one of them over a live token of the other cache.  The caches are as they were.
        `scheduler_metadata` has more than one axis, or was made for calls of other sizes or on another device.
    NotImplementedError
        Gradients are wanted, which there are none.

    Notes
    -----
    Two sequences may share pages, and append to different rows of one; all appending is done before any of it is read.
    Both caches may be views of one buffer, page by page or head by head, as long as no new token of one is memory of a
    live token of the other.

    New float8_e4m3fn keys and values are stored as they come: they have to be multiples of the same descales as those
    in the cache.  Where they are rotated, and `q` with them, they are rounded to float8_e4m3fn again, to nearest even;
    what has become too large is 448 of its sign, as where weights are rounded to it on Hopper.

    On a GPU it is two launches, or one if nothing is appended, and nobody waits for the values of index arrays, unless
    `check_indices`: what they name outside of the arrays is neither read nor written, and keys and values of a page
    that there is not count as zeros.  Two new tokens for one place, be it named by both caches, leave either of
    them there, and `q`, `k` and `v` must not lie in the caches themselves.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> k_cache, v_cache = np.zeros((2, 1, 16, 2, 8), np.float32)
    >>> q = k = v = np.ones((1, 1, 2, 8), np.float32)
    >>> cupyattn.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=3).shape
    (1, 1, 2, 8)
    >>> k_cache[0, :5, 0, 0]
    array([0., 0., 0., 1., 0.], dtype=float32)
    """
    arrays = {"q": q, "k": k_cache, "v": v_cache, "k_new": k, "v_new": v, "alibi_slopes": alibi_slopes, "sinks": sinks}
    arrays |= {"rotary_cos": rotary_cos, "rotary_sin": rotary_sin, "rotary_seqlens": rotary_seqlens}
    arrays |= {"cache_batch_idx": cache_batch_idx, "cache_leftpad": cache_leftpad, "block_table": block_table}
    arrays |= {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
    arrays |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k_new": cu_seqlens_k_new}
    visit, seqlen = _enter({**arrays, "scheduler_metadata": scheduler_metadata}, page_table, cache_seqlens)
    options = Options(
        axes="bshd" if cu_seqlens_q is None else "thd",
        window=reading.window(FUNCTION, "window_size", window_size),
        causal=reading.flag(FUNCTION, "causal", causal),
        softmax_scale=reading.softmax_scale(FUNCTION, "softmax_scale", softmax_scale),
        softcap=reading.softcap(FUNCTION, softcap),
        compute_dtype=reading.compute_dtype(FUNCTION, compute_dtype),
        needs_lse=reading.flag(FUNCTION, "return_softmax_lse", return_softmax_lse),
        max_seqlen_q=_longest_of(max_seqlen_q, cu_seqlens_q is not None),
        **OF_CACHES,
    )
    splits, waits = _splits_and_waits(num_splits, check_indices, pack_gqa, sm_margin, attention_chunk, qv)
    results = _answer(visit, options, seqlen, _rotation(options, rotary_interleaved), splits, waits, (out, lse_out))
    return (results["out"], results["lse"]) if return_softmax_lse else results["out"]


def _splits_and_waits(num_splits: Any, check_indices: Any, *hints: Any) -> tuple[int, bool]:
    check_hints(FUNCTION, *hints)
    splits = reading.integer(FUNCTION, "num_splits", num_splits, low=0)
    return splits, reading.flag(FUNCTION, "check_indices", check_indices)


def _rotation(options: Options, rotary_interleaved: Any) -> Rotation:
    each_row = options.causal or options.window != (None, None)
    return Rotation(each_row, reading.flag(FUNCTION, "rotary_interleaved", rotary_interleaved))


def _enter(arrays: Mapping[str, Any], page_table: Any, cache_seqlens: Any) -> tuple[Visit, int | None]:
    """The arrays, given by our words; and cache_seqlens where that is one number, and not an array like the others."""
    arrays, names = dict(arrays), {"k": "k_cache", "v": "v_cache", "k_new": "k", "v_new": "v"}
    if page_table is not None:
        if arrays["block_table"] is not None:
            rule = "page_table is another word for block_table: give one of them"
            raise ValueError(refusal(FUNCTION, rule, ("block_table", "given"), ("page_table", "given")))
        arrays["block_table"], names["block_table"] = page_table, "page_table"
    seqlen = None
    if reading.is_one_number(cache_seqlens):
        seqlen = reading.integer(FUNCTION, "cache_seqlens", cache_seqlens, low=0)
    else:
        arrays["cache_seqlens"] = cache_seqlens
    needed = ("q", "k", "v")
    present = {word: (names.get(word, word), x) for word, x in arrays.items() if x is not None or word in needed}
    return enter(FUNCTION, present, in_place=("k", "v")), seqlen


def _longest_of(max_seqlen_q: Any, packed: bool) -> int:
    if not packed:
        if max_seqlen_q is not None:
            rule = "max_seqlen_q belongs to a packed q, with cu_seqlens_q"
            raise ValueError(refusal(FUNCTION, rule, ("max_seqlen_q", max_seqlen_q)))
        return 0
    if max_seqlen_q is None:
        raise ValueError(refusal(FUNCTION, "max_seqlen_q is needed for a packed q", ("cu_seqlens_q", "given")))
    return reading.integer(FUNCTION, "max_seqlen_q", max_seqlen_q, low=0)


def _answer(
    visit: Visit,
    options: Options,
    seqlen: int | None,
    rotation: Rotation,
    splits: int,
    waits: bool,
    own: tuple[Any, Any],
) -> Arrays:
    """The results by name, once the options are read; `seqlen` is cache_seqlens where that is one number, `own` the
    caller's memory for results."""
    into = destinations_of(FUNCTION, *own, options.needs_lse, "return_softmax_lse=True")
    visit, metadata = _without_metadata(visit)
    problem, specs = reading.read(FUNCTION, visit.specs, options), dict(visit.specs)
    check_new(FUNCTION, visit.specs, problem, seqlen is not None)
    _check_caches(visit)
    if into:
        check_destinations(visit, into, problem.results)
    plan = with_num_splits(plan_for(FUNCTION, problem, visit.device(), currently_allowed()), problem, splits)
    visit.before_work((problem, plan))

    def append(operands: Arrays) -> Arrays:
        """On the CPU: what attention is asked of, once new keys are in the caches."""
        if metadata is not None:
            _check_empty(visit.library.shape(metadata))
        found = Appended.read(FUNCTION, specs, problem, _indices(operands), seqlen)
        return found.append(FUNCTION, specs, problem, operands, *rotation)

    if visit.kind == "cuda" and waits:
        _check_values_on_gpu(visit, problem, seqlen, rotation)
    results = answer_from_cache(visit, problem, plan, seqlen, rotation, append, into, metadata, waits)
    if "k_new" in specs:
        for name in ("k", "v"):
            visit.library.note_overwritten(visit.arrays[name])
    return results


def _without_metadata(visit: Visit) -> tuple[Visit, Any]:
    """scheduler_metadata apart from what attention is asked."""
    word, specs = "scheduler_metadata", dict(visit.specs)
    if word not in specs:
        return visit, None
    spec = specs.pop(word)
    if spec.dtype != "int32" or len(spec.shape) != 1:
        rule = f"{word} has to be what get_scheduler_metadata gives, int32 of one axis"
        kind = ValueError if spec.dtype == "int32" else TypeError
        raise kind(refusal(FUNCTION, rule, (word, spec.shape, spec.dtype)))
    arrays, given = ({name: x for name, x in those.items() if name != word} for those in (visit.arrays, visit.given))
    return replace(visit, arrays=arrays, given=given, specs=tuple(specs.items())), visit.arrays[word]


def _check_empty(shape: Shape) -> None:
    """What `cuda.run_from_cache` refuses on a GPU, on the CPU, where there is no work to be shared out."""
    if shape != (0,):
        rule = "scheduler_metadata was made for other calls: get_scheduler_metadata makes (0,) for one on the CPU"
        raise ValueError(refusal(FUNCTION, rule, ("scheduler_metadata", shape)))


def _check_values_on_gpu(visit: Visit, problem: Problem, seqlen: int | None, rotation: Rotation) -> None:
    """Wait for the values of all index arrays, and refuse what `Appended.append` refuses on the CPU."""
    specs = dict(visit.specs)
    values = {name: visit.library.values(array) for name, array in _indices(visit.arrays).items()}
    found = Appended.read(FUNCTION, specs, problem, values, seqlen)
    in_k, in_v = (Memory.of_view(*view) for view in views_on_gpu(visit, ("k", "v")))
    found.check_apart(FUNCTION, specs, in_k, in_v, values.get("block_table"))
    if "rotary_cos" in specs:
        found.check_positions(FUNCTION, specs, problem, rotation.each_row)


def _check_caches(visit: Visit) -> None:
    """Refuse what would lose gradients, and caches that cannot take keys in."""
    library = visit.library
    if library.differentiates(visit.arrays):
        raise NotImplementedError(refusal(FUNCTION, NO_GRADIENTS))
    if "k_new" not in visit.arrays:
        return
    for word in ("k", "v"):
        name, array = dict(visit.specs)[word].name, visit.arrays[word]
        library.check_writable(FUNCTION, name, array)
        library.check_in_place(FUNCTION, name, array)


def _indices(arrays: Arrays) -> Arrays:
    return {name: arrays[name] for name in INDICES if name in arrays}
