"""Ring attention: every rank has some tokens; keys go round, and rows stay."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, overload

from cupyattn.api import Gradients
from cupyattn.arrays import Arrays, untraced
from cupyattn.distributed import jax as in_jax
from cupyattn.distributed import verbs
from cupyattn.distributed.agreement import heard
from cupyattn.distributed.asked import Asked, ask
from cupyattn.distributed.comm import Comm
from cupyattn.distributed.jax import JaxComm
from cupyattn.distributed.route import Route, route_of
from cupyattn.distributed.running import run, run_backward
from cupyattn.distributed.sharding import Kind, Sharding
from cupyattn.distributed.traffic import Keys, Returns, Ring
from cupyattn.distributed.working import AnyState, AnyWork, work_of
from cupyattn.problem import A, Alignment, Array, Implementation, Span
from cupyattn.reading import flag


# fmt: off
@overload
def ring_attention(
    q: A, k: A, v: A, *, comm: Comm | JaxComm, sharding: Sharding | Kind | None = ...,
    layout: Literal["bshd", "bhsd"] = ..., causal: bool = ..., alignment: Alignment | None = ...,
    window_size: tuple[int | None, int | None] = ..., mask: Array | None = ..., bias: Array | None = ...,
    softmax_scale: float | None = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    sinks: Array | None = ..., compute_dtype: Any = ...,
    implementation: Implementation | Collection[Implementation] | None = ...,
    return_lse: Literal[False] = ...,
) -> A: ...
@overload
def ring_attention(
    q: A, k: A, v: A, *, comm: Comm | JaxComm, sharding: Sharding | Kind | None = ...,
    layout: Literal["bshd", "bhsd"] = ..., causal: bool = ..., alignment: Alignment | None = ...,
    window_size: tuple[int | None, int | None] = ..., mask: Array | None = ..., bias: Array | None = ...,
    softmax_scale: float | None = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    sinks: Array | None = ..., compute_dtype: Any = ...,
    implementation: Implementation | Collection[Implementation] | None = ...,
    return_lse: Literal[True],
) -> tuple[A, A]: ...
@overload
def ring_attention(
    q: A, k: A, v: A, *, comm: Comm | JaxComm, sharding: Sharding | Kind | None = ...,
    layout: Literal["bshd", "bhsd"] = ..., causal: bool = ..., alignment: Alignment | None = ...,
    window_size: tuple[int | None, int | None] = ..., mask: Array | None = ..., bias: Array | None = ...,
    softmax_scale: float | None = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    sinks: Array | None = ..., compute_dtype: Any = ...,
    implementation: Implementation | Collection[Implementation] | None = ...,
    return_lse: bool,
) -> A | tuple[A, A]: ...
# fmt: on
@untraced
@heard
def ring_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    comm: Comm | JaxComm,
    sharding: Sharding | Kind | None = None,
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
    compute_dtype: Any = None,
    implementation: Implementation | Collection[Implementation] | None = None,
    return_lse: bool = False,
) -> Any:
    """`attention` of a sequence whose tokens are shared out among ranks.  Every rank of `comm` calls it.

    Parameters
    ----------
    q, k, v : array, shapes (batch, seqlen, num_heads, head_dim), ...
        As for `attention`, of this rank's tokens: what `shard_sequence` makes of the whole.  Of packed sequences
        (tokens, num_heads, head_dim), with a `Sharding` that has their lengths.  On the CPU; or CuPy's and
        torch's on a GPU, each rank on its own.
    comm : Comm or JaxComm
        Who takes part: by `run_ranks`, `MpiComm`, `TorchComm` or `NcclComm`; inside of `jax.shard_map` a `JaxComm`.
    sharding : Sharding or {"zigzag", "contiguous", "striped"}, optional
        Which tokens are whose.  A name means that of all tokens that there are, of q and of k by itself; "contiguous"
        ones may then be as many on each rank as they are.  Default "zigzag" if `causal`, else "contiguous".
    layout, causal, alignment, window_size, softmax_scale, softcap, compute_dtype, implementation
        As for `attention`, of the whole.  Rows and diagonals are counted in the sequence, not on a rank.
    mask, bias : array, optional
        Of this rank's rows, in its order, and all keys, in the sequence's: they broadcast to
        (batch, num_heads, own rows, all keys).  Not with packed sequences.
    alibi_slopes : array, shape (num_heads,), (batch, num_heads) or, packed, (sequences, num_heads), optional
        The same on all ranks.
    sinks : array, shape (num_heads,), optional
        The same on all ranks.
    return_lse : bool
        Also return the log-sum-exp.

    Returns
    -------
    out : array, as q with head_dim_v for head_dim
        Of this rank's rows.
    lse : array, shape (batch, num_heads, own rows) or (num_heads, own tokens), only if `return_lse`

    Raises
    ------
    TypeError, ValueError
        As `attention`, on all ranks if on one; or they do not agree about shapes, dtypes or options, or arrays are
        traced, or float8; or, on a GPU, of another library than CuPy and torch.
    NotImplementedError
        On a GPU, no kernel takes the problem; the message lists each kernel's objections.
    RankFailed
        Another rank raised an error, or was not heard of for `comm.timeout` seconds.

    Notes
    -----
    The same as `attention` over the whole sequence.  A rank merges what it finds in its own keys, then in those of the
    rank before it, and so on round the ring; stretches of rows and keys in their order.  States are merged in float64
    and rounded once.  On a GPU each stretch is rounded to the dtype of `q`, states are merged in float32, and rounded
    once more; that has not run on a GPU yet.  While some keys are attended the next are on their way.  With a window,
    only keys that somebody further along sees go on.

    torch's autograd gives gradients, if all ranks call backward.  The gradient of what is the same on all ranks is this
    rank's share: the sum over ranks is the whole.

    References
    ----------
    .. [1] H. Liu, M. Zaharia and P. Abbeel, "Ring Attention with Blockwise Transformers", 2023, arXiv:2310.01889.
    .. [2] W. Brandon et al., "Striped Attention", 2023, arXiv:2311.09431.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> from cupyattn.distributed import Sharding, ring_attention, run_ranks, shard_sequence, unshard_sequence
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 10, 2, 4))
    >>> layout = Sharding("zigzag", size=2, seqlens=(10,))
    >>> def rank(comm):
    ...     own = (shard_sequence(x, layout, comm.rank) for x in (q, k, v))
    ...     return ring_attention(*own, comm=comm, sharding=layout, causal=True)
    >>> out = unshard_sequence(run_ranks(rank, 2), layout)
    >>> bool(np.allclose(out, cupyattn.attention(q, k, v, causal=True)))
    True
    """
    function = "ring_attention"
    arrays = {"q": q, "k": k, "v": v, "mask": mask, "bias": bias, "alibi_slopes": alibi_slopes, "sinks": sinks}
    scalars = {
        "layout": layout, "causal": causal, "alignment": alignment, "window_size": window_size,
        "softmax_scale": softmax_scale, "softcap": softcap, "compute_dtype": compute_dtype,
        "implementation": implementation,
    }  # fmt: skip
    if isinstance(comm, JaxComm):
        return in_jax.ring(function, comm, sharding, arrays, flag(function, "return_lse", return_lse), **scalars)
    asked = ask(function, comm, sharding, arrays, {}, replicated_rows=False, return_lse=return_lse, **scalars)
    found = run(asked, _forward, _backward)
    return (found["out"], found["lse"]) if asked.returns_lse else found["out"]


@untraced
@heard
def ring_attention_backward(
    dout: A,
    q: A,
    k: A,
    v: A,
    *,
    comm: Comm,
    out: A | None = None,
    lse: A | None = None,
    dlse: A | None = None,
    sharding: Sharding | Kind | None = None,
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
    compute_dtype: Any = None,
    implementation: Implementation | Collection[Implementation] | None = None,
) -> Gradients[A]:
    """Gradients of `ring_attention`, given this rank's gradient of its output.  Every rank of `comm` calls it.

    Parameters
    ----------
    dout : array, shape of out
        Gradient of this rank's output.
    q, k, v : array
        As they were given to `ring_attention`; likewise all arguments not named here.
    out, lse : array, optional
        What it returned.  Both save another round of the keys, where they are in the dtype of the arithmetic, so that
        nothing was lost by rounding; they are found again otherwise.
    dlse : array, shape of lse, optional
        Gradient of the log-sum-exp, if anything was made of it.

    Returns
    -------
    Gradients
        Named tuple (dq, dk, dv, dbias, dsinks, dalibi_slopes).  dk and dv are whole, of this rank's tokens; dbias is of
        this rank's rows.  Those of sinks and slopes, which are the same on all ranks, are this rank's share, as
        is that of a bias that is one for all rows: the sum over ranks is the whole.

    Raises
    ------
    TypeError, ValueError, RankFailed
        As `ring_attention`; also if `dout`, `out`, `lse` or `dlse` do not have the shapes above.

    Notes
    -----
    Keys go round as before; what a rank finds of an owner's dk and dv goes straight to the owner, in the dtype of the
    arithmetic, who adds it up in the order of steps.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> from cupyattn.distributed import ring_attention_backward, run_ranks
    >>> q = k = v = np.ones((1, 4, 2, 4))
    >>> def rank(comm):
    ...     own = slice(2 * comm.rank, 2 * comm.rank + 2)
    ...     mine = [x[:, own] for x in (q, k, v)]
    ...     return ring_attention_backward(np.ones_like(mine[0]), *mine, comm=comm).dv[0, :, 0, 0]
    >>> run_ranks(rank, 2)
    [array([1., 1.]), array([1., 1.])]
    """
    asked = ask(
        "ring_attention_backward", comm, sharding,
        {"q": q, "k": k, "v": v, "mask": mask, "bias": bias, "alibi_slopes": alibi_slopes, "sinks": sinks},
        {"dout": dout, "out": out, "lse": lse, "dlse": dlse},
        replicated_rows=False, implementation=implementation,
        layout=layout, causal=causal, alignment=alignment, window_size=window_size, softmax_scale=softmax_scale,
        softcap=softcap, compute_dtype=compute_dtype,
    )  # fmt: skip
    return Gradients(**{f"d{name}": array for name, array in run_backward(asked, _forward, _backward).items()})


def _route(asked: Asked) -> Route:
    return route_of(asked.rows, asked.keys, asked.band)


def _ring(asked: Asked, work: AnyWork) -> Ring:
    length = asked.keys.length(asked.comm.rank)
    return Ring(asked.comm, _route(asked), Keys((Span(0, length),), work.k, work.v))


def _forward(asked: Asked, operands: Arrays) -> tuple[AnyWork, AnyState]:
    """The state of this rank's rows over all keys."""
    work = work_of(asked, operands)
    whole, ring = work.begin(), _ring(asked, work)
    for _ in range(asked.comm.size):
        ring.begin()
        for rectangle in ring.seen():
            work.attend(whole, rectangle, *ring.held.of(rectangle.keys))
        ring.end()
    return work, whole


def _backward(work: AnyWork, rows: Arrays) -> Arrays:
    """The gradients; those of keys are found where the rows are, and go home."""
    asked = work.asked
    totals, ring = work.totals(), _ring(asked, work)
    returns = Returns(asked.comm, ring.route, totals["k"], totals["v"])
    for step in range(asked.comm.size):
        ring.begin()
        held = Keys(ring.held.spans, work.for_gradients(ring.held.k), work.for_gradients(ring.held.v))
        found = held.zeros(work.dtype)
        for rectangle in ring.seen():
            shares = work.gradients(totals, rows, rectangle, *held.of(rectangle.keys))
            for total, share in zip(found.of(rectangle.keys), shares, strict=True):
                verbs.add(total, share)
        returns.exchange(step, found)
        ring.end()
    returns.add()
    return totals
