"""Between padded batches and packed tokens, and back again without a loss."""

import numpy as np
import pytest
from homes import DTYPES, HOMES, Dask, Home, Jax, Strict, Torch, dtype_name, needs
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from oracle import assert_matches, assert_same_bits, to_numpy

import cupyattn
from cupyattn import pad_input, unpad_input

EAGER = [home for home in HOMES if not home.lazy]
masks = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=6))


def hidden_of(mask, *features, dtype=np.float32):
    """Rows that are all different and never zero."""
    size = int(np.prod([*mask.shape, *features]))
    return (np.arange(1, size + 1)).astype(dtype).reshape(*mask.shape, *features)


def by_hand(hidden, mask, unused=None):
    """What `unpad_input` means, row by row."""
    kept = mask if unused is None else mask | unused
    places = [(b, s) for b in range(mask.shape[0]) for s in range(mask.shape[1]) if kept[b, s]]
    rows = np.array([hidden[place] for place in places]).reshape(len(places), *hidden.shape[2:]).astype(hidden.dtype)
    indices = np.array([b * mask.shape[1] + s for b, s in places], np.int64)
    lengths = [int(row.sum()) for row in kept]
    starts = np.array([sum(lengths[:b]) for b in range(len(lengths) + 1)], np.int32)
    return rows, indices, starts, max(lengths, default=0), np.array([int(row.sum()) for row in mask], np.int32)


def assert_unpacked(found, expected):
    rows, indices, starts, longest, used = found
    for a, b in zip((rows, indices, starts, used), (expected[0], expected[1], expected[2], expected[4]), strict=True):
        assert_same_bits(a, b)
    assert type(longest) is int
    assert longest == expected[3]
    assert dtype_name(starts) == dtype_name(used) == "int32"


@given(mask=masks, features=st.lists(st.integers(0, 3), max_size=2))
def test_unpadding_takes_the_rows_a_mask_keeps(mask, features):
    hidden = hidden_of(mask, *features)
    assert_unpacked(unpad_input(hidden, mask), by_hand(hidden, mask))


@given(mask=masks, data=st.data())
def test_unused_tokens_are_packed_and_not_counted_as_used(mask, data):
    unused = data.draw(hnp.arrays(bool, mask.shape))
    hidden = hidden_of(mask, 2)
    assert_unpacked(unpad_input(hidden, mask, unused), by_hand(hidden, mask, unused))


@given(mask=masks, features=st.lists(st.integers(1, 3), max_size=2))
def test_padding_undoes_unpadding_and_fills_with_zeros(mask, features):
    hidden = hidden_of(mask, *features)
    rows, indices, *_ = unpad_input(hidden, mask)
    padded = pad_input(rows, indices, *mask.shape)
    assert padded.dtype == hidden.dtype
    assert_same_bits(padded, np.where(mask.reshape(*mask.shape, *(1,) * len(features)), hidden, 0))


@given(mask=masks)
def test_unpadding_undoes_padding(mask):
    rows = hidden_of(mask, 2)[mask]
    _, indices, *_ = unpad_input(hidden_of(mask), mask)
    assert_same_bits(unpad_input(pad_input(rows, indices, *mask.shape), mask)[0], rows)


MASKS = {
    "ragged": [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]],
    "with gaps": [[0, 1, 0, 1], [1, 0, 0, 1], [0, 0, 1, 0]],
    "an empty sequence": [[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]],
    "all padding": [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
    "no padding": [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]],
}
named_masks = pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS)


@named_masks
@pytest.mark.parametrize("home", EAGER, ids=str)
def test_every_library_packs_and_unpacks_at_home(home, rows):
    mask = np.array(rows, bool)
    hidden = hidden_of(mask, 2, dtype=DTYPES[home.dtype])
    there = home.make(hidden)
    found = unpad_input(there, home.make(mask))
    assert_unpacked(found, by_hand(hidden, mask))
    padded = pad_input(found[0], found[1], 3, 4)
    for array in (*found[:3], found[4], padded):
        home.check(array, there)
    assert found[0].dtype == padded.dtype == there.dtype
    assert_same_bits(padded, hidden * mask[..., None])


@pytest.mark.parametrize("kind", [bool, np.int8, np.uint8, np.int32, np.int64, ">i8"])
def test_a_mask_is_boolean_or_holds_zeros_and_ones(kind):
    mask = np.array(MASKS["with gaps"], bool)
    hidden = hidden_of(mask, 2)
    assert_unpacked(unpad_input(hidden, mask.astype(kind), mask.astype(kind)), by_hand(hidden, mask))


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool", "complex64", "float16", ">f8"])
def test_rows_of_any_dtype_are_packed(dtype):
    mask = np.array(MASKS["ragged"], bool)
    hidden = hidden_of(mask, 2).astype(dtype)
    rows, indices, *_ = unpad_input(hidden, mask)
    padded = pad_input(rows, indices, 3, 4)
    assert rows.dtype == padded.dtype == hidden.dtype
    np.testing.assert_array_equal(padded, np.where(mask[..., None], hidden, np.zeros((), dtype)))


