"""What a caller's arguments turn into: defaults, spellings of one meaning, and the text of a refusal."""

import inspect
import re
import warnings
from fractions import Fraction

import numpy as np
import pytest

import cupyattn
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


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_scale_may_have_any_sign(sign):
    assert reading.softmax_scale("f", "scale", 0.3 * sign) == 0.3 * sign


LIBRARIES = ["numpy", "torch", "jax.numpy", "array_api_strict"]


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_number_may_be_an_array_of_shape_nothing_of_any_library(library):
    xp = pytest.importorskip(library)
    half, three, true = xp.asarray(0.5), xp.asarray(3), xp.asarray(True)
    found = [
        *(reading.softmax_scale("f", "scale", x) for x in (half, three)),
        *(f("f", half) for f in (reading.softcap, reading.dropout_p)),
        *(reading.dropout_seed("f", three), reading.split_size("f", three)),
        *reading.window("f", "window_size", (three, xp.asarray(-1))),
        reading.flag("f", "causal", true),
    ]
    assert found == [0.5, 3.0, 0.5, 0.5, 3, 3, 3, None, True]
    assert [type(x) for x in found] == [float, float, float, float, int, int, int, type(None), bool]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", ">f8", "longdouble"])
def test_a_number_in_an_array_may_be_of_any_floating_dtype(dtype):
    kind = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    assert reading.softcap("f", np.array(0.5, kind)) == 0.5
    assert reading.softcap("f", np.array(0.5, kind)[()]) == 0.5


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_array_of_one_number_in_an_axis_is_no_number(library):
    xp = pytest.importorskip(library)
    for read_one, value in ((reading.softcap, 0.5), (reading.dropout_seed, 3), (reading.dropout_p, 1)):
        with pytest.raises(TypeError, match=r"f: \w+ has to be an? (number|integer), or an array of shape \(\)"):
            read_one("f", xp.asarray([value]))
    with pytest.raises(TypeError, match="f: causal has to be True or False"):
        reading.flag("f", "causal", xp.asarray([True]))


@pytest.mark.parametrize("library", LIBRARIES)
def test_arrays_of_shape_nothing_are_of_the_right_kind_or_refused(library):
    xp = pytest.importorskip(library)
    for read_one, value in (
        (lambda x: reading.softcap("f", x), True),
        (lambda x: reading.dropout_seed("f", x), 3.0),
        (lambda x: reading.dropout_seed("f", x), True),
        (lambda x: reading.flag("f", "causal", x), 1),
    ):
        with pytest.raises(TypeError, match=r"^f: \w+ has to be"):
            read_one(xp.asarray(value))


def test_a_number_that_requires_grad_is_refused_instead_of_losing_its_gradient():
    torch = pytest.importorskip("torch")
    for make in (lambda: torch.tensor(0.5, requires_grad=True), lambda: torch.nn.Parameter(torch.tensor(0.5))):
        with pytest.raises(TypeError, match=r"f: scale requires grad, and no gradient of it is computed.*detach"):
            reading.softmax_scale("f", "scale", make())
        assert reading.softmax_scale("f", "scale", make().detach()) == 0.5
    with pytest.raises(TypeError, match="f: scale requires grad"):
        torch.func.grad(lambda x: reading.softmax_scale("f", "scale", x))(torch.tensor(0.5))


def test_a_number_that_is_not_known_yet_is_refused_in_words():
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    words = "f: scale has to be known now, as it is not under a trace"

    def scale(x):
        return reading.softmax_scale("f", "scale", x)

    with pytest.raises(TypeError, match=words):
        jax.jit(scale)(0.5)
    with pytest.raises(TypeError, match=words):
        jax.grad(scale)(0.5)
    with pytest.raises(TypeError, match=words):
        torch.func.vmap(scale)(torch.ones(2))
    with pytest.raises(TypeError, match=words):
        scale(torch.ones((), device="meta"))
    with pytest.raises(TypeError, match=words):
        scale(jax.ShapeDtypeStruct((), "float32"))
    with pytest.raises(TypeError, match="f: dropout_seed has to be known now"):
        jax.jit(lambda x: reading.dropout_seed("f", x))(3)
    with pytest.raises(TypeError, match="f: causal has to be known now"):
        jax.jit(lambda x: reading.flag("f", "causal", x))(True)


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
# Heads and sequence exchanged
# ---------------------------------------------------------------------------------------------------

