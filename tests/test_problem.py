"""The nouns of the package, without arrays: bands against their definition, sizes, shapes and costs by hand."""

import itertools
import os
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from cupyattn import problem
from cupyattn.problem import NAMED_DEVICES, Layout, Mask, Problem, ScoreEdits, Sizes, Span, Spec

SIDES = (None, 0, 1, 2, 9)
LENGTHS = range(8)

every_band = pytest.mark.parametrize(
    "band",
    [Mask(left, right, to) for left, right, to in itertools.product(SIDES, SIDES, ("top-left", "bottom-right"))],
    ids=lambda band: f"{band.left}-{band.right}-{band.alignment}",
)


def dense(band, seqlen_q, seqlen_k):
    """The definition: whether each query sees each key, one pair at a time."""
    offset = {"top-left": 0, "bottom-right": seqlen_k - seqlen_q}[band.alignment]
    return [
        [
            (band.left is None or row + offset - key <= band.left)
            and (band.right is None or key - (row + offset) <= band.right)
            for key in range(seqlen_k)
        ]
        for row in range(seqlen_q)
    ]


def keys_of(span):
    return set(range(span.start, span.stop))


def sizes(batch_shape=(2,), heads=(12, 4, 4), seqlens=(5, 7), head_dims=(16, 24), total_q=0):
    return Sizes(batch_shape, *heads, *seqlens, *head_dims, total_q)


def asked(axes="bshd", mask=None, **changes):
    """A Problem about float32 arrays."""
    known = {"sizes": sizes(), "layout": Layout(axes), "dtype": "float32", "edits": ScoreEdits(0.25)}
    return Problem(**{**known, "mask": mask or Mask(), **changes})


# ---------------------------------------------------------------------------------------------------
# Which keys a query sees
# ---------------------------------------------------------------------------------------------------


@every_band
def test_visible_keys_are_those_of_the_definition(band):
    for seqlen_q, seqlen_k in itertools.product(LENGTHS, LENGTHS):
        for row, seen in enumerate(dense(band, seqlen_q, seqlen_k)):
            expected = {key for key, visible in enumerate(seen) if visible}
            assert keys_of(band.visible_keys(row, seqlen_q, seqlen_k)) == expected


@every_band
def test_touched_keys_are_seen_by_some_row_and_whole_keys_by_all(band):
    for seqlen_q, seqlen_k in itertools.product(LENGTHS, LENGTHS):
        table = dense(band, seqlen_q, seqlen_k)
        for start, stop in itertools.combinations(range(seqlen_q + 1), 2):
            seen = list(zip(*table[start:stop], strict=True))
            rows = Span(start, stop)
            assert keys_of(band.touched(rows, seqlen_q, seqlen_k)) == {key for key, by in enumerate(seen) if any(by)}
            assert keys_of(band.whole(rows, seqlen_q, seqlen_k)) == {key for key, by in enumerate(seen) if all(by)}


@every_band
def test_as_many_pairs_are_visible_as_the_definition_says(band):
    for seqlen_q, seqlen_k in itertools.product(LENGTHS, LENGTHS):
        expected = sum(map(sum, dense(band, seqlen_q, seqlen_k)))
        assert band.count_visible(seqlen_q, seqlen_k) == expected


def test_a_million_rows_are_counted_without_walking_them():
    assert Mask(right=0).count_visible(10**6, 10**6) == 10**6 * (10**6 + 1) // 2
    assert Mask(left=9, right=0).count_visible(10**6, 10**6) == 10 * 10**6 - 45


def test_a_mask_without_sides_has_no_band():
    assert not Mask().has_band
    assert not Mask(array=(5, 7)).has_band
    assert Mask(left=0).has_band
    assert Mask(right=0).has_band


@every_band
def test_the_width_of_a_band_is_the_most_keys_that_it_lets_a_row_see(band):
    for seqlen_k in LENGTHS:
        rows = range(-10, 2 * max(LENGTHS))  # all places of a diagonal, and not those alone that a call has
        whole = Mask(band.left, band.right, 0)
        seen = max(len(whole.visible_keys(row, 1, seqlen_k)) for row in rows)
        assert band.band_width(seqlen_k) == (seen if band.has_band else None)


def test_the_diagonal_of_the_first_row_lies_where_the_alignment_says():
    assert Mask(alignment="top-left").offset(2, 5) == 0
    assert Mask(alignment="bottom-right").offset(2, 5) == 3
    assert Mask(alignment="bottom-right").offset(5, 2) == -3


def test_a_span_is_half_open_and_may_be_empty():
    assert len(Span(2, 5)) == 3
    assert len(Span(5, 2)) == 0
    assert [index in Span(2, 5) for index in (1, 2, 4, 5)] == [False, True, True, False]
    assert 3 not in Span(5, 2)


