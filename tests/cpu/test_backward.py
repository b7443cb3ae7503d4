"""The backward pass: what nobody may look at, heads that tasks share, and what is not computed twice."""

import numpy as np
import pytest
from oracle import assert_matches, assert_same_bits

import cupyattn
from cupyattn import plan
from cupyattn.cpu import flash

KEYS, ROWS = 300, 200
LAST = KEYS - 1
LOWEST = float(np.finfo(np.float32).min)


@pytest.fixture
def with_care(monkeypatch):
    """Whether each block was computed with care, in order."""
    found, original = [], flash.block_gradients

    def watched(*arguments, with_care=False):
        found.append(with_care)
        return original(*arguments, with_care=with_care)

    monkeypatch.setattr(flash, "block_gradients", watched)
    return found


def operands(rng, dtype="float64"):
    """dout, q, k, v in "bhsd", and a mask that hides the last key from all, and all keys from the first row."""
    shapes = (1, 4, ROWS, 8), (1, 4, ROWS, 8), (1, 2, KEYS, 8), (1, 2, KEYS, 8)
    mask = np.ones((ROWS, KEYS), bool)
    mask[0], mask[:, LAST] = False, False
    return *(rng.standard_normal(shape).astype(dtype) for shape in shapes), mask


@pytest.mark.parametrize("stray", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["q", "dout", "k", "v"])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"dropout_p": 0.3, "dropout_seed": 1}], ids=str)
def test_what_nobody_may_look_at_reaches_no_gradient(rng, with_care, where, stray, options):
    """In k it would reach dq alone, in v all that comes of the scores, in q dk alone, in dout dv alone, for one."""
    dout, q, k, v, mask = operands(rng)
    arrays = {"dout": dout, "q": q, "k": k, "v": v}
    options = {"layout": "bhsd", "mask": mask, **options}
    arrays[where][:, :, LAST if where in "kv" else 0] = 0.0
    out, lse = cupyattn.attention(q, k, v, **options, return_lse=True)
    expected = cupyattn.attention_backward(**arrays, out=out, lse=lse, **options)
    assert True not in with_care
    arrays[where][:, :, LAST if where in "kv" else 0] = stray
    found = cupyattn.attention_backward(**arrays, out=out, lse=lse, **options)
    assert True in with_care
    for one, other in zip(found[:3], expected[:3], strict=True):
        assert_matches(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("stray", [np.nan, np.inf])
@pytest.mark.parametrize("extra", ["bias", "alibi_slopes"])
def test_gradients_of_a_bias_and_of_slopes_are_looked_at_where_there_are_no_others(rng, extra, stray):
    """Without head_dim there is no dq and no dk for a value that nobody may look at to show in."""
    q, k = np.zeros((1, 2, 3, 0)), np.zeros((1, 2, 4, 0))
    v, dout = rng.standard_normal((1, 2, 4, 5)), rng.standard_normal((1, 2, 3, 5))
    options = {"layout": "bhsd", "mask": np.arange(4) < 3, "softmax_scale": 1.0, "alignment": "top-left"}
    options[extra] = rng.standard_normal((3, 4) if extra == "bias" else 2)
    expected = cupyattn.attention_backward(dout, q, k, v, **options)
    v[:, :, 3] = stray
    found = cupyattn.attention_backward(dout, q, k, v, **options)
    assert_matches(getattr(found, f"d{extra}"), getattr(expected, f"d{extra}"), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_are_what_they_are_where_only_their_sum_is_beyond_the_range(rng, with_care, dtype):
    dout, q, k, v, mask = operands(rng, dtype)
    huge = float(np.finfo(dtype).max) / 4
    q[...], v[...], dout[...] = 0.0, 0.0, huge
    found = cupyattn.attention_backward(dout, q, k, v, mask=mask, layout="bhsd", compute_dtype=dtype)
    assert True in with_care
    assert_matches(found.dv[:, :, :LAST] / huge, np.full((1, 2, LAST, 8), 2 * (ROWS - 1) / (KEYS - 1)), rtol=1e-5)
    assert not found.dv[:, :, LAST].any()
    assert not found.dq.any()


@pytest.fixture
def workers(monkeypatch):
    """A function that sets how many threads there are for any problem, each task one of its own."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    monkeypatch.setattr("cupyattn.plan.cpu.WORTH_THREADS", 0)
    monkeypatch.setattr("cupyattn.cpu.tasks.LITTLE", 0)

    def set_to(count):
        torch.set_num_threads(count)
        monkeypatch.setattr("cupyattn.arrays.visit.num_cores", lambda: count)
        monkeypatch.setattr("cupyattn.cpu.threads._blas.num_threads", lambda: count)
        for remembered in (plan.choose, cupyattn.arrays.visit.cpu_device):
            remembered.cache_clear()
        return torch

    yield set_to
    torch.set_num_threads(before)
    for remembered in (plan.choose, cupyattn.arrays.visit.cpu_device):
        remembered.cache_clear()


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("slopes", [(4,), (1, 4)], ids=str)
def test_tasks_that_share_a_head_add_up_to_its_gradient(rng, workers, with_care, causal, slopes):
    """One key head, and one sequence, for several workers."""
    arrays = [rng.standard_normal((1, n, heads, 8)) for n, heads in ((600, 4), (600, 4), (500, 1), (500, 1))]
    extra = rng.standard_normal(slopes)
    options = {"causal": causal, "alignment": "bottom-right"}
    found = {}
    for count in (1, 4):
        torch = workers(count)
        dout, *inputs = (torch.from_numpy(x) for x in (*arrays, extra))
        leaves = [x.requires_grad_() for x in inputs]
        out = cupyattn.attention(*leaves[:3], alibi_slopes=leaves[3], **options)
        with_care.clear()
        found[count] = torch.autograd.grad(out, leaves, dout)
        assert len(with_care) >= count
    for one, other in zip(found[4], found[1], strict=True):
        assert_matches(one, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("wants_lse", [False, True])
@pytest.mark.parametrize(
    ("dtype", "compute_dtype", "again"),
    [("float64", "float64", False), ("float32", "float32", False), ("float32", "float64", True)],
)
def test_torchs_backward_pass_computes_out_again_only_where_it_was_rounded(
    rng, monkeypatch, dtype, compute_dtype, again, wants_lse
):
    torch, calls, original = pytest.importorskip("torch"), [], flash.flash
    monkeypatch.setattr(flash, "flash", lambda *arguments: calls.append(1) or original(*arguments))
    q, k, v = (torch.from_numpy(rng.standard_normal((1, 5, 2, 4)).astype(dtype)).requires_grad_() for _ in range(3))
    found = cupyattn.attention(q, k, v, compute_dtype=compute_dtype, return_lse=wants_lse)
    out = found[0] if wants_lse else found
    calls.clear()
    out.sum().backward()
    assert bool(calls) == again


def test_the_backward_pass_has_its_own_results_where_the_callers_may_be_overwritten(rng):
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(rng.standard_normal((1, 5, 2, 4))).requires_grad_() for _ in range(3))
    expected = torch.autograd.grad(cupyattn.attention(q, k, v).sum(), (q, k, v))
    out = cupyattn.attention(q, k, v)
    found = torch.autograd.grad(out.mul_(2.0).sum(), (q, k, v))
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(one, 2 * other)


@pytest.mark.parametrize(("compute", "bias"), [("float64", LOWEST), ("float64", -1e12), ("float32", LOWEST)], ids=str)
@pytest.mark.parametrize("known", [False, True])
def test_rows_whose_keys_all_have_a_very_low_bias_share_their_gradients_among_these(rng, compute, bias, known):
    """Their log-sum-exp is the bias itself: how many keys there are is lost in it."""
    dout, q, k, v, mask = operands(rng)
    biases = np.where(np.arange(ROWS)[:, None] % 3 == 0, bias, rng.standard_normal((ROWS, KEYS)))
    mask[4, 7:] = False  # and some rows see few of them
    sinks = np.array([bias, bias, 0.0, -np.inf])
    options = {"layout": "bhsd", "mask": mask, "bias": biases, "compute_dtype": compute, "sinks": sinks}
    forward = {}
    if known:
        forward = dict(zip(("out", "lse"), cupyattn.attention(q, k, v, **options, return_lse=True), strict=True))
    found = cupyattn.attention_backward(dout, q, k, v, **forward, **options)
    expected = gradients_by_hand(dout, q, k, v, mask, biases, sinks, compute)
    tolerance = {"rtol": 1e-10, "atol": 1e-11} if compute == "float64" else {"rtol": 1e-4, "atol": 1e-4}
    for name in ("dq", "dk", "dv", "dbias", "dsinks"):
        assert_matches(getattr(found, name), expected[name], **tolerance)


def gradients_by_hand(dout, q, k, v, mask, bias, sinks, compute):
    """Of each row's softmax as it is, in which numbers that are added to a low bias are lost as in `compute`."""
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    scale = q.shape[-1] ** -0.5
    scores = (scale * q @ k.swapaxes(-1, -2)).astype(compute) + bias.astype(compute)
    scores = np.where(mask, scores.astype(np.float64), -np.inf)
    sinks = np.broadcast_to(sinks.astype(compute).astype(np.float64)[:, None, None], (*scores.shape[:-1], 1))
    every = np.concatenate([scores, sinks], axis=-1)
    highest = every.max(axis=-1, keepdims=True)
    weights = np.exp(every - np.where(np.isneginf(highest), 0.0, highest))
    total = weights.sum(axis=-1, keepdims=True)
    weights = np.where(total > 0.0, weights / np.where(total > 0.0, total, 1.0), 0.0)
    dweights = np.concatenate([dout @ v.swapaxes(-1, -2), np.zeros(sinks.shape)], axis=-1)
    dscores = weights * (dweights - (weights * dweights).sum(axis=-1, keepdims=True))
    weights, dkeys, dsinks = weights[..., :-1], dscores[..., :-1], dscores[..., -1]
    of_groups = lambda x: x.reshape(1, -1, group, *x.shape[2:]).sum(axis=2)  # noqa: E731
    return {
        "dq": scale * dkeys @ k,
        "dk": of_groups(scale * dkeys.swapaxes(-1, -2) @ q),
        "dv": of_groups(weights.swapaxes(-1, -2) @ dout),
        "dbias": dkeys.sum(axis=(0, 1)),
        "dsinks": dsinks.sum(axis=(0, -1)),
    }
