"""Sequences that begin alike: the prefix read once gives what reading it for each of them gives."""

import numpy as np
import pytest
from homes import DTYPES, Dask, Home, Jax, Strict, Torch, needs
from oracle import assert_correctly_rounded, assert_matches, assert_same_bits, to_numpy

from cupyattn import attention, cascade_attention, merge_states, numpy_ref
from cupyattn.parts import merged_at_home
from cupyattn.problem import Layout, Mask, Problem, ScoreEdits, Sizes


def draw(rng, *, batch=3, prefix=50, own=7, rows=4, heads=(4, 2), head_dim_v=8, dtype=np.float32):
    """q, k_prefix, v_prefix, k, v; shifted off zero mean."""
    shapes = (
        (batch, rows, heads[0], 8),
        (prefix, heads[1], 8),
        (prefix, heads[1], head_dim_v),
        (batch, own, heads[1], 8),
        (batch, own, heads[1], head_dim_v),
    )
    return [(rng.standard_normal(shape) + 0.5).astype(dtype) for shape in shapes]


def joined(k_prefix, k):
    """The keys of each sequence in one array."""
    return np.concatenate([np.broadcast_to(k_prefix, (len(k), *k_prefix.shape)), k], axis=1)


def plain(q, k_prefix, v_prefix, k, v, **options):
    options = {"causal": True, "alignment": "bottom-right", **options}
    return attention(q, joined(k_prefix, k), joined(v_prefix, v), **options)


OPTIONS = {
    "nothing": {},
    "not causal": {"causal": False},
    "a scale": {"softmax_scale": 0.7},
    "a softcap": {"softcap": 1.5},
    "sinks": {"sinks": np.array([0.5, -1.0, 3.0, 20.0])},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@every_option
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_cascade_is_attention_over_all_keys_rounded_once(options, dtype, rng):
    arrays = draw(rng, dtype=DTYPES[dtype])
    out, lse = cascade_attention(*arrays, return_lse=True, **options)
    exact = plain(*(x.astype(np.float64) for x in arrays), return_lse=True, **options)
    assert out.dtype == DTYPES[dtype]
    assert_correctly_rounded(out, exact[0], dtype)
    assert_correctly_rounded(lse, exact[1], "float32")


@every_option
def test_in_float64_a_cascade_is_attention_to_a_few_units(options, rng):
    arrays = draw(rng, dtype=np.float64)
    found = cascade_attention(*arrays, return_lse=True, **options)
    for actual, expected in zip(found, plain(*arrays, return_lse=True, **options), strict=True):
        assert_matches(actual, expected, rtol=1e-14, atol=1e-15)


def test_a_cascade_is_what_merge_states_makes_of_its_parts(rng):
    q, k_prefix, v_prefix, k, v = draw(rng, dtype=np.float64)
    over_prefix = attention(q, k_prefix[None], v_prefix[None], return_lse=True)
    over_own = attention(q, k, v, causal=True, alignment="bottom-right", return_lse=True)
    merged = merge_states(*zip(over_prefix, over_own, strict=True))
    found = cascade_attention(q, k_prefix, v_prefix, k, v, return_lse=True)
    for actual, expected in zip(found, merged, strict=True):
        assert_matches(actual, expected, rtol=1e-15, atol=1e-16)


@pytest.mark.parametrize(
    "sizes",
    [
        {"prefix": 0},
        {"own": 0, "rows": 0},
        {"batch": 0},
        {"batch": 1},
        {"rows": 7},
        {"head_dim_v": 3},
        {"heads": (3, 1)},
    ],
    ids=str,
)
def test_parts_of_any_size(sizes, rng):
    arrays = draw(rng, **sizes)
    for actual, expected in zip(
        cascade_attention(*arrays, return_lse=True), plain(*arrays, return_lse=True), strict=True
    ):
        assert actual.shape == expected.shape
        assert_matches(actual, expected, rtol=1e-6, atol=1e-7)


def test_compute_dtype_is_that_of_attention(rng):
    arrays = draw(rng)
    exact = plain(*(x.astype(np.float64) for x in arrays))
    in_float32 = cascade_attention(*arrays, compute_dtype="float32")
    assert_matches(in_float32, exact, rtol=1e-5, atol=1e-6)
    assert (in_float32 != cascade_attention(*arrays)).any()


@pytest.mark.parametrize(
    "home",
    [
        Home("bfloat16"),
        Torch("float32"),
        Torch("bfloat16"),
        Jax("float32"),
        Jax("float32", jit=True),
        Strict("float32", "device1"),
        Dask("float32"),
    ],
    ids=str,
)
def test_every_library_gets_its_own_arrays_back(home, rng):
    arrays = draw(rng, dtype=DTYPES[home.dtype])
    names = ("q", "k_prefix", "v_prefix", "k", "v")
    there = {name: home.make(x) for name, x in zip(names, arrays, strict=True)}
    out = home.call(cascade_attention, there)
    home.check(out, there["q"])
    assert_same_bits(out, cascade_attention(*arrays))


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)], ids=["out", "lse", "both"])
def test_torchs_gradients_are_those_of_attention(used, rng):
    torch = needs("torch")
    arrays = draw(rng, dtype=np.float64)
    sinks = rng.standard_normal(4)
    ours, theirs = ([torch.tensor(x, requires_grad=True) for x in (*arrays, sinks)] for _ in range(2))
    *mine, own_sinks = ours
    q, k_prefix, v_prefix, k, v, their_sinks = theirs
    whole_k, whole_v = (
        torch.cat([prefix.expand(3, *prefix.shape), x], 1) for prefix, x in ((k_prefix, k), (v_prefix, v))
    )
    found = cascade_attention(*mine, sinks=own_sinks, return_lse=True)
    expected = attention(q, whole_k, whole_v, causal=True, alignment="bottom-right", sinks=their_sinks, return_lse=True)
    weights = [torch.tensor(rng.standard_normal(x.shape)) for x in expected]
    for results in (found, expected):
        sum((results[i] * weights[i]).sum() for i in used).backward()
    for a, b in zip(ours, theirs, strict=True):
        gradients = [np.zeros(x.shape) if x.grad is None else to_numpy(x.grad) for x in (a, b)]
        assert_matches(*gradients, rtol=1e-12, atol=1e-13)


