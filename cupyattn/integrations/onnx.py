"""ONNX's operator Attention (opset 23, 24 and 25) as a function, under its own names and defaults.

For who runs ONNX graphs in NumPy, or brings one to another library; the package onnx is not needed.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import array_api_compat
import numpy as np

from cupyattn import api, reading
from cupyattn.arrays import Visit, enter, recorded, shapes
from cupyattn.problem import FLOATS, Alignment, Array, Spec
from cupyattn.reading import refusal

FUNCTION = "onnx.attention"
PRECISIONS = {1: "float", 10: "float16", 11: "double", 16: "bfloat16"}
"""Of TensorProto, by the numbers in which softmax_precision is said."""


class Outputs(NamedTuple):
    """The operator's outputs, in its order."""

    Y: Array
    present_key: Array
    present_value: Array
    qk_matmul_output: Array | None
    """None unless a `qk_matmul_output_mode` was given."""


@recorded(
    shapes.of_onnx,
    ("Y", "present_key", "present_value", "qk_matmul_output"),
    finish=lambda asked, found: Outputs(
        found[0], found[1], found[2], None if asked["qk_matmul_output_mode"] is None else found[3]
    ),
    is_one_job=False,
    smooth=4,
    casts_inside=True,
    title="onnx_attention",
)
def attention(
    Q: Array,
    K: Array,
    V: Array,
    attn_mask: Array | None = None,
    past_key: Array | None = None,
    past_value: Array | None = None,
    nonpad_kv_seqlen: Array | None = None,
    *,
    is_causal: int | bool = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int | None = None,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
) -> Outputs:
    """ONNX's Attention: inputs in its order, attributes by its names.

    Parameters
    ----------
    Q : array, shape (batch, q_num_heads, seqlen_q, head_dim) or (batch, seqlen_q, q_num_heads * head_dim)
        float16, bfloat16, float32 or float64.
    K, V : array, shapes (batch, kv_num_heads, seqlen_kv, head_dim), (batch, kv_num_heads, seqlen_kv, head_dim_v)
        Or with heads side by side, as `Q`.  Of its library, device and dtype.
    attn_mask : array, optional
        bool, True where a key takes part, or floating, added to the scores; broadcasts to (batch, q_num_heads,
        seqlen_q, total), where total counts past keys, too.  If its last axis is shorter the keys behind it are hidden.
    past_key, past_value : array, shapes (batch, kv_num_heads, past, head_dim), (batch, kv_num_heads, past, head_dim_v)
        Keys and values before `K` and `V`.
    nonpad_kv_seqlen : array of int64 or int32, shape (batch,), optional
        Of opset 24: how many keys of each sequence there are; those behind are hidden.  Not together with past keys.
    is_causal : {0, 1}
        Query ``i`` sees key ``j`` where ``j <= i + offset``: the number of past keys, ``nonpad_kv_seqlen - seqlen_q``,
        or 0 if neither is given, even where there are more keys than queries.
    kv_num_heads, q_num_heads : int, optional
        Needed if heads are side by side.
    left_window_size, right_window_size : int
        Of opset 25: keys seen before and after that diagonal, inclusive; -1: no limit.
    qk_matmul_output_mode : {0, 1, 2, 3}, optional
        What the fourth output is: scores as they are, after softcap, after masks, or weights.  The operator's default
        is 0; here nothing is computed unless it is asked for, since it takes memory of seqlen_q * total.
    scale : float, optional
        Of the scores; default ``head_dim ** -0.5``.
    softcap : float
        If not 0, scores become ``softcap * tanh(score / softcap)`` before masks.
    softmax_precision : int, optional
        1 (float), 10 (float16), 11 (double) or 16 (bfloat16).  What is computed is not less precise: float64 on the
        CPU; double is refused on a GPU, where it is float32.

    Returns
    -------
    Outputs
        Named tuple (Y, present_key, present_value, qk_matmul_output).  `Y` has the axes of `Q`; the present is past and
        new, (batch, kv_num_heads, total, head_dim).  A query that sees no key has a Y of 0, and weights of 0.

    Raises
    ------
    TypeError
        Not arrays, arrays of different libraries or dtypes.
    ValueError
        Shapes do not fit, an attribute is out of its range, or heads that have to be said are not.

    References
    ----------
    .. [1] https://onnx.ai/onnx/operators/onnx__Attention.html

    Examples
    --------
    >>> import numpy as np
    >>> from cupyattn.integrations import onnx
    >>> Q = np.ones((1, 3, 4 * 8), np.float32)  # four heads of 8, side by side
    >>> K = V = np.ones((1, 3, 2 * 8), np.float32)
    >>> outputs = onnx.attention(Q, K, V, is_causal=1, q_num_heads=4, kv_num_heads=2, qk_matmul_output_mode=3)
    >>> outputs.Y.shape, outputs.present_key.shape
    ((1, 3, 32), (1, 2, 3, 8))
    >>> outputs.qk_matmul_output[0, 0]
    array([[1.        , 0.        , 0.        ],
           [0.5       , 0.5       , 0.        ],
           [0.33333334, 0.33333334, 0.33333334]], dtype=float32)
    """
    causal = _flag("is_causal", is_causal)
    window = _side("left_window_size", left_window_size), _side("right_window_size", right_window_size)
    scale = reading.softmax_scale(FUNCTION, "scale", scale)
    softcap = reading.softcap(FUNCTION, softcap)
    precision = _one_of("softmax_precision", softmax_precision, tuple(PRECISIONS))
    mode = _one_of("qk_matmul_output_mode", qk_matmul_output_mode, (0, 1, 2, 3))
    given = {"Q": Q, "K": K, "V": V, "attn_mask": attn_mask, "past_key": past_key, "past_value": past_value}
    given["nonpad_kv_seqlen"] = nonpad_kv_seqlen
    heads = {"Q": q_num_heads, "K": kv_num_heads, "V": kv_num_heads}
    visit = enter(FUNCTION, {word: (word, x) for word, x in given.items() if x is not None or word in heads})
    q, k, v = (_heads_first(visit, word, count) for word, count in heads.items())
    _check(visit, {"Q": q.shape, "K": k.shape, "V": v.shape})
    xp = array_api_compat.array_namespace(q)
    if past_key is not None:
        k, v = (xp.concat([visit.arrays[f"past_{word}"], x], axis=2) for word, x in (("key", k), ("value", v)))
    hidden = _hidden(visit, xp, q, k, causal, window)
    out = api.attention(
        q, k, v, layout="bhsd", causal=hidden.causal, alignment=hidden.alignment, window_size=hidden.window,
        mask=hidden.mask, bias=hidden.bias, softmax_scale=scale, softcap=softcap,
        compute_dtype="float64" if precision == 11 else None,
    )  # fmt: skip
    if len(visit.arrays["Q"].shape) == 3:
        out = xp.permute_dims(out, (0, 2, 1, 3))
        out = xp.reshape(out, (out.shape[0], out.shape[1], out.shape[2] * out.shape[3]))
    if mode is None:
        return Outputs(out, k, v, None)
    seen = _hidden(visit, xp, q, k, causal, window, written_out=True)
    scale = max(1, q.shape[-1]) ** -0.5 if scale is None else scale
    return Outputs(out, k, v, _scores(visit, xp, q, k, seen, scale, softcap, mode))


