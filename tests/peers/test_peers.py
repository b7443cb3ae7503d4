"""The functions under their peers' names: do they do what the peers do?

torch's attention is asked itself.  flash-attn needs a GPU, so its rules are written out here, one query
at a time, from its documentation: `one_sequence` is that definition and shares nothing with the package.
"""

import inspect
from functools import partial

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_correctly_rounded, assert_matches, assert_same_bits, to_numpy

import cupyattn
from cupyattn import corridor, cpu

torch = pytest.importorskip("torch")

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
FLOAT32_ROUNDING = 2.0**-24 * 1.001

seeds = st.integers(0, 2**32 - 1)


def assert_rounded_once(actual, expected, dtype):
    """`actual`, of `dtype`, is float64 `expected` rounded to it."""
    if dtype == "float64":
        assert_matches(actual, expected, rtol=1e-12, atol=1e-13)
    else:
        assert tuple(actual.shape) == tuple(expected.shape)
        assert_correctly_rounded(actual, expected, dtype)


# ---------------------------------------------------------------------------------------------------
# torch.nn.functional.scaled_dot_product_attention
# ---------------------------------------------------------------------------------------------------


def with_strides(array, how):
    """The same values in another place of memory; what lies between them is nan."""
    if how == "transposed":
        return np.ascontiguousarray(array.swapaxes(-1, -2)).swapaxes(-1, -2)
    if how == "rows before heads" and array.ndim >= 3:
        return np.ascontiguousarray(array.swapaxes(-2, -3)).swapaxes(-2, -3)
    if how == "every second" and array.dtype != bool:
        spread = np.full([2 * size for size in array.shape], np.nan).astype(array.dtype)
        spread[(slice(None, None, 2),) * array.ndim] = array
        return spread[(slice(None, None, 2),) * array.ndim]
    if how == "flipped":
        backwards = (slice(None, None, -1),) * array.ndim
        return np.ascontiguousarray(array[backwards])[backwards]
    if how == "odd bytes":
        padded = np.zeros(array.shape, np.dtype([("pad", np.int8), ("values", array.dtype)]))
        padded["values"] = array
        return padded["values"]
    return array


ANY_STRIDES = ("contiguous", "transposed", "rows before heads", "every second", "repeated")
NUMPY_STRIDES = (*ANY_STRIDES, "flipped", "odd bytes")


def torch_of(array):
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


@st.composite
def sdpa_calls(draw):
    """(library, dtype, query, key, value, options) for scaled_dot_product_attention."""
    library = draw(st.sampled_from(["numpy", "torch"]))
    dtype = draw(st.sampled_from(list(DTYPES)))
    rank = draw(st.integers(2, 5))
    seqlen_q, seqlen_k = (draw(st.sampled_from([1, 2, 5, 7, 80])) for _ in range(2))
    head_dim, head_dim_v = (draw(st.sampled_from([1, 2, 5, 8])) for _ in range(2))
    lead = [draw(st.sampled_from([1, 2, 3])) for _ in range(max(0, rank - 3))]
    grouped = rank >= 3 and draw(st.booleans())
    num_heads = draw(st.sampled_from([1, 2, 4, 6]))
    divisors = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
    rng = np.random.default_rng(draw(seeds))

    def operand(rows, columns, is_query):
        if grouped:
            heads = [num_heads if is_query else draw(st.sampled_from(divisors))]
        else:
            heads = [draw(st.sampled_from([1, num_heads]))] if rank >= 3 else []
        shape = [*(draw(st.sampled_from([1, size])) for size in lead), *heads, rows, columns]
        if rank >= 4 and draw(st.booleans()) and not is_query:  # leading axes may be left out
            shape = shape[1:]
        return drawn(shape)

    def drawn(shape, kind=dtype):
        how = draw(st.sampled_from(NUMPY_STRIDES if library == "numpy" else ANY_STRIDES))
        values = rng.standard_normal(shape).astype(DTYPES[kind])
        if how == "repeated":
            axis = draw(st.integers(0, len(shape) - 1))
            strides = [0 if i == axis else stride for i, stride in enumerate(values.strides)]
            return np.lib.stride_tricks.as_strided(values, values.shape, strides)
        return with_strides(values, how)

    query = operand(seqlen_q, head_dim, True)
    key, value = operand(seqlen_k, head_dim, False), operand(seqlen_k, head_dim_v, False)
    options = {"enable_gqa": grouped, "scale": draw(st.sampled_from([None, 0.3, 2.5]))}
    mask_kind = draw(st.sampled_from(["none", "causal", "bool", "float32", dtype]))
    if mask_kind == "causal":
        options["is_causal"] = True
    elif mask_kind != "none":
        lead_of_key = (*key.shape[:-3], 1) if grouped else key.shape[:-2]
        full = [*np.broadcast_shapes(query.shape[:-2], lead_of_key), seqlen_q, seqlen_k]
        shape = [draw(st.sampled_from([1, size])) for size in full]
        shape = shape[draw(st.integers(0, len(shape) - 2)) :]
        hidden = rng.random(shape) < draw(st.sampled_from([0.0, 0.3, 0.9]))
        if mask_kind == "bool":
            options["attn_mask"] = with_strides(~hidden, draw(st.sampled_from(["contiguous", "transposed"])))
        else:
            bias = drawn(shape, mask_kind)
            options["attn_mask"] = np.where(hidden, bias.dtype.type(-np.inf), bias)
    return library, dtype, query, key, value, options


