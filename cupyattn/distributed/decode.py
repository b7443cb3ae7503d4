"""Decoding over keys that are shared out among ranks: queries everywhere, one exchange of what each rank has found."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal, overload

from cupyattn.api import Gradients
from cupyattn.arrays import Arrays, untraced
from cupyattn.distributed import jax as in_jax
from cupyattn.distributed import verbs
from cupyattn.distributed.agreement import heard
from cupyattn.distributed.asked import Asked, ask
from cupyattn.distributed.comm import Comm
from cupyattn.distributed.jax import JaxComm
from cupyattn.distributed.rectangles import Rectangle, rectangles_of, shifts_of
from cupyattn.distributed.running import run, run_backward
from cupyattn.distributed.sharding import Kind, Sharding
from cupyattn.distributed.working import AnyState, AnyWork, work_of
from cupyattn.problem import A, Alignment, Array, Implementation
from cupyattn.reading import flag


# fmt: off
@overload
def sharded_decode(
    q: A, k: A, v: A, *, comm: Comm | JaxComm, sharding: Sharding | Kind = ...,
    seqlens_q: Sequence[int] | None = ...,
    layout: Literal["bshd", "bhsd"] = ..., causal: bool = ..., alignment: Alignment | None = ...,
    window_size: tuple[int | None, int | None] = ..., mask: Array | None = ..., bias: Array | None = ...,
    softmax_scale: float | None = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    sinks: Array | None = ..., compute_dtype: Any = ...,
    implementation: Implementation | Collection[Implementation] | None = ...,
    return_lse: Literal[False] = ...,
) -> A: ...
@overload
def sharded_decode(
    q: A, k: A, v: A, *, comm: Comm | JaxComm, sharding: Sharding | Kind = ...,
    seqlens_q: Sequence[int] | None = ...,
    layout: Literal["bshd", "bhsd"] = ..., causal: bool = ..., alignment: Alignment | None = ...,
    window_size: tuple[int | None, int | None] = ..., mask: Array | None = ..., bias: Array | None = ...,
    softmax_scale: float | None = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    sinks: Array | None = ..., compute_dtype: Any = ...,
    implementation: Implementation | Collection[Implementation] | None = ...,
    return_lse: Literal[True],
) -> tuple[A, A]: ...
@overload
def sharded_decode(
    q: A, k: A, v: A, *, comm: Comm | JaxComm, sharding: Sharding | Kind = ...,
    seqlens_q: Sequence[int] | None = ...,
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
def sharded_decode(
    q: Array,
    k: Array,
    v: Array,
    *,
    comm: Comm | JaxComm,
    sharding: Sharding | Kind = "contiguous",
    seqlens_q: Sequence[int] | None = None,
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
    """`attention` of queries that all ranks have, over keys of which each rank has some.  Every rank calls it.

    Parameters
    ----------
    q : array, shape (batch, seqlen_q, num_heads, head_dim)
        The same on all ranks; all else that is not named here, too.  On the CPU or, as for
        `ring_attention`, on a GPU.  Of packed sequences (total_q, num_heads, head_dim), end to end.
    k, v : array, shapes (batch, own tokens, num_heads_kv, head_dim), ...
        Of this rank's tokens; there may be none.  Of packed sequences (own tokens, num_heads_kv, head_dim): this rank's
        tokens of the first sequence, of the second, and so on.
    comm : Comm or JaxComm
        Who takes part: by `run_ranks`, `MpiComm`, `TorchComm` or `NcclComm`; inside of `jax.shard_map` a `JaxComm`.
    sharding : Sharding or {"contiguous", "zigzag", "striped"}
        Which keys are whose.  The keys of "contiguous" ranks may be as many as they are.  Of packed sequences a
        `Sharding`, whose `seqlens` are how many keys each has.
    seqlens_q : tuple of int, optional
        How many queries each packed sequence has; there may be none.  Default one.
    causal, alignment, window_size, ...
        As for `attention`, of the whole, or of each packed sequence.  `alignment` has to be chosen where there is a
        diagonal, and says "bottom-right" for queries that are the last tokens.
    mask, bias : array, optional
        They broadcast to (batch, num_heads, seqlen_q, all keys), keys in the sequence's order.  Not with packed
        sequences.
    alibi_slopes : array, shape (num_heads,), (batch, num_heads) or, packed, (sequences, num_heads), optional
        The same on all ranks.

    Returns
    -------
    out : array, as q with head_dim_v for head_dim
        The same on all ranks.
    lse : array, shape (batch, num_heads, seqlen_q) or (num_heads, total_q), only if `return_lse`

    Raises
    ------
    TypeError, ValueError, RankFailed
        As `ring_attention`.

    Notes
    -----
    One exchange: of each rank's out and lse in float64, on a GPU in float32, merged by every rank in the order of
    ranks, rounded once.  Packed sequences are one exchange, too, and on each rank a call for every sequence of which it
    has keys that are seen, or several if they are no neighbours.

    A key that is appended to a "striped" sequence of n goes to rank ``n % size``, behind those of this sequence that
    are there, and no other key moves.

    torch's autograd gives gradients; where all ranks have the same gradient of the output, those of q and of all
    else that is the same on all ranks are whole on all.

    References
    ----------
    .. [1] V. Shyam et al., "Tree Attention", 2024, arXiv:2408.04093.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> from cupyattn.distributed import Sharding, run_ranks, shard_sequence, sharded_decode
    >>> q, k, v = np.ones((1, 1, 2, 4)), *np.random.default_rng(0).standard_normal((2, 1, 10, 2, 4))
    >>> def rank(comm):
    ...     own = slice(4 * comm.rank, 4 * comm.rank + 4)
    ...     return sharded_decode(q, k[:, own], v[:, own], comm=comm)
    >>> [bool(np.allclose(out, cupyattn.attention(q, k, v))) for out in run_ranks(rank, 3)]
    [True, True, True]

    Two packed sequences, of 7 and 3 keys and a query each:

    >>> layout = Sharding("striped", 3, (7, 3))
    >>> def packed(comm):
    ...     mine = (shard_sequence(x[0], layout, comm.rank, axis=0) for x in (k, v))
    ...     return sharded_decode(np.ones((2, 2, 4)), *mine, comm=comm, sharding=layout)
    >>> alone = [cupyattn.attention(q, k[:, own], v[:, own])[0, 0] for own in (slice(7), slice(7, 10))]
    >>> [bool(np.allclose(out, alone)) for out in run_ranks(packed, 3)]
    [True, True, True]
    """
    function = "sharded_decode"
    arrays = {"q": q, "k": k, "v": v, "mask": mask, "bias": bias, "alibi_slopes": alibi_slopes, "sinks": sinks}
    scalars = {
        "layout": layout, "causal": causal, "alignment": alignment, "window_size": window_size,
        "softmax_scale": softmax_scale, "softcap": softcap, "compute_dtype": compute_dtype,
        "implementation": implementation,
    }  # fmt: skip
    if isinstance(comm, JaxComm):
        return_lse = flag(function, "return_lse", return_lse)
        return in_jax.decode(function, comm, sharding, seqlens_q, arrays, return_lse, **scalars)
    asked = ask(
        function, comm, sharding, arrays, {},
        replicated_rows=True, return_lse=return_lse, seqlens_q=seqlens_q, **scalars,
    )  # fmt: skip
    found = run(asked, _forward, _backward)
    return (found["out"], found["lse"]) if asked.returns_lse else found["out"]


@untraced
@heard
def sharded_decode_backward(
    dout: A,
    q: A,
    k: A,
    v: A,
    *,
    comm: Comm,
    out: A | None = None,
    lse: A | None = None,
    dlse: A | None = None,
    sharding: Sharding | Kind = "contiguous",
    seqlens_q: Sequence[int] | None = None,
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
    """Gradients of `sharded_decode`, given the gradient of its output, the same on all ranks.  Every rank calls it.

    Parameters
    ----------
    dout : array, shape of out
        Gradient of the output; `dlse` that of lse, if anything was made of it.  The same on all ranks.
    q, k, v : array
        As they were given to `sharded_decode`; likewise all arguments not named here.
    out, lse : array, optional
        What it returned; both save finding them again, where they are in the dtype of the arithmetic.

    Returns
    -------
    Gradients
        dk and dv of this rank's keys; all others whole, and the same on all ranks.

    Raises
    ------
    TypeError, ValueError, RankFailed
        As `ring_attention_backward`.
    """
    asked = ask(
        "sharded_decode_backward", comm, sharding,
        {"q": q, "k": k, "v": v, "mask": mask, "bias": bias, "alibi_slopes": alibi_slopes, "sinks": sinks},
        {"dout": dout, "out": out, "lse": lse, "dlse": dlse},
        replicated_rows=True, seqlens_q=seqlens_q, implementation=implementation,
        layout=layout, causal=causal, alignment=alignment, window_size=window_size, softmax_scale=softmax_scale,
        softcap=softcap, compute_dtype=compute_dtype,
    )  # fmt: skip
    return Gradients(**{f"d{name}": array for name, array in run_backward(asked, _forward, _backward).items()})


def _seen(asked: Asked) -> tuple[Rectangle, ...]:
    """What all rows see of this rank's keys."""
    shifts = shifts_of(asked.rows, asked.keys, asked.band)
    return rectangles_of(asked.rows.pieces[0], asked.keys.pieces[asked.comm.rank], shifts, asked.band)


def _forward(asked: Asked, operands: Arrays) -> tuple[AnyWork, AnyState]:
    work = work_of(asked, operands)
    own = work.begin(with_sinks=asked.comm.rank == 0)
    for rectangle in _seen(asked):
        keys = slice(*rectangle.keys)
        work.attend(own, rectangle, work.k[:, :, keys], work.v[:, :, keys])
    return work, work.merged(asked.comm.all_gather(work.message(own)))


def _backward(work: AnyWork, rows: Arrays) -> Arrays:
    totals = work.totals()
    wide = [work.for_gradients(x) for x in (work.k, work.v)]
    for rectangle in _seen(work.asked):
        keys = slice(*rectangle.keys)
        shares = work.gradients(totals, rows, rectangle, *(x[:, :, keys] for x in wide))
        for name, share in zip("kv", shares, strict=True):
            verbs.add(totals[name][:, :, keys], share)
    common = [name for name in totals if name not in ("k", "v")]
    return totals | {name: work.asked.comm.all_reduce(totals[name]) for name in common}
