"""flash_attn_with_kvcache against a loop over sequences, rows and keys that writes out flash-attn's rules."""

import inspect
import re
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from conftest import SEED
from homes import HostBackedCuPy
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_correctly_rounded, assert_matches, assert_same_bits, to_numpy

import cupyattn
from cupyattn import flash_attn_with_kvcache

FUNCTION = "flash_attn_with_kvcache"
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
FLOAT8 = "float8_e4m3fn"
STORED = {**DTYPES, FLOAT8: ml_dtypes.float8_e4m3fn}
DESCALES = ("q_descale", "k_descale", "v_descale")
CAPACITY = 24


# ---------------------------------------------------------------------------------------------------
# The definition
# ---------------------------------------------------------------------------------------------------


def turned(row, cos, sin, interleaved):
    """One row, (heads, head_dim), rotated: pairs of features as complex numbers."""
    half, row = cos.size, row.astype(np.float64)
    first, second = (
        (np.arange(half) * 2, np.arange(half) * 2 + 1) if interleaved else np.arange(2 * half).reshape(2, half)
    )
    pairs = (row[:, first] + 1j * row[:, second]) * (cos.astype(np.float64) + 1j * sin.astype(np.float64))
    row[:, first], row[:, second] = pairs.real, pairs.imag
    return row


EIGHT_BITS = np.arange(256, dtype=np.uint8).view(STORED[FLOAT8])
SIZES = EIGHT_BITS[:127].astype(np.float64)


def stored(x, kind):
    """float64 numbers as a cache of this kind keeps them; ml_dtypes rounds to float8 twice, and knows no saturation."""
    if kind != STORED[FLOAT8]:
        return x.astype(kind)
    off = np.abs(np.abs(x)[..., None] - SIZES)
    nearest = off == off.min(axis=-1, keepdims=True)
    even = nearest & (np.arange(127) % 2 == 0)  # of two as near, one is
    index = np.where(even.any(axis=-1), even.argmax(axis=-1), nearest.argmax(axis=-1))
    return EIGHT_BITS[np.where(np.signbit(x), 128, 0) + index]