@settings(derandomize=True, deadline=None, max_examples=350)
@given(sdpa_calls())
def test_sdpa_is_torchs_own_rounded_once_in_every_shape_stride_and_dtype(call):
    library, dtype, *arrays, options = call
    in_double = [torch.from_numpy(np.array(x, np.float64)) for x in arrays]
    mask = options.get("attn_mask")
    peer_options = dict(options)
    if mask is not None:
        peer_options["attn_mask"] = torch.from_numpy(np.array(mask, bool if mask.dtype == bool else np.float64))
        if library == "torch":
            options = {**options, "attn_mask": torch_of(mask)}
    expected = torch.nn.functional.scaled_dot_product_attention(*in_double, **peer_options)

    given_arrays = arrays if library == "numpy" else [torch_of(x) for x in arrays]
    out = cupyattn.scaled_dot_product_attention(*given_arrays, **options)

    assert type(out) is type(given_arrays[0])
    assert out.dtype == given_arrays[0].dtype
    assert_rounded_once(out, expected, dtype)


@pytest.mark.parametrize(
    ("query", "key", "value"),
    [
        ((0, 3, 4, 5), (0, 3, 6, 5), (0, 3, 6, 7)),
        ((2, 0, 4, 5), (2, 0, 6, 5), (2, 0, 6, 7)),
        ((2, 3, 0, 5), (2, 3, 6, 5), (2, 3, 6, 7)),
        ((2, 3, 4, 5), (2, 3, 0, 5), (2, 3, 0, 7)),
        ((2, 3, 4, 0), (2, 3, 6, 0), (2, 3, 6, 7)),
        ((2, 3, 4, 5), (2, 3, 6, 5), (2, 3, 6, 0)),
        ((2, 3, 4, 0), (2, 3, 6, 0), (2, 3, 6, 0)),
        ((2, 3, 0, 5), (2, 3, 0, 5), (2, 3, 0, 7)),
        ((3, 4, 0), (3, 6, 0), (3, 6, 7)),
        ((0, 5), (6, 5), (6, 7)),
        ((4, 5), (0, 5), (0, 7)),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_sdpa_with_an_empty_axis_gives_what_torch_gives(rng, query, key, value, is_causal):
    arrays = [rng.standard_normal(shape) for shape in (query, key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(x) for x in arrays), is_causal=is_causal
    )
    out = cupyattn.scaled_dot_product_attention(*arrays, is_causal=is_causal)
    assert_matches(out, expected, rtol=1e-12, atol=1e-14)


def test_sdpa_with_dropout_of_one_gives_zeros_like_torchs(rng):
    q, k, v = (torch.from_numpy(x) for x in rng.standard_normal((3, 2, 3, 4, 5)))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=1.0)
    assert_matches(cupyattn.scaled_dot_product_attention(q, k, v, dropout_p=1.0), expected)


def test_sdpa_follows_torchs_random_generator(rng):
    q, k, v = (torch.from_numpy(x) for x in rng.standard_normal((3, 1, 2, 16, 4)))
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(cupyattn.scaled_dot_product_attention(q, k, v, dropout_p=0.5))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_sdpa_takes_a_negative_scale_as_torch_does(rng, is_causal):
    q, k, v = (torch.from_numpy(x) for x in rng.standard_normal((3, 2, 3, 80, 5)))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # its other one multiplies hidden -inf
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=-0.3, is_causal=is_causal)
    ours = cupyattn.scaled_dot_product_attention(q, k, v, scale=-0.3, is_causal=is_causal)
    assert_matches(ours, expected, rtol=1e-12, atol=1e-14)


def test_sdpa_takes_numbers_that_are_tensors_as_torch_does(rng):
    q, k, v = (torch.from_numpy(x) for x in rng.standard_normal((3, 2, 3, 4, 5)))
    arguments = (q, k, v, None, torch.tensor(0.0))
    expected = torch.nn.functional.scaled_dot_product_attention(*arguments, scale=torch.tensor(0.25))
    ours = cupyattn.scaled_dot_product_attention(*arguments, torch.tensor(False), scale=torch.tensor(0.25))
    assert_matches(ours, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (((2, 3, 4, 5), (2, 3, 6, 5), (2, 3, 6, 5)), {"attn_mask": torch.zeros(4, 6, dtype=torch.float64)}),
        (((2, 3, 4, 5), (2, 3, 6, 5), (2, 3, 6, 5)), {"attn_mask": torch.zeros(4, 6, dtype=torch.float16)}),
        (((2, 3, 4, 5), (2, 3, 6, 5), (2, 3, 6, 5)), {"attn_mask": torch.zeros(4, 6, dtype=torch.int32)}),
        (((2, 3, 4, 5), (2, 3, 6, 5), (2, 3, 6, 5)), {"attn_mask": torch.zeros(4, 5)}),
        (((2, 3, 4, 5), (2, 3, 6, 5), (2, 3, 6, 5)), {"attn_mask": torch.zeros(3, 3, 4, 6)}),
        (((2, 3, 4, 5), (2, 3, 6, 5), (2, 3, 6, 5)), {"dropout_p": -0.1}),
        (((2, 3, 4, 5), (2, 3, 6, 5), (2, 3, 6, 5)), {"dropout_p": 1.1}),
        (((2, 4, 4, 5), (2, 2, 6, 5), (2, 2, 6, 5)), {}),
        (((2, 4, 4, 5), (2, 3, 6, 5), (2, 3, 6, 5)), {"enable_gqa": True}),
        (((2, 3, 4, 5), (3, 3, 6, 5), (2, 3, 6, 5)), {}),
        (((2, 3, 4, 5), (2, 3, 6, 4), (2, 3, 6, 5)), {}),
        (((5,), (5,), (5,)), {}),
    ],
    ids=lambda x: str(list(x)) if isinstance(x, dict) else None,
)
def test_sdpa_refuses_what_torch_refuses(arguments, options):
    arrays = [torch.ones(shape) for shape in arguments]
    with pytest.raises((RuntimeError, ValueError, TypeError, IndexError)):
        torch.nn.functional.scaled_dot_product_attention(*arrays, **options)
    with pytest.raises((TypeError, ValueError), match=r"^scaled_dot_product_attention: "):
        cupyattn.scaled_dot_product_attention(*arrays, **options)


