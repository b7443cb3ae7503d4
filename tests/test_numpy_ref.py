"""The definition, against one written with nothing but `math`, and the algebra of states."""

import math
from functools import reduce
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_matches, assert_same_bits

import cupyattn
from cupyattn import numpy_ref
from cupyattn.numpy_ref import State, merge

seeds = st.integers(0, 2**32 - 1)
quick = settings(derandomize=True, deadline=None, max_examples=100)


# ---------------------------------------------------------------------------------------------------
# The definition
# ---------------------------------------------------------------------------------------------------


def one_row(q, k, v, visible, scale, softcap, bias, sink):
    """out and lse of one query, in Python floats: no arrays, no subtraction of a maximum."""
    scores = []
    for j in range(len(k)):
        score = scale * sum(a * b for a, b in zip(q, k[j], strict=True))
        score = softcap * math.tanh(score / softcap) if softcap else score
        scores.append(score + bias[j] if visible[j] else -math.inf)
    weights = [math.exp(score) for score in scores]
    total = sum(weights) + (math.exp(sink) if sink is not None else 0.0)
    if total == 0.0:
        return [0.0] * v.shape[1], -math.inf
    out = [sum(w * x for w, x in zip(weights, v[:, d], strict=True)) / total for d in range(v.shape[1])]
    return out, math.log(total)


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_the_definition_is_the_formula_in_plain_python(rng, softcap, with_sinks):
    q, k = rng.standard_normal((2, 2, 5, 4))
    v = rng.standard_normal((2, 5, 3))
    visible = np.tri(5, 5, -1, dtype=bool)
    bias = rng.standard_normal((5, 5))
    sinks = rng.standard_normal((2, 5)) if with_sinks else None
    state = numpy_ref.attention(q, k, v, visible=visible, scale=0.7, softcap=softcap, bias=bias, sinks=sinks)
    for head in range(2):
        for i in range(5):
            sink = sinks[head, i] if with_sinks else None
            out, lse = one_row(q[head, i], k[head], v[head], visible[i], 0.7, softcap, bias[i], sink)
            assert_matches(state.out[head, i], out, rtol=1e-13, atol=1e-15)
            assert_matches(state.lse[head, i], lse, rtol=1e-13, atol=1e-15)


def test_the_definition_drops_weights_after_normalising_them(rng):
    q, k, v = rng.standard_normal((3, 4, 4))
    keep = rng.random((4, 4)) < 0.5
    plain = numpy_ref.attention(q, k, np.eye(4), scale=0.5)
    dropped = numpy_ref.attention(q, k, v, scale=0.5, keep=keep, dropout_p=0.5)
    assert_matches(dropped.out, (plain.out * keep / 0.5) @ v, rtol=1e-13, atol=1e-15)
    assert_same_bits(dropped.lse, plain.lse)


def test_the_definition_survives_scores_that_exp_does_not(rng):
    q, k, v = rng.standard_normal((3, 4, 4))
    state = numpy_ref.attention(q, k, v, scale=1e5)
    assert np.isfinite(state.out).all()
    assert np.abs(state.lse).max() > 1e4


# ---------------------------------------------------------------------------------------------------
# States
# ---------------------------------------------------------------------------------------------------

logs = st.one_of(st.floats(-800.0, 800.0), st.just(-np.inf), st.sampled_from([0.0, 1e5, -1e5]))
logs_with_infinity = st.one_of(logs, st.just(np.inf))


def states(lses=logs):
    """Two rows; the out of a row that saw nothing is garbage."""

    def build(lse, seed):
        out = np.random.default_rng(seed).uniform(-1.0, 1.0, (2, 3))
        out[np.isneginf(lse)] = np.nan if seed % 2 else np.inf
        return State(out, np.array(lse))

    return st.builds(build, st.lists(lses, min_size=2, max_size=2), seeds)


def whole(state):
    """The state with the garbage of empty rows taken out: what it means."""
    return State(np.where(np.isneginf(state.lse)[:, None], 0.0, state.out), state.lse)


def assert_same_state(actual, expected, **tolerance):
    assert_matches(actual.out, expected.out, **tolerance)
    assert_matches(actual.lse, expected.lse, **tolerance)


NOTHING = State(np.zeros((2, 3)), np.full(2, -np.inf))


@quick
@given(states(logs_with_infinity), states(logs_with_infinity))
def test_merge_is_commutative(a, b):
    assert_same_state(merge([a, b]), merge([b, a]), rtol=1e-15, atol=1e-15)


@quick
@given(states(), states(), states())
def test_merge_is_associative(a, b, c):
    left, right = merge([merge([a, b]), c]), merge([a, merge([b, c])])
    largest = max(np.abs(x.lse[x.lse > -np.inf]).max(initial=1.0) for x in (a, b, c))
    rounding = 8 * np.finfo(float).eps * largest  # what a stored lse is off by, exp makes a factor of
    assert_same_state(left, right, rtol=rounding, atol=rounding)
    assert_same_state(merge([a, b, c]), left, rtol=rounding, atol=rounding)


