"""Linear attention against a loop over single numbers of what its docstring says, and at home in every library."""

import numpy as np
import pytest
from homes import DTYPES, HOMES, BigEndian, Home, HostBackedCuPy, needs
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_correctly_rounded, assert_matches, assert_same_bits, to_numpy

from cupyattn import linear_attention, linear_attention_backward

RULES = {"linear": (), "gated": ("decay",), "delta": ("beta",), "gated_delta": ("decay", "beta")}
every_rule = pytest.mark.parametrize("rule", RULES)
layouts = pytest.mark.parametrize("layout", ["bshd", "bhsd"])


def by_definition(q, k, v, decay=None, beta=None, state=None, scale=None):
    """bshd, one batch, head and token at a time, in float64: out and the last state."""
    q, k, v, decay, beta, state = (None if x is None else to_numpy(x) for x in (q, k, v, decay, beta, state))
    batch, seqlen, heads, dim = q.shape
    heads_kv, scale = k.shape[2], dim**-0.5 if scale is None else scale
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    last = np.zeros((batch, heads_kv, dim, v.shape[-1])) if state is None else state.copy()
    for b in range(batch):
        for h in range(heads_kv):
            own = last[b, h]
            for t in range(seqlen):
                value = v[b, t, h].copy()
                if decay is not None:
                    own = np.exp(np.broadcast_to(decay[b, t, h], dim))[:, None] * own
                if beta is not None:
                    value = beta[b, t, h if beta.shape[2] > 1 else 0] * (value - own.T @ k[b, t, h])
                own = own + np.outer(k[b, t, h], value)
                for i in range(h * (heads // heads_kv), (h + 1) * (heads // heads_kv)):
                    out[b, t, i] = scale * own.T @ q[b, t, i]
            last[b, h] = own
    return out, last


def drawn(rule, seqlen=7, heads=4, heads_kv=2, dim=3, dim_v=5, of_features=False, seed=1, dtype="float64", batch=2):
    """Arguments of a call, with a state; keys have a length of about one."""
    rng = np.random.default_rng(seed)
    found = {
        "q": rng.standard_normal((batch, seqlen, heads, dim)),
        "k": rng.standard_normal((batch, seqlen, heads_kv, dim)) * max(1, dim) ** -0.5,
        "v": rng.standard_normal((batch, seqlen, heads_kv, dim_v)),
        "decay": -rng.exponential(0.3, (batch, seqlen, heads_kv, dim)[: 4 if of_features else 3]),
        "beta": rng.uniform(0, 1, (batch, seqlen, heads_kv)),
        "state": rng.standard_normal((batch, heads_kv, dim, dim_v)),
    }
    return {
        name: x.astype(DTYPES[dtype]) for name, x in found.items() if name in ("q", "k", "v", "state", *RULES[rule])
    }


@every_rule
@pytest.mark.parametrize("of_features", [False, True], ids=["of heads", "of features"])
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3, 7, 100])
def test_is_the_recurrence(rule, of_features, chunk_size):
    operands = drawn(rule, of_features=of_features)
    found = linear_attention(**operands, rule=rule, chunk_size=chunk_size, return_state=True)
    for result, expected in zip(found, by_definition(**operands), strict=True):
        assert_matches(result, expected, rtol=1e-13, atol=1e-14)


@every_rule
@pytest.mark.parametrize("of_features", [False, True], ids=["of heads", "of features"])
def test_chunks_and_tokens_agree_to_the_last_bits(rule, of_features):
    operands = drawn(rule, seqlen=300, dim=16, dim_v=8, of_features=of_features)
    whole, by_tokens = (linear_attention(**operands, rule=rule, chunk_size=size) for size in (None, 1))
    assert np.abs(whole - by_tokens).max() <= 2e-14 * np.abs(by_tokens).max()


@given(
    rule=st.sampled_from(list(RULES)),
    sizes=st.tuples(*(st.integers(0, 9) for _ in range(2)), *(st.integers(0, 3) for _ in range(3))),
    heads_kv=st.integers(1, 3),
    chunk_size=st.integers(1, 5),
)
def test_any_sizes(rule, sizes, heads_kv, chunk_size):
    seqlen, group, batch, dim, dim_v = sizes
    operands = drawn(rule, seqlen, group % 3 * heads_kv, heads_kv, dim, dim_v, batch=batch)
    found = linear_attention(**operands, rule=rule, chunk_size=chunk_size, scale=0.7, return_state=True)
    for result, expected in zip(found, by_definition(**operands, scale=0.7), strict=True):
        assert_matches(result, expected, rtol=1e-13, atol=1e-13)