def test_padding_may_hold_nan():
    mask = np.array(MASKS["ragged"], bool)
    hidden = np.where(mask[..., None], hidden_of(mask, 2), np.nan)
    rows, indices, *_ = unpad_input(hidden, mask)
    assert np.isfinite(rows).all()
    assert np.isfinite(pad_input(rows, indices, 3, 4)).all()


def test_results_are_fresh_memory_even_without_padding():
    mask = np.ones((2, 3), bool)
    hidden = hidden_of(mask, 2)
    rows, indices, *_ = unpad_input(hidden, mask)
    assert not np.shares_memory(rows, hidden)
    assert not np.shares_memory(pad_input(rows, indices, 2, 3), rows)


def test_rows_go_to_where_the_indices_say_in_any_order():
    rows = np.array([[1.0], [2.0], [3.0]])
    padded = pad_input(rows, np.array([5, 0, 2], np.int32), 2, 3)
    assert_same_bits(padded[..., 0], [[2.0, 0.0, 3.0], [0.0, 0.0, 1.0]])


# ---------------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------------


@named_masks
def test_torchs_gradients_flow_to_tokens_and_not_to_padding(rows):
    torch = needs("torch")
    mask = np.array(rows, bool)
    hidden = torch.from_numpy(hidden_of(mask, 2)).requires_grad_()
    packed, indices, *_ = unpad_input(hidden, torch.from_numpy(mask))
    weight = torch.from_numpy(hidden_of(mask, 2) + 100)
    (pad_input(packed, indices, 3, 4) * weight).sum().backward()
    assert_same_bits(hidden.grad, weight.numpy() * mask[..., None])


def test_jaxs_gradients_flow_to_tokens_and_not_to_padding():
    """The mask has its values: it is hidden_states alone that is differentiated."""
    jax = needs("jax")
    mask = np.array(MASKS["with gaps"], bool)
    weight = hidden_of(mask, 2) + 100

    def loss(hidden):
        packed, indices, *_ = unpad_input(hidden, jax.numpy.asarray(mask))
        return (pad_input(packed, indices, 3, 4) * weight).sum()

    assert_same_bits(jax.grad(loss)(jax.numpy.asarray(hidden_of(mask, 2))), weight * mask[..., None])


# ---------------------------------------------------------------------------------------------------
# Into attention
# ---------------------------------------------------------------------------------------------------


