"""Rotary embedding against the formula in complex numbers: a pair (a, b) is a + bi, times cos + i sin."""

import ml_dtypes
import numpy as np
import pytest
from homes import DTYPES, HOMES, BigEndian, Dask, Home, Jax, Strict, Torch, needs
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_correctly_rounded, assert_matches, assert_same_bits

from cupyattn import apply_rotary_emb


def by_complex_numbers(x, cos, sin, positions, interleaved):
    """x is (..., rows, heads, head_dim) and positions (..., rows); all in float64."""
    x, cos, sin = (np.asarray(array, np.float64) for array in (x, cos, sin))
    half = cos.shape[-1]
    turn = (cos + 1j * sin)[positions][..., None, :]
    result = x.copy()
    first, second = slice(0, half), slice(half, 2 * half)
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    turned = (x[..., first] + 1j * x[..., second]) * turn
    result[..., first], result[..., second] = turned.real, turned.imag
    return result


def drawn(dtype="float64", shape=(2, 5, 3, 8), half=4, rows=16, seed=1):
    """x, and cos and sin of the angles of the paper: position * 10000 ** (-i / half)."""
    rng = np.random.default_rng(seed)
    kind = DTYPES[dtype]
    angles = np.arange(rows)[:, None] * 10000.0 ** (-np.arange(half) / max(1, half))
    return (rng.standard_normal(shape) + 0.3).astype(kind), np.cos(angles).astype(kind), np.sin(angles).astype(kind)


interleavings = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


@interleavings
@pytest.mark.parametrize("half", [0, 1, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_complex_numbers_rounded_once(dtype, half, interleaved):
    x, cos, sin = drawn(dtype, (2, 9, 3, 8), half)
    found = apply_rotary_emb(x, cos, sin, interleaved)
    expected = by_complex_numbers(x, cos, sin, np.arange(9), interleaved)
    assert found.dtype == x.dtype
    if dtype == "float64":
        assert_matches(found, expected, rtol=1e-15, atol=1e-15)
    else:
        assert_correctly_rounded(found, expected, dtype, share=1.0)
    assert_same_bits(found[..., 2 * half :], x[..., 2 * half :])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_value_is_rounded_once_from_float64(dtype):
    """Many of them: products of float16 or bfloat16 are so short that float64 sums are nearly always exact."""
    x, cos, sin = drawn(dtype, (1, 64, 16, 64), 32, rows=64)
    found = apply_rotary_emb(x, cos, sin)
    assert_correctly_rounded(found, by_complex_numbers(x, cos, sin, np.arange(64), False), dtype, share=1.0)


@interleavings
@pytest.mark.parametrize("offset", [0, 3, np.int64(11), np.int32(7)])
def test_an_offset_is_the_position_of_the_first_row(offset, interleaved):
    x, cos, sin = drawn()
    found = apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offset)
    assert_matches(found, by_complex_numbers(x, cos, sin, offset + np.arange(5), interleaved), atol=1e-15)


@interleavings
@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_every_sequence_has_its_own_offset(kind, interleaved):
    x, cos, sin = drawn()
    offsets = np.array([7, 2], kind)
    found = apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offsets)
    assert_matches(found, by_complex_numbers(x, cos, sin, offsets[:, None] + np.arange(5), interleaved), atol=1e-15)


@interleavings
@pytest.mark.parametrize("offsets", [0, 4, np.array([4, 0, 1, 9], np.int32)], ids=["none", "one", "each"])
def test_packed_sequences_count_from_their_own_start(offsets, interleaved):
    x, cos, sin = drawn(shape=(11, 3, 8))
    starts = np.array([0, 4, 4, 9, 11], np.int32)
    positions = np.concatenate(
        [np.arange(b - a) + first for a, b, first in zip(starts, starts[1:], np.broadcast_to(offsets, 4), strict=False)]
    )
    found = apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offsets, cu_seqlens=starts, max_seqlen=5)
    assert_matches(found, by_complex_numbers(x, cos, sin, positions, interleaved), atol=1e-15)