class Hidden(NamedTuple):
    """Which keys are seen, as `cupyattn.attention` is told."""

    causal: bool
    alignment: Alignment | None
    window: tuple[int | None, int | None]
    mask: Array | None
    bias: Array | None


def _hidden(
    visit: Visit,
    xp: Any,
    q: Array,
    k: Array,
    causal: bool,
    window: tuple[int | None, int | None],
    written_out: bool = False,
) -> Hidden:
    """As arguments as far as there are such, the rest in a mask; all of it in a mask if `written_out`."""
    rows, keys, library = q.shape[2], k.shape[2], visit.library
    mask = bias = None
    if "attn_mask" in visit.arrays:
        said = visit.arrays["attn_mask"]
        if said.shape and said.shape[-1] < keys:
            behind = library.zeros((*said.shape[:-1], keys - said.shape[-1]), said)
            is_bool = library.dtype(said) == "bool"
            said = xp.concat([said, behind if is_bool else xp.full_like(behind, -np.inf)], axis=-1)
        mask, bias = (said, None) if library.dtype(said) == "bool" else (None, said)
    has_diagonal = causal or window != (None, None)
    offset: Any = visit.arrays["past_key"].shape[2] if "past_key" in visit.arrays else 0
    here = library.index(np.arange(keys), q)
    more = []
    if "nonpad_kv_seqlen" in visit.arrays:
        lengths = xp.reshape(visit.arrays["nonpad_kv_seqlen"], (-1, 1, 1, 1))
        more.append(here < lengths)
        offset = lengths - rows
    is_plain = "nonpad_kv_seqlen" not in visit.arrays and offset in (0, keys - rows) and not written_out
    if has_diagonal and not is_plain:
        diagonal = library.index(np.arange(rows)[:, None], q) + offset
        left, right = window[0], 0 if causal else window[1]
        right = min(0, window[1]) if causal and window[1] is not None else right
        more += [] if right is None else [here <= diagonal + right]
        more += [] if left is None else [here >= diagonal - left]
    for shown in more:
        mask = shown if mask is None else xp.logical_and(mask, shown)
    if not (has_diagonal and is_plain):
        return Hidden(False, None, (None, None), mask, bias)
    return Hidden(causal, "top-left" if offset == 0 else "bottom-right", window, mask, bias)