@quick
@given(states(logs_with_infinity))
def test_a_state_that_saw_nothing_is_merges_identity(a):
    for garbage in (0.0, np.nan, np.inf, 1e300):
        nothing = State(np.full((2, 3), garbage), np.full(2, -np.inf))
        assert_same_state(merge([a, nothing]), whole(a), rtol=1e-15)
        assert_same_state(merge([nothing, a]), whole(a), rtol=1e-15)
    assert_same_state(merge([NOTHING, NOTHING]), NOTHING)


@quick
@given(states(logs_with_infinity))
def test_a_state_merged_alone_is_itself(a):
    assert_same_state(merge([a]), whole(a), rtol=1e-15)


@quick
@given(st.lists(states(logs_with_infinity), min_size=1, max_size=5))
def test_merge_is_never_nan(several):
    found = merge(several)
    assert not np.isnan(found.out).any()
    assert not np.isnan(found.lse).any()
    highest = np.max([state.lse for state in several], axis=0)
    assert (found.lse >= highest).all()
    assert (found.lse <= highest + np.log(len(several)) + 1e-12).all()
    assert np.abs(found.out).max() <= 1.0 + 1e-12, "a mean of states is not larger than the largest"


@quick
@given(states(), states())
def test_merge_weighs_by_the_exponential_of_lse(a, b):
    found = merge([a, b])
    pairs = zip(a.lse, b.lse, strict=True)
    share = np.array([1 / (1 + np.exp(min(700.0, y - x))) if x > -np.inf else 0.0 for x, y in pairs])
    expected = share[:, None] * whole(a).out + (1 - share[:, None]) * whole(b).out
    assert_matches(found.out, expected, rtol=1e-11, atol=1e-13)
    assert_matches(found.lse, np.logaddexp(a.lse, b.lse), rtol=1e-14, atol=1e-14)


def test_an_infinite_lse_outweighs_all_finite_ones():
    big, small = State(np.ones((2, 3)), np.array([np.inf, np.inf])), State(np.zeros((2, 3)), np.array([700.0, 0.0]))
    assert_same_state(merge([small, big, small]), big)


@quick
@given(seed=seeds, cuts=st.lists(st.integers(0, 20), max_size=5), dtype=st.sampled_from(["float64", "float32"]))
def test_merging_attention_over_any_cut_of_the_keys_is_attention_over_all(seed, cuts, dtype):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((2, 3, 4, 5)).astype(dtype)
    k, v = 3 * rng.standard_normal((2, 2, 20, 2, 5)).astype(dtype)
    mask = rng.random((2, 1, 3, 20)) < 0.5
    edges = [0, *sorted(cuts), 20]
    parts = [
        cupyattn.attention(q, k[:, a:b], v[:, a:b], mask=mask[..., a:b], return_lse=True) for a, b in pairwise(edges)
    ]
    outs, lses = zip(*parts, strict=True)
    merged = cupyattn.merge_states(outs, lses)
    expected = cupyattn.attention(q, k, v, mask=mask, return_lse=True)
    one_by_one = reduce(lambda one, other: cupyattn.merge_states(*zip(one, other, strict=True)), parts)
    tolerance = {"rtol": 1e-12, "atol": 1e-13} if dtype == "float64" else {"rtol": 1e-6, "atol": 2e-6}
    for found in (merged, one_by_one):
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == theirs.dtype
            assert_matches(ours, theirs, **tolerance)


@pytest.mark.parametrize(
    ("layout", "axes"), [("bshd", (0, 1, 2, 3)), ("bhsd", (0, 2, 1, 3)), ("thd", None)], ids=["bshd", "bhsd", "thd"]
)
def test_merge_states_takes_every_layout(rng, layout, axes):
    q, k, v = rng.standard_normal((1, 5, 4, 6)), *rng.standard_normal((2, 1, 9, 4, 6))
    parts = [cupyattn.attention(q, k[:, part], v[:, part], return_lse=True) for part in (slice(0, 4), slice(4, 9))]
    outs, lses = zip(*parts, strict=True)
    outs = [x[0] if axes is None else x.transpose(axes) for x in outs]
    lses = [x[0] if axes is None else x for x in lses]
    out, lse = cupyattn.merge_states(outs, lses, layout=layout)
    expected, expected_lse = cupyattn.attention(q, k, v, return_lse=True)
    assert_matches(out, expected[0] if axes is None else expected.transpose(axes), rtol=1e-12, atol=1e-14)
    assert_matches(lse, expected_lse[0] if axes is None else expected_lse, rtol=1e-13)