def test_a_packed_sequence_is_its_padded_self():
    x, cos, sin = drawn(shape=(1, 6, 3, 8))
    starts = np.array([0, 6], np.int32)
    assert_same_bits(apply_rotary_emb(x[0], cos, sin, cu_seqlens=starts), apply_rotary_emb(x, cos, sin)[0])


@given(
    seqlen=st.integers(0, 4),
    heads=st.integers(0, 3),
    half=st.integers(0, 3),
    rest=st.integers(0, 2),
    offset=st.integers(0, 4),
    interleaved=st.booleans(),
)
def test_any_sizes(seqlen, heads, half, rest, offset, interleaved):
    x, cos, sin = drawn(shape=(2, seqlen, heads, 2 * half + rest), half=half, rows=8)
    found = apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offset)
    assert_matches(found, by_complex_numbers(x, cos, sin, offset + np.arange(seqlen), interleaved), atol=1e-15)


def test_rotation_keeps_lengths_and_products_depend_on_distance_alone():
    x, cos, sin = drawn(shape=(1, 8, 1, 8))
    same = np.broadcast_to(x[:, :1], x.shape)
    rotated = apply_rotary_emb(same, cos, sin)[0, :, 0]
    products = rotated @ rotated.T
    for distance in range(8):
        assert np.ptp(np.diagonal(products, distance)) < 1e-13
    assert np.ptp(np.diagonal(products, 1)) < 0.01 * abs(products[0, 0] - products[0, 5])


def test_cos_and_sin_may_be_more_precise_than_x():
    x, cos, sin = drawn("float64")
    low = x.astype(ml_dtypes.bfloat16)
    found = apply_rotary_emb(low, cos, sin)
    assert found.dtype == ml_dtypes.bfloat16
    assert_correctly_rounded(found, by_complex_numbers(low, cos, sin, np.arange(5), False), "bfloat16", share=1.0)


def test_nan_and_infinity_stay_in_their_pair():
    x, cos, sin = drawn()
    x[0, 1, 0, 1], x[1, 2, 2, 7] = np.nan, np.inf
    found = apply_rotary_emb(x, cos, sin)
    touched = np.zeros(x.shape, bool)
    touched[0, 1, 0, [1, 5]] = touched[1, 2, 2, [3, 7]] = True
    np.testing.assert_array_equal(~np.isfinite(found), touched)


# ---------------------------------------------------------------------------------------------------
# Pairs
# ---------------------------------------------------------------------------------------------------


def pair(dtype="float32"):
    """q and k of different numbers of heads, and tables for both."""
    q, cos, sin = drawn(dtype)
    return q, drawn(dtype, (2, 5, 1, 8), seed=2)[0], cos, sin


@interleavings
@pytest.mark.parametrize("home", HOMES, ids=str)
def test_a_pair_is_rotated_as_its_parts_are(home, interleaved):
    operands = pair(home.dtype)
    q, k, cos, sin = map(home.make, operands)

    def both(q, k, cos, sin):
        return apply_rotary_emb((q, k), cos, sin, interleaved, seqlen_offsets=2)

    found = home.call(both, {"q": q, "k": k, "cos": cos, "sin": sin})
    assert type(found) is tuple
    for rotated, like, x in zip(found, (q, k), operands, strict=False):
        home.check(rotated, like)
        assert_same_bits(rotated, apply_rotary_emb(x, *operands[2:], interleaved, seqlen_offsets=2))


def test_a_pair_may_be_packed():
    q, k, cos, sin = pair()
    starts = np.array([0, 4, 10], np.int32)
    packed = q.reshape(10, 3, 8), k.reshape(10, 1, 8)
    for found, x in zip(apply_rotary_emb(packed, cos, sin, cu_seqlens=starts), packed, strict=True):
        assert_same_bits(found, apply_rotary_emb(x, cos, sin, cu_seqlens=starts))


