"""`linear_attention` and its gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Generic, Literal, NamedTuple, TypeAlias, overload

import numpy as np

from cupyattn.arrays import Arrays, enter, recorded, shapes
from cupyattn.linear.asked import Asked, read
from cupyattn.linear.chunks import by_chunks
from cupyattn.linear.gradients import gradients
from cupyattn.problem import A, Array, Spec
from cupyattn.reading import flag, refusal

Rule: TypeAlias = Literal["linear", "gated", "delta", "gated_delta"]


# fmt: off
@overload
def linear_attention(
    q: A, k: A, v: A, *, decay: Array | None = ..., beta: Array | None = ..., state: Array | None = ...,
    rule: Rule = ..., scale: float | None = ..., layout: Literal["bshd", "bhsd"] = ..., chunk_size: int | None = ...,
    return_state: Literal[False] = ...,
) -> A: ...
@overload
def linear_attention(
    q: A, k: A, v: A, *, decay: Array | None = ..., beta: Array | None = ..., state: Array | None = ...,
    rule: Rule = ..., scale: float | None = ..., layout: Literal["bshd", "bhsd"] = ..., chunk_size: int | None = ...,
    return_state: Literal[True],
) -> tuple[A, A]: ...
@overload
def linear_attention(
    q: A, k: A, v: A, *, decay: Array | None = ..., beta: Array | None = ..., state: Array | None = ...,
    rule: Rule = ..., scale: float | None = ..., layout: Literal["bshd", "bhsd"] = ..., chunk_size: int | None = ...,
    return_state: bool,
) -> A | tuple[A, A]: ...
# fmt: on
@recorded(
    shapes.of_linear,
    ("out", "state"),
    always={"return_state": True},
    finish=lambda asked, found: tuple(found) if asked["return_state"] else found[0],
)
def linear_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    decay: Array | None = None,
    beta: Array | None = None,
    state: Array | None = None,
    rule: Rule = "linear",
    scale: float | None = None,
    layout: Literal["bshd", "bhsd"] = "bshd",
    chunk_size: int | None = None,
    return_state: bool = False,
) -> Any:
    """Attention without a softmax: each token writes its value under its key into a matrix, and reads it by its query.

    This is not `attention` made faster, but another function: there are no weights that sum to one, no mask but the
    causal one, and the past is a state of fixed size, in which keys that are not orthogonal blur each other.  Models
    are trained for it (RetNet, GLA, DeltaNet, Gated DeltaNet and others), as those with a softmax are not.

    Parameters
    ----------
    q : array, shape (batch, seqlen, num_heads, head_dim)
        Queries, float16, bfloat16, float32 or float64.
    k, v : array, shapes (batch, seqlen, num_heads_kv, head_dim), (batch, seqlen, num_heads_kv, head_dim_v)
        Keys and values, of the library, device and dtype of `q`.  `num_heads_kv` divides `num_heads`; query head ``h``
        reads the state of key head ``h // (num_heads // num_heads_kv)``.  For "delta" and "gated_delta" keys should
        have a length of one; nothing here normalises them.
    decay : array, shape (batch, seqlen, num_heads_kv) or (batch, seqlen, num_heads_kv, head_dim), optional
        Natural logarithm of what is kept of the state before a token writes, so not positive as a rule; -inf forgets
        all.  Of "gated" and "gated_delta", and of no other.
    beta : array, shape (batch, seqlen, num_heads_kv) or (batch, seqlen, 1), optional
        How much of the error is corrected, from 0 to 1 as a rule.  Of "delta" and "gated_delta", and of no other.
    state : array, shape (batch, num_heads_kv, head_dim, head_dim_v), optional
        What earlier tokens left.  Default zeros.
    rule : {"linear", "gated", "delta", "gated_delta"}
        How a token changes the state ``S``; the outer product ``k v`` is (head_dim, head_dim_v)::

            linear       S = S + k v
            gated        S = exp(decay) S + k v
            delta        S = S + beta k (v - S.T k)
            gated_delta  S = exp(decay) S, then as delta

        and then ``out = scale * S.T q``: a token reads what it has written, too.
    scale : float, optional
        Default ``head_dim ** -0.5``.
    layout : {"bshd", "bhsd"}
        Order of the axes: as above, or with num_heads before seqlen, in all but `state`.
    chunk_size : int, optional
        Tokens that are computed at once, by matrix products; 1: token by token.  Results differ by the rounding of
        float64 sums alone.  Default 64, or 16 with a decay of each feature.
    return_state : bool
        Also return the state after the last token.

    Returns
    -------
    out : array, shape of `q` with head_dim_v for head_dim
        Library, device and dtype of `q`; float64 arithmetic, rounded once.
    state : array, shape (batch, num_heads_kv, head_dim, head_dim_v), only if `return_state`
        In the dtype of `state`, if that was given; else float32, or float64 if `q` is.

    Raises
    ------
    TypeError
        Not arrays, arrays of different libraries or dtypes, or of dtypes that cannot be computed with.
    ValueError
        Shapes do not fit, a rule without what it needs or with what it does not know, or a number out of its range.
    NotImplementedError
        Arrays on a GPU: there is no kernel for this.

    Notes
    -----
    ``4 * batch * seqlen * num_heads * head_dim * head_dim_v`` floating-point operations or so, half as many again with
    beta: O(N), where softmax attention takes O(N**2).  A decoding step takes as long after a million tokens as after
    one, and all that is kept of them is the state.  torch's autograd and JAX have gradients; for others there
    is `linear_attention_backward`.

    Rules, shapes and defaults are those of ONNX's LinearAttention, opset 27, but for the state's dtype, which there is
    that of `q`, and the rule, which there is "gated_delta" if nothing is said.

    References
    ----------
    .. [1] A. Katharopoulos et al., "Transformers are RNNs", 2020, arXiv:2006.16236, section 3.3.
    .. [2] S. Yang et al., "Gated Linear Attention Transformers", 2023, arXiv:2312.06635, section 4.
    .. [3] S. Yang et al., "Parallelizing Linear Transformers with the Delta Rule", 2024, arXiv:2406.06484, section 3.
    .. [4] S. Yang et al., "Gated Delta Networks", 2024, arXiv:2412.06464, section 3.

    Examples
    --------
    A prompt, and then a token that finds all that it needs in the state:

    >>> import numpy as np, cupyattn
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 9, 2, 4))
    >>> whole = cupyattn.linear_attention(q, k, v)
    >>> _, state = cupyattn.linear_attention(q[:, :8], k[:, :8], v[:, :8], return_state=True)
    >>> last = cupyattn.linear_attention(q[:, 8:], k[:, 8:], v[:, 8:], state=state)
    >>> bool(np.allclose(last, whole[:, 8:])), state.shape
    (True, (1, 2, 4, 4))

    The delta rule overwrites: what is written under a key is what is read by it.

    >>> k[:, 8] = k[:, 3] / np.linalg.norm(k[:, 3], axis=-1, keepdims=True)
    >>> out = cupyattn.linear_attention(k, k, v, beta=np.ones((1, 9, 2)), rule="delta", scale=1.0)
    >>> bool(np.allclose(out[:, 8], v[:, 8]))
    True
    """
    function = "linear_attention"
    flag(function, "return_state", return_state)
    given = {"q": q, "k": k, "v": v, "decay": decay, "beta": beta, "state": state}
    visit = enter(function, {word: (word, x) for word, x in given.items() if x is not None or word in ("q", "k", "v")})
    asked = read(function, dict(visit.specs), rule, layout, scale, chunk_size)

    def forward(operands: Arrays) -> Arrays:
        with np.errstate(all="ignore"):
            tokens = asked.tokens(operands)
            out = np.empty(tokens.out_shape())
            after = by_chunks(tokens, asked.state(operands), out, asked.chunk_size)
            return {"out": asked.home("out", out), "state": asked.home("state", after)}

    def backward(operands: Arrays, known: Arrays) -> Arrays:
        return _gradients(asked, operands, known["dout"], known.get("dstate"))

    results = asked.results if return_state else {"out": asked.results["out"]}
    found = visit.run(forward, backward, results)
    return (found["out"], found["state"]) if return_state else found["out"]


def _gradients(asked: Asked, operands: Arrays, dout: Array | None, dstate: Array | None) -> Arrays:
    with np.errstate(all="ignore"):
        tokens = asked.tokens(operands)
        rows = np.zeros(tokens.out_shape()) if dout is None else asked.in_groups(asked.heads_first(dout))
        last = asked.state({"dstate": dstate}, "dstate")
        return asked.gradients(*gradients(tokens, asked.state(operands), rows, last, asked.chunk_size))


class LinearGradients(NamedTuple, Generic[A]):
    """Gradients of `linear_attention`, each shaped like the argument it belongs to; None where that was not given."""

    dq: A
    dk: A
    dv: A
    ddecay: A | None = None
    dbeta: A | None = None
    dstate: A | None = None


@recorded(
    shapes.of_linear_gradients,
    (),
    has_gradients=False,
    finish=lambda asked, found: LinearGradients(*_in_their_places(asked, found)),
)
def linear_attention_backward(
    dout: A,
    q: A,
    k: A,
    v: A,
    *,
    dlast_state: Array | None = None,
    decay: Array | None = None,
    beta: Array | None = None,
    state: Array | None = None,
    rule: Rule = "linear",
    scale: float | None = None,
    layout: Literal["bshd", "bhsd"] = "bshd",
    chunk_size: int | None = None,
) -> LinearGradients[A]:
    """Gradients of `linear_attention`, given the gradient of its output.

    Parameters
    ----------
    dout : array, shape of out
        Gradient of the output, in the dtype of `q`.
    q, k, v : array
        As they were given to `linear_attention`; likewise all arguments not named here.
    dlast_state : array, shape (batch, num_heads_kv, head_dim, head_dim_v), optional
        Gradient of the state that was returned, in its dtype, if anything was made of it.

    Returns
    -------
    LinearGradients
        Named tuple (dq, dk, dv, ddecay, dbeta, dstate) in the library, dtype and shape of each argument; None for
        those not given.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `linear_attention`; also if `dout` or `dlast_state` do not have the shapes and dtypes above.

    Notes
    -----
    In chunks of `chunk_size` tokens, from the last to the first, by matrix products; 1: token by token.  About ``2 *
    sqrt(seqlen / chunk_size)`` states of each head are kept for it.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> q = k = v = np.ones((1, 3, 2, 4))
    >>> cupyattn.linear_attention_backward(np.ones_like(q), q, k, v).dv[0, :, 0, 0]
    array([6., 4., 2.])
    """
    function = "linear_attention_backward"
    given = {"q": q, "k": k, "v": v, "decay": decay, "beta": beta, "state": state}
    given |= {"dout": dout, "dlast_state": dlast_state}
    needed = ("q", "k", "v", "dout")
    visit = enter(function, {word: (word, x) for word, x in given.items() if x is not None or word in needed})
    specs = dict(visit.specs)
    own = {word: spec for word, spec in specs.items() if word not in ("dout", "dlast_state")}
    asked = read(function, own, rule, layout, scale, chunk_size)
    for word, spec in (("dout", asked.results["out"]), ("dlast_state", asked.results["state"])):
        if word in specs:
            _expect(function, specs[word], spec)

    def backward(operands: Arrays) -> Arrays:
        own_operands = {word: array for word, array in operands.items() if word in own}
        return _gradients(asked, own_operands, operands["dout"], operands.get("dlast_state"))

    found = visit.as_given(visit.run(backward, None, own))
    return LinearGradients(**{f"d{word}": gradient for word, gradient in found.items()})


def _in_their_places(asked: Mapping[str, Any], found: Sequence[Array]) -> list[Array | None]:
    """Gradients of what was given, among those of all that could have been."""
    rest = iter(found)
    return [None if asked[name] is None else next(rest) for name in ("q", "k", "v", "decay", "beta", "state")]


def _expect(function: str, spec: Spec, like: Spec) -> None:
    if spec.shape != like.shape:
        raise ValueError(refusal(function, f"{spec.name} has to have the shape {like.shape}", (spec.name, spec.shape)))
    if spec.dtype != like.dtype:
        raise TypeError(refusal(function, f"{spec.name} has to be {like.dtype}", (spec.name, spec.shape, spec.dtype)))
