"""Attention of many sequences that begin alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, overload

import array_api_compat

from cupyattn import reading
from cupyattn.arrays import enter, recorded, shapes
from cupyattn.parts import Part, answer_in_parts
from cupyattn.problem import A, Array, Shape
from cupyattn.reading import AXES, Options, refusal


# fmt: off
@overload
def cascade_attention(
    q: A, k_prefix: A, v_prefix: A, k: A, v: A, *, causal: bool = ..., softmax_scale: float | None = ...,
    softcap: float = ..., sinks: Array | None = ..., compute_dtype: Any = ...,
    return_lse: Literal[False] = ...,
) -> A: ...
@overload
def cascade_attention(
    q: A, k_prefix: A, v_prefix: A, k: A, v: A, *, causal: bool = ..., softmax_scale: float | None = ...,
    softcap: float = ..., sinks: Array | None = ..., compute_dtype: Any = ...,
    return_lse: Literal[True],
) -> tuple[A, A]: ...
@overload
def cascade_attention(
    q: A, k_prefix: A, v_prefix: A, k: A, v: A, *, causal: bool = ..., softmax_scale: float | None = ...,
    softcap: float = ..., sinks: Array | None = ..., compute_dtype: Any = ...,
    return_lse: bool,
) -> A | tuple[A, A]: ...
# fmt: on
@recorded(shapes.of_cascade, ("out", "lse"), always={"return_lse": True}, finish=shapes.with_lse, is_one_job=False)
def cascade_attention(
    q: Array,
    k_prefix: Array,
    v_prefix: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: Array | None = None,
    compute_dtype: Any = None,
    return_lse: bool = False,
) -> Any:
    """Attention of sequences that have their first tokens in common, which are read once for all of them.

    The same as `attention` over ``concatenate([k_prefix, k[i]])`` of each sequence ``i``, aligned bottom-right: the
    attention over the prefix of all rows of all sequences, and that over each sequence's own tokens, are merged as
    `merge_states` does it.

    Parameters
    ----------
    q : array, shape (batch, seqlen_q, num_heads, head_dim)
        Of the last seqlen_q tokens of each sequence, which are its own: seqlen_q <= seqlen_k if causal.
    k_prefix, v_prefix : array, shape (seqlen_prefix, num_heads_kv, head_dim)
        Of the tokens that the sequences share.
    k, v : array, shape (batch, seqlen_k, num_heads_kv, head_dim)
        Of each sequence's own tokens.
    causal : bool
        A query sees no token after its own.
    softmax_scale, softcap, sinks, compute_dtype, return_lse
        As for `attention`.

    Returns
    -------
    out : array, shape (batch, seqlen_q, num_heads, head_dim)
    lse : array, shape (batch, num_heads, seqlen_q), only if `return_lse`

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `attention`; also if there are more queries than own tokens.

    Notes
    -----
    On the CPU the parts are merged before the result is rounded, once.  On a GPU each part is rounded, merged in
    float32, and rounded again.  `PagedCache.attend` does this for the pages that its sequences share, if asked.

    References
    ----------
    .. [1] Z. Ye et al., "Cascade Inference: Memory Bandwidth Efficient Shared Prefix Batch Decoding", 2024,
       https://flashinfer.ai/2024/02/02/cascade-inference.html.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> prefix = np.ones((100, 2, 16))
    >>> own = np.ones((8, 3, 2, 16))
    >>> cupyattn.cascade_attention(own[:, -1:], prefix, prefix, own, own).shape
    (8, 1, 2, 16)
    """
    function = "cascade_attention"
    options = Options(
        causal=reading.flag(function, "causal", causal),
        softmax_scale=reading.softmax_scale(function, "softmax_scale", softmax_scale),
        softcap=reading.softcap(function, softcap),
        compute_dtype=reading.compute_dtype(function, compute_dtype),
        needs_lse=reading.flag(function, "return_lse", return_lse),
    )
    named = {"q": ("q", q), "k": ("k", k), "v": ("v", v), "sinks": ("sinks", sinks)}
    prefix = {"k_prefix": ("k_prefix", k_prefix), "v_prefix": ("v_prefix", v_prefix)}
    shapes = {word: spec.shape for word, spec in enter(function, {**named, **prefix}).specs}
    _check(function, shapes, options.causal)
    xp = array_api_compat.array_namespace(q)
    batch, rows, *rest = shapes["q"]
    common = Part(
        {
            "q": ("q", xp.reshape(q, (1, batch * rows, *rest))),
            "k": ("k_prefix", k_prefix[None, ...]),
            "v": ("v_prefix", v_prefix[None, ...]),
        },
        options._replace(causal=False),
    )
    found = answer_in_parts(function, [Part(named, options), common], needs_lse=options.needs_lse)
    return (found["out"], found["lse"]) if return_lse else found["out"]


def _check(function: str, shapes: Mapping[str, Shape], causal: bool) -> None:
    """Refuse arrays that are not of the same sequences, heads and tokens."""
    for word, rank, axes in (
        ("q", 4, AXES["bshd"]),
        ("k", 4, AXES["bshd"]),
        ("v", 4, AXES["bshd"]),
        ("k_prefix", 3, AXES["thd"]),
        ("v_prefix", 3, AXES["thd"]),
    ):
        if len(shapes[word]) != rank:
            raise ValueError(refusal(function, f"{word} has to have {rank} axes, {axes}", (word, shapes[word])))
    if shapes["q"][0] != shapes["k"][0] or shapes["q"][0] != shapes["v"][0]:
        rule = "q, k and v have to be of the same sequences"
        raise ValueError(refusal(function, rule, *((word, shapes[word]) for word in ("q", "k", "v"))))
    for word in ("k", "v"):
        prefix_word = f"{word}_prefix"
        if shapes[prefix_word][1:] != shapes[word][2:]:
            rule = f"{prefix_word} has to have the heads and the head_dim of {word}"
            raise ValueError(refusal(function, rule, (prefix_word, shapes[prefix_word]), (word, shapes[word])))
    if shapes["k_prefix"][0] != shapes["v_prefix"][0]:
        rule = "k_prefix and v_prefix have to hold the same tokens"
        raise ValueError(refusal(function, rule, *((word, shapes[word]) for word in ("k_prefix", "v_prefix"))))
    if causal and shapes["q"][1] > shapes["k"][1]:
        rule = "there have to be at least as many own tokens as queries, seqlen_q <= seqlen_k"
        raise ValueError(refusal(function, rule, ("q", shapes["q"]), ("k", shapes["k"])))
