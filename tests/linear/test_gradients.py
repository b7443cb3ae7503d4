"""Gradients of chunks against those of tokens, one after the other."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from linear.test_calls import drawn, every_rule
from oracle import assert_matches

from cupyattn import linear_attention, linear_attention_backward

of_each = pytest.mark.parametrize("of_features", [False, True], ids=["of heads", "of features"])


def both(operands, rule, chunk_size=None, **more):
    """Gradients by chunks and by tokens, of random ones of out and of the last state, by name."""
    rng = np.random.default_rng(5)
    out, state = linear_attention(**operands, rule=rule, return_state=True)
    known = {"dout": rng.standard_normal(out.shape), "dlast_state": rng.standard_normal(state.shape), **more}
    found = (linear_attention_backward(**known, **operands, rule=rule, chunk_size=size) for size in (chunk_size, 1))
    return [{f"d{name}": getattr(x, f"d{name}") for name in operands} for x in found]


@every_rule
@of_each
@pytest.mark.parametrize("chunk_size", [None, 2, 7, 300, 1000])
def test_are_those_of_tokens_to_the_last_bits(rule, of_features, chunk_size):
    by_chunks, by_tokens = both(drawn(rule, 300, dim=16, dim_v=8, of_features=of_features), rule, chunk_size)
    for name, exact in by_tokens.items():
        assert np.abs(by_chunks[name] - exact).max() <= 5e-14 * np.abs(exact).max(), name


@pytest.mark.parametrize("seqlen", [1, 63, 64, 65, 257])
def test_any_number_of_chunks(seqlen):
    by_chunks, by_tokens = both(drawn("gated_delta", seqlen), "gated_delta")
    for name, exact in by_tokens.items():
        assert_matches(by_chunks[name], exact, rtol=1e-12, atol=1e-12)


@given(
    rule=st.sampled_from(["linear", "gated", "delta", "gated_delta"]),
    sizes=st.tuples(*(st.integers(0, 9) for _ in range(2)), *(st.integers(0, 3) for _ in range(3))),
    heads_kv=st.integers(1, 3),
    chunk_size=st.integers(2, 5),
    of_features=st.booleans(),
)
def test_any_sizes(rule, sizes, heads_kv, chunk_size, of_features):
    seqlen, group, batch, dim, dim_v = sizes
    operands = drawn(rule, seqlen, group % 3 * heads_kv, heads_kv, dim, dim_v, of_features, batch=batch)
    by_chunks, by_tokens = both(operands, rule, chunk_size)
    for name, exact in by_tokens.items():
        assert_matches(by_chunks[name], exact, rtol=1e-12, atol=1e-12)


@every_rule
def test_without_a_state_or_its_gradient(rule):
    operands = drawn(rule, 20)
    del operands["state"]
    by_chunks, by_tokens = both(operands, rule, 8, dlast_state=None)
    for name, exact in by_tokens.items():
        assert_matches(by_chunks[name], exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("rule", ["gated", "gated_delta"])
@of_each
def test_what_is_forgotten_has_no_gradient(rule, of_features):
    operands = drawn(rule, 9, of_features=of_features)
    operands["decay"][:, 5] = -np.inf
    dout = np.random.default_rng(3).standard_normal((*operands["q"].shape[:-1], operands["v"].shape[-1]))
    dout[:, :5] = 0.0
    by_chunks, by_tokens = both(operands, rule, dout=dout)
    assert not by_chunks["dstate"].any()
    assert not by_chunks["dv"][:, :5].any()
    assert not by_chunks["ddecay"][:, 5].any()
    for name, exact in by_tokens.items():
        assert_matches(by_chunks[name], exact, rtol=1e-12, atol=1e-13)


@every_rule
@of_each
def test_a_decay_that_leaves_next_to_nothing_costs_no_digits(rule, of_features):
    operands = drawn(rule, 40, of_features=of_features)
    if "decay" in operands:
        operands["decay"] -= 20.0
    by_chunks, by_tokens = both(operands, rule)
    for name, exact in by_tokens.items():
        assert_matches(by_chunks[name], exact, rtol=1e-11, atol=1e-40 if name == "ddecay" else 1e-13)


@every_rule
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e200])
def test_what_is_not_finite_goes_where_it_goes_token_by_token(rule, name, value):
    operands = drawn(rule, 9)
    more = {}
    if name == "dout":
        more["dout"] = np.ones(operands["q"].shape[:-1] + operands["v"].shape[-1:])
        more["dout"][:, 6] = value
    else:
        operands[name][:, 6] = value
    by_chunks, by_tokens = both(operands, rule, 4, **more)
    for gradient, exact in by_tokens.items():
        finite = np.isfinite(exact)
        assert np.array_equal(np.isfinite(by_chunks[gradient]), finite)
        largest = np.abs(exact[finite]).max(initial=1.0)
        assert_matches(by_chunks[gradient][finite] / largest, exact[finite] / largest, rtol=1e-12, atol=1e-13)