REAL = {
    "decode of grouped heads": ((1, 1, 32, 128), (1, 8192, 8, 128)),
    "decode of a batch": ((64, 1, 32, 128), (64, 4096, 8, 128)),
    "decode over one key": ((1, 1, 32, 128), (1, 1, 8, 128)),
    "decode of one head for all": ((1, 1, 71, 64), (1, 300, 1, 64)),
    "decode of few keys": ((1, 1, 8, 64), (1, 3, 8, 64)),
    "prefill": ((2, 4096, 32, 128), (2, 4096, 32, 128)),
    "prefill of grouped heads": ((2, 4096, 128, 128), (2, 4096, 8, 128)),
    "chunk of a prefill": ((1, 512, 32, 128), (1, 8192, 8, 128)),
    "short prompt": ((1, 5, 32, 64), (1, 5, 32, 64)),
    "short prompt of grouped heads": ((1, 5, 32, 64), (1, 5, 8, 64)),
    "short prompt of 71 heads": ((1, 5, 71, 64), (1, 5, 71, 64)),
    "short prompt of Falcon 180B": ((1, 7, 232, 64), (1, 7, 8, 64)),
    "short prompt of Falcon 180B, keys repeated": ((1, 7, 232, 64), (1, 7, 232, 64)),
    "short prompt of 128 heads": ((1, 4, 128, 128), (1, 4, 128, 128)),
    "one token": ((1, 1, 32, 64), (1, 1, 32, 64)),
    "drafts": ((1, 8, 64, 128), (1, 1000, 8, 128)),
    "more drafts than keys": ((1, 8, 64, 128), (1, 4, 8, 128)),
    "vision": ((8, 197, 12, 64), (8, 197, 12, 64)),
    "cross attention from text": ((1, 77, 8, 40), (1, 4096, 8, 40)),
    "cross attention to text": ((1, 4096, 8, 40), (1, 77, 8, 40)),
    "text": ((1, 77, 12, 64), (1, 77, 12, 64)),
    "windows of 49": ((64, 49, 4, 32), (64, 49, 4, 32)),
    "windows of 49, 32 heads": ((64, 49, 32, 32), (64, 49, 32, 32)),
    "windows of 16, 24 heads": ((64, 16, 24, 32), (64, 16, 24, 32)),
    "patches of 25 heads": ((1, 1024, 25, 64), (1, 1024, 25, 64)),
}
"""(q, k) of (batch, seqlen, num_heads, head_dim) as models have them."""

CERTAIN = {
    "grouped heads": ((1, 32, 4096, 128), (1, 8, 4096, 128)),
    "as many": ((2, 32, 4096, 128), (2, 32, 4096, 128)),
    "a few tokens more than anybody has heads": ((1, 32, 257, 128), (1, 32, 257, 128)),
    "vision": ((2, 12, 197, 64), (2, 12, 197, 64)),
    "text": ((1, 8, 77, 64), (1, 8, 77, 64)),
    "cross attention": ((1, 8, 4096, 40), (1, 8, 1024, 40)),
    "71 heads": ((1, 71, 300, 64), (1, 1, 300, 64)),
}
"""(q, k) of (batch, num_heads, seqlen, head_dim)."""


def read_as(shapes, function="attention", **options):
    return read(function, specs(q=shapes[0], k=shapes[1], v=shapes[1]), Options(**options))


def turned(shapes):
    return [(batch, second, first, head_dim) for batch, first, second, head_dim in shapes]


@pytest.mark.parametrize("function", ["attention", "flash_attn_func"])
@pytest.mark.parametrize("name", REAL)
def test_real_shapes_raise_no_false_alarm(name, function):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_as(REAL[name], function)
        read_as(turned(REAL[name]), function, axes="bhsd")
        read_as(turned(REAL[name]), "scaled_dot_product_attention", axes="bhsd", any_rank=True)


@pytest.mark.parametrize("name", CERTAIN)
def test_heads_before_the_sequence_are_warned_of_where_nothing_else_can_be_meant(name):
    with pytest.warns(UserWarning, match=r"attention: heads and sequence look exchanged(.|\n)*say layout=\"bhsd\""):
        read_as(CERTAIN[name])
    with pytest.warns(UserWarning, match=r"flash_attn_func: heads and sequence look exchanged(.|\n)*swapaxes\(1, 2\)"):
        read_as(CERTAIN[name], "flash_attn_func")


def test_a_layout_that_was_chosen_is_not_doubted():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_as(turned(CERTAIN["as many"]), axes="bhsd")
        read_as(CERTAIN["as many"], axes="bhsd")