def test_sdpa_refuses_what_torchs_documentation_forbids_and_its_cpu_kernels_do_not_check():
    q, k = torch.ones(2, 3, 4, 5), torch.ones(2, 3, 6, 5)
    with pytest.raises(ValueError, match="exclude each other"):
        cupyattn.scaled_dot_product_attention(q, k, k, torch.ones(4, 6, dtype=torch.bool), is_causal=True)
    with pytest.raises(ValueError, match="different seqlen_k"):
        cupyattn.scaled_dot_product_attention(q, k, torch.ones(2, 3, 7, 5))


@pytest.mark.filterwarnings("ignore:Lower right causal bias will produce NaNs:UserWarning")
@pytest.mark.parametrize("heads", [2, 8])
@pytest.mark.parametrize("lengths", [(4, 9), (5, 5), (9, 4)])
@pytest.mark.parametrize("name", ["causal_upper_left", "causal_lower_right"])
def test_torchs_own_causal_biases_mean_what_they_mean_to_torch(rng, name, lengths, heads):
    """What is in their memory says nothing; rows that see no key give zeros, as torch's do."""
    from torch.nn.attention import bias as biases

    q, k, v = (torch.from_numpy(rng.standard_normal((2, heads, n, 16))) for n in (lengths[0], *lengths[1:] * 2))
    mask = getattr(biases, name)(*lengths)
    if hasattr(mask, "fill_"):
        torch.Tensor.fill_(mask, 3.0)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    found = cupyattn.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert_matches(found, expected, rtol=1e-12, atol=1e-14)
    on_numpy = cupyattn.scaled_dot_product_attention(*(x.numpy() for x in (q, k, v)), attn_mask=mask)
    assert_same_bits(on_numpy, found)


def test_torchs_own_causal_biases_have_to_fit_and_go_with_no_other_mask(rng):
    from torch.nn.attention.bias import causal_lower_right, causal_upper_left

    q, k = (torch.from_numpy(rng.standard_normal((1, 2, n, 8))) for n in (4, 9))
    sdpa = cupyattn.scaled_dot_product_attention
    with pytest.raises(ValueError, match="attn_mask is causal between 4 queries and 4 keys"):
        sdpa(q, k, k, attn_mask=causal_lower_right(4, 4))
    with pytest.raises(ValueError, match="attn_mask and is_causal exclude each other"):
        sdpa(q, k, k, attn_mask=causal_upper_left(4, 9), is_causal=True)
    with pytest.raises(TypeError, match="attention: mask is a CausalBias"):
        cupyattn.attention(q, q, q, mask=causal_upper_left(4, 4))


@pytest.mark.parametrize("kinds", [("float32", "float64"), ("int64", "int64"), ("complex64", "complex64")], ids=str)
def test_sdpa_refuses_the_dtypes_that_torch_refuses(kinds):
    query, key = (torch.ones(2, 3, 4, 5, dtype=getattr(torch, kind)) for kind in kinds)
    if "complex64" not in kinds:  # torch's does something with complex numbers that nobody documents
        with pytest.raises((RuntimeError, ValueError)):
            torch.nn.functional.scaled_dot_product_attention(query, key, key)
    with pytest.raises(TypeError, match="query"):
        cupyattn.scaled_dot_product_attention(query, key, key)


# ---------------------------------------------------------------------------------------------------
# flash-attn: the definition
# ---------------------------------------------------------------------------------------------------


