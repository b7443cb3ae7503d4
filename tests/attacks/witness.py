"""An oracle of attention in float64 that shares no line with the package, and by how much the package may miss it.

Dense NumPy, from the definition: each result comes with a tolerance for each of its numbers.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

NAN, INF = float("nan"), float("inf")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = tuple(map(np.dtype, ("float16", BFLOAT16, "float32", "float64")))
FLOAT32 = np.finfo(np.float32)
LARGEST_BFLOAT16 = float(ml_dtypes.finfo(BFLOAT16).max)


class Wrong(Exception):
    """What the package did wrong, in words."""


# ---------------------------------------------------------------------------------------------------
# Numbers and how far off they may be
# ---------------------------------------------------------------------------------------------------


class Expected(NamedTuple):
    """A result in float64 and by how much the package may miss it before it rounds; infinite: nobody can say.

    Where the package's arithmetic overflows although the result would be finite, or a softmax hangs on the last bits of
    scores of 1e300, there is no right answer in that arithmetic.  Such elements, and no others, have an infinite
    tolerance: the oracle bounds every score by what rounding its operands may do to it, and every weight by the
    smallest and the largest that scores within these bounds may give.
    """

    value: Any
    tolerance: Any

    def map(self, function):
        return Expected(function(self.value), function(self.tolerance))


class Arithmetic(NamedTuple):
    """What the package computes in."""

    dtype: Any
    eps: float
    least: float
    """The smallest number: products below it vanish."""
    most: float
    """Sums of numbers beyond it may overflow on the way."""

    @classmethod
    def of(cls, dtype):
        info = np.finfo(dtype)
        return cls(dtype, float(info.eps), float(info.smallest_subnormal), float(info.max) / 8)

    def read(self, array):
        """An operand's numbers as this arithmetic sees them, in float64."""
        with np.errstate(all="ignore"):
            return as_float64(np.asarray(array).astype(self.dtype))


ARITHMETIC = {name: Arithmetic.of(name) for name in ("float32", "float64")}


def as_float64(array):
    if hasattr(array, "detach"):  # torch's
        return array.detach().double().numpy()
    with np.errstate(all="ignore"):
        return np.asarray(array).astype(np.float64)


def rounded(values, dtype):
    """float64 numbers rounded once to nearest even, in float64.  ml_dtypes would round twice, to float32 first."""
    with np.errstate(all="ignore"):
        if dtype != BFLOAT16:
            return values.astype(dtype).astype(np.float64)
        step = np.maximum(np.frexp(values)[1] - 8, -133)
        nearest = np.ldexp(np.rint(np.ldexp(values, -step)), step)
        return np.where(np.abs(nearest) > LARGEST_BFLOAT16, np.copysign(INF, nearest), nearest)


def check(what, actual, expected, dtype, lenient=False):
    """Raise unless the numbers lie within bounds; `lenient`: whatever is not finite in the oracle may be anything."""
    value, tolerance = expected
    if tuple(actual.shape) != value.shape:
        raise Wrong(f"{what} has the shape {tuple(actual.shape)}, expected {value.shape}")
    came = str(actual.dtype).removeprefix("torch.") if not isinstance(actual, np.ndarray) else actual.dtype
    if came != (dtype if isinstance(actual, np.ndarray) else dtype.name):
        raise Wrong(f"{what} is {came}, expected {dtype}")
    actual = as_float64(actual)
    with np.errstate(all="ignore"):
        low, high = rounded(value - tolerance, dtype), rounded(value + tolerance, dtype)
        right = (low <= actual) & (actual <= high) | (np.isnan(value) & np.isnan(actual)) | ~(tolerance < INF)
        right |= actual == rounded(value, dtype)
        if lenient:
            right |= ~np.isfinite(value)
        if right.all():
            return
        error = np.where(right, -1.0, np.nan_to_num(np.abs(actual - value) / (tolerance + 1e-323), nan=INF, posinf=INF))
    worst = tuple(int(i) for i in np.unravel_index(np.argmax(error), error.shape))
    raise Wrong(
        f"{what}{list(worst)} is {actual[worst]!r}, expected {value[worst]!r} +- {tolerance[worst]:.3g}"
        f" ({int((~right).sum())} of {right.size} are off)"
    )