def test_thousands_of_heads_of_torchs_function_are_warned_of():
    torchs = {"function": "scaled_dot_product_attention", "axes": "bhsd", "any_rank": True}
    for shapes in (((1, 4096, 32, 128), (1, 4096, 8, 128)), ((1, 1, 32, 128), (1, 8192, 8, 128))):
        with pytest.warns(
            UserWarning, match=r"look exchanged(.|\n)*\(batch, seqlen, num_heads, head_dim\), call attention"
        ):
            read_as(shapes, grouped_heads=False, **torchs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_as(((8, 1024, 49, 32), (8, 1024, 49, 32)), **torchs)  # windows before their keys


def test_a_warning_comes_once_for_a_problem_and_points_to_the_callers_line():
    shapes = (1, 16, 999, 8), (1, 16, 999, 8), (1, 16, 999, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            cupyattn.explain(*shapes)
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (((1, 32, 1, 128), (1, 8, 8192, 128)), {}),
        (((1, 32, 1, 128), (1, 32, 8192, 128)), {}),
        (((1, 8, 5, 40), (1, 8, 12, 40)), {}),
        (((1, 8, 6, 40), (1, 2, 6, 40)), {"causal": True, "alignment": None}),
        (((1, 32, 4096, 128), (1, 8, 4096, 128)), {"causal": True, "alignment": None}),
        (((2, 32, 4096, 128), (3, 32, 4096, 128)), {}),
    ],
    ids=str,
)
def test_an_error_names_the_layout_where_that_may_be_what_is_wrong(shapes, options):
    with pytest.raises(
        ValueError, match=r"\n    if the arrays are \(batch, num_heads, seqlen, head_dim\), say layout="
    ):
        read_as(shapes, **options)
    with pytest.raises(ValueError, match=r"\n    if the arrays are .*, pass swapaxes\(1, 2\) of each"):
        read_as(shapes, "flash_attn_func", **options)


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (((2, 100, 10, 64), (2, 100, 4, 64)), {}),
        (((2, 5, 10, 64), (2, 5, 4, 64)), {}),
        (((1, 1, 32, 128), (1, 8192, 8, 128)), {"causal": True, "alignment": None}),
        (((1, 512, 32, 128), (1, 1024, 8, 128)), {"causal": True, "alignment": None}),
        (((2, 4096, 32, 128), (3, 4096, 32, 128)), {}),
    ],
    ids=str,
)
def test_other_errors_do_not_speak_of_the_layout(shapes, options):
    with pytest.raises(ValueError, match=r"^attention: ") as caught:
        read_as(shapes, **options)
    assert "layout" not in str(caught.value)


def test_torchs_error_about_groups_does_not_speak_of_the_layout():
    with pytest.raises(ValueError, match="enable_gqa=True lets key heads serve groups") as caught:
        read("f", specs(q=(1, 32, 100, 128), k=(1, 8, 100, 128), v=(1, 8, 100, 128)), torch_like())
    assert "the arrays are" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------
# Words of others
# ---------------------------------------------------------------------------------------------------

