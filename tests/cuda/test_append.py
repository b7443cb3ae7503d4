"""New keys into a cache and attention over it, under the emulator, held to the function on the CPU."""

import re
from typing import Any, NamedTuple, get_type_hints

import emulator
import numpy as np
import pytest
from emulated import (
    FLAGS,
    STORED,
    UNTOLD,
    assert_close_lse,
    assert_within_the_bar,
    cut_off,
    definition,
    emulation,
    encode,
    guarded,
    plan_of,
    problem_of,
    ragged_options,
)
from emulator import CUDA, EmulatorError, path_of
from oracle import assert_matches, assert_same_bits

from cupyattn import flash_attn_with_kvcache, reading
from cupyattn.cuda.launching import append
from cupyattn.cuda.launching.launch import recipe_of, record_of
from cupyattn.cuda.launching.views import view_of_numpy
from cupyattn.cuda.making import catalogue, compiler, source
from cupyattn.plan import Tile, num_sequences, with_num_splits
from cupyattn.plan.hopper import KEYS_IN_A_BOX, hopper_tile
from cupyattn.reading import Options

SMALL = Tile(16, 32, 2, 2)
FLASH = Tile(32, 32, 2, 1)
ULP = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-22}
FLOAT8 = "float8_e4m3fn"
HEADS = (4, 2, 2)
DIMS = (64, 40)
SEED = 11

# ---------------------------------------------------------------------------------------------------
# Calls
# ---------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A call by our words, its cache in place."""

    arrays: dict
    seqlen: Any = None
    """cache_seqlens, where it is one number."""
    interleaved: bool = True
    max_seqlen_q: Any = None
    edits: Any = ()
    """What else the function is asked, as pairs."""

    @property
    def options(self):
        asked = {"window_size": (None, None), **dict(self.edits)}
        window = tuple(None if side == -1 else side for side in asked.pop("window_size"))
        return Options(
            axes="bshd" if self.max_seqlen_q is None else "thd",
            window=window,
            needs_lse=True,
            max_seqlen_q=self.max_seqlen_q or 0,
            cached=True,
            **asked,
        )

    @property
    def each_row(self):
        asked = dict(self.edits)
        return asked.get("causal", False) or max(asked.get("window_size", (-1, -1))) >= 0

    def by_the_callers_words(self):
        words = {"k": "k_cache", "v": "v_cache", "k_new": "k", "v_new": "v"}
        given = {words.get(name, name): x.copy() for name, x in self.arrays.items()}
        if self.seqlen is not None:
            given["cache_seqlens"] = self.seqlen
        if self.max_seqlen_q is not None:
            given["max_seqlen_q"] = self.max_seqlen_q
        return {**given, "rotary_interleaved": self.interleaved, **dict(self.edits)}


