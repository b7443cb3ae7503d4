"""What a caller's arguments turn into: defaults, spellings of one meaning, and the text of a refusal."""

import re
from fractions import Fraction

import numpy as np
import pytest

from cupyattn import reading
from cupyattn.problem import Layout, Mask, Spec
from cupyattn.reading import Options, check_sequences, read, refusal


def specs(dtype="float32", /, **shapes):
    """The specs of arrays under their own names; bool, int32 or `dtype`, as each has to be."""
    kinds = {"mask": "bool", "cu_seqlens_q": "int32", "cu_seqlens_k": "int32", "block_table": "int32"}
    kinds |= dict.fromkeys(reading.DESCALES, "float32")
    return tuple((name, Spec(name, shape, kinds.get(name, dtype))) for name, shape in shapes.items())


SQUARE = {"q": (2, 5, 4, 8), "k": (2, 5, 2, 8), "v": (2, 5, 2, 6)}
LONGER_KEYS = {"q": (2, 5, 4, 8), "k": (2, 7, 2, 8), "v": (2, 7, 2, 6)}


def asked(shapes=SQUARE, dtype="float32", /, **options):
    return read("attention", specs(dtype, **shapes), Options(**options))


def torch_like(**options):
    """Options of functions that broadcast heads and batches, as torch's do."""
    return Options(**{"axes": "bhsd", "any_rank": True, "grouped_heads": False, "alignment": "top-left", **options})


# ---------------------------------------------------------------------------------------------------
# Defaults
# ---------------------------------------------------------------------------------------------------


def test_without_options_nothing_is_hidden_capped_or_dropped():
    problem = asked()
    assert problem.mask == Mask()
    assert problem.layout == Layout("bshd")
    edits = problem.edits
    assert (edits.softcap, edits.alibi_slopes, edits.bias, edits.sinks) == (0.0, None, None, False)
    assert (problem.dropout_p, problem.compute_dtype, problem.needs_lse) == (0.0, None, False)


def test_sizes_are_read_off_the_shapes():
    sizes = asked(LONGER_KEYS).sizes
    assert (sizes.batch_shape, sizes.seqlen_q, sizes.seqlen_k) == ((2,), 5, 7)
    assert (sizes.num_heads, sizes.num_heads_k, sizes.num_heads_v) == (4, 2, 2)
    assert (sizes.head_dim, sizes.head_dim_v) == (8, 6)


def test_both_layouts_ask_for_the_same_sizes():
    turned = {"q": (2, 4, 5, 8), "k": (2, 2, 7, 8), "v": (2, 2, 7, 6)}
    assert asked(turned, axes="bhsd").sizes == asked(LONGER_KEYS).sizes
    assert asked(turned, axes="bhsd").out_shape == (2, 4, 5, 6)


@pytest.mark.parametrize(("head_dim", "expected"), [(1, 1.0), (64, 0.125), (80, 80**-0.5), (0, 1.0)])
def test_the_default_scale_is_one_over_the_root_of_head_dim(head_dim, expected):
    shapes = {"q": (1, 5, 1, head_dim), "k": (1, 5, 1, head_dim), "v": (1, 5, 1, 6)}
    assert asked(shapes).edits.softmax_scale == expected


def test_a_scale_of_zero_is_a_scale():
    assert reading.softmax_scale("f", "scale", 0) == 0.0
    assert asked(softmax_scale=0.0).edits.softmax_scale == 0.0
    assert reading.softmax_scale("f", "scale", None) is None


def test_key_and_value_heads_may_differ():
    sizes = asked({"q": (2, 5, 12, 8), "k": (2, 5, 6, 8), "v": (2, 5, 4, 8)}).sizes
    assert (sizes.num_heads, sizes.num_heads_k, sizes.num_heads_v, sizes.queries_per_pair) == (12, 6, 4, 1)


def test_a_batch_of_one_serves_all_the_others():
    assert asked({**SQUARE, "k": (1, 5, 2, 8), "v": (1, 5, 2, 6)}).sizes.batch_shape == (2,)
    assert asked({**SQUARE, "q": (1, 5, 4, 8)}).sizes.batch_shape == (2,)