ATTENTIONS = [name for name in cupyattn.__all__ if "attn_" in name or name in ("attention", "cascade_attention")]
ATTENTIONS += ["scaled_dot_product_attention", "attention_backward", "explain"]
TORCHS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
JAXS = (
    *("query", "key", "value", "bias", "mask", "scale", "is_causal", "query_seq_lengths", "key_value_seq_lengths"),
    *("local_window_size", "implementation", "return_residual"),
)
FLASH_ATTNS = (
    *("q", "k", "v", "dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes", "deterministic"),
    *("return_attn_probs", "cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen", "max_seqlen_q", "max_seqlen_k"),
    *("block_table", "k_cache", "v_cache", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx"),
    *("cache_leftpad", "rotary_interleaved", "num_splits", "return_softmax_lse", "q_descale", "k_descale", "v_descale"),
    *("page_table", "cu_seqlens_k_new", "rotary_seqlens", "pack_gqa", "sm_margin", "learnable_sink"),
    "s_aux",
    *("seqused_q", "seqused_k", "qv", "attention_chunk"),
)
FLEX_ATTENTIONS = ("score_mod", "block_mask")
OURS = (
    *("layout", "alignment", "mask", "bias", "sinks", "dropout_seed", "compute_dtype", "fixed_split_size"),
    *("return_lse", "check_indices", "implementation", "backend", "out", "lse_out"),
    *("seqlens_q", "seqlens_k"),
)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_words_of_torch_jax_flash_attn_and_ours_are_answered_with_what_to_say_instead(name):
    function = getattr(cupyattn, name)
    own = list(inspect.signature(function).parameters)
    of_operands = {"q", "k", "v", "query", "key", "value"}  # of functions that have packed ones
    for word in {*TORCHS, *JAXS, *FLASH_ATTNS, *FLEX_ATTENTIONS, *OURS}.difference(own):
        with pytest.raises(TypeError, match=rf"^{name}: has no argument {word}; it has {', '.join(own)}\n") as caught:
            function(**{word: None})
        line = str(caught.value).splitlines()[-1].strip()
        named = re.search(r"here it is (\w+)(?: or (\w+))?(?: or (\w+))?$", line)
        if named:
            assert {x for x in named.groups() if x} <= set(own)
        elif not (word in of_operands and {"qkv", "kv", "k_cache"} & set(own)):
            assert "no function here" not in line
            assert "perhaps" not in line


def test_jaxs_words_are_all_known():
    jax = pytest.importorskip("jax")
    assert set(inspect.signature(jax.nn.dot_product_attention).parameters) <= set(JAXS)


@pytest.mark.parametrize(
    ("name", "word", "words"),
    [
        ("attention", "attn_mask", "here it is mask or bias"),
        ("attention", "is_causal", "here it is causal"),
        ("attention", "scale", "here it is softmax_scale"),
        ("attention", "query", "here it is q"),
        ("attention", "enable_gqa", "leave it out"),
        ("scaled_dot_product_attention", "mask", "here it is attn_mask"),
        ("scaled_dot_product_attention", "window_size", "attention takes it"),
        ("flash_attn_func", "attn_mask", "attention takes it, as mask"),
        ("flash_attn_func", "cu_seqlens_q", "flash_attn_varlen_func takes sequences of different lengths"),
        ("flash_attn_varlen_qkvpacked_func", "cu_seqlens_k", "here it is cu_seqlens"),
        ("attention", "colour", "no function here has one of this name"),
        ("attention", "retrun_lse", "perhaps return_lse$"),
        ("attention", "casual", "perhaps causal$"),
        ("attention", "dropout", "perhaps dropout_p or dropout_seed$"),
        ("attention", "seed", "perhaps dropout_seed$"),
        ("attention", "causal_mask", "perhaps causal or mask$"),
        ("kv_cache_bytes", "token", "perhaps tokens$"),
        ("attention", "cache_seqlens", "here it is seqlens_k"),
        ("flash_attn_qkvpacked_func", "qv", "flash_attn_func takes None for it"),
        ("attention", "attention_chunk", "as a mask of chunks"),
        ("flash_attn_varlen_func", "cache_seqlens", "here it is seqused_k$"),
        ("flash_attn_varlen_func", "seqlens_q", "here it is seqused_q$"),
        ("flash_attn_varlen_kvpacked_func", "seqused_k", "flash_attn_varlen_func takes it, as seqused_k"),
        ("flash_attn_varlen_qkvpacked_func", "seqused_q", "the rows that cu_seqlens say"),
        ("flash_attn_with_kvcache", "seqused_k", "here it is cache_seqlens"),
        ("kv_cache_bytes", "num_layers", "here it is layers"),
        ("kv_cache_bytes", "num_key_value_heads", "here it is num_heads_kv"),
        ("PagedCache", "block_size", "here it is page_size"),
        ("rotary_tables", "head_dim", "here it is dim"),
        ("rotary_tables", "rope_theta", "here it is theta"),
        ("rotary_tables", "rope_scaling", "here it is scaling"),
    ],
)
def test_a_strangers_word_is_explained(name, word, words):
    with pytest.raises(TypeError, match=rf"(?m){word} +.*{words}"):
        getattr(cupyattn, name)(**{word: None})


def test_methods_of_caches_explain_words_as_well():
    cache = cupyattn.DynamicCache()
    with pytest.raises(
        TypeError, match=r"^DynamicCache.attend: has no argument scale; it has q, causal.*\n.*softmax_scale$"
    ):
        cache.attend(np.ones((1, 1, 1, 2)), scale=1.0)


def test_what_is_wrong_besides_words_keeps_its_own_error():
    with pytest.raises(TypeError, match=r"^attention: q has to be an array"):
        cupyattn.attention(1, 2, 3, causal=True)


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


def test_a_refusal_shows_each_value_in_a_line_of_bounded_length():
    text = refusal("f", "no", ("q", np.arange(1000).reshape(10, 100)), ("seqlens", list(range(9999)), "int"))
    assert len(text.splitlines()) == 3
    assert all(len(line) < 330 for line in text.splitlines())
    assert "q        [[ 0 1 2 3" in text
    assert text.endswith("9997, 9998]  int")


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