def one_sequence(q, k, v, causal=False, window=(-1, -1), softcap=0.0, slopes=None, scale=None):
    """(out, lse, weights) of one sequence, (seqlen, heads, head_dim), by flash-attn's rules."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (seqlen_q, num_heads, head_dim), (seqlen_k, num_heads_v, head_dim_v) = q.shape, v.shape
    out = np.zeros((seqlen_q, num_heads, head_dim_v))
    lse = np.full((num_heads, seqlen_q), -np.inf)
    weights = np.zeros((num_heads, seqlen_q, seqlen_k))
    left, right = (None if side in (-1, None) else side for side in window)
    if causal:
        right = 0
    for head in range(num_heads):
        key_head = head // (num_heads // k.shape[1])
        value_head = head // (num_heads // num_heads_v)
        for i in range(seqlen_q):
            diagonal = i + seqlen_k - seqlen_q
            seen = [
                j
                for j in range(seqlen_k)
                if (left is None or diagonal - left <= j) and (right is None or j <= diagonal + right)
            ]
            if not seen:
                continue
            scores = k[seen, key_head] @ q[i, head] * (head_dim**-0.5 if scale is None else scale)
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            if slopes is not None:
                scores = scores - float(slopes[head]) * np.abs(diagonal - np.array(seen))
            powers = np.exp(scores - scores.max())
            weights[head, i, seen] = powers / powers.sum()
            out[i, head] = weights[head, i, seen] @ v[seen, value_head]
            lse[head, i] = scores.max() + np.log(powers.sum())
    return out, lse, weights


def batch_of_sequences(q, k, v, slopes=None, **options):
    """(out, lse, weights) of (batch, seqlen, heads, head_dim) arrays."""
    found = [
        one_sequence(q[b], k[b], v[b], slopes=slopes[b] if np.ndim(slopes) == 2 else slopes, **options)
        for b in range(q.shape[0])
    ]
    return tuple(np.stack(parts) for parts in zip(*found, strict=True))


sides = st.sampled_from([-1, None, 0, 1, 3, 8])


@st.composite
def flash_options(draw, batch, num_heads, rng):
    """Options of the definition; `for_peer` renames them for the function."""
    slopes_shape = draw(st.sampled_from([None, (num_heads,), (batch, num_heads)]))
    return {
        "causal": draw(st.booleans()),
        "window": (draw(sides), draw(sides)),
        "softcap": draw(st.sampled_from([0.0, 0.0, 1.5])),
        "slopes": None if slopes_shape is None else rng.uniform(0.0, 2.0, slopes_shape).astype(np.float32),
        "scale": draw(st.sampled_from([None, 0.0, 2.0, -1.5])),
    }


PEER_NAMES = {"window": "window_size", "slopes": "alibi_slopes", "scale": "softmax_scale"}


def for_peer(options):
    return {PEER_NAMES.get(name, name): value for name, value in options.items()}


@st.composite
def flash_calls(draw):
    batch = draw(st.sampled_from([1, 2]))
    seqlen_q, seqlen_k = (draw(st.integers(0, 9)) for _ in range(2))
    num_heads_k, num_heads_v = draw(st.sampled_from([(1, 1), (2, 2), (2, 4), (4, 1), (4, 2)]))
    rng = np.random.default_rng(draw(seeds))
    head_dim, head_dim_v = draw(st.sampled_from([(4, 4), (3, 5)]))
    dtype = draw(st.sampled_from(list(DTYPES)))
    shapes = (seqlen_q, 4, head_dim), (seqlen_k, num_heads_k, head_dim), (seqlen_k, num_heads_v, head_dim_v)
    arrays = [rng.standard_normal((batch, *shape)).astype(DTYPES[dtype]) for shape in shapes]
    return dtype, arrays, draw(flash_options(batch, 4, rng))


@settings(derandomize=True, deadline=None, max_examples=200)
@given(flash_calls())
def test_flash_attn_func_follows_flash_attns_rules(call):
    dtype, arrays, options = call
    expected_out, expected_lse, _ = batch_of_sequences(*arrays, **options)
    out, lse = cupyattn.flash_attn_func(*arrays, **for_peer(options), return_lse=True)
    assert out.dtype == arrays[0].dtype
    assert lse.dtype == (np.float64 if dtype == "float64" else np.float32)
    assert_rounded_once(out, expected_out, dtype)
    assert_matches(lse, expected_lse, rtol=1e-12 if dtype == "float64" else FLOAT32_ROUNDING, atol=1e-12)


def test_flash_attn_func_follows_them_over_more_keys_and_rows_than_one_block(rng):
    q = rng.standard_normal((1, 530, 2, 4))
    k, v = rng.standard_normal((2, 1, 600, 1, 4))
    options = {"causal": True, "window": (300, -1), "softcap": 2.0, "slopes": np.array([0.01, 0.5])}
    expected_out, expected_lse, _ = batch_of_sequences(q, k, v, **options)
    out, lse = cupyattn.flash_attn_func(q, k, v, **for_peer(options), return_lse=True)
    assert_matches(out, expected_out, rtol=1e-10, atol=1e-12)
    assert_matches(lse, expected_lse, rtol=1e-10)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(flash_calls())
def test_the_packed_functions_do_what_the_unpacked_one_does(call):
    _, (q, k, _), options = call
    kv = np.stack([k, k[::-1] + k.dtype.type(1)], axis=2)
    expected = cupyattn.flash_attn_func(q, kv[:, :, 0], kv[:, :, 1], **for_peer(options), return_lse=True)
    actual = cupyattn.flash_attn_kvpacked_func(q, kv, **for_peer(options), return_lse=True)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_same_bits(ours, theirs)
    qkv = np.stack([q, q[:, ::-1], q + q.dtype.type(1)], axis=2)
    expected = cupyattn.flash_attn_func(q, q[:, ::-1], q + q.dtype.type(1), **for_peer(options), return_lse=True)
    actual = cupyattn.flash_attn_qkvpacked_func(qkv, **for_peer(options), return_lse=True)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_same_bits(ours, theirs)


def test_the_packed_functions_take_q_k_and_v_in_that_order(rng):
    qkv = rng.standard_normal((2, 5, 3, 4, 6))
    expected, _, _ = batch_of_sequences(*np.moveaxis(qkv, 2, 0), causal=True)
    assert_matches(cupyattn.flash_attn_qkvpacked_func(qkv, causal=True), expected, rtol=1e-12, atol=1e-13)
    q, kv = rng.standard_normal((2, 3, 4, 6)), rng.standard_normal((2, 5, 2, 2, 6))
    expected, _, _ = batch_of_sequences(q, *np.moveaxis(kv, 2, 0), window=(1, 0))
    assert_matches(cupyattn.flash_attn_kvpacked_func(q, kv, window_size=(1, 0)), expected, rtol=1e-12, atol=1e-13)


# ---------------------------------------------------------------------------------------------------
# flash-attn: sequences of different lengths
# ---------------------------------------------------------------------------------------------------


def starts_of(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def packed_sequences(q, k, v, lengths_q, lengths_k, slopes=None, **options):
    """(out, lse) of packed arrays, sequence by sequence; rows after the last one see nothing."""
    out = np.zeros((*q.shape[:2], v.shape[-1]))
    lse = np.full((q.shape[1], q.shape[0]), -np.inf)
    starts_q, starts_k = starts_of(lengths_q), starts_of(lengths_k)
    for b in range(len(lengths_q)):
        rows, keys = slice(*starts_q[b : b + 2]), slice(*starts_k[b : b + 2])
        here = slopes[b] if np.ndim(slopes) == 2 else slopes
        out[rows], lse[:, rows], _ = one_sequence(q[rows], k[keys], v[keys], slopes=here, **options)
    return out, lse


@st.composite
def varlen_calls(draw):
    lengths = draw(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=4))
    lengths_q, lengths_k = [q for q, _ in lengths], [k for _, k in lengths]
    rng = np.random.default_rng(draw(seeds))
    spare = draw(st.integers(0, 3))
    dtype = draw(st.sampled_from(list(DTYPES)))
    num_heads_k, num_heads_v = draw(st.sampled_from([(1, 1), (2, 2), (4, 2)]))
    shapes = (sum(lengths_q), 4, 4), (sum(lengths_k), num_heads_k, 4), (sum(lengths_k), num_heads_v, 5)
    arrays = [rng.standard_normal((rows + spare, *rest)).astype(DTYPES[dtype]) for rows, *rest in shapes]
    return dtype, arrays, lengths_q, lengths_k, draw(flash_options(len(lengths_q), 4, rng))


@settings(derandomize=True, deadline=None, max_examples=150)
@given(varlen_calls())
def test_varlen_attends_each_sequence_alone_and_gives_zero_to_rows_after_the_last_one(call):
    dtype, arrays, lengths_q, lengths_k, options = call
    expected_out, expected_lse = packed_sequences(*arrays, lengths_q, lengths_k, **options)
    out, lse = cupyattn.flash_attn_varlen_func(
        *arrays,
        starts_of(lengths_q),
        starts_of(lengths_k),
        max(lengths_q, default=0),
        max(lengths_k, default=0) + 3,
        **for_peer(options),
        return_lse=True,
    )
    assert out.dtype == arrays[0].dtype
    assert_rounded_once(out, expected_out, dtype)
    assert_matches(lse, expected_lse, rtol=1e-12 if dtype == "float64" else FLOAT32_ROUNDING, atol=1e-12)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(varlen_calls())
def test_the_packed_varlen_functions_do_what_the_unpacked_one_does(call):
    _, (q, k, _), lengths_q, lengths_k, options = call
    starts_q, starts_k = starts_of(lengths_q), starts_of(lengths_k)
    longest_q, longest_k = max(lengths_q, default=0), max(lengths_k, default=0)
    options = {**for_peer(options), "return_lse": True}
    v = k[::-1] + k.dtype.type(1)
    expected = cupyattn.flash_attn_varlen_func(q, k, v, starts_q, starts_k, longest_q, longest_k, **options)
    kv = np.stack([k, v], axis=1)
    actual = cupyattn.flash_attn_varlen_kvpacked_func(q, kv, starts_q, starts_k, longest_q, longest_k, **options)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_same_bits(ours, theirs)
    k, v = q[:, ::-1], q + q.dtype.type(1)
    expected = cupyattn.flash_attn_varlen_func(q, k, v, starts_q, starts_q, longest_q, longest_q, **options)
    actual = cupyattn.flash_attn_varlen_qkvpacked_func(np.stack([q, k, v], axis=1), starts_q, longest_q, **options)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_same_bits(ours, theirs)


def paged(k, v, lengths, page_size, rng):
    """Packed k and v scattered over shuffled pages; whatever no sequence uses is nan, or no page at all."""
    used = [-(-length // page_size) for length in lengths]
    num_pages = sum(used) + 2
    places = rng.permutation(num_pages)
    table = np.full((len(lengths), max(used, default=0) + 1), -7, np.int32)
    pages = [np.full((num_pages, page_size, *x.shape[1:]), np.nan, x.dtype) for x in (k, v)]
    starts = starts_of(lengths)
    for b, length in enumerate(lengths):
        table[b, : used[b]] = places[sum(used[:b]) : sum(used[:b]) + used[b]]
        for position in range(length):
            where = table[b, position // page_size], position % page_size
            pages[0][where], pages[1][where] = k[starts[b] + position], v[starts[b] + position]
    return (*pages, table)


@pytest.mark.parametrize("page_size", [1, 3, 16, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window_size": (5, 2), "softcap": 1.0}], ids=["full", "causal", "window"]
)
def test_pages_give_the_bits_of_contiguous_keys_and_unused_pages_never_matter(rng, page_size, dtype, options):
    lengths_q, lengths_k = [3, 0, 1, 70, 4], [5, 9, 300, 40, 0]
    q = rng.standard_normal((sum(lengths_q), 4, 8)).astype(DTYPES[dtype])
    k, v = rng.standard_normal((2, sum(lengths_k), 2, 8)).astype(DTYPES[dtype])
    pages_k, pages_v, table = paged(k, v, lengths_k, page_size, rng)
    common = (starts_of(lengths_q), starts_of(lengths_k), 70, 300)
    expected = cupyattn.flash_attn_varlen_func(q, k, v, *common, **options, return_lse=True)
    actual = cupyattn.flash_attn_varlen_func(
        q, pages_k, pages_v, *common, **options, block_table=table, return_lse=True
    )
    for ours, theirs in zip(actual, expected, strict=True):
        assert np.isfinite(to_numpy(ours)).any()
        assert_same_bits(ours, theirs)


def test_one_page_may_serve_several_sequences(rng):
    """A shared prefix: two sequences whose tables name the same first page."""
    pages_k, pages_v = rng.standard_normal((2, 3, 4, 2, 8))
    table = np.array([[2, 0], [2, 1]], np.int32)
    q = rng.standard_normal((2, 2, 8))
    out = cupyattn.flash_attn_varlen_func(
        q, pages_k, pages_v, starts_of([1, 1]), starts_of([7, 8]), 1, 8, block_table=table
    )
    for b, length in enumerate([7, 8]):
        k, v = (np.concatenate(list(pages[table[b]]))[:length] for pages in (pages_k, pages_v))
        assert_matches(out[b : b + 1], one_sequence(q[b : b + 1], k, v)[0], rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------------------------------------------
# Results besides out
# ---------------------------------------------------------------------------------------------------


def flash_functions(rng):
    """Each flash function as a call with its arrays filled in, and the shapes of its out, lse and S_dmask."""
    q, k, v = rng.standard_normal((3, 2, 5, 4, 8))
    packed = [x.reshape(10, 4, 8) for x in (q, k, v)]
    starts = starts_of([5, 5])
    dense = (2, 5, 4, 8), (2, 4, 5), (2, 4, 5, 5)
    ends = (10, 4, 8), (4, 10), (2, 4, 5, 5)
    return {
        "flash_attn_func": (lambda **o: cupyattn.flash_attn_func(q, k, v, **o), dense),
        "flash_attn_qkvpacked_func": (
            lambda **o: cupyattn.flash_attn_qkvpacked_func(np.stack([q, k, v], axis=2), **o),
            dense,
        ),
        "flash_attn_kvpacked_func": (
            lambda **o: cupyattn.flash_attn_kvpacked_func(q, np.stack([k, v], axis=2), **o),
            dense,
        ),
        "flash_attn_varlen_func": (
            lambda **o: cupyattn.flash_attn_varlen_func(*packed, starts, starts, 5, 5, **o),
            ends,
        ),
        "flash_attn_varlen_qkvpacked_func": (
            lambda **o: cupyattn.flash_attn_varlen_qkvpacked_func(np.stack(packed, axis=1), starts, 5, **o),
            ends,
        ),
        "flash_attn_varlen_kvpacked_func": (
            lambda **o: cupyattn.flash_attn_varlen_kvpacked_func(
                packed[0], np.stack(packed[1:], axis=1), starts, starts, 5, 5, **o
            ),
            ends,
        ),
    }


FLASH_FUNCTIONS = [
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_kvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_varlen_kvpacked_func",
]


@pytest.mark.parametrize("name", FLASH_FUNCTIONS)
def test_return_attn_probs_gives_out_lse_and_no_weights_without_dropout(rng, name):
    call, (out_shape, lse_shape, _) = flash_functions(rng)[name]
    out, lse, weights = call(causal=True, return_attn_probs=True)
    assert weights is None
    assert out.shape == out_shape
    assert lse.shape == lse_shape
    assert_same_bits(out, call(causal=True))


@pytest.mark.parametrize("name", FLASH_FUNCTIONS)
def test_return_lse_gives_out_and_lse(rng, name):
    call, (out_shape, lse_shape, _) = flash_functions(rng)[name]
    out, lse = call(causal=True, return_lse=True)
    assert (out.shape, lse.shape) == (out_shape, lse_shape)
    _, same_lse, _ = call(causal=True, return_attn_probs=True)
    assert_same_bits(lse, same_lse)
    both = call(causal=True, return_lse=True, return_attn_probs=True)
    assert len(both) == 3, "flash-attn's three results win"


@pytest.mark.parametrize("name", FLASH_FUNCTIONS)
def test_the_returned_weights_are_the_softmax_and_negative_where_dropped(rng, name):
    call, (_, _, weights_shape) = flash_functions(rng)[name]
    out, _, signed = call(causal=True, dropout_p=0.4, dropout_seed=9, return_attn_probs=True)
    assert signed.shape == weights_shape
    q, k, v = np.random.default_rng(20261121).standard_normal((3, 2, 5, 4, 8))
    _, _, weights = batch_of_sequences(q, k, v, causal=True)
    assert_matches(np.abs(signed), weights, rtol=1e-12, atol=1e-15)
    dropped = np.signbit(signed) & (weights > 0)
    assert dropped.any()
    assert not dropped[weights > 0].all()
    kept = np.where(dropped, 0.0, weights) / 0.6
    expected = np.einsum("bhij,bjhd->bihd", kept, v)
    assert_matches(np.reshape(out, expected.shape), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_returned_weights_are_in_the_dtype_of_q_and_as_exact(rng, dtype):
    q, k, v = rng.standard_normal((3, 1, 40, 2, 8)).astype(DTYPES[dtype])
    _, _, signed = cupyattn.flash_attn_func(q, k, v, dropout_p=0.5, dropout_seed=1, return_attn_probs=True)
    _, _, weights = batch_of_sequences(q, k, v)
    assert signed.dtype == q.dtype
    assert_rounded_once(np.abs(signed), weights, dtype)


def test_weights_of_sequences_of_different_lengths_are_padded_with_zeros(rng):
    lengths_q, lengths_k = [2, 4], [5, 3]
    q = rng.standard_normal((6, 2, 4))
    k, v = rng.standard_normal((2, 8, 2, 4))
    _, _, signed = cupyattn.flash_attn_varlen_func(
        q, k, v, starts_of(lengths_q), starts_of(lengths_k), 4, 5, 0.5, dropout_seed=3, return_attn_probs=True
    )
    expected = np.zeros((2, 2, 4, 5))
    expected[0, :, :2] = one_sequence(q[:2], k[:5], v[:5])[2]
    expected[1, :, :, :3] = one_sequence(q[2:], k[5:], v[5:])[2]
    assert_matches(np.abs(signed), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", FLASH_FUNCTIONS)
def test_deterministic_is_accepted_and_changes_nothing(rng, name):
    call, _ = flash_functions(rng)[name]
    assert_same_bits(call(deterministic=True), call())


def test_sdpa_returns_lse_only_if_asked(rng):
    q, k, v = rng.standard_normal((3, 2, 4, 5, 8))
    out, lse = cupyattn.scaled_dot_product_attention(q, k, v, return_lse=True)
    rows_first = [x.swapaxes(1, 2) for x in (q, k, v)]
    assert_matches(lse, batch_of_sequences(*rows_first)[1], rtol=1e-12)
    assert_same_bits(out, cupyattn.scaled_dot_product_attention(q, k, v))


# ---------------------------------------------------------------------------------------------------
# flash-attn 3's float8
# ---------------------------------------------------------------------------------------------------

FLOAT8 = ml_dtypes.float8_e4m3fn
DESCALES = ("q_descale", "k_descale", "v_descale")


def float8(rng, *shape):
    return rng.standard_normal(shape).astype(FLOAT8)


def factors(rng, *shape):
    return dict(zip(DESCALES, rng.uniform(0.3, 3.0, (3, *shape)).astype(np.float32), strict=True))


def times(array, factor):
    """A float8 array, (..., heads, head_dim), times a factor for each key head, in float64."""
    by_head = np.repeat(factor.astype(np.float64), array.shape[-2] // factor.shape[-1], axis=-1)
    return array.astype(np.float64) * by_head[..., None]


def test_flash_attn_func_takes_float8_and_a_descale_for_each_batch_and_key_head(rng):
    q, k, v, descales = float8(rng, 2, 3, 4, 6), float8(rng, 2, 5, 2, 6), float8(rng, 2, 5, 2, 6), factors(rng, 2, 2)
    wide = (times(x, descales[name][:, None]) for x, name in zip((q, k, v), DESCALES, strict=True))
    expected_out, expected_lse, _ = batch_of_sequences(*wide, causal=True)
    out, lse = cupyattn.flash_attn_func(q, k, v, causal=True, **descales, return_lse=True)
    assert (out.dtype, lse.dtype) == (ml_dtypes.bfloat16, np.float32)
    assert_correctly_rounded(out, expected_out, "bfloat16")
    assert_matches(lse, expected_lse, rtol=FLOAT32_ROUNDING, atol=1e-12)


def test_the_packed_functions_take_float8_too(rng):
    qkv, descales = float8(rng, 2, 5, 3, 2, 6), factors(rng, 2, 2)
    q, k, v = np.moveaxis(qkv, 2, 0)
    expected = cupyattn.flash_attn_func(q, k, v, **descales)
    assert_same_bits(cupyattn.flash_attn_qkvpacked_func(qkv, **descales), expected)
    assert_same_bits(cupyattn.flash_attn_kvpacked_func(q, qkv[:, :, 1:], **descales), expected)
    assert not np.array_equal(cupyattn.flash_attn_func(q, k, v), expected)


@pytest.mark.parametrize("page_size", [None, 1, 3])
def test_each_packed_or_paged_sequence_has_its_own_descales(rng, page_size):
    lengths_q, lengths_k = [3, 0, 1, 40], [5, 9, 0, 70]
    q, k, v = float8(rng, 44, 4, 8), float8(rng, 84, 2, 8), float8(rng, 84, 2, 8)
    descales = factors(rng, 4, 2)
    starts = starts_of(lengths_q), starts_of(lengths_k)
    expected, expected_lse = np.zeros((44, 4, 8)), np.full((4, 44), -np.inf)
    for b in range(4):
        rows, keys = (slice(*found[b : b + 2]) for found in starts)
        wide = (
            times(x[at], descales[name][b]) for x, at, name in zip((q, k, v), (rows, keys, keys), DESCALES, strict=True)
        )
        expected[rows], expected_lse[:, rows], _ = one_sequence(*wide)
    table = None
    if page_size:
        k, v, table = paged(k, v, lengths_k, page_size, rng)
    out, lse = cupyattn.flash_attn_varlen_func(q, k, v, *starts, 40, 70, block_table=table, **descales, return_lse=True)
    assert_correctly_rounded(out, expected, "bfloat16")
    assert_matches(lse, expected_lse, rtol=FLOAT32_ROUNDING, atol=1e-12)


def test_a_shared_page_is_taken_times_the_descale_of_each_sequence(rng):
    q, k, v = float8(rng, 2, 2, 8), float8(rng, 1, 4, 2, 8), float8(rng, 1, 4, 2, 8)
    table, starts = np.zeros((2, 1), np.int32), (starts_of([1, 1]), starts_of([4, 4]))
    out = cupyattn.flash_attn_varlen_func(q, k, v, *starts, 1, 4, block_table=table, v_descale=np.float32([[1], [4]]))
    plain = cupyattn.flash_attn_varlen_func(q, k, v, *starts, 1, 4, block_table=table)
    assert_same_bits(to_numpy(out), to_numpy(plain) * np.array([1, 4])[:, None, None])


def test_the_returned_weights_of_hidden_keys_are_zero_in_rows_of_nan():
    q = np.ones((1, 3, 1, 2))
    q[0, 0] = np.nan
    k = np.ones((1, 3, 1, 2))
    weights = cupyattn.flash_attn_func(q, k, k, 0.3, causal=True, dropout_seed=3, return_attn_probs=True)[2]
    assert np.isnan(weights[0, 0, 0, 0])
    assert (weights[0, 0, 0, 1:] == 0).all()


def test_weights_that_this_machine_has_no_memory_for_are_refused(monkeypatch):
    q = np.ones((1, 30_000, 1, 1), np.float16)
    monkeypatch.setattr(cpu, "memory_of_machine", lambda: 2.0**30)
    rule = r"S_dmask would be larger than this machine's memory, \(1, 1, 30000, 30000\) of float16: 1.7 GiB of 1.0"
    with pytest.raises(ValueError, match=rule):
        cupyattn.flash_attn_func(q, q, q, 0.5, dropout_seed=1, return_attn_probs=True)


def test_the_memory_of_this_machine_is_known_or_there_is_no_limit():
    assert cpu.memory_of_machine() > 2**26


def test_the_returned_weights_of_float8_are_bfloat16(rng):
    q = float8(rng, 2, 5, 2, 8)
    found = cupyattn.flash_attn_func(q, q, q, 0.3, dropout_seed=3, return_attn_probs=True)
    wide = cupyattn.flash_attn_func(*[q.astype(np.float64)] * 3, 0.3, dropout_seed=3, return_attn_probs=True)
    assert found[2].dtype == ml_dtypes.bfloat16
    assert_correctly_rounded(found[2], wide[2], "bfloat16")


# ---------------------------------------------------------------------------------------------------
# Signatures
# ---------------------------------------------------------------------------------------------------

REQUIRED = inspect.Parameter.empty
FLASH_DEFAULTS = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
PEERS = {
    "scaled_dot_product_attention": {
        "query": REQUIRED,
        "key": REQUIRED,
        "value": REQUIRED,
        "attn_mask": None,
        "dropout_p": 0.0,
        "is_causal": False,
        "scale": None,
        "enable_gqa": False,
    },
    "flash_attn_func": {"q": REQUIRED, "k": REQUIRED, "v": REQUIRED, **FLASH_DEFAULTS},
    "flash_attn_qkvpacked_func": {"qkv": REQUIRED, **FLASH_DEFAULTS},
    "flash_attn_kvpacked_func": {"q": REQUIRED, "kv": REQUIRED, **FLASH_DEFAULTS},
    "flash_attn_varlen_func": {
        **dict.fromkeys(["q", "k", "v", "cu_seqlens_q"], REQUIRED),
        **dict.fromkeys(
            ["cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
        ),  # what follows the first, which may be left out
        **FLASH_DEFAULTS,
        "block_table": None,
    },
    "flash_attn_varlen_qkvpacked_func": {
        **dict.fromkeys(["qkv", "cu_seqlens", "max_seqlen"], REQUIRED),
        **FLASH_DEFAULTS,
    },
    "flash_attn_varlen_kvpacked_func": {
        **dict.fromkeys(["q", "kv", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"], REQUIRED),
        **FLASH_DEFAULTS,
    },
}


@pytest.mark.parametrize("name", PEERS)
def test_names_order_and_defaults_are_the_peers_and_ours_come_by_keyword_only(name):
    ours = inspect.signature(getattr(cupyattn, name)).parameters
    theirs = PEERS[name]
    assert {key: ours[key].default for key in list(ours)[: len(theirs)]} == theirs
    assert list(ours)[: len(theirs)] == list(theirs)
    for parameter in list(ours.values())[len(theirs) :]:
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert parameter.default is not REQUIRED


def flash_3_calls():
    """Calls without what flash-attn 3 has added."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 8, 2, 16), np.float32)
    starts = np.array([0, 8, 16], np.int32)
    flat = (x.reshape(16, 2, 16) for x in (q, k, v))
    return {
        "flash_attn_func": partial(cupyattn.flash_attn_func, q, k, v),
        "flash_attn_varlen_func": partial(cupyattn.flash_attn_varlen_func, *flat, starts, starts, 8, 8),
        "flash_attn_with_kvcache": partial(cupyattn.flash_attn_with_kvcache, q, k, v),
    }