@pytest.mark.parametrize(
    "empty",
    [
        {"q": (0, 5, 4, 8), "k": (0, 5, 2, 8), "v": (0, 5, 2, 6)},
        {"q": (2, 0, 4, 8), "k": (2, 5, 2, 8), "v": (2, 5, 2, 6)},
        {"q": (2, 5, 4, 8), "k": (2, 0, 2, 8), "v": (2, 0, 2, 6)},
        {"q": (2, 5, 0, 8), "k": (2, 5, 0, 8), "v": (2, 5, 0, 6)},
        {"q": (2, 5, 4, 8), "k": (2, 5, 2, 8), "v": (2, 5, 2, 0)},
    ],
    ids=str,
)
def test_nothing_of_something_is_not_an_error(empty):
    assert asked(empty).out_shape == (*empty["q"][:3], empty["v"][-1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_four_dtypes_can_be_computed_with(dtype):
    assert asked(SQUARE, dtype).dtype == dtype


def test_edits_are_remembered_by_their_shapes():
    edits = asked({**SQUARE, "bias": (4, 1, 5), "alibi_slopes": (2, 4), "sinks": (4,)}, softcap=30.0).edits
    assert (edits.bias, edits.alibi_slopes, edits.sinks, edits.softcap) == ((4, 1, 5), (2, 4), True, 30.0)


def test_equal_calls_are_one_problem():
    assert asked() is asked()
    assert asked() is not asked(needs_lse=True)


# ---------------------------------------------------------------------------------------------------
# The band: windows, causal, alignment
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ((-1, -1), (None, None)),
        ((None, -1), (None, None)),
        ([3, None], (3, None)),
        ((0, 0), (0, 0)),
        ((np.int64(2), np.array(5)), (2, 5)),
        ((-1, 2**31 - 1), (None, 2**31 - 1)),
    ],
)
def test_no_limit_of_a_window_is_none_or_minus_one(window, expected):
    assert reading.window("f", "window_size", window) == expected


@pytest.mark.parametrize(
    ("window", "expected"), [((None, None), (None, 0)), ((3, None), (3, 0)), ((3, 2), (3, 0)), ((None, 0), (None, 0))]
)
def test_causal_sets_the_right_side_to_nothing(window, expected):
    mask = asked(causal=True, window=window).mask
    assert (mask.left, mask.right) == expected


@pytest.mark.parametrize("alignment", ["top-left", "bottom-right"])
def test_a_chosen_alignment_is_kept(alignment):
    assert asked(LONGER_KEYS, causal=True, alignment=alignment).mask == Mask(None, 0, alignment)


def test_without_a_diagonal_no_alignment_has_to_be_chosen():
    assert asked(LONGER_KEYS, alignment=None).mask == Mask()
    assert asked({**LONGER_KEYS, "mask": (5, 7)}, alignment=None).mask == Mask(array=(5, 7))


def test_with_equal_lengths_no_alignment_has_to_be_chosen():
    assert asked(alignment=None, causal=True).mask == Mask(right=0)
    assert asked(alignment=None, window=(1, 1)).mask == Mask(1, 1)


@pytest.mark.parametrize(
    "has_a_diagonal", [{"causal": True}, {"window": (1, None)}, {"window": (None, 2)}, {"alibi_slopes": (4,)}], ids=str
)
def test_with_a_diagonal_and_different_lengths_the_alignment_has_to_be_chosen(has_a_diagonal):
    options = dict(has_a_diagonal)
    shapes = {**LONGER_KEYS, **{name: options.pop(name) for name in ("alibi_slopes",) if name in options}}
    with pytest.raises(ValueError, match="attention: alignment has to be chosen"):
        asked(shapes, alignment=None, **options)
    asked(shapes, alignment="top-left", **options)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 7), (5, 1), (4, 5, 7), (1, 1, 5, 7), (2, 4, 5, 7), (2, 1, 1, 1)])
def test_masks_and_biases_broadcast_to_the_scores(shape):
    assert asked({**LONGER_KEYS, "mask": shape}).mask.array == shape
    assert asked({**LONGER_KEYS, "bias": shape}).edits.bias == shape


@pytest.mark.parametrize("shape", [(), (1,), (2,), (1, 2), (3, 1), (3, 2)], ids=str)
def test_descales_broadcast_to_batch_and_key_heads(shape):
    shapes = {"q": (3, 5, 4, 8), "k": (3, 5, 2, 8), "v": (3, 5, 2, 8)}
    described = {**shapes, **dict.fromkeys(reading.DESCALES, shape)}
    assert asked(described, "float8_e4m3fn", takes_float8=True) == asked(shapes, "float8_e4m3fn", takes_float8=True)


def test_the_descale_of_q_goes_by_the_heads_of_k_and_that_of_v_by_its_own():
    shapes = {"q": (3, 5, 4, 8), "k": (3, 5, 2, 8), "v": (3, 5, 1, 8)}
    asked({**shapes, "q_descale": (3, 2), "v_descale": (3, 1)}, "float8_e4m3fn", takes_float8=True)
    for name, shape, wanted in (("q_descale", (3, 4), "(3, 2)"), ("v_descale", (3, 2), "(3, 1)")):
        with pytest.raises(
            ValueError, match=re.escape(f"{name} does not broadcast to (batch, num_heads_kv), {wanted}")
        ):
            asked({**shapes, name: shape}, "float8_e4m3fn", takes_float8=True)