@pytest.mark.parametrize("home", [Home("float32"), BigEndian("float32"), Torch("bfloat16")], ids=str)
def test_a_pair_is_rotated_in_place(home):
    operands = pair(home.dtype)
    q, k, cos, sin = map(home.make, operands)
    given = (q, k)
    assert apply_rotary_emb(given, cos, sin, inplace=True) is given
    for found, expected in zip(given, apply_rotary_emb(operands[:2], *operands[2:]), strict=True):
        assert_same_bits(found, expected)


@pytest.mark.parametrize("spoilt", ["read-only", "too long", "of integers"])
def test_of_a_pair_none_is_written_where_the_second_is_refused(spoilt):
    q, k, cos, sin = pair()
    wrong = {"read-only": k.copy(), "too long": np.ones((2, 17, 1, 8), np.float32), "of integers": k.astype(int)}[
        spoilt
    ]
    wrong.flags.writeable = spoilt != "read-only"
    before = q.copy()
    with pytest.raises((ValueError, TypeError), match=r"apply_rotary_emb: (x\[1\]|positions)"):
        apply_rotary_emb((q, wrong), cos, sin, inplace=True)
    assert_same_bits(q, before)


def test_gradients_flow_through_a_pair():
    torch = needs("torch")
    q, k, cos, sin = (torch.from_numpy(x).requires_grad_() for x in pair("float64"))
    assert torch.autograd.gradcheck(lambda *x: apply_rotary_emb(x[:2], *x[2:]), (q, k, cos, sin))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_tuple_that_is_no_pair_is_refused(count):
    q, _, cos, sin = pair()
    with pytest.raises(TypeError, match=r"apply_rotary_emb: x has to be an array, or a pair of arrays, \(q, k\)"):
        apply_rotary_emb((q,) * count, cos, sin)


# ---------------------------------------------------------------------------------------------------
# In place
# ---------------------------------------------------------------------------------------------------

WRITABLE = [Home("float32"), Home("bfloat16"), BigEndian("float32"), Torch("float32"), Torch("bfloat16")]
WRITABLE += [Strict("float32"), Strict("float64", "device1")]


@pytest.mark.parametrize("home", WRITABLE, ids=str)
def test_inplace_writes_into_x_and_returns_it(home):
    operands = drawn(home.dtype)
    x, cos, sin = map(home.make, operands)
    assert apply_rotary_emb(x, cos, sin, inplace=True) is x
    assert_same_bits(x, apply_rotary_emb(*operands))
    for array, original in ((cos, operands[1]), (sin, operands[2])):
        assert_same_bits(array, original)


@pytest.mark.parametrize("home", [home for home in HOMES if home not in WRITABLE], ids=str)
def test_without_inplace_x_is_left_as_it_was(home):
    operands = drawn(home.dtype)
    x, cos, sin = map(home.make, operands)
    home.call(apply_rotary_emb, {"x": x, "cos": cos, "sin": sin})
    assert_same_bits(x, operands[0])


@pytest.mark.parametrize("home", [Home("float32"), Torch("float32")], ids=str)
def test_inplace_writes_through_a_view(home):
    x, cos, sin = drawn("float32")
    whole = home.make(np.stack([x, x, x], axis=2))
    apply_rotary_emb(whole[:, :, 1], home.make(cos), home.make(sin), inplace=True)
    assert_same_bits(whole, np.stack([x, apply_rotary_emb(x, cos, sin), x], axis=2))


def test_inplace_may_have_its_own_values_as_cos():
    x = np.linspace(0, 1, 4 * 4).reshape(1, 4, 1, 4)
    cos, sin = x[0, :, 0, :2], x[0, :, 0, 2:]
    expected = apply_rotary_emb(x.copy(), cos.copy(), sin.copy())
    apply_rotary_emb(x, cos, sin, inplace=True)
    assert_same_bits(x, expected)


def of_a_pair(whole, first, second):
    return whole[:, :, first], whole[:, :, second]


