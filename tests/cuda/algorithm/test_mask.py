"""Who sees whom, as compiled: for extreme numbers, and for index arrays that say anything."""

import numpy as np
import pytest
from ptx.alone import BEGIN, PARAMS, TARGETS, built, numbers, planted, rows_of, run

from cupyattn.cuda.launching.params import NO_CACHE, OPEN
from cupyattn.problem import Mask, Span

pytestmark = pytest.mark.usefixtures("nvrtc")

LARGEST = 2**31 - 1
MASK = "algorithm/mask.cuh"
PROBE = f"""
#include "algorithm/mask.cuh"
namespace alone {{
using namespace cupyattn;
template <int>
__global__ void band(int count, const Band* bands, const int2* rows, int* found) {{
    {BEGIN}
    const Band band = bands[i];
    const int first = rows[i].x, last = rows[i].y;
    const Span spans[3] = {{band.visible_keys(first), band.touched(first, last), band.whole(first, last)}};
    for (int at = 0; at < 3; ++at) found[6 * i + 2 * at] = spans[at].start, found[6 * i + 2 * at + 1] = spans[at].stop;
}}
template <int>
__global__ void turned(int count, const Band* bands, const int2* keys, int* found) {{
    {BEGIN}
    const Band band = bands[i];
    const int first = keys[i].x, last = keys[i].y;
    const Span spans[3] = {{band.seeing_rows(first), band.touching(first, last), band.seeing_all(first, last)}};
    for (int at = 0; at < 3; ++at) found[6 * i + 2 * at] = spans[at].start, found[6 * i + 2 * at + 1] = spans[at].stop;
}}
template <int>
__global__ void sequence(int count, const Params* params, const int* indices, int64* found) {{
    {BEGIN}
    const Sequence at = sequence_at(indices[i], params[i]);
    const int64 all[] = {{at.index, at.place, at.first_row, at.first_key, at.band.seqlen_q, at.band.seqlen_k,
                         at.band.left, at.band.right, at.band.offset}};
    for (int field = 0; field < 9; ++field) found[9 * i + field] = all[field];
}}
}}
"""
target = pytest.mark.parametrize("target", TARGETS)


# ---- Bands -----------------------------------------------------------------------------------------------------------

BANDS = 40_000


def hold_bands(rng, kernel, open_=OPEN):
    """Spans of bands and rows of all kinds, held to those of `problem.Mask`."""
    seqlens = numbers(rng, (2, BANDS), 0, OPEN)
    seqlens[0] = np.maximum(seqlens[0], 1)
    close = rng.random(BANDS) < 0.3
    seqlens[1, close] = np.clip(seqlens[0, close] + rng.integers(-2, 3, close.sum()), 0, OPEN)
    sides = numbers(rng, (2, BANDS), 0, OPEN)
    hides = rng.random((2, BANDS)) < 0.7
    bottom_right = rng.random(BANDS) < 0.5
    within = rng.choice([0.0, 0.5, 1.0, rng.random()], (2, BANDS)) * (seqlens[0] - 1)
    rows = np.clip(within.astype(np.int64) + rng.integers(-2, 3, within.shape), 0, seqlens[0] - 1)
    rows = np.ascontiguousarray(np.sort(rows, axis=0).T, np.int32)
    offset = np.where(bottom_right, seqlens[1] - seqlens[0], 0)
    bands = np.stack([*seqlens, *np.where(hides, sides, open_), offset], axis=1).astype(np.int32)
    found = run(kernel, [bands, rows], np.zeros((BANDS, 6), np.int32)).tolist()
    for case, (seqlen_q, seqlen_k) in enumerate(seqlens.T.tolist()):
        left, right = (x if used else None for x, used in zip(sides.T[case].tolist(), hides.T[case], strict=True))
        mask = Mask(left, right, ("top-left", "bottom-right")[int(bottom_right[case])])
        first, last = rows[case].tolist()
        span = Span(first, last + 1)
        expected = [mask.visible_keys(first, seqlen_q, seqlen_k), mask.touched(span, seqlen_q, seqlen_k)]
        expected.append(mask.whole(span, seqlen_q, seqlen_k))
        assert found[case] == [x for each in expected for x in each], (mask, seqlen_q, seqlen_k, first, last)