# ---------------------------------------------------------------------------------------------------
# torch's broadcasting
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "key", "value", "out_shape", "lse_shape"),
    [
        ((5, 8), (7, 8), (7, 6), (1, 5, 6), (1, 5)),
        ((4, 5, 8), (7, 8), (7, 6), (4, 5, 6), (4, 5)),
        ((5, 8), (4, 7, 8), (4, 7, 6), (4, 5, 6), (4, 5)),
        ((4, 5, 8), (1, 7, 8), (4, 7, 6), (4, 5, 6), (4, 5)),
        ((2, 4, 5, 8), (4, 7, 8), (7, 6), (2, 4, 5, 6), (2, 4, 5)),
        ((3, 1, 4, 5, 8), (2, 1, 7, 8), (1, 1, 4, 7, 6), (3, 2, 4, 5, 6), (3, 2, 4, 5)),
        ((2, 3, 2, 4, 5, 8), (7, 8), (7, 6), (2, 3, 2, 4, 5, 6), (2, 3, 2, 4, 5)),
        ((0, 4, 5, 8), (1, 4, 7, 8), (0, 4, 7, 6), (0, 4, 5, 6), (0, 4, 5)),
    ],
)
def test_leading_axes_broadcast_against_each_other(query, key, value, out_shape, lse_shape):
    problem = read("f", specs(q=query, k=key, v=value), torch_like())
    assert problem.out_shape == out_shape
    assert problem.lse_shape == lse_shape


def test_one_query_head_meets_many_key_heads_only_if_nothing_is_grouped():
    shapes = specs(q=(2, 1, 5, 8), k=(2, 4, 7, 8), v=(2, 4, 7, 6))
    assert read("f", shapes, torch_like()).sizes.num_heads == 4
    with pytest.raises(ValueError, match="the number of heads of k has to divide"):
        read("f", shapes, torch_like(grouped_heads=True))


def test_grouped_heads_of_any_rank():
    problem = read("f", specs(q=(3, 2, 4, 5, 8), k=(2, 2, 7, 8), v=(1, 7, 6)), torch_like(grouped_heads=True))
    assert problem.out_shape == (3, 2, 4, 5, 6)
    assert problem.sizes.queries_per_pair == 2


# ---------------------------------------------------------------------------------------------------
# Packed sequences and pages
# ---------------------------------------------------------------------------------------------------

PACKED = {"q": (9, 4, 8), "k": (11, 2, 8), "v": (11, 2, 6), "cu_seqlens_q": (4,), "cu_seqlens_k": (4,)}
PAGES = {**PACKED, "k": (5, 2, 2, 8), "v": (5, 2, 2, 6), "block_table": (3, 2)}


def test_a_packed_problem_has_its_longest_lengths_and_all_its_rows():
    problem = asked(PACKED, axes="thd", max_seqlen_q=6, max_seqlen_k=8)
    sizes = problem.sizes
    assert (sizes.batch_shape, sizes.seqlen_q, sizes.seqlen_k, sizes.total_q) == ((3,), 6, 8, 9)
    assert (problem.out_shape, problem.lse_shape) == ((9, 4, 6), (4, 9))
    assert problem.layout == Layout("thd")


def test_the_page_size_is_read_off_k():
    assert asked(PAGES, axes="thd", max_seqlen_q=6, max_seqlen_k=4).layout == Layout("thd", page_size=2)


def sequences(starts_q, starts_k, shapes=PACKED, table=None, longest=9):
    """Look at the values of index arrays, as a call would."""
    here = dict(specs(**{**shapes, "cu_seqlens_q": (len(starts_q),), "cu_seqlens_k": (len(starts_k),)}))
    sizes = asked(shapes, axes="thd", max_seqlen_q=longest, max_seqlen_k=longest).sizes
    operands = {"cu_seqlens_q": np.array(starts_q), "cu_seqlens_k": np.array(starts_k), "block_table": np.array(table)}
    check_sequences("f", here, sizes, operands)


def test_sequences_may_be_empty_and_end_before_the_rows_do():
    sequences([0, 0, 3, 3], [0, 5, 5, 5])
    sequences([0, 0, 0, 0], [0, 0, 0, 0])
    sequences([0], [0])