FLASH_3_CALLS = flash_3_calls()


@pytest.mark.parametrize("name", FLASH_3_CALLS)
def test_what_flash_attn_3_has_added_is_taken_where_it_changes_no_result(name):
    call = FLASH_3_CALLS[name]
    neutral = {"sm_margin": 0, "attention_chunk": 0, "qv": None}
    for num_splits, pack_gqa in ((0, None), (1, True), (3, False)):
        assert_same_bits(call(num_splits=num_splits, pack_gqa=pack_gqa, **neutral), call())


@pytest.mark.parametrize(
    ("words", "error", "says"),
    [
        ({"num_splits": -1}, ValueError, "num_splits has to be"),
        ({"num_splits": 1.5}, TypeError, "num_splits has to be an integer"),
        ({"pack_gqa": 1}, TypeError, "pack_gqa has to be True or False"),
        ({"sm_margin": 2}, ValueError, "sm_margin has to be 0: no multiprocessors are kept free"),
        ({"attention_chunk": 4}, ValueError, "attention_chunk has to be 0: attention takes chunks, as a mask"),
        ({"qv": np.ones((2, 8, 2, 16))}, NotImplementedError, "qv has to be None: instead of it concatenate q and qv"),
    ],
)
@pytest.mark.parametrize("name", FLASH_3_CALLS)
def test_what_flash_attn_3_has_added_is_refused_where_it_would_change_results(name, words, error, says):
    with pytest.raises(error, match=f"^{name}: {says}"):
        FLASH_3_CALLS[name](**words)