@target
def test_bands_of_any_lengths_and_windows_do_not_wrap(rng, target):
    hold_bands(rng, built(PROBE, "alone::band<0>", target))


def test_a_guarded_difference_wraps_as_compiled(rng):
    """What mask.cuh had: right in every test of the emulator, and zeros for whole tiles on a GPU."""
    sources = planted(MASK, "larger(diagonal - left, 0)", "diagonal > left ? diagonal - left : 0")
    assert sources[MASK].count("right == kOpen ? seqlen_k") == 1
    sources = {MASK: sources[MASK].replace("right == kOpen ? seqlen_k", "right == kLargest ? seqlen_k")}
    with pytest.raises(AssertionError, match="Mask"):
        hold_bands(rng, built(PROBE, "alone::band<0>", "sm_80", sources), open_=LARGEST)


def seeing(mask, key, seqlen_q, seqlen_k):
    """The queries that see a key, in numbers that never wrap."""
    diagonal = key - mask.offset(seqlen_q, seqlen_k)
    start = 0 if mask.right is None else max(0, diagonal - mask.right)
    return start, seqlen_q if mask.left is None else min(seqlen_q, diagonal + mask.left + 1)


def test_queries_that_see_a_key_are_those_that_see_it(rng):
    for case in range(50):
        seqlen_q, seqlen_k, left, right = (int(x) for x in rng.integers(1, 9, 4))
        left, right = (None if rng.random() < 0.3 else side for side in (left, right))
        mask = Mask(left, right, ("top-left", "bottom-right")[case % 2])
        for key in range(seqlen_k):
            spans = (mask.visible_keys(row, seqlen_q, seqlen_k) for row in range(seqlen_q))
            rows = [row for row, span in enumerate(spans) if span.start <= key < span.stop]
            assert rows == list(range(*seeing(mask, key, seqlen_q, seqlen_k)))


def hold_turned_bands(rng, kernel):
    """Spans of the queries that see keys of all kinds."""
    seqlens = np.maximum(numbers(rng, (2, BANDS), 0, OPEN), 1)
    close = rng.random(BANDS) < 0.3
    seqlens[1, close] = np.clip(seqlens[0, close] + rng.integers(-2, 3, close.sum()), 1, OPEN)
    sides, hides = numbers(rng, (2, BANDS), 0, OPEN), rng.random((2, BANDS)) < 0.7
    bottom_right = rng.random(BANDS) < 0.5
    keys = np.minimum(numbers(rng, (2, BANDS), 0, OPEN), seqlens[1] - 1)
    keys = np.ascontiguousarray(np.sort(keys, axis=0).T, np.int32)
    offset = np.where(bottom_right, seqlens[1] - seqlens[0], 0)
    bands = np.stack([*seqlens, *np.where(hides, sides, OPEN), offset], axis=1).astype(np.int32)
    found = run(kernel, [bands, keys], np.zeros((BANDS, 6), np.int32)).tolist()
    for case, (seqlen_q, seqlen_k) in enumerate(seqlens.T.tolist()):
        left, right = (x if used else None for x, used in zip(sides.T[case].tolist(), hides.T[case], strict=True))
        mask = Mask(left, right, ("top-left", "bottom-right")[int(bottom_right[case])])
        of_first, of_last = (seeing(mask, key, seqlen_q, seqlen_k) for key in keys[case].tolist())
        expected = [*of_first, of_first[0], of_last[1], of_last[0], of_first[1]]
        assert found[case] == expected, (mask, seqlen_q, seqlen_k, keys[case])


@target
def test_queries_of_any_keys_do_not_wrap(rng, target):
    hold_turned_bands(rng, built(PROBE, "alone::turned<0>", target))