@pytest.mark.parametrize("heads", [(slice(0, 2), slice(0, 2)), (slice(0, 3), slice(2, 4))], ids=["same", "one"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_inplace_is_refused_of_a_pair_that_shares_memory(library, heads):
    xp = pytest.importorskip(library)
    whole, table = xp.ones((1, 3, 4, 8)), xp.ones((3, 4))
    with pytest.raises(ValueError, match=r"x\[0\] shares memory with x\[1\], and both were to be overwritten"):
        apply_rotary_emb(of_a_pair(whole, *heads), table, 0.5 * table, inplace=True)
    assert (whole == 1).all()


def test_inplace_takes_a_pair_that_lies_side_by_side():
    whole, table = np.ones((2, 1024, 3, 8, 64)), np.ones((1024, 32))
    q, k = whole[:, :, 0], whole[:, :, 1]
    expected = apply_rotary_emb((q, k), table, 0.5 * table)
    apply_rotary_emb((q, k), table, 0.5 * table, inplace=True)
    assert_same_bits(q, expected[0])
    assert_same_bits(k, expected[1])


@pytest.mark.parametrize("home", [Jax("float32"), Jax("float32", jit=True), Dask("float32")], ids=str)
def test_inplace_is_refused_where_arrays_are_immutable(home):
    x, cos, sin = map(home.make, drawn("float32"))

    def overwrite(x, cos, sin):
        return apply_rotary_emb(x, cos, sin, inplace=True)

    with pytest.raises(TypeError, match=r"apply_rotary_emb: x cannot be overwritten: .* is immutable"):
        home.call(overwrite, {"x": x, "cos": cos, "sin": sin})


def test_inplace_is_refused_for_read_only_memory():
    x, cos, sin = drawn()
    x.flags.writeable = False
    with pytest.raises(ValueError, match="apply_rotary_emb: x is read-only and was to be overwritten"):
        apply_rotary_emb(x, cos, sin, inplace=True)


def overlapping(x):
    """Rows of three that share two elements each: no stride is 0."""
    return np.lib.stride_tricks.as_strided(x, (1, 5, 1, 4), (0, x.itemsize, 0, x.itemsize), writeable=True)


@pytest.mark.parametrize("make", [np.asarray, lambda x: needs("torch").from_numpy(x)], ids=["numpy", "torch"])
def test_inplace_is_refused_where_elements_share_memory(make):
    _, cos, sin = drawn(half=2)
    memory = np.arange(8.0)
    x = overlapping(memory) if make is np.asarray else make(memory).as_strided((1, 5, 1, 4), (0, 1, 0, 1))
    with pytest.raises(ValueError, match="apply_rotary_emb: x was to be overwritten, and its elements share memory"):
        apply_rotary_emb(x, make(cos), make(sin), inplace=True)
    assert_same_bits(memory, np.arange(8.0))
    expanded = np.lib.stride_tricks.as_strided(memory, (1, 2, 1, 4), (0, 0, 0, 8), writeable=True)
    with pytest.raises(ValueError, match="its elements share memory"):
        apply_rotary_emb(expanded, cos, sin, inplace=True)


def test_inplace_takes_strides_that_interleave_without_meeting():
    _, cos, sin = drawn(half=1)
    memory = np.zeros(12)
    x = np.lib.stride_tricks.as_strided(memory, (1, 2, 1, 3), (0, 3 * 8, 0, 2 * 8), writeable=True)
    x[...] = np.arange(6.0).reshape(x.shape)
    expected = apply_rotary_emb(x, cos, sin)
    assert apply_rotary_emb(x, cos, sin, inplace=True) is x
    assert_same_bits(x, expected)
    assert apply_rotary_emb(x[:, :0], cos, sin, inplace=True).size == 0


def test_inplace_copies_x_only_where_gradients_will_ask_for_it(monkeypatch):
    torch = needs("torch")
    x, cos, sin = map(torch.from_numpy, drawn("float32"))
    copies = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda x, *a, **o: copies.append(x.shape) or clone(x, *a, **o))
    apply_rotary_emb(x, cos, sin, inplace=True)
    cos.requires_grad_()
    with torch.no_grad():
        apply_rotary_emb(x, cos, sin, inplace=True)
    assert not copies
    apply_rotary_emb(x, cos, sin, inplace=True)
    assert copies == [x.shape]


# ---------------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------------


@interleavings
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_torchs_gradients_are_the_derivatives(packed, interleaved):
    """Offsets overlap, so that some rows of cos and sin are used by both sequences and some by none."""
    torch = needs("torch")
    x, cos, sin = (torch.from_numpy(array).requires_grad_() for array in drawn(shape=(2, 3, 2, 8), half=3, rows=9))
    offsets = torch.tensor([1, 3], dtype=torch.int32)
    starts = torch.tensor([0, 2, 6], dtype=torch.int32) if packed else None

    def rotated(x, cos, sin):
        rows = x.reshape(6, 2, 8) if packed else x
        return apply_rotary_emb(rows, cos, sin, interleaved, seqlen_offsets=offsets, cu_seqlens=starts)

    assert torch.autograd.gradcheck(rotated, (x, cos, sin))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_gradients_are_rotated_back_and_rounded_once(dtype):
    torch = needs("torch")
    home = Torch(dtype)
    operands = drawn(dtype)
    x, cos, sin = (home.make(array).requires_grad_() for array in operands)
    dout = drawn(dtype, seed=2)[0]
    dx, dcos, dsin = torch.autograd.grad(apply_rotary_emb(x, cos, sin), (x, cos, sin), home.make(dout))
    expected = by_complex_numbers(dout, operands[1], -operands[2].astype(np.float64), np.arange(5), False)
    assert_correctly_rounded(dx, expected, dtype, share=1.0)
    wide = operands[0].astype(np.float64), dout.astype(np.float64)
    pairs = [array[..., :4] + 1j * array[..., 4:] for array in wide]
    turn = np.zeros((16, 4), complex)
    turn[:5] = (pairs[1] * pairs[0].conj()).sum(axis=(0, 2))
    assert_correctly_rounded(dcos, turn.real, dtype, share=0.99)
    assert_correctly_rounded(dsin, turn.imag, dtype, share=0.99)


def test_gradients_flow_through_inplace():
    """As in flash-attn, whose models rotate projections in place while they train."""
    torch = needs("torch")
    operands = drawn("float32")
    weight = torch.from_numpy(drawn("float32", seed=2)[0])
    found = []
    for inplace in (False, True):
        x, cos, sin = (torch.from_numpy(array.copy()).requires_grad_() for array in operands)
        projected = 2 * x
        out = apply_rotary_emb(projected, cos, sin, inplace=inplace)
        assert (out is projected) == inplace
        (out * weight).sum().backward()
        found.append([x.grad, cos.grad, sin.grad])
    for a, b in zip(*found, strict=True):
        assert_same_bits(a, b)


def test_inplace_without_gradients_needs_none_of_them():
    torch = needs("torch")
    x, cos, sin = map(torch.from_numpy, drawn("float32"))
    parameter = torch.nn.Parameter(x.clone())
    with torch.no_grad():
        apply_rotary_emb(parameter, cos, sin, inplace=True)
    assert_same_bits(parameter, apply_rotary_emb(x, cos, sin))
    with torch.inference_mode():
        assert_same_bits(apply_rotary_emb(x.clone(), cos, sin, inplace=True), apply_rotary_emb(x, cos, sin))


def test_a_parameter_that_requires_gradients_cannot_be_overwritten():
    torch = needs("torch")
    x, cos, sin = map(torch.from_numpy, drawn("float32"))
    before = x.clone()
    with pytest.raises(ValueError, match="apply_rotary_emb: x is a leaf"):
        apply_rotary_emb(x.requires_grad_(), cos, sin, inplace=True)
    assert_same_bits(x, before)


def test_an_offset_may_be_an_array_of_shape_nothing():
    x, cos, sin = drawn("float32")
    assert_same_bits(
        apply_rotary_emb(x, cos, sin, seqlen_offsets=np.array(2)), apply_rotary_emb(x, cos, sin, seqlen_offsets=2)
    )


# ---------------------------------------------------------------------------------------------------
# Refused
# ---------------------------------------------------------------------------------------------------


X, COS, SIN = drawn()
PACKED = X.reshape(10, 3, 8)
STARTS = np.array([0, 4, 10], np.int32)
WIDE = np.ones((16, 5))
TWICE = np.ones((16, 8))
FROM_0 = "positions have to be from 0 to 15"
ONE_SHAPE = "cos and sin have to be of one shape"
SEQUENCES = "cu_seqlens has to start with 0, must not decrease, and has to end with the rows of x"


@pytest.mark.parametrize(
    ("error", "message", "wrong"),
    [
        (ValueError, FROM_0, {"seqlen_offsets": 12}),
        (TypeError, "seqlen_offsets has to be an integer", {"seqlen_offsets": 1.5}),
        (ValueError, FROM_0, {"seqlen_offsets": np.array([0, -1])}),
        (ValueError, "seqlen_offsets has to be from 0", {"seqlen_offsets": -1}),
        (TypeError, "seqlen_offsets has to be an integer", {"seqlen_offsets": True}),
        (TypeError, "seqlen_offsets has to be int32 or int64", {"seqlen_offsets": np.array([0.0, 1.0])}),
        (ValueError, r"one position per sequence, \(2,\)", {"seqlen_offsets": np.array([0, 1, 2])}),
        (ValueError, "seqlen_offsets has to be an int, or", {"seqlen_offsets": np.array([[1, 1]])}),
        (ValueError, r"must not exceed head_dim, 8\n", {"cos": WIDE, "sin": WIDE}),
        (ValueError, r"as in transformers, pass cos\[:, :4\]", {"cos": TWICE, "sin": TWICE}),
        (ValueError, ONE_SHAPE, {"sin": SIN[:9]}),
        (ValueError, ONE_SHAPE, {"cos": COS[None], "sin": SIN[None]}),
        (ValueError, r"x has to be \(batch, seqlen, num_heads, head_dim\)", {"x": PACKED}),
        (ValueError, r"x has to be \(tokens, num_heads, head_dim\)", {"cu_seqlens": STARTS}),
        (TypeError, "x has to be one of float16", {"x": X.astype(int)}),
        (TypeError, "sin has to be one of float16", {"sin": SIN * 1j}),
        (TypeError, "cu_seqlens has to be int32", {"x": PACKED, "cu_seqlens": STARTS.astype(np.int64)}),
        (ValueError, r"cu_seqlens has to be \(batch \+ 1,\)", {"x": PACKED, "cu_seqlens": STARTS[:0]}),
        (ValueError, SEQUENCES, {"x": PACKED, "cu_seqlens": np.array([1, 10], np.int32)}),
        (ValueError, SEQUENCES, {"x": PACKED, "cu_seqlens": np.array([0, 11], np.int32)}),
        (ValueError, SEQUENCES, {"x": PACKED, "cu_seqlens": np.array([0, 9], np.int32)}),
        (ValueError, SEQUENCES, {"x": PACKED, "cu_seqlens": np.array([0, 7, 3, 10], np.int32)}),
        (ValueError, "longer than max_seqlen", {"x": PACKED, "cu_seqlens": STARTS, "max_seqlen": 5}),
        (ValueError, "max_seqlen belongs to a packed x", {"max_seqlen": 5}),
        (TypeError, "interleaved has to be True or False", {"interleaved": 1}),
        (TypeError, "inplace has to be True or False", {"inplace": "yes"}),
        (TypeError, "x has to be an array", {"x": None}),
        (TypeError, "cos has to be an array", {"cos": [[1.0]]}),
        (TypeError, "sin has to be an array", {"sin": None}),
    ],
)
def test_what_cannot_be_meant_is_refused(error, message, wrong):
    with pytest.raises(error, match=rf"apply_rotary_emb: .*{message}"):
        apply_rotary_emb(**{"x": X, "cos": COS, "sin": SIN, **wrong})
