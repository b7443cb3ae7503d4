"""A problem on the CPU cut into parts: sequences of the same lengths go together, wherever they lie."""

import numpy as np
import pytest
from conftest import SEED
from oracle import assert_matches, assert_same_bits

import cupyattn
from cupyattn import numpy_ref
from cupyattn.cpu.cutting import SHORT, cut_into_parts
from cupyattn.plan import choose
from cupyattn.problem import Device, Spec
from cupyattn.reading import Options, read

HEADS, HEAD_DIM, HEAD_DIM_V = (4, 2, 1), 6, 5
MIXED = [3, 5, 0, 3, 7, 5, 0, 3, 3, 1, 5], [4, 2, 6, 4, 0, 2, 0, 4, 9, 0, 6]
PACKINGS = {
    "equal": ([5] * 6, [7] * 6),
    "equal, more rows than keys": ([7] * 6, [5] * 6),
    "equal, parted by empty ones": ([5, 0, 5, 0, 5], [3, 0, 3, 2, 3]),
    "q end to end, k not": ([4] * 5, [6, 2, 6, 2, 6]),
    "k end to end, q not": ([6, 2, 6, 2, 6], [4] * 5),
    "no keys": ([2, 3, 2, 3], [0] * 4),
    "mixed": MIXED,
}
OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1), "softcap": 1.5},
    "dropout": {"causal": True, "dropout_p": 0.4, "dropout_seed": SEED},
    "slopes": {"causal": True, "alibi_slopes": "heads"},
    "slopes of each": {"alibi_slopes": "batch, heads"},
}