def test_pages_past_the_end_of_a_sequence_are_not_looked_at():
    sequences([0, 1, 2, 3], [0, 4, 5, 5], PAGES, [[0, 4], [3, -7], [99, 99]])


def test_a_page_that_is_half_full_is_looked_at():
    with pytest.raises(ValueError, match="f: block_table of sequence 0 names page 9, and there are 5"):
        sequences([0, 1, 2, 3], [0, 3, 5, 5], PAGES, [[0, 9], [3, 1], [0, 0]])


def test_many_starts_are_shown_shortened():
    starts = [0] * 50 + [-1]
    with pytest.raises(ValueError, match=r"cu_seqlens_q  \[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, \.\.\. 51 entries\]"):
        sequences(starts, starts)


# ---------------------------------------------------------------------------------------------------
# Scalars
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["float32", np.float32, np.dtype("float32")])
def test_a_compute_dtype_may_be_a_name_a_type_or_a_dtype(spelling):
    assert reading.compute_dtype("f", spelling) == "float32"


@pytest.mark.parametrize("library", ["numpy", "torch", "jax.numpy", "array_api_strict"])
def test_a_compute_dtype_may_be_of_any_library(library):
    xp = pytest.importorskip(library)
    assert reading.compute_dtype("f", xp.float32) == "float32"
    assert reading.compute_dtype("f", xp.float64) == "float64"


def test_no_compute_dtype_leaves_the_choice_to_the_device():
    assert reading.compute_dtype("f", None) is None


@pytest.mark.parametrize("value", [1, 1.0, np.float32(1), np.int8(1), np.float64(1), Fraction(2, 2)])
def test_a_number_may_be_of_any_real_type(value):
    number = reading.softcap("f", value)
    assert type(number) is float
    assert number == 1.0


@pytest.mark.parametrize("value", [3, np.int32(3), np.uint64(3), np.array(3)])
def test_an_integer_may_be_of_any_integer_type(value):
    number = reading.integer("f", "n", value, low=0)
    assert type(number) is int
    assert number == 3


@pytest.mark.parametrize("value", [0, 2**64 - 1, np.uint64(2**64 - 1), None])
def test_every_seed_of_64_bits_is_a_seed(value):
    assert reading.dropout_seed("f", value) == value


@pytest.mark.parametrize("value", [0, 0.0, 0.5, 1, np.float32(0.5)])
def test_every_probability_is_one_from_0_to_1(value):
    assert reading.dropout_p("f", value) == value


@pytest.mark.parametrize("value", [True, False, np.True_, np.False_])
def test_a_flag_is_a_bool_of_python_or_numpy(value):
    assert reading.flag("f", "causal", value) is bool(value)


def test_a_choice_is_one_of_those_allowed():
    assert reading.choice("f", "layout", "bhsd", ("bshd", "bhsd")) == "bhsd"
    assert reading.choice("f", "alignment", None, (None, "top-left")) is None
    with pytest.raises(ValueError, match="f: layout has to be one of 'bshd', 'bhsd'\n    layout  'xyz'"):
        reading.choice("f", "layout", "xyz", ("bshd", "bhsd"))


# ---------------------------------------------------------------------------------------------------
# The text of a refusal
# ---------------------------------------------------------------------------------------------------


def test_a_refusal_shows_what_came_in_columns():
    text = refusal(
        "attention",
        "num_heads_k has to divide num_heads",
        ("q", (2, 128, 10, 64), "num_heads = 10"),
        ("keys", (2, 512, 4, 64), "num_heads_k = 4"),
        ("v", "as k"),
    )
    assert text.splitlines() == [
        "attention: num_heads_k has to divide num_heads",
        "    q     (2, 128, 10, 64)  num_heads = 10",
        "    keys  (2, 512, 4, 64)   num_heads_k = 4",
        "    v     as k",
    ]


def test_a_refusal_of_nothing_shown_is_one_line():
    assert refusal("pad_input", "no") == "pad_input: no"


def test_no_line_of_a_refusal_ends_in_spaces():
    text = refusal("f", "no", ("long_name", 1), ("b", 12345, ""), ("c", ""))
    assert all(line == line.rstrip() for line in text.splitlines())


def test_a_refusal_calls_arguments_as_the_caller_does():
    here = (("q", Spec("query", (2, 4, 5, 8), "float32")), ("k", Spec("key", (2, 4, 5, 6), "float32")))
    with pytest.raises(ValueError, match="f: query and key have different head_dim") as caught:
        read("f", (*here, ("v", Spec("value", (2, 4, 5, 8), "float32"))), torch_like())
    assert caught.match(r"    query  \(2, 4, 5, 8\)\n    key    \(2, 4, 5, 6\)$")