# ---------------------------------------------------------------------------------------------------
# The oracle
# ---------------------------------------------------------------------------------------------------


@dataclass
class Question:
    """One attention, dense: heads first, every number in float64 as the package's arithmetic reads it."""

    q: Any
    """(..., heads, rows, head_dim)."""
    k: Any
    """(..., key heads, keys, head_dim)."""
    v: Any
    arithmetic: Arithmetic
    scale: float
    softcap: float = 0.0
    seen: Any = True
    bias: Any = None
    slopes: Any = None
    """(..., heads)."""
    distance: Any = None
    """Of every key from every row's diagonal."""
    sinks: Any = None
    """(heads,)."""
    keep: Any = True
    dropout_p: float = 0.0
    in_parts: bool = False
    """What has no weight may be left out, even if it is infinite: keys in parts are merged."""


@dataclass
class Answer:
    out: Expected
    lse: Expected
    weights: Expected
    sink_weight: Expected
    hidden: Any
    slack: Any
    """By how much each score may be off."""
    slope: Expected
    """Derivative of the softcap."""


def finite(x):
    return np.where(np.isfinite(x), x, 0.0)


def no_nan(x):
    return np.where(np.isnan(x), 0.0, x)


def masked_sum(weights, values, seen):
    """``weights @ values`` over the pairs that are seen, whatever hidden values hold."""
    weights, bad = np.where(seen, weights, 0.0), ~np.isfinite(values)
    if not bad.any():
        return weights @ values
    total = weights @ np.where(bad, 0.0, values)
    matter = (bad.any(axis=-1) & seen.any(axis=-2)).reshape(-1, values.shape[-2]).any(axis=0)
    values = np.where(bad, values, 0.0)
    for key in np.flatnonzero(matter):
        term = weights[..., key, None] * values[..., None, key, :]
        total = total + np.where(seen[..., key, None] & bad[..., None, key, :], term, 0.0)
    return total


def log_sum_exp(x):
    highest = x.max(axis=-1, keepdims=True)
    origin = np.where(np.isfinite(highest), highest, 0.0)
    return (np.log(np.exp(x - origin).sum(axis=-1, keepdims=True)) + origin)[..., 0]


def log_sum_exp_of_others(x):
    """For each entry of the last axis, of all entries but that."""
    highest = x.max(axis=-1, keepdims=True)
    origin = np.where(np.isfinite(highest), highest, 0.0)
    terms = np.exp(x - origin)
    found = np.log(np.maximum(terms.sum(axis=-1, keepdims=True) - terms, 0.0)) + origin
    top = x == highest
    # A single largest one leaves nothing that could be told from rounding: the others are summed without it.
    alone = top & (top.sum(axis=-1, keepdims=True) == 1)
    return np.where(alone, log_sum_exp(np.where(top, -INF, x))[..., None], found)


def share_of(x, others):
    """exp(x) of exp(x) + exp(others), to the smallest number there is: its inverse would be infinite before."""
    above = np.exp(-np.abs(x - others))
    return np.where(np.isneginf(x), 0.0, np.where(x < others, above, 1.0) / (1.0 + above))


