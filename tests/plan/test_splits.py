"""Into how many splits a decode's keys are cut: by our own rule, and by flash-attn 2 and 3 for comparison."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cupyattn.plan import choose
from cupyattn.plan.splits import (
    BLOCKS_PER_UNIT,
    FEWEST_KEYS,
    FEWEST_KEYS_OF_TILES,
    PEERS,
    by_wave_efficiency,
    flash_attn_2,
    flash_attn_3,
    live_split_blocks,
    merging_blocks,
    split,
)
from cupyattn.problem import NAMED_DEVICES, Layout, Mask, Problem, ScoreEdits, Sizes

H100 = NAMED_DEVICES["H100"]
SLOTS = BLOCKS_PER_UNIT * H100.num_units
PACKED = 16
"""Rows of a tile of the split-KV kernel."""


def decode(seqlen_k, batch=1, heads=(32, 8), seqlen_q=1, head_dim=128, layout="bshd", page_size=None, **changes):
    """A Problem, by default one query of a model with 32 heads that share 8 key heads, in float16."""
    num_heads, num_heads_k = heads
    sizes = Sizes((batch,), num_heads, num_heads_k, num_heads_k, seqlen_q, seqlen_k, head_dim, head_dim)
    rest = {"mask": Mask(), "edits": ScoreEdits(0.1), **changes}
    return Problem(sizes, Layout(layout, page_size), "float16", **rest)


def cut(problem, block_k=64, fixed_split_size=None):
    """(keys of a split, splits of a piece, thread blocks) by our own rule on an H100."""
    return split(problem, H100, PACKED, block_k, fixed_split_size)[:3]


# ---------------------------------------------------------------------------------------------------
# flash-attn 2 and 3: numbers that the compiled functions gave
# ---------------------------------------------------------------------------------------------------

LENGTHS = (512, 1024, 2048, 4096, 8192, 32768, 131072)
GOLDEN = {
    ((32, 8), 1): "4/1/1 8/6/6 16/11/11 32/14/12 32/15/12 29/15/15 28/15/15",
    ((32, 8), 2): "4/1/1 8/6/6 16/7/6 16/7/6 16/8/7 14/8/8 14/8/8",
    ((32, 8), 4): "4/1/1 8/4/3 8/4/3 7/4/4 7/4/4 7/4/4 7/4/4",
    ((32, 8), 8): "4/1/1 4/2/2 4/2/2 4/2/2 4/2/2 4/2/2 4/2/2",
    ((32, 8), 12): "2/1/1 8/4/2 8/4/2 5/4/2 5/4/2 5/4/2 5/4/2",
    ((32, 8), 16): "2/1/1 2/1/1 2/1/1 2/1/1 2/1/1 2/1/1 2/1/1",
    ((32, 8), 32): "1/1/1 1/1/1 1/1/1 1/1/1 1/1/1 1/1/1 1/1/1",
    ((32, 8), 64): "1/1/1 1/1/1 1/1/1 1/1/1 1/1/1 1/1/1 1/1/1",
    ((32, 32), 1): "4/1/1 8/4/3 8/4/3 7/4/4 7/4/4 7/4/4 7/4/4",
    ((32, 32), 4): "2/1/1 2/1/1 2/1/1 2/1/1 2/1/1 2/1/1 2/1/1",
    ((32, 32), 8): "1/1/1 1/1/1 1/1/1 1/1/1 1/1/1 1/1/1 1/1/1",
    ((8, 1), 1): "4/1/1 8/6/6 16/11/11 32/21/21 64/40/40 128/109/94 114/109/107",
    ((8, 1), 16): "4/1/1 8/6/6 16/7/6 16/7/6 16/8/7 14/8/8 14/8/8",
}
"""{(heads, batch): flash-attn 2 / flash-attn 3 / the same with lengths on the device, for each of LENGTHS}"""


@pytest.mark.parametrize(("heads", "batch"), GOLDEN)
def test_a_decode_on_an_h100_is_split_as_flash_attn_2_and_3_split_it(heads, batch):
    problems = [decode(length, batch, heads) for length in LENGTHS]
    found = [
        (flash_attn_2(problem, H100), flash_attn_3(problem, H100), flash_attn_3(problem, H100, [length] * batch))
        for problem, length in zip(problems, LENGTHS, strict=True)
    ]
    assert " ".join("/".join(map(str, row)) for row in found) == GOLDEN[heads, batch]


@pytest.mark.parametrize("length", LENGTHS)
def test_a_chunk_of_a_prefill_fills_the_gpu_for_flash_attn_2(length):
    assert flash_attn_2(decode(length, seqlen_q=512), H100) == 1


def test_flash_attn_2_does_not_fold_heads_of_several_queries():
    assert flash_attn_2(decode(4096, seqlen_q=64), H100) == 7
    speculative = [decode(4096, batch, seqlen_q=4, mask=Mask(right=0)) for batch in (1, 8)]
    assert [flash_attn_2(problem, H100) for problem in speculative] == [7, 1]
    assert [flash_attn_3(problem, H100) for problem in speculative] == [14, 2]


def test_a_long_sequence_among_short_ones_is_split_by_flash_attn_3_only():
    problem = decode(65536, batch=32)
    lengths = [65536] + 31 * [512]
    assert flash_attn_3(problem, H100, lengths) == 12
    assert flash_attn_3(problem, H100, lengths[::-1]) == 1
    assert flash_attn_2(problem, H100) == 1


@pytest.mark.parametrize(
    ("change", "splits"),
    [
        ({}, 32),
        ({"mask": Mask(right=0)}, 32),
        ({"mask": Mask(left=8192, right=8192)}, 32),
        ({"mask": Mask(left=8191)}, 7),
        ({"mask": Mask(left=0)}, 7),
        ({"mask": Mask(left=0, right=0)}, 7),
        ({"mask": Mask(right=1)}, 7),
        ({"edits": ScoreEdits(0.1, alibi_slopes=(32,))}, 7),
        ({"dropout_p": 0.1}, 1),
    ],
    ids=str,
)
def test_flash_attn_2_folds_the_heads_of_one_query_that_sees_all_keys(change, splits):
    assert flash_attn_2(decode(8192, **change), H100) == splits


@pytest.mark.parametrize(
    ("change", "splits"), [({}, 32), ({"seqlen_q": 4}, 1), ({"seqlen_q": 4, "page_size": 256}, 7)], ids=str
)
def test_flash_attn_2_splits_ragged_keys_only_where_it_folds_heads_or_reads_pages(change, splits):
    assert flash_attn_2(decode(8192, layout="thd", **change), H100) == splits


@pytest.mark.parametrize("length", [700, 1409, 2113, 8192])
def test_for_flash_attn_3_causal_changes_nothing_of_one_query(length):
    plain, causal = (flash_attn_3(decode(length, mask=mask), H100) for mask in (Mask(), Mask(right=0)))
    assert causal == plain


def test_flash_attn_3_counts_the_keys_of_a_window_and_a_tile_of_rows():
    # 1024 + 1 + 128 keys are ten blocks of 128
    assert flash_attn_3(decode(65536, batch=2, mask=Mask(left=1024)), H100) == 7
    assert flash_attn_3(decode(65536, mask=Mask(left=1024)), H100) == 9
    assert flash_attn_3(decode(65536, mask=Mask(left=65535, right=0)), H100) == flash_attn_3(decode(65536), H100)


def test_flash_attn_3_splits_heads_that_outgrow_the_cache():
    # 2**18 keys and values of 128 halves are 128 MB, in parts of at most 50 MB
    sizes = {"seqlen_k": 2**18, "heads": (1, 1), "seqlen_q": 2**16}
    assert flash_attn_3(decode(**sizes), H100) == 3
    assert flash_attn_3(decode(**sizes, mask=Mask(right=0)), H100) == 1


@pytest.mark.parametrize("rule", PEERS.values(), ids=PEERS)
@pytest.mark.parametrize(
    "sizes", [{"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}, {"heads": (0, 8)}, {"heads": (0, 0)}], ids=str
)
def test_no_work_is_no_reason_to_split(sizes, rule):
    problem = decode(**{"seqlen_k": 8192, **sizes})
    assert rule(problem, H100) == 1
    assert cut(problem)[2] <= 8
    assert cut(problem, fixed_split_size=64)[2] <= 8


# ---------------------------------------------------------------------------------------------------
# Wave efficiency
# ---------------------------------------------------------------------------------------------------


def test_48_blocks_on_108_units_are_split_in_two():
    # two splits fill 96/108 = 0.89 of a wave; three would need two waves for 144/216 = 0.67
    assert by_wave_efficiency(48, 108, key_blocks=100) == 2


def test_splits_that_make_no_split_shorter_are_passed_over():
    # 5 blocks of keys: four splits are as long as three
    assert by_wave_efficiency(25, 100, key_blocks=5) == 4
    assert by_wave_efficiency(25, 100, key_blocks=5, eligible=lambda splits: splits != 4) == 3


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.integers(1, 500), st.integers(1, 200), st.integers(1, 1000))
def test_the_splits_are_the_fewest_within_85_percent_of_the_best(blocks, units, key_blocks):
    most = min(128, units, key_blocks)
    splits = by_wave_efficiency(blocks, units, key_blocks)
    waves = [np.float32(blocks * n) / np.float32(units) for n in range(1, most + 1)]
    filled = [float(count / np.ceil(count)) for count in waves]
    assert 1 <= splits <= most
    assert filled[splits - 1] >= 0.85 * max(filled)
    assert all(share < 0.85 * max(filled) for share in filled[: splits - 1])


# ---------------------------------------------------------------------------------------------------
# Our own rule
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (decode(8192), (256, 32, 256)),
        (decode(131072), (4032, 33, 264)),
        (decode(8192, batch=8), (2048, 4, 256)),
        (decode(8192, batch=17), (8192, 1, 136)),
        (decode(8192, batch=64), (8192, 1, 512)),
        (decode(256), (256, 1, 8)),
        (decode(257), (320, 1, 8)),
        (decode(512), (256, 2, 16)),
        (decode(8192, heads=(8, 1), seqlen_q=8), (256, 32, 128)),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else "",
)
def test_these_decodes_are_cut_like_this_on_an_h100(problem, expected):
    assert cut(problem) == expected


@st.composite
def decodes(draw):
    num_heads_k = draw(st.integers(1, 40))
    heads = (num_heads_k * draw(st.sampled_from([1, 2, 4, 5, 8])), num_heads_k)
    batch, seqlen_q, seqlen_k = draw(st.integers(1, 300)), draw(st.integers(1, 8)), draw(st.integers(1, 2**20))
    left = draw(st.none() | st.integers(0, 5000))
    right = draw(st.none() | st.integers(0, 5))
    return decode(seqlen_k, batch, heads, seqlen_q, mask=Mask(left, right)), draw(st.sampled_from([16, 32, 64]))


def pieces_of(problem):
    sizes = problem.sizes
    return sizes.batch * sizes.num_heads_k * math.ceil(sizes.seqlen_q * sizes.queries_per_pair / PACKED)


@settings(derandomize=True, deadline=None, max_examples=500)
@given(decodes())
def test_all_splits_run_in_one_wave(asked):
    problem, block_k = asked
    size, splits, workers = cut(problem, block_k)
    pieces = pieces_of(problem)
    assert workers == pieces * splits
    assert size % block_k == 0
    assert workers <= SLOTS if pieces < SLOTS else splits == 1


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.integers(1, SLOTS), st.sampled_from([16, 32, 64]))
def test_of_many_keys_there_are_splits_for_half_the_slots_at_least(pieces, block_k):
    _, _, workers = cut(decode(2**24, pieces, heads=(1, 1)), block_k)
    assert 2 * workers >= SLOTS


@settings(derandomize=True, deadline=None, max_examples=500)
@given(decodes(), st.none() | st.integers(1, 10_000))
def test_the_splits_cover_the_keys_that_are_seen_and_none_is_empty(asked, fixed_split_size):
    problem, block_k = asked
    size, splits, _ = cut(problem, block_k, fixed_split_size)
    seqlen_q, seqlen_k = problem.sizes.seqlen_q, problem.sizes.seqlen_k
    spans = [problem.mask.visible_keys(row, seqlen_q, seqlen_k) for row in range(seqlen_q)]
    seen = {key // block_k for span in spans if len(span) for key in (span.start, span.stop - 1)}
    blocks = max(seen) - min(seen) + 1 if seen else 0
    assert (splits - 1) * size < max(1, blocks * block_k) <= max(1, splits * size)


@settings(derandomize=True, deadline=None, max_examples=500)
@given(decodes())
def test_a_split_that_was_not_asked_for_has_enough_keys(asked):
    problem, block_k = asked
    size, splits, _ = cut(problem, block_k)
    assert splits == 1 or size >= FEWEST_KEYS


def test_splits_of_a_window_cut_the_window_only():
    whole, window = (cut(decode(65536, mask=mask)) for mask in (Mask(), Mask(left=1023, right=0)))
    assert whole == (2048, 32, 256)
    assert window == (256, 4, 32)


@pytest.mark.parametrize("layout", ["bshd", "thd"])
@pytest.mark.parametrize("asked", [1, 64, 500, 512, 10**6])
def test_a_fixed_split_size_does_not_depend_on_what_else_is_in_the_batch(layout, asked):
    found = {
        cut(decode(8192, batch, heads, layout=layout), fixed_split_size=asked)[:2]
        for batch in (1, 3, 1000)
        for heads in ((32, 8), (8, 1), (64, 64))
    }
    whole_blocks = 64 * math.ceil(asked / 64)
    assert found == {(whole_blocks, math.ceil(8192 / whole_blocks))}


def test_a_fixed_split_size_is_planned():
    plan = choose(decode(8192), H100, 1000)
    assert (plan.split_size, plan.num_splits, plan.num_workers) == (1024, 8, 64)
    assert plan.reason == "splits of 1024 keys, as was asked"
    assert plan != choose(decode(8192), H100)


def test_lengths_that_are_data_are_split_on_the_device():
    size, splits, workers = cut(decode(65536, batch=32, layout="thd"))
    assert size == 0
    # as if the other 31 sequences were empty: 1024 blocks, and one more, for each of 8 heads share all slots
    assert splits == 1 + math.ceil(1023 / math.ceil(8 * 1025 / 264)) == 33
    assert workers == 264
    assert cut(decode(65536, batch=32, layout="thd", mask=Mask(left=10)))[1] == splits


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=200), st.integers(0, 300), st.sampled_from([16, 32, 64]))
def test_splits_by_live_lengths_run_in_one_wave_beside_as_many_free_slots(blocks, more, block_k):
    pieces = len(blocks)
    slots = 2 * pieces + more
    size = live_split_blocks(sum(blocks), pieces, slots, block_k)
    assert size * block_k >= FEWEST_KEYS
    assert sum(max(1, math.ceil(count / size)) for count in blocks) <= slots


# ---------------------------------------------------------------------------------------------------
# The Hopper kernel
# ---------------------------------------------------------------------------------------------------

H200 = NAMED_DEVICES["H200"]
CAUSAL = Mask(right=0, alignment="bottom-right")


def of_hopper(problem, fixed_split_size=None):
    """(tiles of rows, splits, thread blocks) of a plan that the Hopper kernel has."""
    chosen = choose(problem, H200, fixed_split_size)
    assert chosen.kernel == "hopper"
    return chosen.num_workers // chosen.num_splits, chosen.num_splits, chosen.num_workers


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (decode(65536, seqlen_q=32, mask=CAUSAL), (8, 16, 128)),
        (decode(65536, seqlen_q=17, mask=CAUSAL), (8, 16, 128)),
        (decode(65536, seqlen_q=5), (8, 16, 128)),
        (decode(65536, seqlen_q=128, mask=CAUSAL), (32, 4, 128)),
        (decode(131072, batch=2, heads=(28, 4), seqlen_q=32, mask=CAUSAL), (16, 8, 128)),
        (decode(2048, seqlen_q=32, mask=CAUSAL), (8, 4, 32)),
        (decode(895, seqlen_q=32, mask=CAUSAL), (8, 1, 8)),
        (decode(65536, batch=16, seqlen_q=32, mask=CAUSAL), (128, 1, 128)),
        (decode(65536, seqlen_q=32, mask=Mask(left=1023, right=0, alignment="bottom-right")), (8, 2, 16)),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else "",
)
def test_few_rows_behind_many_keys_fill_an_h200(problem, expected):
    assert of_hopper(problem) == expected


def test_a_plan_of_few_rows_says_how_it_fills_the_gpu():
    chosen = choose(decode(65536, seqlen_q=32, mask=CAUSAL), H200)
    tiles, _, splits = chosen.reason.partition("; ")
    assert tiles == "8 tiles of 128 rows, of 4 heads side by side"
    assert splits == "8 pieces on 132 slots: 16 splits of 4096 keys fill 97% of one wave"
    assert dict(chosen.peers) == {"flash-attn 2": 7, "flash-attn 3": 15}
    assert (chosen.tile.cluster, chosen.tile.persistent) == (1, False)


def test_a_prefill_that_fills_the_gpu_is_not_split():
    chosen = choose(decode(2048, seqlen_q=2048, mask=CAUSAL), H200)
    assert (chosen.kernel, chosen.num_splits, chosen.split_size, chosen.peers) == ("hopper", 1, 0, ())


def test_lengths_that_are_data_are_split_by_hopper_where_tiles_are_few():
    few, many = (decode(65536, batch, seqlen_q=16, layout="thd", mask=CAUSAL) for batch in (4, 17))
    # as if the other sequences were empty: 512 blocks of 128 keys for each of 8 heads share 100 slots
    assert of_hopper(few) == (32, math.ceil(512 / math.ceil(8 * 512 / 100)), 32 * 13)
    assert choose(few, H200).split_size == 0
    assert "by the lengths on the device" in choose(few, H200).reason
    assert of_hopper(many) == (144, 1, 144)  # one tile for each head wipes the rows behind the last sequence


@pytest.mark.parametrize("asked", [1, 1000, 4096])
def test_a_fixed_split_size_of_few_rows_does_not_depend_on_the_batch(asked):
    found = {of_hopper(decode(8192, batch, seqlen_q=32, mask=CAUSAL), asked)[1] for batch in (1, 3, 1000)}
    assert found == {8192 // (128 * math.ceil(asked / 128))}
    sizes = {choose(decode(8192, batch, seqlen_q=32, mask=CAUSAL), H200, asked).split_size for batch in (1, 3, 1000)}
    assert sizes == ({128 * math.ceil(asked / 128)})


@pytest.mark.parametrize("batch", [1, 100])
def test_with_a_fixed_split_size_rows_of_several_tiles_are_never_split(batch):
    assert of_hopper(decode(65536, batch, seqlen_q=33, mask=CAUSAL), 512)[1] == 1


def test_splits_of_tiles_have_enough_keys():
    for seqlen_k in (1024, 1500, 5000, 20000):
        chosen = choose(decode(seqlen_k, seqlen_q=32, mask=CAUSAL), H200)
        assert chosen.split_size >= FEWEST_KEYS_OF_TILES


def test_where_hopper_cannot_read_the_arrays_splitkv_splits_its_own_way():
    instead = choose(decode(65536, seqlen_q=8, mask=CAUSAL), H200).instead
    assert (instead.kernel, instead.num_splits) == ("splitkv", 16)


@pytest.mark.parametrize(
    ("rows", "num_splits", "blocks", "together"),
    [(32, 4, 8, False), (32, 5, 32, True), (1056, 9, 1056, True), (1057, 9, 265, False), (0, 9, 0, True)],
)
def test_few_rows_of_many_splits_are_merged_by_a_block_each(rows, num_splits, blocks, together):
    assert merging_blocks(rows, num_splits) == (blocks, together)
