"""cupyattn's own functions: `attention` and its gradients."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Generic, Literal, NamedTuple, overload

from cupyattn import reading
from cupyattn.allowed import allowed_by
from cupyattn.arrays import destinations_of, enter, recorded, shapes
from cupyattn.corridor import answer, answer_with_gradients, under_our_names
from cupyattn.problem import A, Alignment, Array, Implementation
from cupyattn.reading import attention_options, expect, read, refusal
from cupyattn.repeating import repeated


# fmt: off
@overload
def attention(
    q: A, k: A, v: A, *, layout: Literal["bshd", "bhsd"] = ..., causal: bool = ..., alignment: Alignment | None = ...,
    window_size: tuple[int | None, int | None] = ..., mask: Array | None = ..., bias: Array | None = ...,
    softmax_scale: float | None = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    sinks: Array | None = ..., q_descale: Array | None = ..., k_descale: Array | None = ...,
    v_descale: Array | None = ..., seqlens_q: Array | None = ..., seqlens_k: Array | None = ...,
    dropout_p: float = ..., dropout_seed: int | None = ..., compute_dtype: Any = ...,
    fixed_split_size: int | None = ..., implementation: Implementation | Collection[Implementation] | None = ...,
    return_lse: Literal[False] = ..., out: A | None = ..., lse_out: A | None = ...,
) -> A: ...
@overload
def attention(
    q: A, k: A, v: A, *, layout: Literal["bshd", "bhsd"] = ..., causal: bool = ..., alignment: Alignment | None = ...,
    window_size: tuple[int | None, int | None] = ..., mask: Array | None = ..., bias: Array | None = ...,
    softmax_scale: float | None = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    sinks: Array | None = ..., q_descale: Array | None = ..., k_descale: Array | None = ...,
    v_descale: Array | None = ..., seqlens_q: Array | None = ..., seqlens_k: Array | None = ...,
    dropout_p: float = ..., dropout_seed: int | None = ..., compute_dtype: Any = ...,
    fixed_split_size: int | None = ..., implementation: Implementation | Collection[Implementation] | None = ...,
    return_lse: Literal[True], out: A | None = ..., lse_out: A | None = ...,
) -> tuple[A, A]: ...
@overload
def attention(
    q: A, k: A, v: A, *, layout: Literal["bshd", "bhsd"] = ..., causal: bool = ..., alignment: Alignment | None = ...,
    window_size: tuple[int | None, int | None] = ..., mask: Array | None = ..., bias: Array | None = ...,
    softmax_scale: float | None = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    sinks: Array | None = ..., q_descale: Array | None = ..., k_descale: Array | None = ...,
    v_descale: Array | None = ..., seqlens_q: Array | None = ..., seqlens_k: Array | None = ...,
    dropout_p: float = ..., dropout_seed: int | None = ..., compute_dtype: Any = ...,
    fixed_split_size: int | None = ..., implementation: Implementation | Collection[Implementation] | None = ...,
    return_lse: bool, out: A | None = ..., lse_out: A | None = ...,
) -> A | tuple[A, A]: ...
# fmt: on
@recorded(
    shapes.of_attention,
    ("out", "lse"),
    always={"return_lse": True},
    destinations=("out", "lse_out"),
    finish=shapes.with_lse,
)
@repeated()
def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    layout: Literal["bshd", "bhsd"] = "bshd",
    causal: bool = False,
    alignment: Alignment | None = None,
    window_size: tuple[int | None, int | None] = (None, None),
    mask: Array | None = None,
    bias: Array | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    q_descale: Array | None = None,
    k_descale: Array | None = None,
    v_descale: Array | None = None,
    seqlens_q: Array | None = None,
    seqlens_k: Array | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    compute_dtype: Any = None,
    fixed_split_size: int | None = None,
    implementation: Implementation | Collection[Implementation] | None = None,
    return_lse: bool = False,
    out: Array | None = None,
    lse_out: Array | None = None,
) -> Any:
    """Exact softmax attention, ``softmax(softmax_scale * q @ k.T) @ v`` for every head, and its variations.

    Parameters
    ----------
    q : array, shape (batch, seqlen_q, num_heads, head_dim)
        Queries, float16, bfloat16, float32, float64 or float8_e4m3fn; any strides.
    k, v : array, shapes (batch, seqlen_k, num_heads_kv, head_dim), (batch, seqlen_k, num_heads_kv, head_dim_v)
        Keys and values, of the library, device and dtype of `q`.  `num_heads_kv` divides `num_heads`;
        query head ``h`` uses key head ``h // (num_heads // num_heads_kv)``.  k and v may differ in
        their numbers of heads.  A batch of one serves all of q's.
    layout : {"bshd", "bhsd"}
        Order of the axes: as above, or (batch, num_heads, seqlen, head_dim).
    causal : bool
        A query sees no key after its diagonal.
    alignment : {"top-left", "bottom-right"}, optional
        Where the diagonal lies, for `causal`, `window_size` and `alibi_slopes`: row ``i`` has key ``i``
        on it (torch's rule), or key ``i + seqlen_k - seqlen_q`` (flash-attn's).  With two queries and
        five keys, causal::

            top-left       bottom-right
            1 0 0 0 0      1 1 1 1 0
            1 1 0 0 0      1 1 1 1 1

        Has to be chosen where the lengths differ; says nothing where they are equal.
    window_size : (left, right)
        Keys seen before and after the diagonal, both inclusive; None or -1: no limit.
    mask : array of bool, optional
        True where a key may be seen; broadcasts to (batch, num_heads, seqlen_q, seqlen_k) in either
        layout.  Holds together with `causal` and `window_size`.  Like all that goes with q, k and v it may
        be NumPy's beside another library's, and is copied to their device.
    bias : array, optional
        Added to the scores; broadcasts like `mask`.  A key with bias -inf is not seen.
    softmax_scale : float, optional
        Multiplies ``q @ k.T``; finite.  Default ``head_dim ** -0.5``.  As every number, it may be an array of shape ()
        of any library, but not one that is traced or requires grad.
    softcap : float
        If not 0, scores become ``softcap * tanh(score / softcap)``, before ALiBi and bias.
    alibi_slopes : array, shape (num_heads,) or (batch, num_heads), optional
        ``-slope * |diagonal - key|`` is added to the scores.  One of inf leaves the key on the diagonal alone, if it
        is seen; on a GPU results of its head may be nan.
    sinks : array, shape (num_heads,), optional
        A logit per head that joins the softmax's denominator and has no value.  One of +inf has all the weight: out
        is 0 and lse +inf, of queries that see no key too.
    q_descale, k_descale, v_descale : array of float32, optional
        Factors of q, k and v in float8_e4m3fn, and of no other dtype; they broadcast to (batch, num_heads_kv).
        Those of q go by the key head that a query head uses.  Default 1.  Where a factor of q times one of k is
        negative, results on a GPU are nan.
    seqlens_q, seqlens_k : array of int32, shape (batch,), optional
        How many rows, and keys, of each sequence there are: the others are as if they were not there, whatever they
        hold.  Such rows give out 0 and lse -inf, and have no part in any gradient; the diagonal that is aligned
        bottom-right ends at the last key and row that there are, as with flash-attn 3's seqused, and `alignment` has to
        be chosen where there is a diagonal.  JAX's query_seq_lengths and key_value_seq_lengths.  Not with `mask`,
        `bias`, `dropout_p` or a batch of one that serves all.  On a GPU nobody waits for them: they are cut to what
        there is.  Default: all.
    dropout_p : float
        Probability with which a weight is dropped; the others grow by ``1 / (1 - dropout_p)``.
    dropout_seed : int, optional
        Decides which, from 0 to 2**64 - 1: the same on every device (Philox 4x32-10, counted by batch,
        head, row and key).  Default: torch's generator for torch, fresh entropy for others.  Under
        jax.jit a Python int, fixed when it traces.
    compute_dtype : {"float64", "float32"}, optional
        Of the arithmetic on the CPU.  Default float64, rounded once to the dtype of `q`.
    fixed_split_size : int, optional
        Where few queries on a GPU have their keys split, do it every so many (rounded up to whole blocks), so
        that a sequence's result is the same to the last bit whatever else is in the batch.  Default: as many
        splits as fill the GPU.  More queries than one tile of a kernel has are then not split, and nothing else
        splits keys, so that elsewhere this has nothing to do.
    implementation : str or tuple of str, optional
        The only ones that may be taken, of "numpy", "splitkv", "hopper" and "flash"; what `explain` calls
        `Plan.kernel`.  Default: what `implementations` allows around the call, which says what gradients make of it.
    return_lse : bool
        Also return the log-sum-exp of the scores.
    out, lse_out : array, optional
        Memory for the results, which is then what is returned: of their shapes and dtypes, of the library and device
        of `q`, writable, apart from each other and from all that is read.  Written to once all is computed; by the
        kernel itself on a GPU, if it is contiguous and starts at a multiple of 16 bytes, and there are no seqlens.  Not
        for JAX and dask, whose arrays are immutable, nor where gradients may be asked for.

    Returns
    -------
    out : array, shape of `q` with head_dim_v for head_dim
        Library, device and dtype of `q`; bfloat16 if that is float8_e4m3fn.  A query that sees no key gives zeros.
    lse : array, shape (batch, num_heads, seqlen_q), only if `return_lse`
        Natural logarithm of the softmax's denominator; float32, or float64 if `q` is.  -inf for a
        query that sees no key (and has no sink).

    Raises
    ------
    TypeError
        Not arrays, arrays of different libraries or dtypes, or of dtypes that cannot be computed with.
    ValueError
        Shapes do not fit, a number is out of its range, arrays are on different devices, or
        `alignment` is needed and was not chosen.
    NotImplementedError
        No implementation takes the problem on this device; the message lists each one's reasons.
    ImportError, RuntimeError
        The arrays are on a GPU, and CuPy or the driver is missing.

    Warns
    -----
    UserWarning
        Heads and sequence look exchanged: more heads than any model has, and not more positions than a model has heads.

    Notes
    -----
    Keys that are not seen never reach the result, even if they hold nan.

    Under torch.autocast q, k, v and `bias` are cast as torch's own function casts them: to its dtype, unless they are
    float64 (or float8).  Gradients come back in the dtypes of the arguments.

    Where torch makes a graph (torch.compile, torch.export, make_fx, torch.jit.trace), or its tensors have no values (on
    the meta device, FakeTensor), the call is one operator, ``torch.ops.cupyattn.attention``, with the same results and
    gradients to the last bit; `cupyattn.integrations.torch` has its rules.  What shapes rule out is refused there and
    then, all else where the graph runs.  `implementations` counts where it runs.

    torch's autograd keeps lse and a copy of out, or out itself if lse is asked for, where neither has been rounded.

    Under torch.func.vmap(randomness="different") each call has a dropout of its own, unless there is a `dropout_seed`.

    float8_e4m3fn has no gradients.  On the CPU its numbers are taken as they are: nothing is rounded to 8 bits.

    On a GPU scores and sums are float32, weights are rounded to the dtype of `v` (of float8_e4m3fn to float16 by the
    split-KV kernel), and numbers under 2**-126 are zero.  Hopper's sums of float8_e4m3fn products have 13 bits behind
    the point: scores, and a result's share of each block of keys.  float32 operands enter the products as exact sums
    of three bfloat16 numbers, of whose nine products the three smallest are left out: results are within 2e-6 of the
    largest value, by the emulator.
    Gradients are float32 sums there, the same bits in every run.

    ``4 * batch * num_heads * seqlen_q * seqlen_k * head_dim`` floating-point operations, about half of it
    if causal; memory grows with seqlen_q + seqlen_k.

    References
    ----------
    .. [1] T. Dao, "FlashAttention-2", 2023, arXiv:2307.08691, algorithm 1.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> q = k = v = np.ones((1, 3, 2, 4), np.float32)
    >>> cupyattn.attention(q, k, v, causal=True).shape
    (1, 3, 2, 4)
    >>> out = np.empty_like(q)
    >>> cupyattn.attention(q, k, v, causal=True, out=out) is out
    True
    """
    function = "attention"
    options = attention_options(
        function, layout, causal, alignment, window_size, softmax_scale, softcap, dropout_p, compute_dtype, return_lse,
        takes_float8=True,
    )  # fmt: skip
    arrays = under_our_names(q=q, k=k, v=v, mask=mask, bias=bias, alibi_slopes=alibi_slopes, sinks=sinks)
    if not (seqlens_q is seqlens_k is None):
        arrays |= under_our_names(seqlens_q=seqlens_q, seqlens_k=seqlens_k)
    if not (q_descale is k_descale is v_descale is None):
        arrays |= {name: (name, x) for name, x in zip(reading.DESCALES, (q_descale, k_descale, v_descale), strict=True)}
    seed, size = reading.dropout_seed(function, dropout_seed), reading.split_size(function, fixed_split_size)
    allowed, into = allowed_by(function, implementation), destinations_of(function, out, lse_out, options.needs_lse)
    found = answer(function, arrays, options, seed, size, allowed, into)
    return (found["out"], found["lse"]) if options.needs_lse else found["out"]


class Gradients(NamedTuple, Generic[A]):
    """Gradients of `attention`, each shaped like the argument it belongs to; None where that was not given."""

    dq: A
    dk: A
    dv: A
    dbias: A | None = None
    dsinks: A | None = None
    dalibi_slopes: A | None = None


@recorded(
    shapes.of_gradients, (), has_gradients=False, finish=lambda asked, found: Gradients(*_in_their_places(asked, found))
)
def attention_backward(
    dout: A,
    q: A,
    k: A,
    v: A,
    *,
    out: A | None = None,
    lse: A | None = None,
    dlse: A | None = None,
    layout: Literal["bshd", "bhsd"] = "bshd",
    causal: bool = False,
    alignment: Alignment | None = None,
    window_size: tuple[int | None, int | None] = (None, None),
    mask: Array | None = None,
    bias: Array | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    seqlens_q: Array | None = None,
    seqlens_k: Array | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    compute_dtype: Any = None,
    implementation: Implementation | Collection[Implementation] | None = None,
) -> Gradients[A]:
    """Gradients of `attention`, given the gradient of its output.

    Parameters
    ----------
    dout : array, shape of out
        Gradient of the output.
    q, k, v : array
        As they were given to `attention`; likewise all arguments not named here.
    out, lse : array, optional
        What `attention` returned.  Both save computing them again, and are used where they are in the
        compute dtype, so that nothing was lost by rounding; otherwise they are computed again.
    dlse : array, shape of lse, optional
        Gradient of the log-sum-exp, if anything was made of it.
    dropout_seed : int
        Needed if `dropout_p` > 0: the seed of the forward pass.

    Returns
    -------
    Gradients
        Named tuple (dq, dk, dv, dbias, dsinks, dalibi_slopes) in the library, dtype and shape of each
        argument; None for those not given.  Queries that see no key have gradients of zero.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `attention`; also if `dout`, `out`, `lse` or `dlse` do not have the shapes above, or q, k and v are
        float8_e4m3fn.

    References
    ----------
    .. [1] T. Dao, "FlashAttention-2", 2023, arXiv:2307.08691, algorithm 2.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> q = k = v = np.ones((1, 3, 2, 4))
    >>> cupyattn.attention_backward(np.ones_like(q), q, k, v, causal=True).dv[0, :, 0, 0]
    array([1.83333333, 0.83333333, 0.33333333])
    """
    function = "attention_backward"
    options = attention_options(
        function, layout, causal, alignment, window_size, softmax_scale, softcap, dropout_p, compute_dtype, True
    )
    seed, allowed = reading.dropout_seed(function, dropout_seed), allowed_by(function, implementation)
    if options.dropout_p > 0.0 and seed is None:
        raise ValueError(refusal(function, "dropout needs the dropout_seed of the forward pass"))
    operands = under_our_names(
        q=q, k=k, v=v, mask=mask, bias=bias, alibi_slopes=alibi_slopes, sinks=sinks,
        seqlens_q=seqlens_q, seqlens_k=seqlens_k,
    )  # fmt: skip
    known = {"dout": dout, "out": out, "lse": lse, "dlse": dlse}
    visit = enter(function, {**operands, **{name: (name, array) for name, array in known.items()}})
    specs = dict(visit.specs)
    problem = read(function, tuple((name, spec) for name, spec in visit.specs if name in operands), options)
    for name, shape, dtype in (
        ("dout", problem.out_shape, problem.dtype),
        ("out", problem.out_shape, problem.dtype),
        ("lse", problem.lse_shape, problem.lse_dtype),
        ("dlse", problem.lse_shape, problem.lse_dtype),
    ):
        if name in specs:
            expect(function, specs[name], shape, dtype)
    found = answer_with_gradients(visit, problem, tuple(known), allowed, seed or 0)
    return Gradients(**{f"d{name}": gradient for name, gradient in found.items()})


def _in_their_places(asked: Mapping[str, Any], found: Sequence[Array]) -> list[Array | None]:
    """Gradients of what was given, among those of all that could have been."""
    rest = iter(found)
    return [None if asked[name] is None else next(rest) for name in ("q", "k", "v", "bias", "sinks", "alibi_slopes")]