def shared(array, heads):
    """Key heads repeated for the query heads that they serve."""
    return np.repeat(array, heads // max(1, array.shape[-3]), axis=-3)


def scores_of(ask):
    """Scores, -inf where a key is hidden, by how much they may be off, and the softcap's derivative."""
    a, q, k = ask.arithmetic, ask.q, shared(ask.k, ask.q.shape[-3])
    dim, known_q, known_k = q.shape[-1], np.abs(finite(q)), np.abs(finite(k))
    products = known_q @ known_k.swapaxes(-1, -2)
    scale, scaled = abs(ask.scale), abs(ask.scale) * known_q
    scores = ask.scale * (q @ k.swapaxes(-1, -2))
    slack = a.eps * (dim + 8) * scale * products
    slack = slack + a.least * (known_k.sum(axis=-1)[..., None, :] + products + dim)
    special = ~np.isfinite(q).all(axis=-1)[..., None] | ~np.isfinite(k).all(axis=-1)[..., None, :]
    # q * scale first or last: where one of them leaves the range, and where 0 * inf is nan and 1e-400 * inf is not
    by_scale = np.where(np.isinf(q), scale, scaled)  # what is inf here may have been a number that left the range
    vanishes = ((by_scale < a.least * 2.0**60) & (q != 0.0)).any(axis=-1)[..., None]
    leaves = (scaled.max(axis=-1, initial=0.0) > a.most)[..., None]
    lost = (products > a.most) | (scale * products > a.most) | leaves | (special & vanishes)
    slack = np.where(special, 0.0, slack)
    slope = Expected(np.ones(()), np.zeros(()))
    if ask.softcap:
        cap = ask.softcap
        tanh, low, high = (np.tanh(x / cap) for x in (scores, scores - slack, scores + slack))
        off = finite(np.maximum(high - tanh, tanh - low))
        slope = Expected(1.0 - tanh**2, np.minimum(1.0, 2 * np.abs(tanh) * off + off**2) + 8 * a.eps)
        scores, slack = cap * tanh, cap * off + 8 * a.eps * cap * finite(np.abs(tanh)) + 2 * a.least * (cap + 1)
    steep, slopes = False, None
    if ask.slopes is not None:  # one of inf leaves the diagonal's key as it is, and no other
        slopes = ask.slopes[..., None, None]
        steep = np.isposinf(slopes) & (ask.distance != 0.0)
        slopes = -np.where(np.isposinf(slopes), 0.0, slopes) * ask.distance
    for edit in (slopes, ask.bias):
        if edit is not None:
            slack = slack + 2 * a.eps * (finite(np.abs(scores)) + finite(np.abs(edit)))
            scores = scores + edit
    lost |= np.isfinite(scores) & (np.abs(scores) > a.most)
    slack = np.where(lost, INF, slack)
    hidden = ~np.broadcast_to(ask.seen, scores.shape) | (np.isneginf(scores) & (slack < INF))
    hidden |= steep
    if ask.bias is not None:
        hidden |= np.isneginf(ask.bias)  # even if the score is nan
    scores = np.where(np.isneginf(scores), np.finfo(float).min, scores)  # nobody can say, but it is seen
    return np.where(hidden, -INF, scores), slack, slope


def answer(ask):
    """The definition of attention, and bounds of what rounding may make of it."""
    with np.errstate(all="ignore"):
        return _answer(ask)


def _answer(ask):
    a, v = ask.arithmetic, shared(ask.v, ask.q.shape[-3])
    scores, slack, slope = scores_of(ask)
    hidden = np.isneginf(scores)
    slack = np.where(hidden, 0.0, slack)
    ill = (slack == INF).any(axis=-1)
    sink = np.full(scores.shape[:-1], -INF)
    if ask.sinks is not None:
        sink = np.broadcast_to(ask.sinks[:, None], sink.shape)
    highest = np.maximum(scores.max(axis=-1, initial=-INF), sink)
    origin = np.where(np.isneginf(highest), 0.0, highest)
    raw = np.exp(scores - origin[..., None])
    raw_sink = np.where(np.isposinf(sink), 1.0, np.exp(sink - origin))
    total = raw.sum(axis=-1) + raw_sink
    weights = np.where(hidden, 0.0, raw / total[..., None])
    factor = np.broadcast_to(ask.keep * (0.0 if ask.dropout_p == 1.0 else 1.0 / (1.0 - ask.dropout_p)), weights.shape)
    seen, count = ~hidden, 16 + scores.shape[-1]
    kept = weights * factor
    out = masked_sum(kept, v, seen)
    lse = np.where(total == 0.0, -INF, origin + np.log(total))

    # One more key for the sink; a certain one is as good as one that no score comes near.
    everything = np.concatenate([scores, np.minimum(sink, np.finfo(float).max / 4)[..., None]], axis=-1)
    off = np.concatenate([np.where(slack == INF, 0.0, slack), np.zeros((*sink.shape, 1))], axis=-1)
    off += 2 * a.eps * np.where(np.isfinite(everything), np.abs(everything), 0.0)
    low, high = everything - off, everything + off
    top = share_of(high, log_sum_exp_of_others(low))
    bottom = share_of(low, log_sum_exp_of_others(high))
    spread = no_nan(np.maximum(top - bottom, 0.0))
    error = spread[..., :-1] + count * a.eps * weights
    size_of_v = np.abs(finite(v))
    out_error = masked_sum(no_nan(error * factor), size_of_v, seen)
    vanishing = np.where(seen, a.least * (1.0 + factor), 0.0)
    out_error = out_error + masked_sum(vanishing, size_of_v, seen) + a.least * count
    largest = np.ones_like(raw) if ask.in_parts else no_nan(raw)  # a part's highest score may be any of its own
    overflows = masked_sum(largest * factor, size_of_v, seen) > a.most
    # inf times a weight that may be zero or not
    slight = bottom[..., :-1] < a.least * 2.0**80
    doubtful = seen & slight if ask.in_parts else seen & slight & (top[..., :-1] > 0.0)
    overflows |= masked_sum(doubtful * 1.0, (~np.isfinite(v)) * 1.0, seen) > 0.0
    out_error = np.where(ill[..., None] | overflows, INF, no_nan(out_error))
    lse_error = finite(np.maximum(log_sum_exp(high) - lse, lse - log_sum_exp(low)))
    lse_error = np.where(ill, INF, lse_error + count * a.eps * (1.0 + finite(np.abs(lse))))
    if not ask.in_parts:
        lse_error = np.where(np.isfinite(lse) | ill, lse_error, 0.0)
    error = np.where(ill[..., None] & seen, INF, no_nan(error))
    sink_weight = Expected(raw_sink / total, np.where(ill, INF, spread[..., -1] + count * a.eps * raw_sink / total))
    return Answer(
        Expected(out, out_error), Expected(lse, lse_error), Expected(weights, error), sink_weight, hidden, slack, slope
    )


def computed_again(found):
    """The weights, where they are taken from scores computed once more and the lse that there was."""
    weights, error = found.weights
    with np.errstate(all="ignore"):
        more = weights * np.expm1(4 * found.slack + 2 * found.lse.tolerance[..., None])
        return Expected(weights, error + np.where(weights == 0.0, 0.0, more))


def gradients(ask, found, dout, dlse):
    """Of q, k, v, bias, slopes and sinks, in the shapes that they have in the question; bias in that of the scores."""
    with np.errstate(all="ignore"):
        return _gradients(ask, found, dout, dlse)


def _gradients(ask, found, dout, dlse):
    a, heads = ask.arithmetic, ask.q.shape[-3]
    k, v = shared(ask.k, heads), shared(ask.v, heads)
    hidden, seen = found.hidden, ~found.hidden
    weights, (out, out_error), lse = found.weights.value, found.out, found.lse.value
    dim, count = v.shape[-1] + 8, seen.shape[-1] + 8
    factor = ask.keep * (0.0 if ask.dropout_p == 1.0 else 1.0 / (1.0 - ask.dropout_p))
    error = computed_again(found).tolerance
    dweights = factor * (dout @ v.swapaxes(-1, -2))
    size = np.abs(dout) @ np.abs(v).swapaxes(-1, -2)
    dweights_error = factor * limit(a, size, dim * a.eps * size + a.least * dim)
    size = (np.abs(dout) * np.abs(out)).sum(axis=-1) + np.abs(dlse)
    delta = (dout * out).sum(axis=-1) - dlse
    delta_error = limit(a, size, (np.abs(dout) * (out_error + a.least)).sum(axis=-1) + dim * a.eps * size)
    nothing = np.isneginf(lse)
    delta, delta_error = (np.where(nothing, 0.0, x)[..., None] for x in (delta, delta_error))
    size = np.abs(dweights) + np.abs(delta)
    dscores = np.where(hidden, 0.0, weights * (dweights - delta))
    off = (error + 8 * a.eps * weights + 4 * a.least) * size + weights * (dweights_error + delta_error) + a.least
    dscores = Expected(dscores, np.where(hidden, 0.0, limit(a, size, off)))
    result = {"bias": dscores}
    if ask.slopes is not None:
        distance = np.broadcast_to(ask.distance, seen.shape)
        result["slopes"] = total_of(a, dscores.map(lambda x: x * distance), (-2, -1))
        result["slopes"] = Expected(-result["slopes"].value, result["slopes"].tolerance)
    if ask.sinks is not None:
        share, share_error = found.sink_weight
        value = np.where(nothing, 0.0, -share * delta[..., 0])
        off = share_error * np.abs(delta[..., 0]) + share * delta_error[..., 0] + 8 * a.eps * np.abs(value) + a.least
        result["sinks"] = total_of(a, Expected(value, np.where(nothing, 0.0, off)), (-1,))
    slope, slope_error = found.slope
    uncapped = np.where(hidden, 0.0, dscores.value * slope)
    off = dscores.tolerance * np.abs(slope) + np.abs(dscores.value) * slope_error + a.eps * np.abs(uncapped) + a.least
    off = np.where(hidden, 0.0, off)
    scaled = ask.scale * ask.q

    def product(weights, off, values, seen):
        size = masked_sum(np.abs(weights), np.abs(values), seen)
        slack = masked_sum(off + count * a.eps * np.abs(weights), np.abs(values), seen) + a.least * count
        slack = slack + 2 * a.least * np.where(seen, np.abs(weights), 0.0).sum(axis=-1)[..., None]
        return Expected(masked_sum(weights, values, seen), limit(a, size, slack))

    dq = product(uncapped, off, k, seen)
    result["q"] = Expected(ask.scale * dq.value, limit(a, np.abs(ask.scale * dq.value), abs(ask.scale) * dq.tolerance))
    result["q"] = result["q"]._replace(
        tolerance=result["q"].tolerance + 4 * a.eps * np.abs(result["q"].value) + a.least * (1 + np.abs(dq.value))
    )
    turned = seen.swapaxes(-1, -2)
    count = seen.shape[-2] + 8
    dk = product(uncapped.swapaxes(-1, -2), off.swapaxes(-1, -2), scaled, turned)
    kept, off = np.where(hidden, 0.0, weights * factor), np.where(hidden, 0.0, error * factor + a.least)
    dv = product(kept.swapaxes(-1, -2), off.swapaxes(-1, -2), dout, turned)
    for name, whole, heads_kv in (("k", dk, ask.k.shape[-3]), ("v", dv, ask.v.shape[-3])):
        groups = (heads_kv, heads // max(1, heads_kv))
        by_group = whole.map(lambda x, groups=groups: x.reshape(*x.shape[:-3], *groups, *x.shape[-2:]))
        result[name] = total_of(a, by_group, (-3,))
    return result


def limit(arithmetic, size, tolerance):
    """No tolerance is enough where sums of that size may overflow."""
    return np.where(size > arithmetic.most, INF, tolerance)


def total_of(arithmetic, terms, axes, keepdims=False):
    size = np.abs(terms.value).sum(axis=axes, keepdims=keepdims)
    tolerance = terms.tolerance.sum(axis=axes, keepdims=keepdims)
    count = 8 + int(np.prod([terms.value.shape[axis] for axis in axes]))
    tolerance = limit(arithmetic, size, tolerance + count * arithmetic.eps * size)
    return Expected(terms.value.sum(axis=axes, keepdims=keepdims), tolerance)


def summed_to(arithmetic, terms, shape):
    """The gradient of an operand from that of its broadcast."""
    extra = terms.value.ndim - len(shape)
    terms = total_of(arithmetic, terms, tuple(range(extra))) if extra > 0 else terms
    made = tuple(i for i, size in enumerate(shape) if size == 1 and terms.value.shape[i] != 1)
    return total_of(arithmetic, terms, made, keepdims=True) if made else terms


def turned(cos, sin, x, positions, interleaved):
    """Features of (..., heads, head_dim) rotated at positions (...), and by how much that may be off."""
    half = cos.shape[1]
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    c, s = (as_float64(table)[positions][..., None, :] for table in (cos, sin))
    value, tolerance = x.copy(), np.zeros(x.shape)
    with np.errstate(all="ignore"):
        a, b = x[..., first], x[..., second]
        value[..., first], value[..., second] = a * c - b * s, a * s + b * c
        tolerance[..., first] = 4e-16 * (np.abs(a * c) + np.abs(b * s))
        tolerance[..., second] = 4e-16 * (np.abs(a * s) + np.abs(b * c))
    return Expected(value, finite(tolerance))