def one_row(q, k, v, diagonal, left, right, softcap, slopes, sinks, scale):
    """(out, lse) of one query, (heads, head_dim), over all keys of its sequence."""
    out, lse = np.zeros((q.shape[0], v.shape[-1])), np.full(q.shape[0], -np.inf)
    seen = [j for j in range(len(k)) if diagonal - left <= j <= diagonal + right]
    for head in range(q.shape[0]):
        keys, values = (x[seen, head * x.shape[1] // q.shape[0]] for x in (k, v))
        scores = keys @ q[head] * scale
        scores = softcap * np.tanh(scores / softcap) if softcap else scores
        scores = scores - slopes[head] * np.abs(diagonal - np.array(seen, int))
        every = np.append(scores, sinks[head])
        if np.isneginf(every.max()):
            continue
        powers = np.exp(every - every.max())
        out[head] = powers[:-1] / powers.sum() @ values
        lse[head] = every.max() + np.log(powers.sum())
    return out, lse


class Case(NamedTuple):
    """A call sequence by sequence, and what is the same for all of them."""

    dtype: str
    q: list
    new: list
    """(k, v) of each sequence, or None."""
    seqlens: list
    leftpad: list
    tables: Any
    """(cos, sin) or None."""
    positions: Any
    """rotary_seqlens or None."""
    interleaved: bool
    edits: dict
    """causal, window_size, softcap, softmax_scale, alibi_slopes, sinks."""
    descales: dict
    """{name: (batch, heads)} of those that are given."""


def defined(case, caches):
    """(out, lse) of each sequence, and each sequence's own cache, (k, v), as it is after the call."""
    edits, found, after = case.edits, [], []
    left, right = (np.inf if side in (-1, None) else side for side in edits["window_size"])
    each_row = edits["causal"] or min(left, right) < np.inf
    if edits["causal"]:
        right = 0
    for b, q in enumerate(case.q):
        k, v = (cache.copy() for cache in caches[b])
        start, stop = case.leftpad[b], case.seqlens[b]
        first = stop if case.positions is None else case.positions[b]
        rows = q.astype(np.float64)
        if case.new[b] is not None:
            for i, (k_row, v_row) in enumerate(zip(*case.new[b], strict=True)):
                if case.tables is not None:
                    k_row = turned(k_row, *(table[first + i] for table in case.tables), case.interleaved)
                k[stop + i], v[stop + i] = stored(k_row.astype(np.float64), k.dtype), v_row
            stop += len(case.new[b][0])
            if case.tables is not None:
                at = [first + (i if each_row else 0) for i in range(len(q))]
                rows = [turned(q[i], *(t[p] for t in case.tables), case.interleaved) for i, p in enumerate(at)]
                rows = stored(np.array(rows).reshape(q.shape), q.dtype).astype(np.float64)
        factors = [np.float64(case.descales.get(name, np.ones((len(case.q), 1))))[b] for name in DESCALES]
        live = [x[start:stop] * y[:, None] for x, y in zip((k, v), factors[1:], strict=True)]
        rows = rows * np.repeat(factors[0], q.shape[1] // factors[0].size)[:, None]
        slopes = np.broadcast_to(np.float64(edits.get("alibi_slopes", 0.0)), (len(case.q), q.shape[1]))[b]
        sinks = np.broadcast_to(np.float64(edits.get("sinks", -np.inf)), q.shape[1:2])
        scale = edits["softmax_scale"] or q.shape[-1] ** -0.5
        results = [
            one_row(rows[i], *live, i + stop - start - len(q), left, right, edits["softcap"], slopes, sinks, scale)
            for i in range(len(q))
        ]
        found.append(results)
        after.append((k, v))
    return found, after


# ---------------------------------------------------------------------------------------------------
# Calls
# ---------------------------------------------------------------------------------------------------


def homes(torch, array):
    """The array in torch's hands, sharing memory, or as it is."""
    if not torch or array is None:
        return array
    library = pytest.importorskip("torch")
    if array.dtype == ml_dtypes.bfloat16:
        return library.from_numpy(array.view(np.int16)).view(library.bfloat16)
    if array.dtype == STORED[FLOAT8]:
        return library.from_numpy(array.view(np.uint8)).view(library.float8_e4m3fn)
    return library.from_numpy(array)


def as_pages(rng, caches, page_size, share=None):
    """Sequences' caches as pages in random order among others of nan, and the table."""
    capacity = len(caches[0][0])
    count = -(-capacity // page_size)
    order = rng.permutation(len(caches) * count + 2).astype(np.int32)
    table = order[: len(caches) * count].reshape(len(caches), count)
    pages = []
    for which in range(2):
        sample = caches[0][which]
        found = np.full((order.size, page_size, *sample.shape[1:]), np.nan, sample.dtype)
        for b, cache in enumerate(caches):
            for key in range(capacity):
                found[table[b, key // page_size], key % page_size] = cache[which][key]
        pages.append(found)
    return (*pages, table)


def of_sequence(pages, table, b):
    """What a sequence's pages hold, (k, v)."""
    return tuple(x[table[b]].reshape(-1, *x.shape[2:])[:CAPACITY] for x in pages)


@st.composite
def calls(draw, dtypes=tuple(DTYPES)):
    """A case, and how it is put to the function."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from(dtypes))
    kind, batch = STORED[dtype], draw(st.integers(0, 3))
    heads, heads_k, heads_v = draw(st.sampled_from([(1, 1, 1), (4, 2, 2), (4, 1, 2), (6, 3, 3)]))
    head_dim, head_dim_v = draw(st.sampled_from([(4, 4), (6, 5)]))
    packed_q, packed_new = draw(st.booleans()), draw(st.booleans())

    def lengths(most, same):
        one = draw(st.integers(0, most))
        return [one if same else draw(st.integers(0, most)) for _ in range(batch)]

    q = [rng.standard_normal((n, heads, head_dim)).astype(kind) for n in lengths(5, not packed_q)]
    appends = draw(st.booleans())
    counts = lengths(5, not packed_new) if appends else [0] * batch
    shapes = [(heads_k, head_dim), (heads_v, head_dim_v)]
    new = [tuple(rng.standard_normal((n, *s)).astype(kind) for s in shapes) if appends else None for n in counts]
    seqlens = [draw(st.integers(0, CAPACITY - n)) for n in counts]
    uniform = draw(st.booleans())
    if uniform:
        seqlens = [min(seqlens, default=0)] * batch
    leftpad = [draw(st.integers(0, n)) for n in seqlens] if draw(st.booleans()) else [0] * batch
    tables = positions = None
    if appends and draw(st.booleans()):
        half = draw(st.integers(0, head_dim // 2))
        of_tables = DTYPES.get(dtype, np.float32)
        tables = (rng.standard_normal((2, CAPACITY + 6, half)) * draw(st.sampled_from([1, 300]))).astype(of_tables)
        positions = [draw(st.integers(0, CAPACITY)) for _ in range(batch)] if draw(st.booleans()) else None
    edits: dict[str, Any] = {
        "causal": draw(st.booleans()),
        "window_size": (draw(st.sampled_from([-1, None, 0, 2, 9])), draw(st.sampled_from([-1, -1, 0, 1, 4]))),
        "softcap": draw(st.sampled_from([0.0, 1.5])),
        "softmax_scale": draw(st.sampled_from([None, 0.5])),
    }
    if draw(st.booleans()):
        shape = draw(st.sampled_from([(heads,), (batch, heads)]))
        edits["alibi_slopes"] = rng.uniform(0.0, 1.0, shape).astype(np.float32)
    if draw(st.booleans()):
        edits["sinks"] = rng.standard_normal(heads).astype(np.float32)
    descales = {}
    if dtype == FLOAT8:
        for name, count in zip(DESCALES, (heads_k, heads_k, heads_v), strict=True):
            if draw(st.booleans()):
                descales[name] = rng.uniform(0.3, 3.0, (batch, count)).astype(np.float32)
    case = Case(dtype, q, new, seqlens, leftpad, tables, positions, draw(st.booleans()), edits, descales)
    how = {
        "torch": draw(st.booleans()),
        "packed_q": packed_q,
        "packed_new": packed_new and appends,
        "uniform": uniform,
        "page_size": draw(st.sampled_from([None, None, 1, 3, 8, 24])),
        "reordered": draw(st.booleans()),
    }
    sizes = (heads, head_dim, heads_k, heads_v, head_dim_v)
    return case, how, sizes, rng


def starts_of(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def joined(arrays, packed, shape, kind):
    """Sequences end to end, or side by side."""
    if packed:
        return np.concatenate([np.zeros((0, *shape), kind), *arrays])
    return np.stack(arrays) if arrays else np.zeros((0, 1, *shape), kind)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(calls())
def test_follows_flash_attns_rules_and_appends_in_place(call):
    check_call(call)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(calls((FLOAT8,)))
def test_float8_follows_the_same_rules(call):
    check_call(call)


def check_call(call):
    """Hold a call's results to the definition, and both caches to what it leaves there."""
    case, how, (heads, head_dim, heads_k, heads_v, head_dim_v), rng = call
    kind, batch = STORED[case.dtype], len(case.q)
    caches = [
        tuple(rng.standard_normal((CAPACITY, *s)).astype(kind) for s in ((heads_k, head_dim), (heads_v, head_dim_v)))
        for _ in range(batch)
    ]
    found, after = defined(case, caches)
    arguments: dict[str, Any] = {**case.edits, **case.descales}
    order = None
    if how["page_size"] is not None and batch:
        k_cache, v_cache, table = as_pages(rng, caches, how["page_size"])
        arguments["page_table" if how["reordered"] else "block_table"] = table
    else:
        order = rng.permutation(batch + 2)[:batch].astype(np.int32) if how["reordered"] else np.arange(batch)
        rooms = batch + 2 if how["reordered"] else batch
        k_cache = np.full((rooms, CAPACITY, heads_k, head_dim), np.nan, kind)
        v_cache = np.full((rooms, CAPACITY, heads_v, head_dim_v), np.nan, kind)
        for b, place in enumerate(order):
            k_cache[place], v_cache[place] = caches[b]
        if how["reordered"]:
            arguments["cache_batch_idx"] = order
    before = k_cache.copy(), v_cache.copy()
    arguments["q"] = joined(case.q, how["packed_q"], (heads, head_dim), kind)
    if how["packed_q"]:
        arguments["cu_seqlens_q"] = starts_of([len(q) for q in case.q])
        arguments["max_seqlen_q"] = 5
    if batch and case.new[0] is not None:
        for i, (name, shape) in enumerate((("k", (heads_k, head_dim)), ("v", (heads_v, head_dim_v)))):
            arguments[name] = joined([new[i] for new in case.new], how["packed_new"], shape, kind)
        if how["packed_new"]:
            arguments["cu_seqlens_k_new"] = starts_of([len(new[0]) for new in case.new])
        if case.tables is not None:
            arguments |= {"rotary_cos": case.tables[0], "rotary_sin": case.tables[1]}
            arguments["rotary_interleaved"] = case.interleaved
            if case.positions is not None:
                arguments["rotary_seqlens"] = np.array(case.positions, np.int32)
    if any(case.leftpad):
        arguments["cache_leftpad"] = np.array(case.leftpad, np.int32)
    uniform = how["uniform"] and batch
    arguments["cache_seqlens"] = case.seqlens[0] if uniform else np.array(case.seqlens, np.int32)
    given_arrays = {
        name: homes(how["torch"], x) if isinstance(x, np.ndarray) else x
        for name, x in {**arguments, "k_cache": k_cache, "v_cache": v_cache}.items()
    }
    out, lse = flash_attn_with_kvcache(**given_arrays, return_softmax_lse=True)
    out, lse = to_numpy(out), to_numpy(lse)
    places = starts_of([len(q) for q in case.q])
    for b, results in enumerate(found):
        for i, (row, its_lse) in enumerate(results):
            at = (places[b] + i,) if how["packed_q"] else (b, i)
            if case.dtype == "float64":
                assert_matches(out[at], row, rtol=1e-11, atol=1e-12)
            else:
                assert_correctly_rounded(out[at], row, "bfloat16" if case.dtype == FLOAT8 else case.dtype, share=0.0)
            there = lse[:, places[b] + i] if how["packed_q"] else lse[b, :, i]
            assert_matches(there, its_lse, rtol=2.0**-23, atol=1e-6)
    for which, cache in enumerate((k_cache, v_cache)):
        expected = before[which].copy()
        for b in range(batch):
            if order is not None:
                expected[order[b]] = after[b][which]
            else:
                for key in range(CAPACITY):
                    expected[table[b, key // how["page_size"]], key % how["page_size"]] = after[b][which][key]
        if case.dtype == "float64":
            assert_matches(cache, expected, rtol=1e-14, atol=1e-14)
        else:
            assert_same_bits(cache, expected)


def floats(*shape, dtype="float32", seed=SEED):
    return np.random.default_rng(seed).standard_normal(shape).astype(DTYPES[dtype])


def ints(*values):
    return np.array(values, np.int32)


def good(**changes):
    """A call that works: four query heads over two key heads, two new tokens for each of two sequences."""
    arguments = {
        "q": floats(2, 2, 4, 8),
        "k_cache": floats(2, CAPACITY, 2, 8),
        "v_cache": floats(2, CAPACITY, 2, 8, seed=2),
        "k": floats(2, 2, 2, 8, seed=3),
        "v": floats(2, 2, 2, 8, seed=4),
        "cache_seqlens": ints(5, 9),
    }
    return {name: x for name, x in {**arguments, **changes}.items() if x is not None or name in ("q", "k_cache")}


def paged(**changes):
    """The same over eight pages of six keys."""
    pages = {"k_cache": floats(8, 6, 2, 8), "v_cache": floats(8, 6, 2, 8, seed=2)}
    return good(**{**pages, "block_table": ints([5, 2, 0, 7], [1, 6, 3, 4]), **changes})


def tables(positions=CAPACITY, half=3):
    return {"rotary_cos": floats(positions, half, seed=5), "rotary_sin": floats(positions, half, seed=6)}


# ---------------------------------------------------------------------------------------------------
# One thing each
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_apply_rotary_emb_then_a_write_then_attention(dtype):
    """Bit for bit, step by step by the functions for each."""
    arguments = {name: x.astype(DTYPES[dtype]) if x.dtype.kind == "f" else x for name, x in good(**tables()).items()}
    k_cache, v_cache = arguments["k_cache"].copy(), arguments["v_cache"].copy()
    out = flash_attn_with_kvcache(**arguments, causal=True)
    turning = {"interleaved": True, "seqlen_offsets": arguments["cache_seqlens"]}
    cos, sin = arguments["rotary_cos"], arguments["rotary_sin"]
    q, k = (cupyattn.apply_rotary_emb(arguments[name], cos, sin, **turning) for name in "qk")
    for b, n in enumerate(arguments["cache_seqlens"]):
        k_cache[b, n : n + 2], v_cache[b, n : n + 2] = k[b], arguments["v"][b]
        there = cupyattn.flash_attn_func(
            *(x[b : b + 1] for x in (q, k_cache[:, : n + 2], v_cache[:, : n + 2])), causal=True
        )
        assert_same_bits(out[b], there[0])
    assert_same_bits(arguments["k_cache"], k_cache)
    assert_same_bits(arguments["v_cache"], v_cache)


@pytest.mark.parametrize("page_size", [1, 5, 8, 24])
def test_pages_give_the_bits_of_a_contiguous_cache(rng, page_size):
    contiguous = good(cache_leftpad=ints(2, 0))
    caches = [(contiguous["k_cache"][b], contiguous["v_cache"][b]) for b in range(2)]
    k_pages, v_pages, table = as_pages(rng, caches, page_size)
    pages = {**contiguous, "k_cache": k_pages, "v_cache": v_pages, "block_table": table}
    assert_same_bits(flash_attn_with_kvcache(**pages, causal=True), flash_attn_with_kvcache(**contiguous, causal=True))
    for b in range(2):
        for found, name in zip(of_sequence((k_pages, v_pages), table, b), ("k_cache", "v_cache"), strict=True):
            assert_same_bits(found, contiguous[name][b])


@pytest.mark.parametrize("page_size", range(1, 257))
def test_every_page_size_gives_the_bits_of_a_contiguous_cache(rng, page_size):
    caches = [(floats(300, 2, 8, seed=b), floats(300, 2, 8, seed=9 + b)) for b in range(2)]
    contiguous = {"k_cache": np.stack([k for k, _ in caches]), "v_cache": np.stack([v for _, v in caches])}
    k_pages, v_pages, table = as_pages(rng, caches, page_size)
    given = {"q": floats(2, 3, 4, 8, seed=5), "cache_seqlens": ints(300, 211), "causal": True}
    out = flash_attn_with_kvcache(k_cache=k_pages, v_cache=v_pages, block_table=table, **given)
    assert_same_bits(out, flash_attn_with_kvcache(**contiguous, **given))


def test_a_decode_step_by_step_is_one_prefill():
    k, v, q = floats(1, 9, 2, 8), floats(1, 9, 2, 8, seed=2), floats(1, 9, 4, 8, seed=3)
    caches = np.full((2, 1, CAPACITY, 2, 8), np.nan, np.float32)
    rows = [
        flash_attn_with_kvcache(
            q[:, i : i + 1], *caches, k[:, i : i + 1], v[:, i : i + 1], cache_seqlens=i, causal=True
        )
        for i in range(9)
    ]
    assert_matches(np.concatenate(rows, axis=1), cupyattn.flash_attn_func(q, k, v, causal=True), atol=1e-7)


def test_a_length_for_all_may_be_an_array_of_shape_nothing():
    out = flash_attn_with_kvcache(**good(cache_seqlens=np.array(5)))
    assert_same_bits(out, flash_attn_with_kvcache(**good(cache_seqlens=5)))


def test_without_lengths_all_of_the_cache_is_attended():
    arguments = good(k=None, v=None, cache_seqlens=None)
    whole = cupyattn.flash_attn_func(arguments["q"], arguments["k_cache"], arguments["v_cache"])
    assert_same_bits(flash_attn_with_kvcache(**arguments), whole)


@pytest.mark.parametrize("make", [good, paged], ids=["contiguous", "paged"])
def test_what_is_not_live_is_never_looked_at(make):
    """nan before the padding's end, behind the last key, and in all other sequences and pages."""
    arguments = make(cache_leftpad=ints(3, 8))
    poisoned = {name: x.copy() for name, x in arguments.items()}
    table = arguments.get("block_table")
    for name in ("k_cache", "v_cache"):
        flat = poisoned[name]
        for b, (first, stop) in enumerate([(3, 5), (8, 9)]):
            for key in range(CAPACITY):
                if not first <= key < stop:
                    flat[(b, key) if table is None else (table[b, key // 6], key % 6)] = np.nan
    assert_same_bits(flash_attn_with_kvcache(**poisoned), flash_attn_with_kvcache(**arguments))


def test_a_sequence_without_keys_gives_zero_and_minus_infinity():
    out, lse = flash_attn_with_kvcache(**good(k=None, v=None, cache_seqlens=ints(0, 9)), return_softmax_lse=True)
    assert not out[0].any()
    assert np.isneginf(lse[0]).all()
    assert np.isfinite(lse[1]).all()


def test_rows_behind_the_last_sequence_give_zero_and_minus_infinity():
    packed = {"q": floats(7, 4, 8), "cu_seqlens_q": ints(0, 2, 5), "max_seqlen_q": 3}
    out, lse = flash_attn_with_kvcache(**good(**packed, **tables()), return_softmax_lse=True)
    assert not out[5:].any()
    assert np.isneginf(lse[:, 5:]).all()
    assert np.isfinite(lse[:, :5]).all()


@pytest.mark.parametrize("packed", [False, True])
def test_without_a_mask_all_rows_of_q_are_rotated_as_the_first(packed):
    q = np.repeat(floats(2, 1, 4, 8), 2, axis=1)
    layout = {"q": q.reshape(4, 4, 8), "cu_seqlens_q": ints(0, 2, 4), "max_seqlen_q": 2} if packed else {"q": q}
    out = flash_attn_with_kvcache(**good(**layout, **tables())).reshape(q.shape)
    assert_same_bits(out[:, 0], out[:, 1])


def test_two_sequences_append_to_different_rows_of_one_page():
    """A page of twelve: the second sequence starts where the first one ends."""
    arguments = paged(
        k_cache=floats(3, 12, 2, 8),
        v_cache=floats(3, 12, 2, 8, seed=2),
        block_table=ints([1, 0], [1, 2]),
        cache_seqlens=ints(4, 6),
    )
    before = arguments["k_cache"].copy()
    flash_attn_with_kvcache(**arguments)
    assert_same_bits(arguments["k_cache"][1, 4:6], arguments["k"][0])
    assert_same_bits(arguments["k_cache"][1, 6:8], arguments["k"][1])
    untouched = np.ones((3, 12), bool)
    untouched[1, 4:8] = False
    assert_same_bits(arguments["k_cache"][untouched], before[untouched])


def test_views_of_one_array_of_both_caches_are_written_to():
    both = floats(2, CAPACITY, 2, 2, 8)
    arguments = good(k_cache=both[:, :, 0], v_cache=both[:, :, 1])
    flash_attn_with_kvcache(**arguments)
    assert_same_bits(both[0, 5:7, 0], arguments["k"][0])
    assert_same_bits(both[1, 9:11, 1], arguments["v"][1])


def test_new_keys_may_be_rows_of_the_cache_itself():
    arguments = good()
    cache = arguments["k_cache"]
    arguments["k"] = cache[:, 4:6]
    expected = cache[:, 4:6].copy()
    flash_attn_with_kvcache(**arguments)
    assert_same_bits(cache[0, 5:7], expected[0])


def interleaved(dims, *, order=(0, 1, 2, 3), gaps=(1, 1, 1, 1), signs=(1, 1, 1, 1)):
    """Bytes from step to step of float32 numbers, the axes nested in some order with gaps between; their reach."""
    steps, reach = [0] * 4, 4
    for axis in reversed(order):
        steps[axis] = reach * gaps[axis]
        reach = steps[axis] * dims[axis]
    return tuple(step * sign for step, sign in zip(steps, signs, strict=True)), reach


def bytes_of(cache, places):
    """The numbers of all bytes of tokens at some places, one by one."""
    (pages, slots), base = places, cache.base.__array_interface__["data"][0]
    found = set()
    for page, slot in zip(pages, slots, strict=True):
        for index in np.ndindex(cache.shape[2:]):
            address = cache[(page, slot, *index, ...)].__array_interface__["data"][0]
            found |= set(range(address - base, address - base + 4))
    return found


def of_one_buffer(rng, has_pages):
    """A call whose caches are views of one buffer, and whether a new token of one is in a live token of the other."""
    dims = (16, 3, 2, 2) if has_pages else (6, 6, 2, 2)
    orders = [(0, 1, 2, 3), (0, 1, 2, 3), (1, 0, 2, 3), (2, 0, 1, 3), (0, 2, 1, 3), (0, 1, 3, 2)]
    order, gaps = orders[rng.integers(6)], tuple(rng.choice([1, 1, 2], 4))
    wide = (*dims[:3], dims[3] - rng.integers(2))  # head_dim_v may be smaller
    signs = tuple(rng.choice([1, 1, 1, -1], 4))
    (steps, reach), (steps_v, reach_v) = (
        interleaved(dims, order=order, gaps=gaps, signs=signs),
        interleaved(dims, order=order if rng.integers(4) else orders[rng.integers(6)], gaps=gaps, signs=signs),
    )
    shift = int(rng.choice([0, 4, 8, 16, 2, abs(steps[0]), abs(steps[1]), abs(steps[2]), rng.integers(reach)]))
    buffer = np.zeros(reach + reach_v + shift, np.uint8)

    def view(shape, steps, first):
        first += sum(-step * (size - 1) for step, size in zip(steps, shape, strict=True) if step < 0)
        return np.ndarray(shape, np.float32, buffer, first, steps)

    k_cache, v_cache = view(dims, steps, 0), view(wide, steps_v, shift)
    k_cache[...], v_cache[...] = rng.standard_normal(dims), rng.standard_normal(wide)
    batch = 2
    table = rng.permutation(dims[0])[: 2 * batch if has_pages else batch].reshape(batch, -1).astype(np.int32)
    capacity, count = table.shape[1] * dims[1], int(rng.integers(1, 3))
    seqlens = rng.integers(0, capacity - count + 1, batch)
    leftpad = np.array([rng.integers(0, n + 1) for n in seqlens])
    places = []
    for first, stop in ((seqlens, seqlens + count), (leftpad, seqlens + count)):
        keys = [(b, key) for b in range(batch) for key in range(first[b], stop[b])]
        places.append(zip(*((table[b, key // dims[1]], key % dims[1]) for b, key in keys), strict=True))
    new, live = map(list, places)
    both = (k_cache, v_cache)
    together = any(bytes_of(a, new) & bytes_of(b, live) for a, b in (both, both[::-1]))
    named = {"block_table": table} if has_pages else {"cache_batch_idx": table[:, 0]}
    q, k = rng.standard_normal((2, batch, count, 2, 2)).astype(np.float32)
    v = rng.standard_normal((batch, count, 2, wide[3])).astype(np.float32)
    lengths = {"cache_seqlens": seqlens.astype(np.int32), "cache_leftpad": leftpad.astype(np.int32)}
    return {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, **lengths, **named}, together


@pytest.mark.parametrize("has_pages", [False, True], ids=["contiguous", "paged"])
def test_caches_of_one_buffer_are_refused_only_where_a_new_token_is_a_live_one_of_the_other(rng, has_pages):
    """Pages, slots, heads and features interleaved, forwards and backwards, against a count of bytes one by one."""
    refused = 0
    for _ in range(120):
        arguments, together = of_one_buffer(rng, has_pages)
        apart = {name: x.copy() for name, x in arguments.items()}
        refused += together
        if together:
            before = arguments["k_cache"].base.tobytes()
            with pytest.raises(ValueError, match="k_cache and v_cache share memory, and a new token"):
                flash_attn_with_kvcache(**arguments)
            assert arguments["k_cache"].base.tobytes() == before
        else:
            assert_same_bits(flash_attn_with_kvcache(**arguments), flash_attn_with_kvcache(**apart))
    assert 30 < refused < 90


def test_interleaved_pages_of_one_buffer_are_appended_to(rng):
    """As transformers' continuous batching lays out layers: a page of keys, one of values, one of the next layer's."""
    layers, blocks, page_size = 2, 6, 4
    buffer = np.zeros((blocks * layers * 2, page_size, 2, 8), np.float32)
    expected = buffer.copy()
    table = ints([0, 2], [4, 1]) * 2 * layers
    for layer in range(layers):
        caches = [buffer[2 * layer + which :][: len(buffer) - 3] for which in range(2)]
        apart = [cache.copy() for cache in caches]
        for n in range(6):
            q, k, v = rng.standard_normal((3, 2, 1, 2, 8)).astype(np.float32)
            given = {"cache_seqlens": ints(n, n), "block_table": table}
            assert_same_bits(
                flash_attn_with_kvcache(q, *caches, k, v, **given), flash_attn_with_kvcache(q, *apart, k, v, **given)
            )
            for which, new in enumerate((k, v)):
                expected[table[:, n // page_size] + 2 * layer + which, n % page_size] = new[:, 0]
    assert_same_bits(buffer, expected)


def test_interleaved_pages_are_refused_where_one_is_named_by_both():
    buffer = floats(12, 4, 2, 8)
    before = buffer.copy()
    arguments = paged(k_cache=buffer[:-1], v_cache=buffer[1:], cache_seqlens=ints(3, 5))
    arguments["block_table"] = ints([0, 2], [4, 1])  # v's page 1 is k's page 2
    with pytest.raises(ValueError, match="k_cache and v_cache share memory"):
        flash_attn_with_kvcache(**arguments)
    assert_same_bits(buffer, before)
    arguments["block_table"] = ints([0, 2], [4, 6])
    flash_attn_with_kvcache(**arguments)


def test_caches_in_each_others_bounds_by_steps_that_do_not_nest_are_refused():
    """Places at 0, 2, 4 and 3, 5, 7: nobody decides which numbers such a cache has."""
    buffer = floats(40)
    odd = [np.lib.stride_tricks.as_strided(buffer[first:], (2, 3, 1, 1), (12, 8, 4, 4)) for first in range(2)]
    new = floats(2, 1, 1, 1)
    with pytest.raises(ValueError, match="k_cache and v_cache share memory"):
        flash_attn_with_kvcache(new, *odd, new, new, cache_seqlens=0)
    far = np.lib.stride_tricks.as_strided(buffer[20:], (2, 3, 1, 1), (12, 8, 4, 4))
    assert_same_bits(flash_attn_with_kvcache(new, odd[0], far, new, new, cache_seqlens=0), new)


def test_queries_may_be_rows_of_the_cache_itself():
    arguments = good(k_cache=floats(2, CAPACITY, 4, 8), v_cache=floats(2, CAPACITY, 4, 8, seed=2))
    arguments |= {"k": floats(2, 2, 4, 8, seed=3), "v": floats(2, 2, 4, 8, seed=4), "cache_seqlens": ints(5, 5)}
    apart = {name: x.copy() for name, x in arguments.items()}
    arguments["q"] = arguments["k_cache"][:, 5:7]
    apart["q"] = apart["k_cache"][:, 5:7].copy()
    assert_same_bits(flash_attn_with_kvcache(**arguments), flash_attn_with_kvcache(**apart))


def test_one_place_of_the_cache_may_be_read_twice():
    arguments = good(k=None, v=None, cache_batch_idx=ints(1, 1))
    out = flash_attn_with_kvcache(**{**arguments, "q": np.repeat(arguments["q"][:1], 2, axis=0)}, causal=True)
    assert out.shape == (2, 2, 4, 8)


def test_names_order_and_defaults_are_flash_attn_2s_and_what_follows_comes_by_keyword_only():
    parameters = inspect.signature(flash_attn_with_kvcache).parameters.values()
    positional = {x.name: x.default for x in parameters if x.kind is x.POSITIONAL_OR_KEYWORD}
    assert positional == {
        **dict.fromkeys(("q", "k_cache", "v_cache"), inspect.Parameter.empty),
        **dict.fromkeys(("k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx")),
        **dict.fromkeys(("cache_leftpad", "block_table", "softmax_scale")),
        "causal": False,
        "window_size": (-1, -1),
        "softcap": 0.0,
        "rotary_interleaved": True,
        "alibi_slopes": None,
        "num_splits": 0,
        "return_softmax_lse": False,
    }
    assert list(positional)[:11] == [
        *("q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin"),
        *("cache_seqlens", "cache_batch_idx", "cache_leftpad", "block_table"),
    ]
    assert {x.name for x in parameters if x.kind is x.KEYWORD_ONLY} == {
        *("cu_seqlens_q", "max_seqlen_q", "cu_seqlens_k_new", "rotary_seqlens", "page_table"),
        *("q_descale", "k_descale", "v_descale", "sinks", "compute_dtype", "check_indices", "out", "lse_out"),
        *("scheduler_metadata", "pack_gqa", "sm_margin", "attention_chunk", "qv"),
    }


def test_lse_comes_only_if_asked():
    assert isinstance(flash_attn_with_kvcache(**good()), np.ndarray)
    out, lse = flash_attn_with_kvcache(**good(), return_softmax_lse=True)
    assert (out.shape, lse.shape) == ((2, 2, 4, 8), (2, 4, 2))


@pytest.mark.parametrize("splits", [1, 7])
def test_the_cpu_does_not_split(splits):
    assert_same_bits(flash_attn_with_kvcache(**good(), num_splits=splits), flash_attn_with_kvcache(**good()))


# ---------------------------------------------------------------------------------------------------
# Float8
# ---------------------------------------------------------------------------------------------------


def in_float8(arguments, **changes):
    """A call whose queries, keys and values are float8, with descales that no two heads share."""
    named = ("q", "k_cache", "v_cache", "k", "v")
    found = {name: x.astype(STORED[FLOAT8]) if name in named else x for name, x in arguments.items()}
    factors = np.random.default_rng(SEED).uniform(0.3, 3.0, (3, 2, 2)).astype(np.float32)
    given = {**found, **dict(zip(DESCALES, factors, strict=True)), **changes}
    return {name: x for name, x in given.items() if x is not None}


def test_new_float8_keys_are_stored_as_they_come_all_patterns_of_them():
    patterns = np.arange(256, dtype=np.uint8)
    arguments = in_float8(good(), k=None, v=None) | {
        name: np.roll(patterns, shift).repeat(2).reshape(2, 16, 2, 8).view(STORED[FLOAT8])
        for name, shift in (("k", 0), ("v", 7))
    }
    arguments["cache_seqlens"] = ints(5, 8)
    flash_attn_with_kvcache(**arguments)
    for b, n in enumerate((5, 8)):
        for name in ("k", "v"):
            there = arguments[f"{name}_cache"][b, n : n + 16].view(np.uint8)
            assert_same_bits(there, arguments[name][b].view(np.uint8))


@pytest.mark.parametrize("page_size", [1, 5, 8, 24])
def test_pages_of_float8_give_the_bits_of_a_contiguous_cache(rng, page_size):
    contiguous = in_float8(good(cache_leftpad=ints(2, 0), **tables(25), causal=True))
    caches = [(contiguous["k_cache"][b], contiguous["v_cache"][b]) for b in range(2)]
    k_pages, v_pages, table = as_pages(rng, caches, page_size)
    pages = {**contiguous, "k_cache": k_pages, "v_cache": v_pages, "block_table": table}
    assert_same_bits(flash_attn_with_kvcache(**pages), flash_attn_with_kvcache(**contiguous))
    for b in range(2):
        for found, name in zip(of_sequence((k_pages, v_pages), table, b), ("k_cache", "v_cache"), strict=True):
            assert_same_bits(found, contiguous[name][b])


def test_descales_are_those_of_the_sequences_of_the_call_wherever_in_the_cache_they_lie():
    arguments = in_float8(good(k=None, v=None))
    elsewhere = {name: arguments[name][::-1].copy() for name in ("k_cache", "v_cache")}
    found = flash_attn_with_kvcache(**{**arguments, **elsewhere}, cache_batch_idx=ints(1, 0))
    assert_same_bits(found, flash_attn_with_kvcache(**arguments))


def test_one_place_of_a_float8_cache_may_be_read_with_two_descales():
    arguments = in_float8(good(k=None, v=None, cache_seqlens=9, cache_batch_idx=ints(1, 1)), v_descale=None)
    arguments |= {"q": arguments["q"][:1].repeat(2, axis=0), "q_descale": None, "k_descale": None}
    out = flash_attn_with_kvcache(**arguments, v_descale=np.float32([[1, 2], [4, 8]])).astype(np.float64)
    assert_matches(out[1], 4 * out[0])


def test_one_descale_serves_all_and_none_is_one():
    arguments = in_float8(good(k=None, v=None), **dict.fromkeys(DESCALES))
    expected = flash_attn_with_kvcache(**arguments)
    ones = {name: np.ones(shape, np.float32) for name, shape in zip(DESCALES, [(), (2,), (2, 1)], strict=True)}
    assert_same_bits(flash_attn_with_kvcache(**arguments, **ones), expected)


def test_what_rotation_makes_too_large_for_float8_is_448_of_its_sign():
    arguments = in_float8(good(**tables()))
    arguments["rotary_cos"] = np.full_like(arguments["rotary_cos"], 1e4)
    arguments["rotary_sin"] = np.zeros_like(arguments["rotary_sin"])
    arguments["k"][:] = np.where(np.arange(8) % 2, -1.0, 1.0)
    flash_attn_with_kvcache(**arguments)
    rows = arguments["k_cache"][0, 5:7].astype(np.float64)
    assert_same_bits(rows, np.broadcast_to([448.0, -448.0] * 3 + [1.0, -1.0], rows.shape))


def test_a_decode_of_float8_step_by_step_is_one_prefill():
    q, k, v = (floats(1, 9, heads, 8, seed=seed).astype(STORED[FLOAT8]) for heads, seed in ((4, 3), (2, 1), (2, 2)))
    factors = {name: np.float32([[0.5, 3.0]]) for name in DESCALES}
    caches = np.full((2, 1, CAPACITY, 2, 8), np.nan, STORED[FLOAT8])
    rows = [
        flash_attn_with_kvcache(
            q[:, i : i + 1], *caches, k[:, i : i + 1], v[:, i : i + 1], cache_seqlens=i, causal=True, **factors
        )
        for i in range(9)
    ]
    whole = cupyattn.flash_attn_func(q, k, v, causal=True, **factors)
    assert whole.dtype == rows[0].dtype == ml_dtypes.bfloat16
    assert_matches(np.concatenate(rows, axis=1), whole, rtol=2.0**-8)


# ---------------------------------------------------------------------------------------------------
# Libraries
# ---------------------------------------------------------------------------------------------------


def in_torch(arguments):
    return {name: homes(True, x) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}


def test_torch_notices_that_its_caches_have_changed():
    """A cache that was kept for a backward pass is not used there with new values."""
    torch = pytest.importorskip("torch")
    arguments = in_torch(good())
    weight = torch.ones(8, requires_grad=True)
    used = (arguments["k_cache"] * weight).sum()
    with torch.no_grad():
        flash_attn_with_kvcache(**arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        used.backward()


def test_torch_tensors_of_inference_mode_are_taken():
    torch = pytest.importorskip("torch")
    with torch.inference_mode():
        arguments = {name: x.clone() for name, x in in_torch(good()).items()}
        out = flash_attn_with_kvcache(**arguments)
    assert_same_bits(out, flash_attn_with_kvcache(**good()))


@pytest.mark.parametrize("name", ["q", "k_cache", "k"])
def test_gradients_are_refused_and_not_lost(name):
    torch = pytest.importorskip("torch")
    arguments = in_torch(good())
    before = arguments["k_cache"].clone()
    arguments[name].requires_grad_()
    with pytest.raises(NotImplementedError, match=f"{FUNCTION}: has no gradients"):
        flash_attn_with_kvcache(**arguments)
    assert_same_bits(arguments["k_cache"], before)
    with torch.no_grad():
        flash_attn_with_kvcache(**arguments)


def test_vmap_is_refused():
    torch = pytest.importorskip("torch")
    arguments = in_torch(good())
    with pytest.raises(NotImplementedError, match="knows no transforms"):
        torch.func.vmap(lambda q: flash_attn_with_kvcache(**{**arguments, "q": q}))(arguments["q"][None])


def test_a_negated_view_cannot_be_overwritten():
    torch = pytest.importorskip("torch")
    arguments = in_torch(good())
    negated = torch.zeros(arguments["k_cache"].shape, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    with pytest.raises(ValueError, match="k_cache was to be overwritten, and is negated or zero by a flag"):
        flash_attn_with_kvcache(**{**arguments, "k_cache": negated})


def test_other_libraries_whose_arrays_can_be_written_to_are_taken():
    xp = pytest.importorskip("array_api_strict")
    arguments = {name: xp.asarray(x) for name, x in good().items()}
    out = flash_attn_with_kvcache(**arguments)
    expected = good()
    assert_same_bits(out, flash_attn_with_kvcache(**expected))
    assert_same_bits(arguments["k_cache"], expected["k_cache"])


@pytest.mark.parametrize("name", ["jax.numpy", "dask.array"])
def test_immutable_arrays_are_refused_in_words_and_may_be_read(name):
    xp = pytest.importorskip(name)
    arguments = {word: xp.asarray(x) for word, x in good().items()}
    with pytest.raises(TypeError, match=rf"{FUNCTION}: k_cache cannot be overwritten: .* is immutable"):
        flash_attn_with_kvcache(**arguments)
    reading = good(k=None, v=None)
    found = flash_attn_with_kvcache(**{word: xp.asarray(x) for word, x in reading.items()})
    assert_same_bits(np.asarray(found), flash_attn_with_kvcache(**reading))


def test_rows_of_a_cupy_cache_that_share_memory_are_refused():
    cupy = pytest.importorskip("cupy")
    if cupy.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    arguments = {name: HostBackedCuPy("float32").make(x) for name, x in good().items()}
    cache = arguments["k_cache"]
    arguments["k_cache"] = cupy.ndarray(cache.shape, cache.dtype, cache.data, strides=(0, *cache.strides[1:]))
    with pytest.raises(ValueError, match="k_cache was to be overwritten, and its elements share memory"):
        flash_attn_with_kvcache(**arguments)


def test_a_cache_of_foreign_byte_order_is_written_in_it():
    arguments = good()
    foreign = {name: x.astype(x.dtype.newbyteorder(">")) for name, x in arguments.items()}
    flash_attn_with_kvcache(**arguments)
    flash_attn_with_kvcache(**foreign)
    assert_same_bits(foreign["k_cache"].astype(np.float32), arguments["k_cache"])


# ---------------------------------------------------------------------------------------------------
# Refused
# ---------------------------------------------------------------------------------------------------


def read_only():
    array = floats(2, CAPACITY, 2, 8)
    array.flags.writeable = False
    return array


def eight(**changes):
    return in_float8(good(), **changes)


def paged_eight(**changes):
    return in_float8(paged(), **changes)


BOTH = floats(2, CAPACITY, 2, 8)
PACKED_Q = {"q": floats(5, 4, 8), "cu_seqlens_q": ints(0, 2, 5), "max_seqlen_q": 3}
PACKED_NEW = {"k": floats(3, 2, 8), "v": floats(3, 2, 8), "cu_seqlens_k_new": ints(0, 1, 3)}

# fmt: off
BAD = [
    # ---- What comes with what
    ("k without v", good, ValueError, ["k is appended together with v"], {"v": None}),
    ("v without k", good, ValueError, ["v is appended together with k"], {"k": None}),
    ("k without cache_seqlens", good, ValueError, ["cache_seqlens has to say where"], {"cache_seqlens": None}),
    ("cos without sin", good, ValueError, ["rotary_cos needs rotary_sin"], {"rotary_cos": floats(24, 3)}),
    ("sin without cos", good, ValueError, ["rotary_sin needs rotary_cos"], {"rotary_sin": floats(24, 3)}),
    ("rotary without k", good, ValueError, ["rotary_cos needs k"], {"k": None, "v": None, **tables()}),
    ("rotary_seqlens alone", good, ValueError, ["rotary_seqlens needs rotary_cos"], {"rotary_seqlens": ints(0, 0)}),
    ("cu_seqlens_k_new alone", good, ValueError, ["cu_seqlens_k_new needs k"],
     {"k": None, "v": None, "cu_seqlens_k_new": ints(0, 1, 2)}),
    ("max_seqlen_q alone", good, ValueError, ["max_seqlen_q belongs to a packed q"], {"max_seqlen_q": 2}),
    ("no max_seqlen_q", good, ValueError, ["max_seqlen_q is needed"], {**PACKED_Q, "max_seqlen_q": None}),
    ("both tables", paged, ValueError, ["page_table is another word for block_table"],
     {"page_table": ints([5, 2, 0, 7], [1, 6, 3, 4])}),
    ("pages and batch_idx", paged, ValueError, ["block_table and cache_batch_idx exclude each other"],
     {"cache_batch_idx": ints(0, 1)}),
    ("q_descale", good, TypeError, ["q_descale is for operands of float8", "float32"], {"q_descale": floats(2, 2)}),
    ("k_descale", good, TypeError, ["k_descale is for operands of float8", "float32"], {"k_descale": floats(2, 2)}),
    ("v_descale", paged, TypeError, ["v_descale is for operands of float8", "float32"], {"v_descale": floats(2, 2)}),
    # ---- Float8
    ("q alone in float8", good, TypeError, ["q, k_cache, v_cache have to be of one dtype", FLOAT8],
     {"q": floats(2, 2, 4, 8).astype(STORED[FLOAT8])}),
    ("float8 of another kind", good, TypeError, ["q has to be one of float16", "float8_e5m2"],
     {"q": floats(2, 2, 4, 8).astype(ml_dtypes.float8_e5m2)}),
    ("new v of float32 for float8", eight, TypeError, ["v and v_cache have to be of one dtype", FLOAT8, "float32"],
     {"v": floats(2, 2, 2, 8)}),
    ("new k of float16 for paged float8", paged_eight, TypeError, ["k and k_cache have to be of one dtype", "float16"],
     {"k": floats(2, 2, 2, 8, dtype="float16")}),
    ("descale of float64", eight, TypeError, ["k_descale has to be float32", "float64"],
     {"k_descale": floats(2, 2, dtype="float64")}),
    ("descale of every query head", paged_eight, ValueError,
     ["q_descale does not broadcast to (batch, num_heads_kv), (2, 2)", "(2, 4)"], {"q_descale": floats(2, 4)}),
    ("descale of every place of the cache", eight, ValueError,
     ["v_descale does not broadcast to (batch, num_heads_kv), (2, 2)", "(3, 2)"],
     {"k_cache": floats(3, 24, 2, 8).astype(STORED[FLOAT8]), "v_cache": floats(3, 24, 2, 8).astype(STORED[FLOAT8]),
      "cache_batch_idx": ints(0, 2), "v_descale": floats(3, 2)}),
    ("descale as a number", eight, TypeError, ["q_descale has to be an array", "float"], {"q_descale": 0.5}),
    ("tables of float8", eight, TypeError, ["rotary_cos has to be one of float16", FLOAT8],
     {name: x.astype(STORED[FLOAT8]) for name, x in tables().items()}),
    ("no room for float8", paged_eight, ValueError, ["sequence 1 would have 25 keys"], {"cache_seqlens": ints(5, 23)}),
    ("a float8 position past the tables", eight, ValueError, ["positions have to be from 0 to 23"],
     {**tables(), "rotary_seqlens": ints(23, 23)}),
    # ---- Shapes
    ("q of three axes", good, ValueError, ["q has to have 4 axes"], {"q": floats(2, 4, 8)}),
    ("packed q of four axes", good, ValueError, ["q has to have 3 axes"], {**PACKED_Q, "q": floats(2, 2, 4, 8)}),
    ("cu_seqlens_q of two axes", good, ValueError, ["cu_seqlens_q has to have 1 axes"],
     {**PACKED_Q, "cu_seqlens_q": ints([0, 2, 5])}),
    ("cu_seqlens_q of none", good, ValueError, ["cu_seqlens_q has to be (batch + 1,)"],
     {**PACKED_Q, "cu_seqlens_q": ints()}),
    ("cache of three axes", good, ValueError, ["k_cache has to have 4 axes"], {"k_cache": floats(2, 24, 16)}),
    ("caches of different length", good, ValueError, ["k_cache and v_cache have to hold the same"],
     {"v_cache": floats(2, 23, 2, 8)}),
    ("caches of different pages", paged, ValueError, ["k_cache and v_cache have to hold the same pages"],
     {"v_cache": floats(7, 6, 2, 8)}),
    ("caches of different head_dim", good, ValueError, ["q and k_cache have different head_dim"],
     {"q": floats(2, 2, 4, 6)}),
    ("heads that do not divide", good, ValueError, ["number of heads of k_cache has to divide", "num_heads = 3"],
     {"q": floats(2, 2, 3, 8)}),
    ("more sequences in the cache", good, ValueError, ["k_cache has to hold as many sequences as q, 2"],
     {"k_cache": floats(3, 24, 2, 8), "v_cache": floats(3, 24, 2, 8)}),
    ("cache_seqlens for three", good, ValueError, ["cache_seqlens has to have one entry per sequence, (2,)", "(3,)"],
     {"cache_seqlens": ints(1, 2, 3)}),
    ("leftpad for three", good, ValueError, ["cache_leftpad has to have one entry", "(3,)"],
     {"cache_leftpad": ints(1, 2, 3)}),
    ("batch_idx for one", good, ValueError, ["cache_batch_idx has to have one entry", "(1,)"],
     {"cache_batch_idx": ints(1)}),
    ("rotary_seqlens of two axes", good, ValueError, ["rotary_seqlens has to have one entry", "(1, 2)"],
     {**tables(), "rotary_seqlens": ints([1, 2])}),
    ("table of one axis", paged, ValueError, ["block_table has to have 2 axes"], {"block_table": ints(1, 2)}),
    ("table for three", paged, ValueError, ["block_table has to have one row per sequence, 2", "(3, 2)"],
     {"block_table": ints([0, 1], [2, 3], [4, 5])}),
    ("pages of nothing", paged, ValueError, ["a page has to hold at least one key"],
     {"k_cache": floats(8, 0, 2, 8), "v_cache": floats(8, 0, 2, 8)}),
    ("new k of other heads", good, ValueError,
     ["k has to be (batch, seqlen_new, num_heads_kv, head_dim)", "(2, 2, 4, 8)"],
     {"k": floats(2, 2, 4, 8)}),
    ("new k for three", good, ValueError, ["k has to be", "(3, 2, 2, 8)"], {"k": floats(3, 2, 2, 8)}),
    ("new v of other head_dim", good, ValueError, ["v has to be", "as v_cache has it"], {"v": floats(2, 2, 2, 6)}),
    ("more new v than k", good, ValueError, ["k and v have to hold the same new tokens"], {"v": floats(2, 3, 2, 8)}),
    ("packed new k of four axes", good, ValueError, ["k has to be (total, num_heads_kv, head_dim)"],
     {"cu_seqlens_k_new": ints(0, 1, 2)}),
    ("cu_seqlens_k_new for three", good, ValueError, ["cu_seqlens_k_new has to be (batch + 1,), (3,)"],
     {**PACKED_NEW, "cu_seqlens_k_new": ints(0, 1, 2, 3)}),
    ("cos and sin of two shapes", good, ValueError, ["rotary_cos and rotary_sin have to be of one shape"],
     {**tables(), "rotary_sin": floats(24, 2)}),
    ("rotary_dim past head_dim", good, ValueError, ["must not exceed head_dim, 8", "(24, 5)"], tables(half=5)),
    ("columns twice", good, ValueError, ["as in transformers, pass rotary_cos[:, :4]", "(24, 8)"], tables(half=8)),
    ("tables shorter than the cache", good, ValueError, ["a row for every place", "24", "(23, 3)"], tables(23)),
    ("slopes of other heads", good, ValueError, ["alibi_slopes has to be (num_heads,) or"],
     {"alibi_slopes": floats(2)}),
    ("sinks of other heads", good, ValueError, ["sinks has to hold one logit per query head"], {"sinks": floats(2)}),
    # ---- Dtypes and kinds
    ("v_cache of another dtype", good, TypeError, ["q, k_cache, v_cache have to be of one dtype", "float64"],
     {"v_cache": floats(2, 24, 2, 8, dtype="float64")}),
    ("new k of another dtype", good, TypeError, ["k and k_cache have to be of one dtype", "float16"],
     {"k": floats(2, 2, 2, 8, dtype="float16")}),
    ("integer q", good, TypeError, ["q has to be one of float16"], {"q": np.ones((2, 2, 4, 8), np.int32)}),
    ("tables of two dtypes", good, TypeError, ["rotary_cos and rotary_sin have to be of one dtype", "float16"],
     {**tables(), "rotary_sin": floats(24, 3, dtype="float16")}),
    ("complex tables", good, TypeError, ["rotary_sin has to be one of float16", "complex64"],
     {**tables(), "rotary_sin": floats(24, 3) * np.complex64(1j)}),
    ("cache_seqlens of int64", good, TypeError, ["cache_seqlens has to be int32", "int64"],
     {"cache_seqlens": np.array([5, 9])}),
    ("cache_seqlens as an array of a float", good, TypeError, ["cache_seqlens has to be an integer", "array(5.)"],
     {"cache_seqlens": np.array(5.0)}),
    ("cache_seqlens as a list", good, TypeError, ["cache_seqlens has to be an array", "list"],
     {"cache_seqlens": [5, 9]}),
    ("cache_seqlens as a float", good, TypeError, ["cache_seqlens has to be an integer", "float"],
     {"cache_seqlens": 5.0}),
    ("cache_seqlens as a bool", good, TypeError, ["cache_seqlens has to be an integer", "bool"],
     {"cache_seqlens": True}),
    ("cache_batch_idx of int64", good, TypeError, ["cache_batch_idx has to be int32"],
     {"cache_batch_idx": np.array([0, 1])}),
    ("cache_leftpad of floats", good, TypeError, ["cache_leftpad has to be int32"], {"cache_leftpad": floats(2)}),
    ("table of int64", paged, TypeError, ["block_table has to be int32"], {"block_table": np.array([[0, 1], [2, 3]])}),
    ("page_table of int64", paged, TypeError, ["page_table has to be int32"],
     {"block_table": None, "page_table": np.array([[0, 1], [2, 3]])}),
    ("cu_seqlens_q of int64", good, TypeError, ["cu_seqlens_q has to be int32"],
     {**PACKED_Q, "cu_seqlens_q": np.array([0, 2, 5])}),
    ("cu_seqlens_k_new of int64", good, TypeError, ["cu_seqlens_k_new has to be int32"],
     {**PACKED_NEW, "cu_seqlens_k_new": np.array([0, 1, 3])}),
    ("rotary_seqlens of int64", good, TypeError, ["rotary_seqlens has to be int32"],
     {**tables(), "rotary_seqlens": np.array([0, 1])}),
    ("causal as a number", good, TypeError, ["causal has to be True or False"], {"causal": 1}),
    ("rotary_interleaved as a number", good, TypeError, ["rotary_interleaved has to be True"],
     {"rotary_interleaved": 0}),
    ("check_indices as a number", good, TypeError, ["check_indices has to be True or False"], {"check_indices": 1}),
    ("num_splits below zero", good, ValueError, ["num_splits has to be from 0", "-1"], {"num_splits": -1}),
    ("num_splits of a half", good, TypeError, ["num_splits has to be an integer", "0.5"], {"num_splits": 0.5}),
    ("window of one side", good, TypeError, ["window_size has to be a pair"], {"window_size": (3,)}),
    ("softcap below zero", good, ValueError, ["softcap has to be"], {"softcap": -1.0}),
    ("no q", good, TypeError, ["q has to be an array"], {"q": None}),
    ("no k_cache", good, TypeError, ["k_cache has to be an array"], {"k_cache": None}),
    # ---- Caches that cannot be written to
    ("a read-only cache", good, ValueError, ["k_cache is read-only"], {"k_cache": read_only()}),
    ("a read-only cache of values", good, ValueError, ["v_cache is read-only"], {"v_cache": read_only()}),
    ("a cache of repeated rows", good, ValueError, ["k_cache was to be overwritten, and its elements share memory"],
     {"k_cache": np.lib.stride_tricks.as_strided(floats(24, 2, 8), (2, 24, 2, 8), (0, 64, 32, 4))}),
    ("one cache for both", good, ValueError, ["k_cache and v_cache share memory"], {"k_cache": BOTH, "v_cache": BOTH}),
    # ---- Values
    ("no room", good, ValueError, ["sequence 1 would have 25 keys", "room for 24"], {"cache_seqlens": ints(5, 23)}),
    ("no room for any", good, ValueError, ["sequence 0 would have 26 keys"], {"cache_seqlens": 24}),
    ("no room in pages", paged, ValueError, ["sequence 1 would have 25 keys"], {"cache_seqlens": ints(5, 23)}),
    ("more live keys than room", good, ValueError, ["sequence 0 would have 25 keys"],
     {"k": None, "v": None, "cache_seqlens": ints(25, 0)}),
    ("cache_seqlens below zero", good, ValueError, ["cache_seqlens must not be negative", "[5, -1]"],
     {"cache_seqlens": ints(5, -1)}),
    ("an int below zero", good, ValueError, ["cache_seqlens has to be from 0", "-1"], {"cache_seqlens": -1}),
    ("leftpad past the keys", good, ValueError, ["cache_leftpad has to be from 0 to cache_seqlens", "[6, 0]"],
     {"cache_leftpad": ints(6, 0)}),
    ("leftpad below zero", good, ValueError, ["cache_leftpad has to be from 0", "[0, -2]"],
     {"cache_leftpad": ints(0, -2)}),
    ("batch_idx past the cache", good, ValueError, ["cache_batch_idx has to be from 0 to 1", "[0, 2]"],
     {"cache_batch_idx": ints(0, 2)}),
    ("batch_idx below zero", good, ValueError, ["cache_batch_idx has to be from 0 to 1"],
     {"cache_batch_idx": ints(0, -1)}),
    ("batch_idx twice", good, ValueError, ["cache_batch_idx names a sequence twice", "[1, 1]"],
     {"cache_batch_idx": ints(1, 1)}),
    ("a page past the last", paged, ValueError, ["block_table of sequence 1 names page 8, and there are 8"],
     {"block_table": ints([5, 2, 0, 7], [1, 8, 3, 4])}),
    ("a page below zero", paged, ValueError, ["block_table of sequence 0 names page -1"],
     {"block_table": ints([-1, 2, 0, 7], [1, 6, 3, 4])}),
    ("one row for two tokens", paged, ValueError, ["block_table leads two new tokens to one row"],
     {"block_table": ints([5, 2, 0, 7], [1, 2, 3, 4]), "cache_seqlens": ints(7, 8)}),
    ("cu_seqlens_q from one", good, ValueError, ["cu_seqlens_q has to start with 0"],
     {**PACKED_Q, "cu_seqlens_q": ints(1, 2, 5)}),
    ("cu_seqlens_q downwards", good, ValueError, ["cu_seqlens_q must not decrease", "[0, 3, 2]"],
     {**PACKED_Q, "cu_seqlens_q": ints(0, 3, 2)}),
    ("cu_seqlens_q past q", good, ValueError, ["cu_seqlens_q ends after the last row of q"],
     {**PACKED_Q, "cu_seqlens_q": ints(0, 3, 6)}),
    ("cu_seqlens_q past max_seqlen_q", good, ValueError, ["longer than max_seqlen_q"], {**PACKED_Q, "max_seqlen_q": 2}),
    ("cu_seqlens_k_new downwards", good, ValueError, ["cu_seqlens_k_new must not decrease"],
     {**PACKED_NEW, "cu_seqlens_k_new": ints(0, 3, 2)}),
    ("cu_seqlens_k_new past k", good, ValueError, ["cu_seqlens_k_new ends after the last row of k"],
     {**PACKED_NEW, "cu_seqlens_k_new": ints(0, 1, 4)}),
    ("a position past the tables", good, ValueError, ["positions have to be from 0 to 23", "23 to 24"],
     {**tables(), "rotary_seqlens": ints(23, 23)}),
    ("a position below zero", good, ValueError, ["positions have to be from 0 to 23"],
     {**tables(), "rotary_seqlens": ints(-1, 0)}),
    ("a row of q past the tables", good, ValueError, ["positions have to be from 0 to 23", "5 to 24"],
     {**tables(), "q": floats(2, 3, 4, 8), "cache_seqlens": ints(5, 22), "causal": True}),
]
# fmt: on


@pytest.mark.parametrize(("make", "error", "says", "changes"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_is_refused_in_words_that_help_and_the_caches_are_as_they_were(make, error, says, changes):
    arguments = make(**changes)
    before = {name: x.tobytes() for name, x in arguments.items() if isinstance(x, np.ndarray)}
    with pytest.raises(error) as caught:
        flash_attn_with_kvcache(**arguments)
    message = str(caught.value)
    assert type(caught.value) is error
    assert message.startswith(f"{FUNCTION}: ")
    assert [words for words in says if not re.search(re.escape(words), message)] == []
    assert {name: x.tobytes() for name, x in arguments.items() if isinstance(x, np.ndarray)} == before


@pytest.mark.parametrize("make", [good, paged, eight, paged_eight])
def test_the_call_that_the_bad_ones_change_is_good(make):
    flash_attn_with_kvcache(**make())
    flash_attn_with_kvcache(**make(**tables()))
    kind = make()["q"].dtype
    packed = {name: x.astype(kind) if name in "qkv" else x for name, x in {**PACKED_Q, **PACKED_NEW}.items()}
    flash_attn_with_kvcache(**make(**packed, **{**tables(), "causal": True}))


def test_entries_behind_the_last_page_are_not_looked_at():
    arguments = paged(block_table=ints([5, 2, -7, 99], [1, 6, 99, -7]))
    assert np.isfinite(flash_attn_with_kvcache(**arguments)).all()


def test_pages_of_nothing_but_padding_are_not_looked_at():
    arguments = paged(
        cache_seqlens=ints(13, 9), cache_leftpad=ints(12, 0), block_table=ints([-1, 99, 0, 7], [1, 6, 3, 4])
    )
    assert np.isfinite(flash_attn_with_kvcache(**arguments)).all()