def test_jaxs_gradients_are_those_of_attention(rng):
    jax = needs("jax")
    arrays = [jax.numpy.asarray(x) for x in draw(rng)]

    def over_all(q, k_prefix, v_prefix, k, v):
        repeated = (jax.numpy.broadcast_to(x, (3, *x.shape)) for x in (k_prefix, v_prefix))
        whole = [jax.numpy.concatenate(pair, axis=1) for pair in zip(repeated, (k, v), strict=True)]
        return (attention(q, *whole, causal=True, alignment="bottom-right") ** 2).sum()

    found = jax.grad(lambda *x: (cascade_attention(*x) ** 2).sum(), argnums=range(5))(*arrays)
    expected = jax.grad(over_all, argnums=range(5))(*arrays)
    for a, b in zip(found, expected, strict=True):
        assert_matches(a, b, rtol=1e-4, atol=1e-5)


def test_prefixes_of_nan_that_nobody_sees_do_not_exist(rng):
    """A tail whose first rows see nothing but the prefix."""
    q, k_prefix, v_prefix, k, v = draw(rng, rows=7)
    k[:, -1], v[:, -1] = np.nan, np.inf
    out = cascade_attention(q, k_prefix, v_prefix, k, v)
    assert np.isfinite(out[:, :-1]).all()
    assert_correctly_rounded(out[:, :-1], plain(q, k_prefix, v_prefix, k, v)[:, :-1], "float32", share=0.95)


# ---------------------------------------------------------------------------------------------------
# The merge that a GPU's arrays go through
# ---------------------------------------------------------------------------------------------------


def states(rng, count, problem):
    """Of rows that see something, of rows that see nothing (whatever their out holds), and of infinite ones."""
    found = []
    for _ in range(count):
        out, lse = rng.standard_normal(problem.out_shape), rng.standard_normal(problem.lse_shape)
        lse[0, ..., 0] = -np.inf
        lse[1, ..., 1] = rng.choice([-np.inf, np.inf, 0.0])
        found.append({"out": out, "lse": lse})
    return found


@pytest.mark.parametrize("home", [Home("float64"), Torch("float64"), Strict("float64", "device1")], ids=str)
@pytest.mark.parametrize("axes", ["thd", "bshd"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_merge_in_the_arrays_own_library_is_the_references(home, axes, count, rng):
    sizes = Sizes((2,), 4, 2, 2, 3, 5, 8, 6, total_q=6)
    problem = Problem(sizes, Layout(axes), "float64", Mask(), ScoreEdits(1.0))
    found = states(rng, count, problem)
    rows = [x["out"].swapaxes(-3, -2) for x in found]
    expected = numpy_ref.merge([numpy_ref.State(x, state["lse"]) for x, state in zip(rows, found, strict=True)])
    there = [{name: home.make(x) for name, x in state.items()} for state in found]
    with np.errstate(all="ignore"):
        merged = merged_at_home(there, [problem] * count)
    home.check(merged["out"], there[0]["out"])
    assert_matches(merged["out"], expected.out.swapaxes(-3, -2), rtol=1e-14, atol=1e-15)
    assert_matches(merged["lse"], expected.lse, rtol=1e-14, atol=1e-15)


def test_the_merge_of_low_precision_is_in_float32(rng):
    torch = needs("torch")
    sizes = Sizes((1,), 2, 2, 2, 4, 4, 8, 8, total_q=4)
    problem = Problem(sizes, Layout("bshd"), "bfloat16", Mask(), ScoreEdits(1.0))
    found = [
        {"out": torch.randn(problem.out_shape).bfloat16(), "lse": torch.randn(problem.lse_shape)} for _ in range(2)
    ]
    merged = merged_at_home(found, [problem] * 2)
    expected, _ = merge_states([x["out"] for x in found], [x["lse"] for x in found])
    assert merged["out"].dtype == torch.bfloat16
    assert merged["lse"].dtype == torch.float32
    assert_matches(merged["out"], to_numpy(expected), rtol=2.0**-7)


@pytest.mark.parametrize("shape", [(1, 2, 2, 0), (1, 2, 0, 4), (1, 0, 2, 4), (0, 2, 2, 4)], ids=str)
def test_axes_of_nothing_give_results_of_nothing(shape):
    x, prefix = np.ones(shape), np.ones((3, *shape[2:]))
    out, lse = cascade_attention(x, prefix, prefix, x, x, return_lse=True)
    assert out.shape == shape
    assert lse.shape == (shape[0], shape[2], shape[1])