def _scores(visit: Visit, xp: Any, q: Array, k: Array, seen: Hidden, scale: float, softcap: float, mode: int) -> Array:
    """The fourth output, in the library's own operations, so that it has gradients as all of these have."""
    batch, heads, rows, head_dim = q.shape
    wide = xp.float32 if visit.library.index_dtype() == "int32" else xp.float64
    grouped = xp.reshape(xp.astype(q, wide), (batch, k.shape[1], heads // k.shape[1], rows, head_dim))
    scores = grouped @ xp.expand_dims(xp.matrix_transpose(xp.astype(k, wide)), axis=2)
    scores = xp.reshape(scores, (batch, heads, rows, k.shape[2])) * scale
    if mode > 0 and softcap:
        scores = softcap * xp.tanh(scores / softcap)
    if mode > 1:
        if seen.bias is not None:
            scores = scores + xp.astype(seen.bias, wide)
        if seen.mask is not None:
            scores = xp.where(seen.mask, scores, xp.full_like(scores, -np.inf))
    if mode > 2 and k.shape[2]:
        largest = xp.max(scores, axis=-1, keepdims=True)
        weights = xp.exp(scores - xp.where(xp.isinf(largest), xp.zeros_like(largest), largest))
        total = xp.sum(weights, axis=-1, keepdims=True)
        scores = weights / xp.where(total == 0, xp.ones_like(total), total)
    return xp.astype(scores, q.dtype)


def _heads_first(visit: Visit, word: str, heads: int | None) -> Array:
    """(batch, heads, seqlen, head_dim), from this or from heads side by side."""
    array, spec = visit.arrays[word], dict(visit.specs)[word]
    count = "q_num_heads" if word == "Q" else "kv_num_heads"
    heads = None if heads is None else reading.integer(FUNCTION, count, heads, low=1)
    if len(spec.shape) == 4:
        if heads is not None and spec.shape[1] != heads:
            rule = f"{count} is not the number of heads of {spec.name}, the second of its four axes"
            raise ValueError(refusal(FUNCTION, rule, (count, heads), (spec.name, spec.shape)))
        return array
    if len(spec.shape) != 3:
        rule = f"{spec.name} has to be (batch, heads, seqlen, head_dim) or (batch, seqlen, heads * head_dim)"
        raise ValueError(refusal(FUNCTION, rule, (spec.name, spec.shape)))
    if heads is None:
        rule = f"{spec.name} of three axes has heads side by side, and {count} has to say how many"
        raise ValueError(refusal(FUNCTION, rule, (count, None), (spec.name, spec.shape)))
    batch, seqlen, features = spec.shape
    if features % heads:
        raise ValueError(
            refusal(FUNCTION, f"{count} has to divide {spec.name}", (count, heads), (spec.name, spec.shape))
        )
    xp = array_api_compat.array_namespace(array)
    return xp.permute_dims(xp.reshape(array, (batch, seqlen, heads, features // heads)), (0, 2, 1, 3))


def _check(visit: Visit, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """What shapes and dtypes can say, of Q, K and V with heads first."""
    specs = dict(visit.specs)
    q, k, v = (shapes[word] for word in ("Q", "K", "V"))
    operands = [specs[word] for word in ("Q", "K", "V", "past_key", "past_value") if word in specs]
    shown = tuple((spec.name, spec.shape, spec.dtype) for spec in operands)
    if operands[0].dtype not in FLOATS or len({spec.dtype for spec in operands}) > 1:
        raise TypeError(refusal(FUNCTION, f"Q, K, V and the past have to be of one dtype, {', '.join(FLOATS)}", *shown))
    if k[:3] != v[:3] or q[0] != k[0] or q[3] != k[3]:
        rule = "Q, K and V have to have one batch, Q and K one head_dim, and K and V the same heads and length"
        raise ValueError(refusal(FUNCTION, rule, *shown))
    if k[1] == 0 or q[1] % k[1]:
        rule = f"q_num_heads = {q[1]} has to be a multiple of kv_num_heads = {k[1]}"
        raise ValueError(refusal(FUNCTION, rule, *shown))
    past = 0
    if ("past_key" in specs) != ("past_value" in specs):
        raise ValueError(refusal(FUNCTION, "past_key and past_value have to come together", *shown))
    if "past_key" in specs:
        past = specs["past_key"].shape[2] if len(specs["past_key"].shape) == 4 else -1
        for word, own in (("past_key", k), ("past_value", v)):
            if specs[word].shape != (*own[:2], past, own[3]):
                rule = f"{word} has to be {(*own[:2], 'past', own[3])}"
                raise ValueError(refusal(FUNCTION, rule, *shown))
    _check_mask(specs, (*q[:3], past + k[2]))
    _check_lengths(visit, specs, k)


def _check_mask(specs: Mapping[str, Spec], scores: tuple[int, ...]) -> None:
    spec = specs.get("attn_mask")
    if spec is None:
        return
    if spec.dtype != "bool" and spec.dtype not in FLOATS:
        rule = f"attn_mask has to be bool, or one of {', '.join(FLOATS)}"
        raise TypeError(refusal(FUNCTION, rule, (spec.name, spec.shape, spec.dtype)))
    whole = (*spec.shape[:-1], scores[-1]) if spec.shape and spec.shape[-1] < scores[-1] else spec.shape
    try:
        fits = np.broadcast_shapes(whole, scores) == scores
    except ValueError:
        fits = False
    if not fits:
        rule = "attn_mask has to broadcast to (batch, q_num_heads, seqlen_q, total), its last axis may be shorter"
        raise ValueError(refusal(FUNCTION, rule, (spec.name, spec.shape), ("scores", scores)))


def _check_lengths(visit: Visit, specs: Mapping[str, Spec], k: tuple[int, ...]) -> None:
    spec = specs.get("nonpad_kv_seqlen")
    if spec is None:
        return
    if "past_key" in specs:
        rule = "nonpad_kv_seqlen is for caches outside of the graph, and does not go together with past_key"
        raise ValueError(refusal(FUNCTION, rule, *((x.name, x.shape) for x in (spec, specs["past_key"]))))
    if spec.dtype not in ("int32", "int64"):
        raise TypeError(refusal(FUNCTION, f"{spec.name} has to be int64 or int32", (spec.name, spec.shape, spec.dtype)))
    if spec.shape != (k[0],):
        rule = f"{spec.name} has to hold one length per sequence, ({k[0]},)"
        raise ValueError(refusal(FUNCTION, rule, (spec.name, spec.shape)))
    lengths = {spec.name: visit.arrays["nonpad_kv_seqlen"]}
    if visit.kind == "cpu" and not visit.library.is_deferred(lengths):
        values = np.asarray(visit.library.values(lengths[spec.name]))
        if values.size and (values.min() < 0 or values.max() > k[2]):
            rule = f"{spec.name} has to be from 0 to {k[2]}, the keys of K"
            raise ValueError(refusal(FUNCTION, rule, (spec.name, reading.short(values.tolist()))))


def _flag(name: str, value: Any) -> bool:
    """An attribute of ONNX that is 0 or 1; or a bool of Python."""
    return value if isinstance(value, bool) else bool(reading.integer(FUNCTION, name, value, low=0, high=1))


def _side(name: str, value: Any) -> int | None:
    size = reading.integer(FUNCTION, name, value, low=-1)
    return None if size == -1 else size


def _one_of(name: str, value: Any, allowed: tuple[int, ...]) -> int | None:
    if value is None:
        return None
    number = reading.integer(FUNCTION, name, value, low=0)
    if number not in allowed:
        rule = f"{name} has to be one of {', '.join(map(str, allowed))}"
        raise ValueError(refusal(FUNCTION, rule, (name, reprlib.repr(value))))
    return number