@named_masks
@pytest.mark.parametrize(
    "home", [Home("float32"), Torch("float32"), Jax("float32"), Strict("float32", "device1")], ids=str
)
def test_packed_attention_is_attention_with_a_mask(home, rows):
    mask = np.array(rows, bool)
    rng = np.random.default_rng(6)
    q, k, v = (rng.standard_normal((3, 4, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    expected = np.where(mask[..., None, None], cupyattn.attention(q, k, v, mask=mask[:, None, None, :]), 0)
    there = home.make(mask)
    packed_q, indices, starts, longest, _ = unpad_input(home.make(q), there)
    packed_k, packed_v = (unpad_input(home.make(x), there)[0] for x in (k, v))
    out = cupyattn.flash_attn_varlen_func(packed_q, packed_k, packed_v, starts, starts, longest, longest)
    assert_matches(pad_input(out, indices, 3, 4), expected, rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------------------------------------------
# Refused
# ---------------------------------------------------------------------------------------------------


def unpad_refusals():
    mask = np.array(MASKS["ragged"], bool)
    hidden = hidden_of(mask, 2)
    yield "no array", TypeError, "hidden_states has to be an array", (None, mask)
    yield "no mask", TypeError, "attention_mask has to be an array", (hidden, None)
    yield "one axis", ValueError, r"hidden_states has to be \(batch, seqlen, ...\)", (hidden[0, :, 0], mask)
    yield "another shape", ValueError, r"attention_mask has to be \(batch, seqlen\), \(3, 4\)", (hidden, mask[:2])
    yield "another unused", ValueError, r"unused_mask has to be \(batch, seqlen\), \(3, 4\)", (hidden, mask, mask.T)
    yield "a float mask", TypeError, "attention_mask has to be boolean or integer", (hidden, mask.astype(float))
    yield "a mask of twos", ValueError, "attention_mask has to hold 0 and 1", (hidden, 2 * mask)
    yield "a negative mask", ValueError, "unused_mask has to hold 0 and 1", (hidden, mask, -1 * mask)


@pytest.mark.parametrize(
    ("error", "message", "arguments"), [r[1:] for r in unpad_refusals()], ids=[r[0] for r in unpad_refusals()]
)
def test_unpadding_refuses_what_cannot_be_meant(error, message, arguments):
    with pytest.raises(error, match=f"unpad_input: {message}"):
        unpad_input(*arguments)


def pad_refusals():
    rows, indices = np.ones((3, 2)), np.arange(3)
    yield "no array", TypeError, "hidden_states has to be an array", (None, indices, 2, 3)
    yield "no indices", TypeError, "indices has to be an array", (rows, None, 2, 3)
    yield "float indices", TypeError, "indices has to be int32 or int64", (rows, indices * 1.0, 2, 3)
    yield "too few indices", ValueError, "indices has to hold one position per row", (rows, indices[:2], 2, 3)
    yield "past the end", ValueError, r"indices have to be from 0 to batch \* seqlen - 1 = 5", (rows, indices + 4, 2, 3)
    yield "negative", ValueError, "indices have to be from 0", (rows, indices - 1, 2, 3)
    yield "twice", ValueError, "indices have to be different", (rows, indices * 0, 2, 3)
    yield "a float batch", TypeError, "batch has to be an integer", (rows, indices, 2.0, 3)
    yield "a negative seqlen", ValueError, "seqlen has to be from 0", (rows, indices, 2, -3)


@pytest.mark.parametrize(
    ("error", "message", "arguments"), [r[1:] for r in pad_refusals()], ids=[r[0] for r in pad_refusals()]
)
def test_padding_refuses_what_cannot_be_meant(error, message, arguments):
    with pytest.raises(error, match=f"pad_input: {message}"):
        pad_input(*arguments)


DEFERRED = [
    (Jax("float32", jit=True), "which under jit, .* call it outside"),
    (Dask("float32"), "which dask .* call compute"),
]


@pytest.mark.parametrize(("home", "advice"), DEFERRED, ids=["jit", "dask"])
def test_what_decides_about_rows_has_to_have_values(home, advice):
    mask = np.ones((2, 3), bool)
    arrays = {"hidden_states": home.make(hidden_of(mask, 2)), "attention_mask": home.make(mask)}
    with pytest.raises(
        TypeError, match=f"unpad_input: the number of rows depends on the values of attention_mask, {advice}"
    ):
        home.call(unpad_input, arrays)
    arrays = {"hidden_states": home.make(hidden_of(mask)), "indices": home.make(np.array([0, 1]))}
    with pytest.raises(TypeError, match=f"pad_input: the place of a row depends on the values of indices, {advice}"):
        home.call(lambda **arrays: pad_input(**arrays, batch=1, seqlen=2), arrays)


def test_an_unused_mask_has_to_have_values_too():
    jax = needs("jax")
    mask = jax.numpy.ones((2, 3), bool)
    hidden = jax.numpy.ones((2, 3, 4))
    with pytest.raises(TypeError, match="depends on the values of attention_mask and unused_mask, which under jit"):
        jax.jit(lambda unused: unpad_input(hidden, mask, unused))(mask)


def test_hidden_states_may_be_traced_where_masks_are_not():
    """Their values decide nothing: in JAX as in torch.func."""
    jax, torch = needs("jax"), needs("torch")
    mask = np.array([[1, 1, 0], [0, 1, 0]], bool)
    hidden = hidden_of(mask, 2)
    rows, indices, *_ = unpad_input(hidden, mask)
    kept = np.where(mask[..., None], hidden, 0)
    for grad, vmap, make in (
        (jax.grad, jax.vmap, jax.numpy.asarray),
        (torch.func.grad, torch.func.vmap, lambda array: torch.from_numpy(array.copy())),
    ):
        m, i = make(mask), make(indices)
        found = grad(lambda x, m=m: (unpad_input(x, m)[0] ** 2).sum())(make(hidden))
        assert_same_bits(found, 2 * kept)
        both = vmap(lambda x, m=m: unpad_input(x, m)[0])(make(np.stack([hidden, -hidden])))
        assert_same_bits(both, np.stack([rows, -rows]))
        padded = vmap(lambda x, i=i: pad_input(x, i, 2, 3))(make(np.stack([rows, 2 * rows])))
        assert_same_bits(padded, np.stack([kept, 2 * kept]))


def test_under_torchs_vmap_a_mask_is_many_and_is_refused():
    torch = needs("torch")
    masks = torch.ones(2, 1, 3, dtype=torch.bool)
    hidden = torch.ones(1, 3, 2)
    with pytest.raises(TypeError, match=r"unpad_input: .* attention_mask, which under vmap are those of many"):
        torch.func.vmap(lambda mask: unpad_input(hidden, mask)[0])(masks)
    nested = torch.func.vmap(lambda mask: torch.func.grad(lambda x: unpad_input(x, mask)[0].sum())(hidden))
    with pytest.raises(TypeError, match=r"unpad_input: .* attention_mask, which under vmap are those of many"):
        nested(masks)
    with pytest.raises(TypeError, match=r"pad_input: .* indices, which under vmap are those of many"):
        torch.func.vmap(lambda i: pad_input(hidden[0], i, 1, 3))(torch.arange(3)[None])


def test_what_came_is_only_read():
    mask = np.array(MASKS["ragged"], bool)
    hidden = hidden_of(mask, 2)
    rows, indices, *_ = unpad_input(hidden, mask, mask)
    before = [x.tobytes() for x in (hidden, mask, rows, indices)]
    pad_input(rows, indices, 3, 4)
    unpad_input(hidden, mask, mask)
    assert [x.tobytes() for x in (hidden, mask, rows, indices)] == before
    assert to_numpy(rows).shape == (7, 2)