def starts_of(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def draw(rng, lengths_q, lengths_k, heads=HEADS, behind=3):
    """Packed q, k and v, with nan behind the last sequence."""
    arrays = []
    for lengths, count, dim in zip(
        (lengths_q, lengths_k, lengths_k), heads, (HEAD_DIM, HEAD_DIM, HEAD_DIM_V), strict=True
    ):
        arrays.append(rng.standard_normal((sum(lengths) + behind, count, dim)))
        arrays[-1][sum(lengths) :] = np.nan
    return arrays


def drawn(rng, name, batch):
    """Options, with arrays where only a shape is named."""
    options = dict(OPTIONS[name])
    if "alibi_slopes" in options:
        shape = (4,) if options["alibi_slopes"] == "heads" else (batch, 4)
        options["alibi_slopes"] = rng.uniform(0.1, 1.0, shape)
    return options


def call(q, k, v, lengths_q, lengths_k, options, **more):
    starts = starts_of(lengths_q), starts_of(lengths_k)
    longest = max(lengths_q), max(lengths_k)
    return cupyattn.flash_attn_varlen_func(q, k, v, *starts, *longest, return_lse=True, **options, **more)


def defined(q, k, v, index, options):
    """(out, lse) of one sequence, (rows, heads, dim) and (heads, rows), by the definition."""
    rows, keys, num_heads = len(q), len(k), q.shape[1]
    q, k, v = (np.repeat(x, num_heads // x.shape[1], axis=1).swapaxes(0, 1) for x in (q, k, v))
    distance = np.arange(keys) - (np.arange(rows)[:, None] + keys - rows)
    left, right = options.get("window_size", (-1, -1))
    right = 0 if options.get("causal") else right
    visible = ((distance >= -left) | (left == -1)) & ((distance <= right) | (right == -1))
    slopes = options.get("alibi_slopes", np.zeros(num_heads))
    slopes = slopes if slopes.ndim == 1 else slopes[index]
    p = options.get("dropout_p", 0.0)
    h, i = np.ogrid[:num_heads, :rows]
    state = numpy_ref.attention(
        q,
        k,
        v,
        visible=visible,
        scale=HEAD_DIM**-0.5,
        softcap=options.get("softcap", 0.0),
        bias=-slopes[:, None, None] * abs(distance),
        keep=numpy_ref.dropout_keep(p, SEED, np.int64(index), h, i, range(keys)) if p and keys else True,
        dropout_p=p,
    )
    return state.out.swapaxes(0, 1), state.lse


def assert_is_each_by_itself(found, q, k, v, lengths_q, lengths_k, options, **tolerance):
    out, lse = found
    starts_q, starts_k = starts_of(lengths_q), starts_of(lengths_k)
    for index in range(len(lengths_q)):
        rows, keys = slice(*starts_q[index : index + 2]), slice(*starts_k[index : index + 2])
        expected = defined(q[rows], k[keys], v[keys], index, options)
        assert_matches(out[rows], expected[0], **tolerance)
        assert_matches(lse[:, rows], expected[1], **tolerance)
    assert_matches(out[starts_q[-1] :], np.zeros_like(out[starts_q[-1] :]))
    assert (lse[:, starts_q[-1] :] == -np.inf).all()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("packing", PACKINGS)
def test_sequences_that_go_together_are_attended_to_as_each_by_itself(rng, packing, name):
    lengths = PACKINGS[packing]
    for heads in (HEADS, (4, 4, 4)):
        q, k, v = draw(rng, *lengths, heads)
        options = drawn(rng, name, len(lengths[0]))
        found = call(q, k, v, *lengths, options)
        assert_is_each_by_itself(found, q, k, v, *lengths, options, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", OPTIONS)
def test_they_are_in_float32(rng, name):
    q, k, v = draw(rng, *MIXED)
    options = drawn(rng, name, len(MIXED[0]))
    found = call(q, k, v, *MIXED, options, compute_dtype="float32")
    assert_is_each_by_itself(found, q, k, v, *MIXED, options, rtol=1e-5, atol=1e-5)


def test_random_mixes_of_lengths_are_attended_to_as_each_by_itself(rng):
    for _ in range(20):
        batch = int(rng.integers(1, 40))
        lengths = [rng.integers(0, rng.integers(2, 9), batch).tolist() for _ in range(2)]
        q, k, v = draw(rng, *lengths)
        options = drawn(rng, str(rng.choice(list(OPTIONS))), batch)
        found = call(q, k, v, *lengths, options)
        assert_is_each_by_itself(found, q, k, v, *lengths, options, rtol=1e-11, atol=1e-13)


def test_views_of_one_packed_array_are_taken_as_they_are(rng):
    qkv = rng.standard_normal((sum(MIXED[0]), 3, 4, HEAD_DIM))
    q, k, v = qkv[:, 0], qkv[:, 1], qkv[::-1, 2]
    found = call(q, k, v, MIXED[0], MIXED[0], {"causal": True})
    state = call(q.copy(), k.copy(), v.copy(), MIXED[0], MIXED[0], {"causal": True})
    assert_same_bits(found[0], state[0])
    assert_same_bits(found[1], state[1])


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("packing", PACKINGS)
def test_pages_give_the_same_bits_whatever_goes_together(rng, packing, page_size):
    lengths_q, lengths_k = PACKINGS[packing]
    q, k, v = draw(rng, lengths_q, lengths_k)
    used = [-(-length // page_size) for length in lengths_k]
    order, table = iter(rng.permutation(sum(used) + 1)), np.full((len(used), max(used)), -1, np.int32)
    pages = [np.full((sum(used) + 1, page_size, *x.shape[1:]), np.nan) for x in (k, v)]
    for index, start in enumerate(starts_of(lengths_k)[:-1]):
        for key in range(lengths_k[index]):
            if key % page_size == 0:
                table[index, key // page_size] = next(order)
            for target, source in zip(pages, (k, v), strict=True):
                target[table[index, key // page_size], key % page_size] = source[start + key]
    options = drawn(rng, "slopes of each", len(used))
    expected = call(q, k, v, lengths_q, lengths_k, options)
    found = call(q, *pages, lengths_q, lengths_k, options, block_table=table)
    assert_same_bits(found[0], expected[0])
    assert_same_bits(found[1], expected[1])


def test_what_one_sequence_may_not_see_stays_out_of_all_that_go_with_it(rng):
    lengths = [4, 2, 4, 4, 2], [6, 3, 6, 6, 3]
    q, k, v = draw(rng, *lengths)
    options = {"window_size": (1, 0)}
    clean = call(q, k, v, *lengths, options)
    for index in (0, 2):
        k[starts_of(lengths[1])[index]] = np.nan
        v[starts_of(lengths[1])[index]] = np.nan
    for one, other in zip(call(q, k, v, *lengths, options), clean, strict=True):
        assert_matches(one, other, rtol=1e-12, atol=1e-13)


# ---------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------


def parts_of(lengths_q, lengths_k, heads=1, head_dim=8, num_workers=1):
    """(operands, parts) of packed float64 operands of zeros."""
    operands = {
        name: np.zeros((sum(lengths), heads, head_dim))
        for name, lengths in (("q", lengths_q), ("k", lengths_k), ("v", lengths_k))
    }
    operands |= {"cu_seqlens_q": starts_of(lengths_q), "cu_seqlens_k": starts_of(lengths_k)}
    specs = tuple((name, Spec(name, x.shape, x.dtype.name)) for name, x in operands.items())
    options = Options(axes="thd", max_seqlen_q=max(lengths_q), max_seqlen_k=max(lengths_k))
    problem = read("test", specs, options)
    plan = choose(problem, Device("cpu", "cpu", num_workers))
    return operands, list(cut_into_parts(plan, problem, operands, 0))


def test_sequences_of_the_same_lengths_are_one_part_and_those_without_rows_are_none():
    _, parts = parts_of(*MIXED)
    found = {(part.seqlen_q, part.seqlen_k): part.batch_ids.tolist() for part in parts}
    assert found == {(3, 4): [0, 3, 7], (5, 2): [1, 5], (7, 0): [4], (3, 9): [8], (1, 0): [9], (5, 6): [10]}
    assert len(parts) == len(found)


def test_a_thousand_sequences_that_lie_end_to_end_are_views_of_the_operands():
    operands, (part,) = parts_of([16] * 1000, [16] * 1000)
    for name, view in (("q", part.q.array), ("k", part.k.array), ("v", part.v.array)):
        assert view.shape == (1000, 1, 16, 8)
        assert np.shares_memory(view, operands[name])
    assert len(part.tiles) < 10


def test_long_sequences_stay_by_themselves_and_are_never_copied():
    seqlen = SHORT // (4 * 8) + 1
    _, parts = parts_of([seqlen, 2, seqlen, seqlen, 2], [seqlen, 2, seqlen, seqlen, 2])
    assert sorted(part.batch_ids.tolist() for part in parts) == [[0], [1, 4], [2], [3]]
    assert all(part.k.places is None for part in parts if part.seqlen_q == seqlen)


def test_a_part_that_is_little_of_the_problem_is_not_cut_for_every_worker():
    lengths = [length for length in range(20, 60) for _ in range(12)]
    _, parts = parts_of(lengths, lengths, head_dim=64, num_workers=4)
    assert all(part.num_workers == 1 and len(part.tiles) == 1 for part in parts)
    _, (whole,) = parts_of([60] * 600, [60] * 600, head_dim=64, num_workers=4)
    assert whole.num_workers == 4
    assert len(whole.tiles) >= 4