WRONG = [
    ("larger(diagonal - right, 0)", "larger(diagonal - right + 1, 0)"),
    ("left == kOpen ? seqlen_q", "left == kOpen ? seqlen_q - 1"),
]


@pytest.mark.parametrize(("old", "new"), WRONG)
def test_a_wrong_span_of_queries_is_noticed(rng, old, new):
    with pytest.raises(AssertionError, match="Mask"):
        hold_turned_bands(rng, built(PROBE, "alone::turned<0>", "sm_80", planted(MASK, old, new)))


# ---- Sequences -------------------------------------------------------------------------------------------------------

SEQUENCES = 30_000
FIELDS = ("index", "place", "first_row", "first_key", "seqlen_q", "seqlen_k", "left", "right", "offset")
BATCH = 3
POINTERS = ("cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k_new", "cache_seqlens", "cache_batch_idx", "cache_leftpad")
"""All that `sequence_at` follows."""


def sequences(rng):
    """(params, indices, arrays by the name of their pointers): every layout with lengths on the device."""
    made = np.zeros(SEQUENCES, PARAMS)
    arrays = {name: numbers(rng, (SEQUENCES, BATCH + 1)).astype(np.int32) for name in POINTERS}
    rising = rng.random(SEQUENCES) < 0.3
    for name in POINTERS[:3]:
        arrays[name][rising] = np.sort(np.abs(arrays[name][rising] // 2), axis=1)
    kind = rng.integers(0, 4, SEQUENCES)  # dense, packed, packed queries and pages, cached
    used = {name: rng.random(SEQUENCES) < 0.6 for name in POINTERS}
    used["cu_seqlens_q"] |= (kind == 1) | (kind == 2)
    used["cu_seqlens_q"] &= kind != 0
    used["cu_seqlens_k"] = (kind == 1) | (kind == 2)
    for name in POINTERS[2:]:
        used[name] &= kind == 3
    for name, which in used.items():
        made["at"][name] = np.where(which, rows_of(arrays[name]), 0)
    made["at"]["block_table"] = np.where(kind == 2, 2**40, 0)  # whether there is one is all that counts
    made["at"]["cache_seqlen"] = numbers(rng, SEQUENCES, 0, LARGEST)
    for name in ("seqlen_q", "seqlen_k", "left", "right", "total_q"):
        made[name] = numbers(rng, SEQUENCES, 0, OPEN)
    for name in ("total_k", "seqlen_new"):
        made[name] = numbers(rng, SEQUENCES, 0, LARGEST)
    made["num_places"] = np.where(kind == 3, numbers(rng, SEQUENCES, 1, LARGEST), NO_CACHE)
    made["batch"] = BATCH
    made["bottom_right"] = rng.integers(0, 2, SEQUENCES)
    return made, rng.integers(0, BATCH + used["cu_seqlens_q"], SEQUENCES).astype(np.int32), arrays


def between(low, x, high):
    return max(low, min(x, high))


def cut(starts, index, total, longest):
    """Its part of `total` rows, not longer than the longest one."""
    start = between(0, starts[index], total)
    return start, min(between(start, starts[index + 1], total), start + longest)


def expected_sequence(params, index, given):
    """The twin of `sequence_at`, of numbers that do not wrap; `given` are the index arrays that there are."""
    found = {"index": index, "place": index, "first_row": 0, "first_key": 0, "offset": 0}
    found |= {name: params[name] for name in ("seqlen_q", "seqlen_k", "left", "right")}
    if "cu_seqlens_q" in given:
        starts = given["cu_seqlens_q"]
        rows = cut(starts, index, params["total_q"], params["seqlen_q"]) if index < BATCH else None
        rows = rows or (between(0, starts[BATCH], params["total_q"]), params["total_q"])
        found |= {"first_row": rows[0], "seqlen_q": rows[1] - rows[0]}
    if index == BATCH:
        found["seqlen_k"] = 0
    elif params["num_places"] != NO_CACHE:
        stop, new = given["cache_seqlens"][index] if "cache_seqlens" in given else params["at"]["cache_seqlen"], None
        if "cu_seqlens_k_new" in given:
            new = cut(given["cu_seqlens_k_new"], index, params["seqlen_new"], params["seqlen_new"])
        stop += params["seqlen_new"] if new is None else new[1] - new[0]
        stop = between(0, stop, params["seqlen_k"])
        start = between(0, given["cache_leftpad"][index] if "cache_leftpad" in given else 0, stop)
        place = given["cache_batch_idx"][index] if "cache_batch_idx" in given else index
        nowhere = not 0 <= place < params["num_places"]
        found |= {"place": 0 if nowhere else place, "seqlen_k": 0 if nowhere else stop - start, "first_key": start}
    elif "cu_seqlens_k" in given:
        paged = params["at"]["block_table"] != 0
        keys = cut(given["cu_seqlens_k"], index, LARGEST if paged else params["total_k"], params["seqlen_k"])
        found |= {"first_key": 0 if paged else keys[0], "seqlen_k": keys[1] - keys[0]}
    if params["bottom_right"]:
        found["offset"] = found["seqlen_k"] - found["seqlen_q"]
    return found


def hold_sequences(rng, kernel):
    made, indices, arrays = sequences(rng)
    found = np.zeros((SEQUENCES, len(FIELDS)), np.int64)
    run(kernel, [made, indices], found, reached=arrays.values())
    by_name = dict(zip(FIELDS, found.T, strict=True))
    assert_inside(made, indices, by_name)
    named = [dict(zip(made.dtype.names, record, strict=True)) for record in made.tolist()]
    lists = {name: array.tolist() for name, array in arrays.items()}
    for case, params in enumerate(named):
        params["at"] = dict(zip(made["at"].dtype.names, params["at"], strict=True))
        given = {name: rows[case] for name, rows in lists.items() if params["at"][name]}
        expected = expected_sequence(params, int(indices[case]), given)
        its = dict(zip(FIELDS, found[case].tolist(), strict=True))
        if not expected["seqlen_k"]:  # where no keys are is all the same
            its["first_key"] = expected["first_key"]
        assert its == expected, (params, given)


def assert_inside(made, indices, found):
    """Rows and keys are those of the arrays; by the bounds alone, not by what the index arrays say."""
    cached, packed = made["num_places"] != NO_CACHE, made["at"]["cu_seqlens_q"] != 0
    last_row, last_key = (found[f"first_{x}"] + found[f"seqlen_{y}"] for x, y in (("row", "q"), ("key", "k")))
    assert (found["seqlen_q"] >= 0).all()
    assert (found["seqlen_k"] >= 0).all()
    assert (found["seqlen_k"] <= made["seqlen_k"]).all()
    assert (found["first_row"] >= 0).all()
    assert (last_row <= np.where(packed, made["total_q"], made["seqlen_q"])).all()
    ends = np.where(made["at"]["cu_seqlens_k"] != 0, made["total_k"], made["seqlen_k"])
    ends = np.where(made["at"]["block_table"] != 0, made["seqlen_k"], ends)
    some = found["seqlen_k"] > 0
    assert ((found["first_key"] >= 0) & (last_key <= ends))[some].all()
    assert ((found["place"] >= 0) & (found["place"] < made["num_places"]))[cached & (indices < BATCH)].all()


@target
def test_sequences_of_any_numbers_lie_within_the_arrays(rng, target):
    hold_sequences(rng, built(PROBE, "alone::sequence<0>", target))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("start + smaller(longest, end - start)", "start + longest"),
        ("int64 stop = params.at.cache_seqlens", "int stop = params.at.cache_seqlens"),
        ("found.place >= params.num_places", "found.place > params.num_places"),
    ],
    ids=["a sum that wraps", "lengths of 32 bits", "one place too many"],
)
def test_a_fault_in_where_sequences_lie_is_found(rng, old, new):
    with pytest.raises(AssertionError):
        hold_sequences(rng, built(PROBE, "alone::sequence<0>", "sm_80", planted(MASK, old, new)))
