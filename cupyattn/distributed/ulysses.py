"""Ulysses: heads are exchanged for tokens, each rank attends some heads of the whole sequence, and back again."""

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
from cupyattn.distributed.exchange import Exchange, has_rows
from cupyattn.distributed.jax import JaxComm
from cupyattn.distributed.running import run, run_backward
from cupyattn.distributed.sharding import Kind, Sharding
from cupyattn.distributed.working import AnyState, AnyWork, work_of
from cupyattn.problem import A, Alignment, Array, Implementation
from cupyattn.reading import flag


# fmt: off
@overload
def ulysses_attention(
    q: A, k: A, v: A, *, comm: Comm | JaxComm, sharding: Sharding | Kind = ...,
    layout: Literal["bshd", "bhsd"] = ..., causal: bool = ..., alignment: Alignment | None = ...,
    window_size: tuple[int | None, int | None] = ..., mask: Array | None = ..., bias: Array | None = ...,
    softmax_scale: float | None = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    sinks: Array | None = ..., compute_dtype: Any = ...,
    implementation: Implementation | Collection[Implementation] | None = ...,
    return_lse: Literal[False] = ...,
) -> A: ...
@overload
def ulysses_attention(
    q: A, k: A, v: A, *, comm: Comm | JaxComm, sharding: Sharding | Kind = ...,
    layout: Literal["bshd", "bhsd"] = ..., causal: bool = ..., alignment: Alignment | None = ...,
    window_size: tuple[int | None, int | None] = ..., mask: Array | None = ..., bias: Array | None = ...,
    softmax_scale: float | None = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    sinks: Array | None = ..., compute_dtype: Any = ...,
    implementation: Implementation | Collection[Implementation] | None = ...,
    return_lse: Literal[True],
) -> tuple[A, A]: ...
@overload
def ulysses_attention(
    q: A, k: A, v: A, *, comm: Comm | JaxComm, sharding: Sharding | Kind = ...,
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
def ulysses_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    comm: Comm | JaxComm,
    sharding: Sharding | Kind = "contiguous",
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
    """`ring_attention` by another way: each rank attends some heads of the whole sequence.  Every rank calls it.

    Parameters
    ----------
    q, k, v, comm, sharding, mask, bias, ...
        As for `ring_attention`.  All layouts are the same work.

    Returns
    -------
    out, lse : array
        As `ring_attention`.

    Raises
    ------
    TypeError, ValueError, RankFailed
        As `ring_attention`.

    Notes
    -----
    Rank ``r`` of ``size`` attends query heads ``r * num_heads // size`` up to ``(r + 1) * num_heads // size``, and
    is sent the key heads that these use: a key head goes to several ranks where there are fewer than ranks.  With more
    ranks than query heads some have nothing to do; inside of `jax.shard_map` query heads have to be a multiple of the
    ranks.  Every rank holds the whole sequence for its heads.  On a GPU
    results are rounded once, by the kernel, and what ranks find of the gradients is added up in float32; that has not
    run on a GPU yet.

    Gradients as of `ring_attention`.

    References
    ----------
    .. [1] S. A. Jacobs et al., "DeepSpeed Ulysses", 2023, arXiv:2309.14509.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> from cupyattn.distributed import run_ranks, ulysses_attention
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 10, 2, 4))
    >>> def rank(comm):
    ...     own = slice(5 * comm.rank, 5 * comm.rank + 5)
    ...     return ulysses_attention(q[:, own], k[:, own], v[:, own], comm=comm, causal=True)
    >>> out = np.concatenate(run_ranks(rank, 2), axis=1)
    >>> bool(np.allclose(out, cupyattn.attention(q, k, v, causal=True)))
    True
    """
    function = "ulysses_attention"
    arrays = {"q": q, "k": k, "v": v, "mask": mask, "bias": bias, "alibi_slopes": alibi_slopes, "sinks": sinks}
    scalars = {
        "layout": layout, "causal": causal, "alignment": alignment, "window_size": window_size,
        "softmax_scale": softmax_scale, "softcap": softcap, "compute_dtype": compute_dtype,
        "implementation": implementation,
    }  # fmt: skip
    if isinstance(comm, JaxComm):
        return in_jax.ulysses(function, comm, sharding, arrays, flag(function, "return_lse", return_lse), **scalars)
    asked = ask(function, comm, sharding, arrays, {}, replicated_rows=False, return_lse=return_lse, **scalars)
    _check_rows(asked)
    found = run(asked, _forward, _backward)
    return (found["out"], found["lse"]) if asked.returns_lse else found["out"]


@untraced
@heard
def ulysses_attention_backward(
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
    """Gradients of `ulysses_attention`, given this rank's gradient of its output.  Every rank calls it.

    Parameters
    ----------
    dout, q, k, v, out, lse, dlse, ...
        As for `ring_attention_backward`.

    Returns
    -------
    Gradients
        As of `ring_attention_backward`; what is the same on all ranks has this rank's share.

    Raises
    ------
    TypeError, ValueError, RankFailed
        As `ring_attention_backward`.
    """
    asked = ask(
        "ulysses_attention_backward", comm, sharding,
        {"q": q, "k": k, "v": v, "mask": mask, "bias": bias, "alibi_slopes": alibi_slopes, "sinks": sinks},
        {"dout": dout, "out": out, "lse": lse, "dlse": dlse},
        replicated_rows=False, implementation=implementation,
        layout=layout, causal=causal, alignment=alignment, window_size=window_size, softmax_scale=softmax_scale,
        softcap=softcap, compute_dtype=compute_dtype,
    )  # fmt: skip
    _check_rows(asked)
    return Gradients(**{f"d{name}": array for name, array in run_backward(asked, _forward, _backward).items()})


def _check_rows(asked: Asked) -> None:
    for name in ("mask", "bias"):
        has_rows(asked, name)


def _forward(asked: Asked, operands: Arrays) -> tuple[AnyWork, AnyState]:
    work = work_of(asked, operands)
    exchange, own = Exchange(work), []
    for array in exchange.attend(_whole(exchange, work.q, work.k, work.v)):
        of_rows = array if array.ndim == 4 else array[..., None]
        rows = asked.rows.length(asked.comm.rank)
        whole = verbs.empty((*of_rows.shape[:1], work.q.shape[1], rows, of_rows.shape[3]), array.dtype, array)
        for heads, part in exchange.scattered(of_rows, asked.rows, exchange.heads):
            verbs.write(whole[:, heads], part)
        own.append(whole if array.ndim == 4 else whole[..., 0])
    return work, work.state_of(*own)


def _whole(exchange: Exchange, q: Array, k: Array, v: Array) -> Arrays:
    """This rank's heads of all tokens."""
    return {
        "q": exchange.gathered(q, exchange.rows, exchange.heads),
        "k": exchange.gathered(k, exchange.keys, exchange.of_k),
        "v": exchange.gathered(v, exchange.keys, exchange.of_v),
        **exchange.edits(),
    }


def _backward(work: AnyWork, rows: Arrays) -> Arrays:
    exchange = Exchange(work)
    whole = _whole(exchange, *(work.for_gradients(x) for x in (work.q, work.k, work.v)))
    known: Arrays = {}
    for name, array in rows.items():
        if array is None:
            known[name] = None
        elif array.ndim == 4:
            known[name] = exchange.gathered(array, exchange.rows, exchange.heads)
        else:
            known[name] = exchange.gathered(array[..., None], exchange.rows, exchange.heads)[..., 0]
    found, totals = exchange.gradients(whole, known), work.totals()
    for name, tokens, of in (
        ("q", exchange.rows, exchange.heads),
        ("k", exchange.keys, exchange.of_k),
        ("v", exchange.keys, exchange.of_v),
    ):
        for heads, part in exchange.scattered(found[name], tokens, of):
            verbs.add(totals[name][:, heads], part)
    if "bias" in found:
        _add_bias(exchange, totals["bias"], found["bias"])
    if "alibi_slopes" in found:
        verbs.add(totals["alibi_slopes"][..., exchange.own], found["alibi_slopes"])
    return totals


def _add_bias(exchange: Exchange, total: Array, found: Array) -> None:
    """What was found of a bias, by all ranks where it is of their own rows, else by this one."""
    total = total.reshape((1,) * (4 - total.ndim) + total.shape)  # a view: it is contiguous
    each_head = total.shape[1] > 1
    if not has_rows(exchange.work.asked, "bias"):
        verbs.add(total[:, exchange.own if each_head else slice(None)], found)
        return
    of = exchange.heads if each_head else lambda _: slice(0, 1)
    for heads, part in exchange.scattered(found, exchange.rows, of):
        verbs.add(total[:, heads], part)