@every_rule
def test_a_layout_is_an_order_of_axes(rule):
    operands = drawn(rule)
    turned = {name: x if name == "state" else x.swapaxes(1, 2) for name, x in operands.items()}
    out, state = linear_attention(**operands, rule=rule, return_state=True)
    its_out, its_state = linear_attention(**turned, rule=rule, layout="bhsd", return_state=True)
    assert_same_bits(its_out, out.swapaxes(1, 2))
    assert_same_bits(its_state, state)


@every_rule
def test_a_state_goes_on_where_it_was_left(rule):
    operands = drawn(rule, seqlen=9)
    first, rest = (
        {name: x if name == "state" else x[:, part] for name, x in operands.items()}
        for part in (slice(0, 4), slice(4, 9))
    )
    out, state = linear_attention(**first, rule=rule, return_state=True)
    rest["state"] = state
    assert_matches(
        np.concatenate([out, linear_attention(**rest, rule=rule)], axis=1),
        linear_attention(**operands, rule=rule),
        rtol=1e-13,
        atol=1e-14,
    )


def test_no_state_is_a_state_of_zeros():
    operands = drawn("gated_delta")
    operands["state"] = np.zeros_like(operands["state"])
    expected = linear_attention(**operands, rule="gated_delta")
    assert_same_bits(linear_attention(**{**operands, "state": None}, rule="gated_delta"), expected)


def test_beta_may_be_shared_by_heads():
    operands = drawn("delta")
    shared = operands["beta"][:, :, :1]
    each = {**operands, "beta": np.broadcast_to(shared, operands["beta"].shape)}
    assert_same_bits(
        linear_attention(**{**operands, "beta": shared}, rule="delta"), linear_attention(**each, rule="delta")
    )


def test_a_decay_of_minus_infinity_forgets():
    operands = drawn("gated_delta", seqlen=9)
    operands["decay"][:, 5] = -np.inf
    found = linear_attention(**operands, rule="gated_delta")[:, 5:]
    rest = {name: x[:, 5:].copy() for name, x in operands.items() if name != "state"}
    rest["decay"][:, 0] = 0.0
    assert_matches(found, linear_attention(**rest, rule="gated_delta"), rtol=1e-13, atol=1e-14)


@every_rule
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["k", "v"])
def test_nan_and_infinity_stay_out_of_the_past(rule, value, name):
    operands = drawn(rule, seqlen=9)
    expected = linear_attention(**operands, rule=rule)
    operands[name][:, 6] = value
    found = linear_attention(**operands, rule=rule)
    assert_matches(found[:, :6], expected[:, :6], rtol=1e-13, atol=1e-14)
    assert not np.isfinite(found[:, 6:]).any()