# ---------------------------------------------------------------------------------------------------
# How many of everything
# ---------------------------------------------------------------------------------------------------


def divisors(number):
    return [size for size in range(1, number + 1) if number % size == 0]


@pytest.mark.parametrize("num_heads", [1, 2, 6, 8, 12])
def test_queries_per_pair_is_the_longest_group_that_shares_its_key_and_its_value_head(num_heads):
    for num_heads_k, num_heads_v in itertools.product(divisors(num_heads), repeat=2):
        pair = [(head * num_heads_k // num_heads, head * num_heads_v // num_heads) for head in range(num_heads)]
        groups = {
            size: [set(pair[first : first + size]) for first in range(0, num_heads, size)]
            for size in divisors(num_heads)
        }
        expected = max(size for size, shared in groups.items() if all(len(pairs) == 1 for pairs in shared))
        assert sizes(heads=(num_heads, num_heads_k, num_heads_v)).queries_per_pair == expected


def test_queries_per_pair_of_no_heads_is_one():
    assert sizes(heads=(0, 0, 0)).queries_per_pair == 1
    assert sizes(heads=(0, 2, 2)).queries_per_pair == 1


@pytest.mark.parametrize(("batch_shape", "batch"), [((), 1), ((3,), 3), ((2, 3), 6), ((2, 0), 0)])
def test_the_batch_is_the_product_of_its_axes(batch_shape, batch):
    assert sizes(batch_shape).batch == batch


@pytest.mark.parametrize(
    ("axes", "batch_shape", "out_shape", "lse_shape"),
    [
        ("bshd", (2,), (2, 5, 12, 24), (2, 12, 5)),
        ("bhsd", (2,), (2, 12, 5, 24), (2, 12, 5)),
        ("bhsd", (), (12, 5, 24), (12, 5)),
        ("bhsd", (2, 3), (2, 3, 12, 5, 24), (2, 3, 12, 5)),
        ("thd", (2,), (9, 12, 24), (12, 9)),
    ],
)
def test_results_have_the_shapes_of_their_layout(axes, batch_shape, out_shape, lse_shape):
    of_the_call = asked(axes, sizes=sizes(batch_shape, total_q=9))
    assert of_the_call.out_shape == out_shape
    assert of_the_call.lse_shape == lse_shape
    assert of_the_call.layout.ragged == (axes == "thd")


# ---------------------------------------------------------------------------------------------------
# What it costs
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "visible"),
    [
        (Mask(), 35),
        (Mask(right=0), 3 + 4 + 5 + 6 + 7),
        (Mask(right=0, alignment="top-left"), 1 + 2 + 3 + 4 + 5),
        (Mask(left=1, right=0), 5 * 2),
        (Mask(array=(5, 7)), 35),
    ],
)
def test_flops_are_two_products_over_the_visible_pairs(mask, visible):
    # 2 sequences, 12 heads; a multiplication and an addition for each of 16 + 24 features of a pair
    assert asked(mask=mask).flops == 2 * 12 * visible * 2 * (16 + 24)


def test_flops_of_the_largest_call_are_exact():
    large = sizes((2**10,), (2**7,) * 3, (2**20, 2**20), (2**7, 2**7))
    assert asked(sizes=large).flops == 2**10 * 2**7 * 2**40 * 2 * 2**8


@pytest.mark.parametrize(
    ("dtype", "item", "lse_item"), [("float16", 2, 4), ("bfloat16", 2, 4), ("float32", 4, 4), ("float64", 8, 8)]
)
def test_bytes_are_those_of_the_arrays_once(dtype, item, lse_item):
    q, k, v, out = 2 * 5 * 12 * 16, 2 * 7 * 4 * 16, 2 * 7 * 4 * 24, 2 * 5 * 12 * 24
    assert asked(dtype=dtype).bytes == (q + k + v + out) * item
    assert asked(dtype=dtype, needs_lse=True).bytes == (q + k + v + out) * item + 2 * 12 * 5 * lse_item


def test_bytes_count_fewer_value_heads_than_key_heads():
    q, k, v, out = 2 * 5 * 12 * 16, 2 * 7 * 6 * 16, 2 * 7 * 2 * 24, 2 * 5 * 12 * 24
    assert asked(sizes=sizes(heads=(12, 6, 2))).bytes == (q + k + v + out) * 4


def test_float8_operands_are_of_one_byte_and_their_results_of_two():
    problem = asked(dtype="float8_e4m3fn", needs_lse=True, needs_dropout_mask=True)
    q, k, v, out = 2 * 12 * 5 * 16, 2 * 4 * 7 * 16, 2 * 4 * 7 * 24, 2 * 12 * 5 * 24
    assert problem.bytes == q + k + v + 2 * out + 4 * 2 * 12 * 5
    assert {name: spec.dtype for name, spec in problem.results.items()} == {
        "out": "bfloat16",
        "lse": "float32",
        "dropout_mask": "bfloat16",
    }