def case_of(
    rng,
    dtype="float16",
    seqlens=(5, 0, 37),
    new=(2, 2, 2),
    rows=(2, 2, 2),
    capacity=48,
    page_size=None,
    spare=2,
    leftpad=None,
    packed_q=False,
    packed_new=False,
    behind=0,
    reordered=False,
    rotary=None,
    table_dtype=None,
    interleaved=True,
    uniform=False,
    heads=HEADS,
    dims=DIMS,
    descaled=(),
    **edits,
):
    """A call whose cache holds nan wherever there is no live key: what is read by mistake shows."""
    kind, batch = STORED[dtype], len(seqlens)

    def drawn(*shape):
        return rng.standard_normal(shape).astype(kind)

    def in_place(counts, packed, *shape):
        return drawn(sum(counts) + behind, *shape) if packed else drawn(batch, counts[0], *shape)

    arrays = {"q": in_place(rows, packed_q, heads[0], dims[0])}
    arrays |= dict.fromkeys("kv")
    starts = [0] * batch if leftpad is None else list(leftpad)
    if page_size is None:
        rooms = batch + spare if reordered else batch
        places = rng.permutation(rooms)[:batch].astype(np.int32) if reordered else np.arange(batch, dtype=np.int32)
        table = None
        shape = (rooms, capacity)
    else:
        count = -(-capacity // page_size)
        order = rng.permutation(batch * count + spare).astype(np.int32)
        table = order[: batch * count].reshape(batch, count).copy()
        shape = (order.size, page_size)
    for name, num_heads, width in (("k", heads[1], dims[0]), ("v", heads[2], dims[1])):
        cache = np.full((*shape, num_heads, width), np.nan, kind)
        for b in range(batch):
            for key in range(starts[b], seqlens[b]):
                where = (places[b], key) if table is None else (table[b, key // page_size], key % page_size)
                cache[where] = drawn(num_heads, width)
        arrays[name] = cache
    if table is not None:
        arrays["block_table"] = table
    if reordered:
        arrays["cache_batch_idx"] = places
    if leftpad is not None:
        arrays["cache_leftpad"] = np.array(leftpad, np.int32)
    if not uniform:
        arrays["cache_seqlens"] = np.array(seqlens, np.int32)
    if new is not None:
        for name, num_heads, width in (("k_new", heads[1], dims[0]), ("v_new", heads[2], dims[1])):
            arrays[name] = in_place(new, packed_new, num_heads, width)
        if packed_new:
            arrays["cu_seqlens_k_new"] = np.cumsum([0, *new], dtype=np.int32)
    if packed_q:
        arrays["cu_seqlens_q"] = np.cumsum([0, *rows], dtype=np.int32)
    if rotary is not None:
        angles = np.arange(capacity + 8)[:, None] * 1000.0 ** (-np.arange(rotary // 2) / max(1, rotary // 2))
        kind_of_tables = STORED.get(table_dtype or ("float32" if dtype == FLOAT8 else dtype), np.float64)
        arrays |= {
            "rotary_cos": np.cos(angles).astype(kind_of_tables),
            "rotary_sin": np.sin(angles).astype(kind_of_tables),
        }
    counts = {"q": heads[1], "k": heads[1], "v": heads[2]}
    arrays |= {f"{x}_descale": rng.uniform(0.5, 2.0, (batch, counts[x])).astype(np.float32) for x in descaled}
    longest = max(rows) if packed_q else None
    return Case(arrays, seqlens[0] if uniform else None, interleaved, longest, tuple(edits.items()))


class Found(NamedTuple):
    """What the launches left."""

    out: Any
    lse: Any
    q: Any
    """Rotated, where there are tables."""
    problem: Any
    plan: Any


def run(case, kernel="splitkv", schedule=0, seed=0, sources=None, num_splits=None, stretched=1, **edits):
    """Append and attend; the cache changes in place.  Buffers end where arrays end, and only results can be written.

    Whoever goes by a schedule goes by one whose line is `stretched` so many times.
    """
    emulator.require_compiler()
    arrays = dict(case.arrays)
    problem = problem_of(arrays, case.options)
    keys = 32 if problem.dtype == FLOAT8 else 16
    tiles = {"splitkv": SMALL, "flash": FLASH, "hopper": hopper_tile(problem)._replace(block_q=128, block_k=keys)}
    splits = {"num_splits": num_splits} if kernel == "hopper" and num_splits else {}
    chosen = plan_of(problem, kernel, **{"tile": tiles[kernel], **splits, **edits})
    if num_splits is not None:
        chosen = with_num_splits(chosen, problem, num_splits)
    seqlen = problem.sizes.seqlen_k if case.seqlen is None else case.seqlen
    if "k_new" in arrays:
        operands = {name: arrays[name] for name in append.POINTERS if name in arrays}
        written = [arrays["k"], arrays["v"]]
        if "rotary_cos" in arrays:
            operands["q_rotated"] = guarded(arrays["q"].shape, arrays["q"].dtype)
            written.append(operands["q_rotated"])
        views = {name: view_of_numpy(x, x.dtype.name) for name, x in operands.items()}
        recipe = append.recipe_of(problem, views, case.each_row, case.interleaved)
        if recipe.grid[0]:
            built = emulator.build("append.cu", recipe.specialisation.expression, sources=sources, flags=FLAGS)
            buffers = [(x, any(x is other for other in written)) for x in operands.values() if x.size]
            record = append.record_of(recipe, views, seqlen)
            built.launch(record, recipe.grid, recipe.specialisation.threads, 0, buffers, schedule, seed)
        arrays["q"] = operands.get("q_rotated", arrays["q"])
    results = {
        "out": guarded(problem.out_shape, STORED[problem.out_dtype]),
        "lse": guarded(problem.lse_shape, np.float32),
    }
    of_appending = ("v_new", "rotary_cos", "rotary_sin", "rotary_seqlens")
    operands = {name: x for name, x in arrays.items() if name not in of_appending}
    views = {name: view_of_numpy(x, x.dtype.name) for name, x in operands.items()}
    recipe = recipe_of(chosen, problem, views)
    space = recipe.workspace
    scratch = {
        "partial_out": guarded(space.partial_out, np.float32),
        "partial_lse": guarded(space.partial_lse, np.float32),
        "told": np.full(space.told, UNTOLD, np.int32),
        "schedule": np.full(space.schedule, UNTOLD, np.int32),
    }
    addresses = [{name: x.ctypes.data for name, x in some.items() if x.size} for some in (results, scratch)]
    buffers = [(x, False) for name, x in operands.items() if x.size and name != "k_new"]
    buffers += [(x, True) for x in (*results.values(), *scratch.values()) if x.size]
    for each in recipe.launches:
        record, what = record_of(each, views, addresses[0], 0, addresses[1], seqlen, encode), each.specialisation
        built = emulator.build(what.source, what.expression, sources=sources, flags=FLAGS)
        built.launch(record, each.grid, what.threads, what.shared_memory, buffers, schedule, seed)
        if each is recipe.schedule:
            line = scratch["schedule"][: 2 * (num_sequences(problem.layout, problem.sizes.batch) + 2)]
            line.view(np.int64)[...] *= stretched
    return Found(results["out"], results["lse"], arrays["q"], problem, chosen)


def append_alone(case, schedule=0, sources=None):
    """The first of the two launches, of a case without packed q or pages."""
    arrays, problem = case.arrays, problem_of(case.arrays, case.options)
    operands = {name: arrays[name] for name in append.POINTERS if name in arrays}
    if "rotary_cos" in arrays:
        operands["q_rotated"] = guarded(arrays["q"].shape, arrays["q"].dtype)
    views = {name: view_of_numpy(x, x.dtype.name) for name, x in operands.items()}
    recipe = append.recipe_of(problem, views, case.each_row, case.interleaved)
    built = emulator.build("append.cu", recipe.specialisation.expression, sources=sources, flags=FLAGS)
    buffers = [(x, name in ("k", "v", "q_rotated")) for name, x in operands.items() if x.size]
    built.launch(append.record_of(recipe, views), recipe.grid, recipe.specialisation.threads, 0, buffers, schedule)


def live_keys(case, name, b, start, stop):
    """Keys (or values) of a sequence, from where they lie."""
    cache, table = case.arrays[name], case.arrays.get("block_table")
    if table is not None:
        keys = np.arange(start, stop)
        return cache[table[b, keys // cache.shape[1]], keys % cache.shape[1]]
    return cache[case.arrays.get("cache_batch_idx", np.arange(len(cache)))[b], start:stop]


def as_ragged(case, q):
    """The attention part of a call, after appending: packed q and live keys, sequence by sequence."""
    arrays = case.arrays
    packed = "cu_seqlens_q" in arrays
    batch = len(arrays["cu_seqlens_q"]) - 1 if packed else len(q)
    starts_q = arrays["cu_seqlens_q"] if packed else np.arange(batch + 1, dtype=np.int32) * q.shape[1]
    stops = np.array(arrays["cache_seqlens"] if case.seqlen is None else [case.seqlen] * batch, np.int64)
    if "cu_seqlens_k_new" in arrays:
        stops = stops + np.diff(arrays["cu_seqlens_k_new"])
    elif "k_new" in arrays:
        stops = stops + arrays["k_new"].shape[1]
    starts = arrays.get("cache_leftpad", np.zeros(batch, np.int64))
    found = {"q": q if packed else q.reshape(-1, *q.shape[2:])}
    for name in "kv":
        found[name] = np.concatenate([live_keys(case, name, b, starts[b], stops[b]) for b in range(batch)])
    found |= {"cu_seqlens_q": starts_q, "cu_seqlens_k": np.cumsum([0, *(stops - starts)], dtype=np.int32)}
    as_it_is = ("alibi_slopes", "sinks", *reading.DESCALES)
    found |= {name: arrays[name] for name in as_it_is if name in arrays}
    asked = {"window_size": (None, None), **dict(case.edits)}
    asked["window_size"] = tuple(None if side == -1 else side for side in asked["window_size"])
    return found, ragged_options(found, **asked)


def check(case, kernel="splitkv", schedule=0, **call):
    """Hold caches and rotated queries to the function on the CPU, and results to the definition over them."""
    expected = case.by_the_callers_words()
    out = flash_attn_with_kvcache(**expected)
    found = run(case, kernel, schedule, **call)
    dtype, arrays = found.problem.dtype, case.arrays
    assert_same_bits(arrays["v"], expected["v_cache"])
    if dtype == FLOAT8:
        assert_neighbours(arrays["k"], expected["k_cache"], 0.002)
    else:
        assert_matches(arrays["k"], expected["k_cache"], rtol=ULP[dtype], atol=2.0**-21)
    if "rotary_cos" in arrays:
        assert np.isfinite(found.q.astype(float)).all()
        rotary_dim = 2 * arrays["rotary_cos"].shape[1]
        assert_same_bits(found.q[..., rotary_dim:], arrays["q"][..., rotary_dim:])
    check_attention(case, found)
    assert_matches(found.out, out, rtol=0.0, atol=24 * ULP[found.problem.out_dtype])
    return found


def assert_neighbours(actual, expected, share):
    """Fail unless float8 numbers are those expected, but for a `share` of them that float32 rounds the other way."""
    actual, expected = actual.view(np.uint8).astype(int), expected.view(np.uint8).astype(int)
    off = np.where(actual >> 7 == expected >> 7, np.abs(actual - expected), (actual & 127) + (expected & 127))
    assert off.max(initial=0) <= 1, f"{(off > 1).sum()} of {off.size} are off by {off.max()} patterns"
    assert (off != 0).sum() <= max(2, share * off.size), f"{(off != 0).sum()} of {off.size} are off by one pattern"


def check_attention(case, found):
    arrays, options = as_ragged(case, found.q)
    problem = problem_of(arrays, options)
    exact_out, exact_lse = definition(arrays, problem)
    emulated = emulation(arrays, problem, found.plan.tile.block_k, kernel=found.plan.kernel)
    lse = found.lse if found.problem.layout.ragged else found.lse.swapaxes(0, 1).reshape(problem.lse_shape)
    assert_close_lse(lse, exact_lse, cut_off(arrays, problem, found.plan.kernel, exact_lse))
    largest = np.abs(np.asarray(arrays["v"]).astype(np.float64)).max(initial=0.0)
    assert_within_the_bar(found.out.reshape(problem.out_shape), exact_out, emulated, problem.out_dtype, largest)


# ---------------------------------------------------------------------------------------------------
# Right
# ---------------------------------------------------------------------------------------------------

CAUSAL = {"causal": True}
LAYOUTS = {
    "contiguous": {},
    "one length for all": {"seqlens": (7, 7, 7), "uniform": True},
    "reordered": {"reordered": True},
    "left padding": {"seqlens": (5, 9, 37), "leftpad": (5, 0, 23)},
    "left padding, reordered": {"seqlens": (5, 9, 37), "leftpad": (2, 0, 16), "reordered": True},
    "pages of 1": {"page_size": 1},
    "pages of 5": {"page_size": 5},
    "pages of 16": {"page_size": 16},
    "pages of 24": {"page_size": 24},
    "pages of 16, left padding": {"page_size": 16, "seqlens": (5, 9, 37), "leftpad": (3, 0, 23)},
    "pages of 48, sixteen of padding": {"page_size": 48, "seqlens": (5, 9, 37), "leftpad": (3, 0, 16)},
    "packed q": {"packed_q": True, "rows": (1, 0, 4)},
    "packed new keys": {"packed_new": True, "new": (3, 0, 1)},
    "all packed, pages of 7": {
        "packed_q": True,
        "rows": (3, 0, 1),
        "packed_new": True,
        "new": (3, 0, 1),
        "page_size": 7,
        "seqlens": (5, 9, 37),
        "leftpad": (5, 2, 0),
    },
    "packed, with more behind": {
        "packed_q": True,
        "rows": (3, 0, 1),
        "packed_new": True,
        "new": (1, 2, 1),
        "behind": 3,
    },
    "nothing new": {"new": None},
    "no new tokens": {"new": (0, 0, 0)},
    "a full cache": {"seqlens": (46, 46, 46)},
}
ROTARY = {
    "none": {},
    "halves": {"rotary": 64, "interleaved": False},
    "pairs": {"rotary": 64},
    "part, halves": {"rotary": 24, "interleaved": False},
    "part, pairs": {"rotary": 20},
    "of nothing": {"rotary": 0},
}


KERNELS = ("splitkv", "flash", "hopper")


def turns(table, given=lambda row: row):
    """(kernel, name, schedule) of every call in a table that a kernel takes: TMA needs pages of whole boxes."""
    calls = [(kernel, name, i % 3) for kernel in KERNELS for i, name in enumerate(table)]
    return [
        (kernel, name, i)
        for kernel, name, i in calls
        if kernel != "hopper" or given(table[name]).get("page_size", 0) % KEYS_IN_A_BOX == 0
    ]


def test_positions_of_a_schedule_may_be_beyond_32_bits(rng):
    case = case_of(rng, seqlens=(5, 0, 700), capacity=704, new=None, rows=(1,) * 3)
    check(case, "splitkv", 1, stretched=2**33)


@pytest.mark.parametrize("schedule", range(3))
@pytest.mark.parametrize(("kernel", "layout"), [call[:2] for call in turns(LAYOUTS)])
def test_every_layout(rng, kernel, layout, schedule):
    given = LAYOUTS[layout]
    rotary = {} if given.get("new", 1) is None else ROTARY["halves"]
    check(case_of(rng, **{**CAUSAL, **rotary, **given}), kernel, schedule)


@pytest.mark.parametrize("schedule", range(3))
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("rotary", ROTARY)
def test_every_rotation_of_every_dtype(rng, rotary, dtype, schedule):
    pages = {"page_size": 6} if schedule == 1 else {}
    check(case_of(rng, dtype, **CAUSAL, **ROTARY[rotary], **pages), "splitkv", schedule)


@pytest.mark.parametrize("table_dtype", ["float16", "bfloat16", "float32", "float64"])
def test_tables_of_every_dtype(rng, table_dtype):
    check(case_of(rng, "float16", **ROTARY["halves"], table_dtype=table_dtype, **CAUSAL))


EIGHT = {"dtype": FLOAT8, "dims": (64, 48), "descaled": "qkv"}


@pytest.mark.parametrize("page_size", [None, 16])
def test_hopper_splits_a_long_cache_among_short_ones_by_the_lengths_on_the_device(rng, page_size):
    case = case_of(rng, seqlens=(5, 0, 1300), rows=(9,) * 3, new=(9,) * 3, capacity=1344, page_size=page_size, **CAUSAL)
    found = check(case, "hopper", 1, num_splits=2)
    assert (found.plan.num_splits, found.plan.split_size) == (2, 0)


KERNELS_OF_FLOAT8 = ("splitkv", "hopper")


@pytest.mark.parametrize("schedule", range(3))
@pytest.mark.parametrize(("kernel", "layout"), [call[:2] for call in turns(LAYOUTS) if call[0] in KERNELS_OF_FLOAT8])
def test_every_layout_of_float8(rng, kernel, layout, schedule):
    given = LAYOUTS[layout]
    rotary = {} if given.get("new", 1) is None else ROTARY["halves"]
    check(case_of(rng, **{**CAUSAL, **rotary, **given, **EIGHT}), kernel, schedule)


@pytest.mark.parametrize("schedule", range(3))
@pytest.mark.parametrize("rotary", ROTARY)
@pytest.mark.parametrize("kernel", KERNELS_OF_FLOAT8)
def test_every_rotation_of_float8(rng, kernel, rotary, schedule):
    pages = {"page_size": 6} if schedule == 1 and kernel == "splitkv" else {}
    check(case_of(rng, **CAUSAL, **ROTARY[rotary], **pages, **EIGHT), kernel, schedule)


@pytest.mark.parametrize("schedule", range(3))
def test_all_patterns_of_float8_are_appended_as_they_come(rng, schedule):
    case = case_of(rng, **{**EIGHT, "dims": (64, 64)}, new=(1, 1, 1), rotary=0 if schedule == 1 else None)
    patterns = np.arange(3 * 128, dtype=np.uint8).reshape(3, 1, 2, 64)
    case.arrays["k_new"], case.arrays["v_new"] = (x.view(STORED[FLOAT8]) for x in (patterns, patterns[::-1].copy()))
    append_alone(case, schedule)
    for b, n in enumerate((5, 0, 37)):
        for name in "kv":
            np.testing.assert_array_equal(
                case.arrays[name][b, n].view(np.uint8), case.arrays[f"{name}_new"][b, 0].view(np.uint8)
            )


@pytest.mark.parametrize("schedule", range(3))
@pytest.mark.parametrize("factor", [1.0, 1.0625, 3.1], ids=["as they are", "many ties", "too large for some"])
def test_rotation_of_float8_rounds_to_nearest_even_and_at_most_to_448(rng, factor, schedule):
    check_rotation_of_float8(rng, factor, schedule)


def check_rotation_of_float8(rng, factor, schedule=0, sources=None):
    """All patterns but the two of nan times a factor; and beside them a pair of which one is nan."""
    case = case_of(rng, **{**EIGHT, "dims": (64, 64)}, new=(1, 1, 1), rotary=64, interleaved=False)
    every = np.minimum(np.arange(128, dtype=np.uint8), 126).view(STORED[FLOAT8]).reshape(2, 64)
    case.arrays["k_new"][:] = np.stack([every, -every, every])[:, None]
    case.arrays["k_new"][2, 0, 1, 8] = np.nan
    case.arrays["rotary_cos"][:], case.arrays["rotary_sin"][:] = factor, 0.0
    append_alone(case, schedule, sources)
    exact = case.arrays["k_new"][:, 0].astype(np.float32) * np.float32(factor)
    exact[2, 1, 40] = np.nan
    found = np.stack([case.arrays["k"][b, n] for b, n in enumerate((5, 0, 37))])
    assert_matches(found, np.clip(exact, -448, 448).astype(STORED[FLOAT8]))


def test_without_a_mask_all_rows_of_q_are_at_their_sequences_first_position(rng):
    case = case_of(rng, rows=(3, 3, 3), **ROTARY["pairs"])
    case.arrays["q"][:, 1:] = case.arrays["q"][:, :1]
    found = check(case)
    assert_same_bits(found.q[:, 2], found.q[:, 0])


def test_positions_of_their_own(rng):
    case = case_of(rng, **CAUSAL, **ROTARY["pairs"])
    case.arrays["rotary_seqlens"] = np.array([11, 0, 50], np.int32)
    check(case)


def test_two_sequences_append_to_one_page(rng):
    case = case_of(rng, seqlens=(4, 6), new=(2, 2), rows=(1, 1), capacity=24, page_size=12, **CAUSAL)
    table = case.arrays["block_table"]
    for name in "kv":
        case.arrays[name][table[1, 0], :4] = case.arrays[name][table[0, 0], :4]
        case.arrays[name][table[1, 0], 4:6] = 0.5
    table[0, 0] = table[1, 0]
    check(case)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "edits",
    [
        {"window_size": (9, 0)},
        {"window_size": (4, 3)},
        {"softcap": 2.0, "causal": True},
        {"softmax_scale": 0.3, "causal": True},
    ],
    ids=str,
)
def test_edits_count_from_the_last_key_after_appending(rng, kernel, edits):
    given = {"seqlens": (5, 9, 37), "leftpad": (2, 0, 16), "rows": (4, 4, 4), **edits}
    case = case_of(rng, **given)
    case.arrays["alibi_slopes"] = rng.uniform(0.0, 0.5, (3, 4)).astype(np.float32)
    case.arrays["sinks"] = rng.standard_normal(4).astype(np.float32)
    check(case, kernel, 1)


@pytest.mark.parametrize(("num_splits", "schedule"), [(1, 0), (2, 1), (5, 2), (None, 1)])
def test_splits_by_live_lengths(rng, num_splits, schedule):
    given = {"seqlens": (700, 1, 1200), "capacity": 1300, "rows": (1, 1, 1), "new": (1, 1, 1), "leftpad": (3, 0, 40)}
    case = case_of(rng, **given, **CAUSAL)
    found = check(case, "splitkv", schedule, num_splits=num_splits)
    assert num_splits is None or found.plan.num_splits == num_splits


def test_one_split_does_not_depend_on_the_rest_of_the_batch(rng):
    case = case_of(rng, seqlens=(700, 1200), capacity=1300, rows=(1, 1), new=(1, 1), **CAUSAL)
    alone = case._replace(arrays={name: x[:1].copy() for name, x in case.arrays.items()})
    both, one = run(case, num_splits=1), run(alone, num_splits=1)
    assert_same_bits(both.out[:1], one.out)


@pytest.mark.parametrize("schedule", range(3))
def test_strided_caches_and_new_keys(rng, schedule):
    """Heads before keys, and keys and values in one array; what lies between is not written."""
    case = case_of(rng, dims=(64, 64), **CAUSAL, **ROTARY["halves"])
    both = np.full((3, 2, 2, 48, 64), 7.0, np.float16)  # batch, k or v, heads, keys
    strided = {"k": both[:, 0].swapaxes(1, 2), "v": both[:, 1].swapaxes(1, 2)}
    for name, view in strided.items():
        view[:] = case.arrays[name]
    expected = case.by_the_callers_words()
    flash_attn_with_kvcache(**expected)
    wide = np.zeros((3, 4, 2, 72), np.float16)
    new = wide[:, 1:3, :, 8:]
    new[:] = case.arrays["k_new"]
    arrays = {**case.arrays, **strided, "k_new": new}
    views = {name: view_of_numpy(arrays[name], arrays[name].dtype.name) for name in append.POINTERS if name in arrays}
    rotated = guarded(arrays["q"].shape, np.float16)
    views["q_rotated"] = view_of_numpy(rotated, "float16")
    problem = problem_of(arrays, case.options)
    recipe = append.recipe_of(problem, views, case.each_row, case.interleaved)
    built = emulator.build("append.cu", recipe.specialisation.expression, flags=FLAGS)
    bases = {
        id(x): x
        for x in (both, wide, *(arrays[n] for n in ("v_new", "q", "rotary_cos", "rotary_sin", "cache_seqlens")))
    }
    buffers = [(x, x is both) for x in bases.values()] + [(rotated, True)]
    record = append.record_of(recipe, views)
    built.launch(record, recipe.grid, recipe.specialisation.threads, 0, buffers, schedule)
    assert_same_bits(strided["v"], expected["v_cache"])
    assert_matches(strided["k"], expected["k_cache"], rtol=ULP["float16"], atol=1e-4)


# ---------------------------------------------------------------------------------------------------
# Wrong indices
# ---------------------------------------------------------------------------------------------------

LAST = 2**31 - 1
LIES: dict[str, tuple[dict, dict]] = {
    "lengths past the cache": ({}, {"cache_seqlens": [47, 48, LAST]}),
    "lengths below zero": ({}, {"cache_seqlens": [-1, -2, -LAST - 1]}),
    "lengths past the pages": ({"page_size": 5}, {"cache_seqlens": [49, 50, LAST]}),
    "lengths below zero of pages": ({"page_size": 5}, {"cache_seqlens": [-1, -2, -LAST]}),
    "padding past the keys": ({"leftpad": (0, 0, 0)}, {"cache_leftpad": [-5, 8, LAST]}),
    "padding past the keys in pages": ({"leftpad": (0, 0, 0), "page_size": 16}, {"cache_leftpad": [-5, 8, LAST]}),
    "places past the cache": ({"reordered": True}, {"cache_batch_idx": [5, LAST, 99]}),
    "places below zero": ({"reordered": True}, {"cache_batch_idx": [-1, -2, -LAST]}),
    "pages past the last": ({"page_size": 16}, {"block_table": [[LAST] * 3, [11] * 3, [12] * 3]}),
    "pages below zero": ({"page_size": 5}, {"block_table": [[-1] * 10] * 3}),
    "new tokens past k": ({"packed_new": True}, {"cu_seqlens_k_new": [0, 9, 900, LAST]}),
    "new tokens downwards": ({"packed_new": True}, {"cu_seqlens_k_new": [4, 2, -7, -LAST]}),
    "new tokens of nobody": ({"packed_new": True}, {"cu_seqlens_k_new": [2, 3, 4, 5]}),
    "rows past q": ({"packed_q": True}, {"cu_seqlens_q": [0, 9, 900, LAST]}),
    "rows downwards": ({"packed_q": True}, {"cu_seqlens_q": [4, 2, -7, 9]}),
    "positions past the tables": ({}, {"rotary_seqlens": [55, 56, LAST]}),
    "positions below zero": ({}, {"rotary_seqlens": [-1, -2, -LAST - 1]}),
}


def lying(rng, name):
    given, lies = LIES[name]
    case = case_of(rng, **{**CAUSAL, **ROTARY["pairs"], **given})
    case.arrays.update({word: np.array(values, np.int32) for word, values in lies.items()})
    return case


@pytest.mark.parametrize("schedule", range(3))
@pytest.mark.parametrize(("kernel", "name"), [call[:2] for call in turns(LIES, lambda row: row[0])])
def test_wrong_indices_lead_nowhere(rng, kernel, name, schedule):
    """The emulator refuses any access outside of an array; and no place of the cache is written by mistake."""
    case = lying(rng, name)
    before = {word: case.arrays[word].copy() for word in "kv"}
    run(case, kernel, schedule)
    if name.startswith(("places", "pages")):
        for word in "kv":
            assert_same_bits(case.arrays[word], before[word])


@pytest.mark.parametrize("page_size", [None, 5])
def test_tokens_inside_are_written_where_others_of_their_sequence_are_not(rng, page_size):
    case = case_of(rng, page_size=page_size)
    capacity = problem_of(case.arrays, case.options).sizes.seqlen_k
    case.arrays["cache_seqlens"][:] = [capacity - 1, -1, capacity]
    before = case.arrays["v"].copy()
    run(case)
    table = case.arrays.get("block_table")

    def at(b, key):
        return (b, key) if table is None else (table[b, key // page_size], key % page_size)

    before[at(0, capacity - 1)] = case.arrays["v_new"][0, 0]
    before[at(1, 0)] = case.arrays["v_new"][1, 1]
    assert_same_bits(case.arrays["v"], before)


def test_a_place_outside_of_the_cache_has_no_keys(rng):
    case = case_of(rng, reordered=True, new=None)
    case.arrays["cache_batch_idx"][1] = -1
    found = run(case)
    assert not found.out[1].any()
    assert np.isneginf(found.lse[1]).all()
    assert np.isfinite(found.lse[[0, 2]]).all()


def test_a_position_outside_of_the_tables_rotates_nothing(rng):
    case = case_of(rng, **CAUSAL, **ROTARY["pairs"])
    case.arrays["rotary_seqlens"] = np.array([-9, 0, LAST], np.int32)
    found = run(case)
    assert_same_bits(found.q[[0, 2]], case.arrays["q"][[0, 2]])
    assert_same_bits(case.arrays["k"][0, 5:7], case.arrays["k_new"][0])


# ---------------------------------------------------------------------------------------------------
# Planted bugs
# ---------------------------------------------------------------------------------------------------

MUTANTS = [
    # ---- append.cu
    ("append.cu", "seqlen_of(token.sequence, params) + token.number;", "seqlen_of(token.sequence, params);", "layouts"),
    ("append.cu", "key < 0 || key >= params.capacity", "key < 0", "lies"),
    ("append.cu", "key < 0 || key >= params.capacity", "key >= params.capacity", "lies"),
    ("append.cu", "key < 0 || key >= params.capacity", "key < 0 || key > params.capacity", "lies"),
    ("append.cu", "page < 0 || page >= params.num_pages", "page < 0", "lies"),
    ("append.cu", "place < 0 || place >= params.num_places", "place < 0", "lies"),
    ("append.cu", "position < 0 || position >= params.positions", "position < 0", "lies"),
    ("append.cu", "+ token.sequence * params.block_table_row", "", "layouts"),
    ("append.cu", "row + at / params.page_size", "row + at / 16", "layouts"),
    ("append.cu", "at % params.page_size * steps.row", "at * steps.row", "layouts"),
    ("append.cu", "params.cache_batch_idx + token.sequence) : token.sequence;",
     "params.cache_batch_idx) : token.sequence;", "layouts"),
    ("append.cu", "params.cache_seqlens + sequence) : params.cache_seqlen;", "params.cache_seqlens) : 0;", "layouts"),
    ("append.cu", ": params.cache_seqlen;", ": 0;", "layouts"),
    ("append.cu", "if (low == batch) return {-1, 0};", "", "layouts"),
    ("append.cu", "if (start < 0 || start > index) return {-1, 0};", "", "lies"),
    ("append.cu", "starts + middle) <= index", "starts + middle) < index", "layouts"),
    ("append.cu", "index / each, index % each", "index % each, index / each", "layouts"),
    ("append.cu", "!params.interleaved", "params.interleaved", "rotations"),
    ("append.cu", "position >= 0 && pair < params.half", "position >= 0", "rotations"),
    ("append.cu", "pair + params.half :", "pair + params.head_dim / 2 :", "rotations"),
    ("append.cu", "ptx::fma(x, cos, -(y * sin))", "ptx::fma(x, cos, y * sin)", "rotations"),
    ("append.cu", "ptx::fma(x, sin, y * cos)", "ptx::fma(y, sin, x * cos)", "rotations"),
    ("append.cu", "position * params.cos_row", "params.cos_row", "rotations"),
    ("append.cu", "params.each_row ? token.number : 0", "token.number", "rotations"),
    ("append.cu", "params.each_row ? token.number : 0", "0", "rotations"),
    ("append.cu", "params.rotary_seqlens + sequence) :", "params.rotary_seqlens) :", "rotations"),
    ("append.cu", "token.sequence < 0 ? -1 :", "false ? -1 :", "lies"),
    ("append.cu", "head * to_steps.head", "head", "layouts"),
    ("append.cu", "head * from_steps.head", "0", "layouts"),
    ("append.cu", "token.sequence * from_steps.batch +", "", "layouts"),
    ("append.cu", "if (head >= num_heads) return;", "", "layouts"),
    ("append.cu", "if (head >= params.num_heads) return;", "", "rotations"),
    ("append.cu", "params.head_dim_v, false, params", "params.head_dim_v, params.positions > 0, params", "rotations"),
    # ---- Float8
    ("numbers.cuh", "0x7ffffu + (size >> 20 & 1u)", "0x80000u", "float8"),
    ("numbers.cuh", "0x7ffffu + (size >> 20 & 1u)", "0u", "float8"),
    ("numbers.cuh", "if (size >= 0x43e00000u) return {static_cast<uint8>(sign | 0x7eu)};", "", "float8"),
    ("numbers.cuh", "size < 0x3c800000u ? small : other", "other", "float8"),
    ("numbers.cuh", "if (size > 0x7f800000u) return {0x7f};", "", "float8"),
    ("numbers.cuh", "sign | (size < 0x3c800000u", "(size < 0x3c800000u", "float8"),
    ("numbers.cuh", "(pair & 0x80008000u) | size >> 1", "size >> 1", "float8"),
    ("numbers.cuh", "(nans >> 15) * 0x7c00u", "0u", "float8"),
    ("numbers.cuh", "<< 8))}) * kOfFloat8", "<< 8))})", "float8"),
    ("splitkv.cu", "<Traits::kEdits>(params, sequence.index,", "<Traits::kEdits>(params, sequence.place,",
     "layouts of float8"),
    ("splitkv.cu", "descale_of_values(params, sequence.index,", "descale_of_values(params, sequence.place,",
     "layouts of float8"),
    # ---- Keys of a cache
    ("mask.cuh", "stop += params.seqlen_new;", "", "layouts"),
    ("mask.cuh", "stop += tokens.stop - tokens.start;", "", "layouts"),
    ("mask.cuh", "stop < params.seqlen_k ? static_cast<int>(stop) : params.seqlen_k", "static_cast<int>(stop)", "lies"),
    ("mask.cuh", "smaller(larger(start, 0), end), end}", "start, end}", "lies"),
    ("mask.cuh", "params.at.cache_seqlens + index) : params.at.cache_seqlen;", "params.at.cache_seqlens) : 0;",
     "layouts"),
    ("mask.cuh", "params.at.cache_leftpad + index", "params.at.cache_leftpad", "layouts"),
    ("mask.cuh", "params.at.cache_batch_idx + index", "params.at.cache_batch_idx", "layouts"),
    ("mask.cuh", "found.place < 0 || found.place >= params.num_places", "found.place < 0", "lies"),
    ("mask.cuh", "found.place < 0 || found.place >= params.num_places", "found.place >= params.num_places", "lies"),
    ("mask.cuh", "found.place = 0, keys.stop = keys.start;", "found.place = 0;", "lies"),
    ("mask.cuh", "found.first_key = keys.start;\n        found.band", "found.band", "layouts"),
    ("splitkv.cu", "base += sequence.place * strides.batch", "base += sequence.index * strides.batch", "layouts"),
    ("splitkv.cu", "key += static_cast<int>(sequence.first_key);", "", "layouts"),
    ("splitkv.cu", "(params.page_size | key) % 16 == 0", "params.page_size % 16 == 0", "layouts"),
    ("flash.cu", "Traits::kPaged ? 0 : sequence.place", "Traits::kPaged ? 0 : sequence.index", "layouts of flash"),
    ("flash.cu", "Traits::kPaged ? 0 : sequence.place", "sequence.place", "layouts of flash"),
    ("flash.cu", "Traits::kPaged ? 0 : sequence.first_key", "sequence.first_key", "layouts of flash"),
    ("flash.cu", "key + static_cast<int>(sequence.first_key)", "key", "layouts of flash"),
]  # fmt: skip


def layouts(sources, kernel="splitkv"):
    for its_kernel, name, schedule in turns(LAYOUTS):
        if its_kernel == kernel:
            case = case_of(np.random.default_rng(SEED), **{**CAUSAL, **LAYOUTS[name]})
            check(case, kernel, schedule, sources=sources)


def rotations(sources):
    for i, rotary in enumerate(ROTARY.values()):
        case = case_of(
            np.random.default_rng(SEED), dims=(40, 64), **{**CAUSAL, **rotary, **({"rotary": 24} if rotary else {})}
        )
        case.arrays.update({"rotary_seqlens": np.array([11, 0, 50], np.int32)} if i % 2 else {})
        check(case, sources=sources)
    check(case_of(np.random.default_rng(SEED), rows=(3, 3, 3), **ROTARY["pairs"]), sources=sources)


def float8(sources):
    for factor in (1.0625, 3.1):
        check_rotation_of_float8(np.random.default_rng(SEED), factor, sources=sources)


def layouts_of_float8(sources):
    for name in ("reordered", "all packed, pages of 7"):
        check(case_of(np.random.default_rng(SEED), **{**CAUSAL, **LAYOUTS[name], **EIGHT}), sources=sources)


def lies(sources):
    """Nothing but addresses can be wrong, and what is written to the cache."""
    for name in LIES:
        case = lying(np.random.default_rng(SEED), name)
        before = case.arrays["v"].copy()
        live = np.isfinite(before)
        found = run(case, sources=sources)
        if name.startswith(("places", "pages")):
            assert_same_bits(case.arrays["v"], before)
        elif not name.startswith("lengths"):
            assert_same_bits(case.arrays["v"][live], before[live])
        if name.startswith("places"):
            assert not found.out.any()
        if name == "rows downwards":
            assert np.isfinite(found.q.astype(float)).all()
    case = case_of(np.random.default_rng(SEED), seqlens=(47, 5, 48))
    before = case.arrays["v"].copy()
    run(case, sources=sources)
    before[0, 47], before[1, 5:7] = case.arrays["v_new"][0, 0], case.arrays["v_new"][1]
    assert_same_bits(case.arrays["v"], before)


GROUPS = {
    "layouts": layouts,
    "layouts of flash": lambda sources: layouts(sources, "flash"),
    "rotations": rotations,
    "float8": float8,
    "layouts of float8": layouts_of_float8,
    "lies": lies,
}


@pytest.mark.parametrize("group", GROUPS)
def test_the_sources_as_they_are_pass(group):
    GROUPS[group](None)


@pytest.mark.parametrize(("name", "old", "new", "group"), MUTANTS, ids=[f"{m[1]} -> {m[2]}" for m in MUTANTS])
def test_a_planted_bug_is_caught(name, old, new, group):
    path = path_of(name)
    text = (CUDA / path).read_text()
    assert text.count(old) == 1, "the text to replace has to be there once"
    with pytest.raises((AssertionError, EmulatorError)):
        GROUPS[group]({path: text.replace(old, new)})


# ---------------------------------------------------------------------------------------------------
# The record, and NVRTC
# ---------------------------------------------------------------------------------------------------

TAIL = {name: getattr(kind, "_fields", None) for name, kind in get_type_hints(append.Tail).items()}
FIELDS = [{"rotary_cos": "cos", "rotary_sin": "sin"}.get(name, name) for name in append.POINTERS]
for _name, _parts in TAIL.items():
    FIELDS += [f"{_name}.{part}" for part in _parts] if _parts else [_name]


def test_every_field_is_where_the_kernel_reads_it():
    emulator.require_compiler()
    writes = "\n".join(f"write({index}, (double)(uint64)given.params.{name});" for index, name in enumerate(FIELDS))
    text = f"""
        #include "append.cu"
        namespace cupyattn {{
        struct Given {{ AppendParams params; double* out; }};
        void probe(Given given) {{
            if (ptx::thread()) return;
            const auto write = [&](int index, double value) {{ ptx::store_global(given.out + index, value); }};
            {writes}
        }}
        }}
    """
    probe = emulator.build("probe.cu", "cupyattn::probe", sources={"probe.cu": text})
    numbers = iter(range(1, len(FIELDS) + 1))
    pointers = [next(numbers) for _ in append.POINTERS]
    tail = {name: tuple(next(numbers) for _ in parts) if parts else next(numbers) for name, parts in TAIL.items()}
    record = append._POINTERS.pack(*pointers) + append.Tail(**tail).pack()
    assert len(record) == append.SIZE == probe.parameter_bytes - 8
    out = np.zeros(len(FIELDS))
    probe.launch(record + int(out.ctypes.data).to_bytes(8, "little"), (1, 1, 1), 32, 0, [(out, True)])
    np.testing.assert_array_equal(out, np.arange(1, len(FIELDS) + 1))


def test_blocks_have_as_many_threads_as_the_kernel_takes_for_granted():
    text = (CUDA / "append.cu").read_text()
    assert int(re.search(r"kAppendThreads = (\d+);", text)[1]) == append.THREADS == catalogue.append("float16").threads


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", FLOAT8])
def test_compiles_without_spills(dtype, target):
    wanted = catalogue.append(dtype)
    cubin = compiler.compile_cubin(source.join(wanted.source), wanted.expression, target)
    assert cubin.spills == 0