def test_keys_to_come_are_too_large_for_the_past_to_see():
    operands = drawn("gated", seqlen=8)
    operands["q"][:, 2] *= 1e200
    operands["k"][:, 6] *= 1e200
    operands["v"][:, 6] *= 1e-250
    assert_matches(linear_attention(**operands, rule="gated"), by_definition(**operands)[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("heads", [4, 0])
def test_a_state_that_grows_beyond_a_chunk_is_the_recurrences(heads):
    """exp(decay) of a chunk together is infinite, and what it multiplies is zero."""
    operands = drawn("gated", seqlen=8)
    operands["decay"][:] = 300.0
    operands["state"][:], operands["k"][:, :6], operands["q"] = 0.0, 0.0, operands["q"][:, :, :heads]
    found = linear_attention(**operands, rule="gated", return_state=True)
    for result, expected in zip(found, by_definition(**operands), strict=True):
        assert_matches(result, expected, rtol=1e-12)


# ---------------------------------------------------------------------------------------------------
# Homes and dtypes
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_rounded_once(dtype):
    operands = drawn("gated_delta", seqlen=40, dim=8, dim_v=8, dtype=dtype)
    out = linear_attention(**operands, rule="gated_delta")
    assert out.dtype == DTYPES[dtype]
    expected = by_definition(**operands)[0]
    if dtype == "float64":
        assert_matches(out, expected, rtol=1e-12, atol=1e-13)
    else:
        assert_correctly_rounded(out, expected, dtype)


@pytest.mark.parametrize(
    ("dtype", "given", "expected"),
    [
        ("bfloat16", None, "float32"),
        ("float64", None, "float64"),
        ("float16", "float16", "float16"),
        ("bfloat16", "float64", "float64"),
    ],
)
def test_the_state_is_as_precise_as_the_one_before_it(dtype, given, expected):
    operands = drawn("linear", dtype=dtype)
    operands["state"] = None if given is None else operands["state"].astype(DTYPES[given])
    assert linear_attention(**operands, return_state=True)[1].dtype == expected


@pytest.mark.parametrize("home", HOMES, ids=str)
def test_results_are_at_home_in_every_library(home):
    operands = drawn("gated_delta", dtype=home.dtype)
    mine = {name: home.make(x) for name, x in operands.items()}

    def call(**arrays):
        return linear_attention(**arrays, rule="gated_delta", return_state=True)

    found = home.call(call, mine)
    expected = linear_attention(**operands, rule="gated_delta", return_state=True)
    for result, its in zip(found, expected, strict=True):
        home.check(result, mine["q"])
        assert_same_bits(result, its)


def test_without_tokens_the_state_is_a_copy():
    operands = drawn("linear", seqlen=0)
    out, state = linear_attention(**operands, return_state=True)
    assert out.shape == (2, 0, 4, 5)
    assert_same_bits(state, operands["state"])
    assert not np.shares_memory(state, operands["state"])


def test_nothing_is_computed_on_a_gpu():
    operands = {name: HostBackedCuPy("float32").make(x) for name, x in drawn("linear", dtype="float32").items()}
    with pytest.raises(NotImplementedError, match="linear_attention: has no CUDA kernel; bring the arrays to the CPU"):
        linear_attention(**operands)


# ---------------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------------


@every_rule
@layouts
@pytest.mark.parametrize("of_features", [False, True], ids=["of heads", "of features"])
def test_torchs_gradients_are_the_derivatives(rule, of_features, layout):
    torch = needs("torch")
    operands = drawn(rule, seqlen=5, heads=2, heads_kv=1 if layout == "bhsd" else 2, dim=2, of_features=of_features)
    names = list(operands)
    tensors = [
        torch.from_numpy(x if name == "state" or layout == "bshd" else x.swapaxes(1, 2).copy())
        for name, x in operands.items()
    ]

    def call(*arrays):
        return linear_attention(
            **dict(zip(names, arrays, strict=True)), rule=rule, layout=layout, chunk_size=3, return_state=True
        )

    assert torch.autograd.gradcheck(call, [tensor.requires_grad_() for tensor in tensors])


def test_gradients_of_a_shared_beta_are_summed():
    torch = needs("torch")
    tensors = {name: torch.from_numpy(x) for name, x in drawn("delta", seqlen=4, dim=2).items()}
    beta = tensors.pop("beta")[:, :, :1].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: linear_attention(**tensors, beta=x, rule="delta"), [beta])


@every_rule
@pytest.mark.parametrize("with_state", [False, True])
def test_gradients_for_numpy_are_torchs(rule, with_state):
    torch = needs("torch")
    operands = drawn(rule, seqlen=11)
    rng = np.random.default_rng(5)
    tensors = {name: torch.from_numpy(x).requires_grad_() for name, x in operands.items()}
    out, state = linear_attention(**tensors, rule=rule, return_state=True)
    dout, dlast = rng.standard_normal(out.shape), rng.standard_normal(state.shape) if with_state else None
    known = [torch.from_numpy(x) for x in (dout, dlast) if x is not None]
    torch.autograd.backward([out, state][: 1 + with_state], known)
    found = linear_attention_backward(dout, **operands, dlast_state=dlast, rule=rule)
    for name in ("q", "k", "v", "decay", "beta", "state"):
        gradient = getattr(found, f"d{name}")
        assert (gradient is None) == (name not in operands)
        if gradient is not None:
            assert_same_bits(gradient, tensors[name].grad)


def test_gradients_in_jax_are_torchs():
    torch, jax = needs("torch"), needs("jax")
    operands = drawn("gated_delta", dtype="float32")
    tensors = {name: torch.from_numpy(x).requires_grad_() for name, x in operands.items()}
    linear_attention(**tensors, rule="gated_delta").square().sum().backward()
    loss = jax.jit(jax.grad(lambda arrays: (linear_attention(**arrays, rule="gated_delta") ** 2).sum()))
    for name, gradient in loss(operands).items():
        assert_matches(gradient, tensors[name].grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("home", [Home("float32"), Home("bfloat16"), BigEndian("float32")], ids=str)
def test_gradients_have_the_dtypes_of_their_arguments(home):
    operands = {name: home.make(x) for name, x in drawn("gated", dtype=home.dtype).items()}
    found = linear_attention_backward(
        np.ones_like(linear_attention(**operands, rule="gated")), **operands, rule="gated"
    )
    assert found.dbeta is None
    for name, x in operands.items():
        gradient = getattr(found, f"d{name}")
        assert (gradient.shape, gradient.dtype) == (x.shape, x.dtype)


def test_a_second_derivative_is_refused():
    torch = needs("torch")
    tensors = {name: torch.from_numpy(x).requires_grad_() for name, x in drawn("linear").items()}
    (dq,) = torch.autograd.grad(linear_attention(**tensors).sum(), tensors["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="linear_attention: has first derivatives only"):
        torch.autograd.grad(dq.sum(), tensors["k"])