@pytest.mark.parametrize(
    "size", [{"batch_shape": (0,)}, {"seqlens": (0, 7)}, {"seqlens": (5, 0)}, {"heads": (0, 0, 0)}]
)
def test_an_empty_call_costs_no_flops(size):
    assert asked(sizes=sizes(**size)).flops == 0


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float16", "float32"), ("float32", "float32"), ("float64", "float64")]
)
def test_lse_is_at_least_float32(dtype, expected):
    assert asked(dtype=dtype).lse_dtype == expected


def test_a_spec_knows_its_bytes():
    assert Spec("q", (2, 3, 4), "bfloat16").nbytes == 48
    assert Spec("q", (2, 0, 4), "float64").nbytes == 0
    assert Spec("q", (2, 3, 4), "float8_e4m3fn").nbytes == 24
    assert Spec("mask", (), "bool").nbytes == 1


# ---------------------------------------------------------------------------------------------------
# Values, to be compared, kept and printed
# ---------------------------------------------------------------------------------------------------


def test_equal_problems_are_one_key_of_a_dictionary():
    kept = {asked(): "first"}
    kept[asked()] = "second"
    assert kept == {asked(): "second"}


@pytest.mark.parametrize(
    "changes",
    [
        {"sizes": sizes(seqlens=(5, 8))},
        {"layout": Layout("bhsd")},
        {"layout": Layout("bshd", page_size=16)},
        {"layout": Layout("bshd", cached=True)},
        {"dtype": "float16"},
        {"mask": Mask(right=0)},
        {"mask": Mask(array=(5, 7))},
        {"edits": ScoreEdits(0.5)},
        {"edits": ScoreEdits(0.25, sinks=True)},
        {"dropout_p": 0.5},
        {"compute_dtype": "float32"},
        {"needs_lse": True},
        {"needs_dropout_mask": True},
    ],
    ids=str,
)
def test_problems_that_differ_in_anything_are_different(changes):
    assert asked(**changes) != asked()
    assert len({asked(**changes), asked()}) == 2


def test_what_was_worked_out_about_a_problem_does_not_change_it():
    looked_at = asked()
    _ = looked_at.flops, looked_at.bytes, looked_at.out_shape, looked_at.lse_shape
    assert looked_at == asked()
    assert hash(looked_at) == hash(asked())
    assert repr(looked_at) == repr(asked())


ELSEWHERE = """
import pickle, sys
sys.path.insert(0, sys.argv[1])
came = pickle.load(sys.stdin.buffer)
made = type(came)(came.sizes, came.layout, came.dtype, came.mask, came.edits)
print(came == made, hash(came) == hash(made))
"""


def test_a_problem_is_found_in_dictionaries_of_the_process_it_was_sent_to():
    sent = asked()
    hash(sent)
    package = Path(problem.__file__).parents[1]
    call = [sys.executable, "-c", ELSEWHERE, str(package)]
    # strings hash differently there, as they do in every new process
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    there = subprocess.run(call, input=pickle.dumps(sent), capture_output=True, check=True, env=environment)
    assert there.stdout.split() == [b"True", b"True"]


@pytest.mark.parametrize("mask", [Mask(), Mask(3, 0, "top-left", (1, 5, 7))], ids=str)
def test_a_problem_prints_as_the_expression_that_makes_it(mask):
    edits = ScoreEdits(0.25, softcap=30.0, alibi_slopes=(12,), bias=(5, 7), sinks=True)
    printed = asked(mask=mask, edits=edits, dropout_p=0.1, compute_dtype="float32")
    assert eval(repr(printed), vars(problem)) == printed


def test_a_problem_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        asked().dtype = "float16"
    with pytest.raises(FrozenInstanceError):
        asked().mask.right = 1
    assert replace(asked(), dtype="float16") == asked(dtype="float16")


def test_every_named_device_is_a_gpu_under_its_own_name():
    for name, device in NAMED_DEVICES.items():
        assert device.name == name
        assert device.kind == "cuda"
        assert device.num_units > 0
        assert device.compute_capability >= (7, 0)
        assert 48 * 1024 < device.shared_memory <= 227 * 1024
    assert len({hash(device) for device in NAMED_DEVICES.values()}) == len(NAMED_DEVICES)


@pytest.mark.parametrize(("layout", "expected"), [
    (Layout("bshd"), False),
    (Layout("bhsd"), False),
    (Layout("thd"), True),
    (Layout("bshd", cached=True), True),
    (Layout("thd", 16, True), True),
])  # fmt: skip
def test_lengths_are_data_in_packed_sequences_and_in_a_cache(layout, expected):
    assert layout.lengths_are_data is expected