def test_what_is_said_instead_of_qv_is_the_same():
    q, k, v, qv = np.random.default_rng(0).standard_normal((4, 2, 8, 2, 16))
    scores = (np.einsum("bihd,bjhd->bhij", q, k) + np.einsum("bihd,bjhd->bhij", qv, v)) * 32**-0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdims=True), v)
    joined = (np.concatenate(pair, -1) for pair in ((q, qv), (k, v)))
    np.testing.assert_allclose(cupyattn.flash_attn_func(*joined, v, softmax_scale=32**-0.5), expected, atol=1e-12)


@pytest.mark.parametrize(("num_splits", "expected"), [(0, None), (1, 8), (3, 3)])
@pytest.mark.parametrize("name", ["flash_attn_func", "flash_attn_varlen_func"])
def test_the_planner_is_asked_for_splits_of_as_many_keys_as_make_so_many(name, num_splits, expected, monkeypatch):
    asked, real = [], corridor.planned
    monkeypatch.setattr(corridor, "planned", lambda *given: asked.append(given[-1]) or real(*given))
    FLASH_3_CALLS[name](num_splits=num_splits)
    assert set(asked) == {expected}


def test_sdpa_has_torchs_parameters_and_takes_by_position_what_torch_does():
    schema = torch.ops.aten.scaled_dot_product_attention.default._schema
    ours = inspect.signature(cupyattn.scaled_dot_product_attention).parameters
    assert list(ours)[: len(schema.arguments)] == [argument.name for argument in schema.arguments]
    for argument in schema.arguments:
        assert (ours[argument.name].kind is inspect.Parameter.KEYWORD_ONLY) == argument.kwarg_only
        if argument.has_default_value():
            assert ours[argument.name].default == argument.default_value


@pytest.mark.parametrize("name", FLASH_FUNCTIONS)
def test_what_flash_attn_takes_by_position_is_taken_by_position(name):
    kinds = [p.kind for p in list(inspect.signature(getattr(cupyattn, name)).parameters.values())[: len(PEERS[name])]]
    assert set(kinds) == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
