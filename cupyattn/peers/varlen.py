"""flash-attn's functions of sequences packed end to end: causal masks are aligned bottom-right."""

from __future__ import annotations

from typing import Any, Literal, overload

from cupyattn import reading
from cupyattn.arrays import recorded, shapes
from cupyattn.peers.flash_call import FLASH, check_hints, flash_answer, split_size, unpacked
from cupyattn.problem import A, Array
from cupyattn.reading import refusal
from cupyattn.repeating import repeated


# fmt: off
@overload
def flash_attn_varlen_func(
    q: A, k: A, v: A, cu_seqlens_q: Array, cu_seqlens_k: Array | None, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int | None, int | None] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: Literal[False] = ..., block_table: Array | None = ..., *,
    q_descale: Array | None = ..., k_descale: Array | None = ..., v_descale: Array | None = ...,
    return_lse: Literal[False] = ..., return_softmax_lse: Literal[False] = ...,
    dropout_seed: int | None = ..., compute_dtype: Any = ...,
    seqused_q: Array | None = ..., seqused_k: Array | None = ...,
    num_splits: int = ..., pack_gqa: bool | None = ..., sm_margin: int = ..., attention_chunk: int = ...,
    qv: A | None = ..., out: A | None = ..., lse_out: A | None = ...,
) -> A: ...
@overload
def flash_attn_varlen_func(
    q: A, k: A, v: A, cu_seqlens_q: Array, cu_seqlens_k: Array | None, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int | None, int | None] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: Literal[False] = ..., block_table: Array | None = ..., *,
    q_descale: Array | None = ..., k_descale: Array | None = ..., v_descale: Array | None = ...,
    return_lse: Literal[True], return_softmax_lse: bool = ..., dropout_seed: int | None = ..., compute_dtype: Any = ...,
    seqused_q: Array | None = ..., seqused_k: Array | None = ...,
    num_splits: int = ..., pack_gqa: bool | None = ..., sm_margin: int = ..., attention_chunk: int = ...,
    qv: A | None = ..., out: A | None = ..., lse_out: A | None = ...,
) -> tuple[A, A]: ...
@overload
def flash_attn_varlen_func(
    q: A, k: A, v: A, cu_seqlens_q: Array, cu_seqlens_k: Array | None, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int | None, int | None] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: Literal[False] = ..., block_table: Array | None = ..., *,
    q_descale: Array | None = ..., k_descale: Array | None = ..., v_descale: Array | None = ...,
    return_lse: bool = ..., return_softmax_lse: Literal[True], dropout_seed: int | None = ..., compute_dtype: Any = ...,
    seqused_q: Array | None = ..., seqused_k: Array | None = ...,
    num_splits: int = ..., pack_gqa: bool | None = ..., sm_margin: int = ..., attention_chunk: int = ...,
    qv: A | None = ..., out: A | None = ..., lse_out: A | None = ...,
) -> tuple[A, A]: ...
@overload
def flash_attn_varlen_func(
    q: A, k: A, v: A, cu_seqlens_q: Array, cu_seqlens_k: Array | None, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int | None, int | None] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., *, return_attn_probs: Literal[True], block_table: Array | None = ...,
    q_descale: Array | None = ..., k_descale: Array | None = ..., v_descale: Array | None = ...,
    return_lse: bool = ..., return_softmax_lse: bool = ..., dropout_seed: int | None = ..., compute_dtype: Any = ...,
    seqused_q: Array | None = ..., seqused_k: Array | None = ...,
    num_splits: int = ..., pack_gqa: bool | None = ..., sm_margin: int = ..., attention_chunk: int = ...,
    qv: A | None = ..., out: A | None = ..., lse_out: A | None = ...,
) -> tuple[A, A, A | None]: ...
@overload
def flash_attn_varlen_func(
    q: A, k: A, v: A, cu_seqlens_q: Array, cu_seqlens_k: Array | None, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int | None, int | None] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: bool = ..., block_table: Array | None = ..., *,
    q_descale: Array | None = ..., k_descale: Array | None = ..., v_descale: Array | None = ...,
    return_lse: bool = ..., return_softmax_lse: bool = ..., dropout_seed: int | None = ..., compute_dtype: Any = ...,
    seqused_q: Array | None = ..., seqused_k: Array | None = ...,
    num_splits: int = ..., pack_gqa: bool | None = ..., sm_margin: int = ..., attention_chunk: int = ...,
    qv: A | None = ..., out: A | None = ..., lse_out: A | None = ...,
) -> A | tuple[A, A] | tuple[A, A, A | None]: ...
@overload
def flash_attn_varlen_func(
    q: A, k: A, v: A, cu_seqlens_q: Array, *, max_seqlen_q: int, max_seqlen_k: int, seqused_k: Array,
    block_table: Array, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int | None, int | None] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: Literal[False] = ...,
    q_descale: Array | None = ..., k_descale: Array | None = ..., v_descale: Array | None = ...,
    return_lse: Literal[False] = ..., return_softmax_lse: Literal[False] = ..., dropout_seed: int | None = ...,
    compute_dtype: Any = ..., seqused_q: Array | None = ..., num_splits: int = ..., pack_gqa: bool | None = ...,
    sm_margin: int = ..., attention_chunk: int = ..., qv: A | None = ..., out: A | None = ..., lse_out: A | None = ...,
) -> A: ...
@overload
def flash_attn_varlen_func(
    q: A, k: A, v: A, cu_seqlens_q: Array, *, max_seqlen_q: int, max_seqlen_k: int, seqused_k: Array,
    block_table: Array, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int | None, int | None] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: Literal[False] = ...,
    q_descale: Array | None = ..., k_descale: Array | None = ..., v_descale: Array | None = ...,
    return_lse: bool = ..., return_softmax_lse: Literal[True], dropout_seed: int | None = ...,
    compute_dtype: Any = ..., seqused_q: Array | None = ..., num_splits: int = ..., pack_gqa: bool | None = ...,
    sm_margin: int = ..., attention_chunk: int = ..., qv: A | None = ..., out: A | None = ..., lse_out: A | None = ...,
) -> tuple[A, A]: ...
@overload
def flash_attn_varlen_func(
    q: A, k: A, v: A, cu_seqlens_q: Array, *, max_seqlen_q: int, max_seqlen_k: int, seqused_k: Array,
    block_table: Array, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int | None, int | None] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: bool = ...,
    q_descale: Array | None = ..., k_descale: Array | None = ..., v_descale: Array | None = ...,
    return_lse: bool = ..., return_softmax_lse: bool = ..., dropout_seed: int | None = ...,
    compute_dtype: Any = ..., seqused_q: Array | None = ..., num_splits: int = ..., pack_gqa: bool | None = ...,
    sm_margin: int = ..., attention_chunk: int = ..., qv: A | None = ..., out: A | None = ..., lse_out: A | None = ...,
) -> A | tuple[A, A] | tuple[A, A, A | None]: ...
# fmt: on
@recorded(shapes.of_varlen, **FLASH)
@repeated()
def flash_attn_varlen_func(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Array | None = None,
    *,
    q_descale: Array | None = None,
    k_descale: Array | None = None,
    v_descale: Array | None = None,
    return_lse: bool = False,
    return_softmax_lse: bool = False,
    dropout_seed: int | None = None,
    compute_dtype: Any = None,
    seqused_q: Array | None = None,
    seqused_k: Array | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    attention_chunk: int = 0,
    qv: Array | None = None,
    out: Array | None = None,
    lse_out: Array | None = None,
) -> Any:
    """flash-attn's flash_attn_varlen_func: sequences of different lengths, packed end to end.

    Parameters
    ----------
    q : array, shape (total_q, num_heads, head_dim)
    k, v : array, shape (total_k, num_heads_kv, head_dim)
        Or pages, (num_pages, page_size, num_heads_kv, head_dim), any page size, if `block_table` is given.
    cu_seqlens_q, cu_seqlens_k : array of int32, shape (batch + 1,)
        Where each sequence starts, and the end of the last one; a sequence may be empty.  Rows of q after
        the end give zeros.  No other integers, as in flash-attn: on a GPU they would cost one more launch.
        `cu_seqlens_k` may be None where `seqused_k` and `block_table` are given, and then has to be.
    max_seqlen_q, max_seqlen_k : int
        At least the longest sequence; they are needed.
    block_table : array of int32, shape (batch, pages of a sequence), optional
        The page of each page_size keys; entries after a sequence's last page are not looked at.
    seqused_q, seqused_k : array of int32, shape (batch,), optional
        How many rows, and keys, of each sequence are used, from its start on; flash-attn 3's.  Bottom-right is the last
        key and row of these.  Rows that are not used give zeros, lse -inf, and what is not used has gradients of 0,
        whatever it holds.  With a `block_table` `seqused_k` takes the place of `cu_seqlens_k`.
    return_softmax_lse : bool
        `return_lse`, as flash_attn_with_kvcache calls it.
    others
        As for `flash_attn_func`; `alibi_slopes` (num_heads,) or (batch, num_heads).

    Returns
    -------
    out : array, shape (total_q, num_heads, head_dim)
    lse : array, shape (num_heads, total_q)

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `attention`; also if cu_seqlens decrease, run past their array or exceed max_seqlen, if more is used of a
        sequence than it has, if a length stands in the way of another one, or if block_table names a page that does not
        exist.  Pages have no gradients on a GPU.

    Notes
    -----
    On a GPU nobody waits for the values of cu_seqlens, seqused and block_table, so that wrong ones are not refused
    there: what they name outside the arrays, or past max_seqlen, is cut off, and rows of `out` that they leave out are
    not set.

    Pages with `seqused_k` are what `flash_attn_with_kvcache` does with `cache_seqlens`, by the same kernels.  Else, of
    each sequence of which less is used there are three, as for `attention`, whose arrays of lengths are made anew on a
    GPU: a few small launches more.
    """
    function = "flash_attn_varlen_func"
    arrays = {
        "q": ("q", q),
        "k": ("k", k),
        "v": ("v", v),
        "cu_seqlens_q": ("cu_seqlens_q", cu_seqlens_q),
        "block_table": ("block_table", block_table),
        **_lengths(function, cu_seqlens_k, seqused_q, seqused_k, block_table is not None),
    }
    longest_q = reading.integer(function, "max_seqlen_q", max_seqlen_q, low=0)
    longest_k = reading.integer(function, "max_seqlen_k", max_seqlen_k, low=0)
    check_hints(function, pack_gqa, sm_margin, attention_chunk, qv)
    words = (("return_lse", return_lse), ("return_softmax_lse", return_softmax_lse))
    asks_for_lse = [reading.flag(function, word, wanted) for word, wanted in words]  # all are looked at
    return flash_answer(
        function, arrays,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        q_descale, k_descale, v_descale, any(asks_for_lse), dropout_seed, compute_dtype, out, lse_out,
        (longest_q, longest_k),
        split_size=split_size(function, num_splits, longest_k),
    )  # fmt: skip


def _lengths(
    function: str, cu_seqlens_k: Any, seqused_q: Any, seqused_k: Any, paged: bool
) -> dict[str, tuple[str, Any]]:
    """What says how many keys each sequence has, and how much is used, by our words."""
    rows = {"seqlens_q": ("seqused_q", seqused_q)}
    if seqused_k is None or not paged:
        if cu_seqlens_k is None:
            rule = "cu_seqlens_k has to be an array, but where seqused_k and block_table are given"
            raise TypeError(refusal(function, rule, ("cu_seqlens_k", None, "NoneType")))
        return {**rows, "cu_seqlens_k": ("cu_seqlens_k", cu_seqlens_k), "seqlens_k": ("seqused_k", seqused_k)}
    if cu_seqlens_k is not None:
        rule = "cu_seqlens_k has to be None: of pages, with a block_table, seqused_k says how many keys there are"
        raise ValueError(refusal(function, rule, ("cu_seqlens_k", "given"), ("seqused_k", "given")))
    return {**rows, "cache_seqlens": ("seqused_k", seqused_k)}


# fmt: off
@overload
def flash_attn_varlen_qkvpacked_func(
    qkv: A, cu_seqlens: Array, max_seqlen: int, dropout_p: float = ...,
    softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int | None, int | None] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: Literal[False] = ..., *,
    q_descale: Array | None = ..., k_descale: Array | None = ..., v_descale: Array | None = ...,
    return_lse: Literal[False] = ..., dropout_seed: int | None = ..., compute_dtype: Any = ...,
    out: A | None = ..., lse_out: A | None = ...,
) -> A: ...
@overload
def flash_attn_varlen_qkvpacked_func(
    qkv: A, cu_seqlens: Array, max_seqlen: int, dropout_p: float = ...,
    softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int | None, int | None] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: Literal[False] = ..., *,
    q_descale: Array | None = ..., k_descale: Array | None = ..., v_descale: Array | None = ...,
    return_lse: Literal[True], dropout_seed: int | None = ..., compute_dtype: Any = ...,
    out: A | None = ..., lse_out: A | None = ...,
) -> tuple[A, A]: ...
@overload
def flash_attn_varlen_qkvpacked_func(
    qkv: A, cu_seqlens: Array, max_seqlen: int, dropout_p: float = ...,
    softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int | None, int | None] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., *, return_attn_probs: Literal[True],
    q_descale: Array | None = ..., k_descale: Array | None = ..., v_descale: Array | None = ...,
    return_lse: bool = ..., dropout_seed: int | None = ..., compute_dtype: Any = ...,
    out: A | None = ..., lse_out: A | None = ...,
) -> tuple[A, A, A | None]: ...
@overload
def flash_attn_varlen_qkvpacked_func(
    qkv: A, cu_seqlens: Array, max_seqlen: int, dropout_p: float = ...,
    softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int | None, int | None] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: bool = ..., *,
    q_descale: Array | None = ..., k_descale: Array | None = ..., v_descale: Array | None = ...,
    return_lse: bool = ..., dropout_seed: int | None = ..., compute_dtype: Any = ...,
    out: A | None = ..., lse_out: A | None = ...,
) -> A | tuple[A, A] | tuple[A, A, A | None]: ...
# fmt: on
@recorded(shapes.of_varlen, **FLASH)
def flash_attn_varlen_qkvpacked_func(
    qkv: Array,
    cu_seqlens: Array,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    q_descale: Array | None = None,
    k_descale: Array | None = None,
    v_descale: Array | None = None,
    return_lse: bool = False,
    dropout_seed: int | None = None,
    compute_dtype: Any = None,
    out: Array | None = None,
    lse_out: Array | None = None,
) -> Any:
    """flash-attn's flash_attn_varlen_qkvpacked_func: `flash_attn_varlen_func` with q, k and v in one array.

    `qkv` is (total, 3, num_heads, head_dim); `cu_seqlens` and `max_seqlen` hold for q and for k.  Other parameters,
    results and errors as for `flash_attn_varlen_func`.
    """
    function = "flash_attn_varlen_qkvpacked_func"
    starts = ("cu_seqlens", cu_seqlens)
    arrays = {**unpacked(function, "qkv", qkv, 3, "total"), "cu_seqlens_q": starts, "cu_seqlens_k": starts}
    longest = reading.integer(function, "max_seqlen", max_seqlen, low=0)
    return flash_answer(
        function, arrays,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        q_descale, k_descale, v_descale, return_lse, dropout_seed, compute_dtype, out, lse_out,
        (longest, longest),
    )  # fmt: skip


# fmt: off
@overload
def flash_attn_varlen_kvpacked_func(
    q: A, kv: A, cu_seqlens_q: Array, cu_seqlens_k: Array, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int | None, int | None] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: Literal[False] = ..., *,
    q_descale: Array | None = ..., k_descale: Array | None = ..., v_descale: Array | None = ...,
    return_lse: Literal[False] = ..., dropout_seed: int | None = ..., compute_dtype: Any = ...,
    out: A | None = ..., lse_out: A | None = ...,
) -> A: ...
@overload
def flash_attn_varlen_kvpacked_func(
    q: A, kv: A, cu_seqlens_q: Array, cu_seqlens_k: Array, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int | None, int | None] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: Literal[False] = ..., *,
    q_descale: Array | None = ..., k_descale: Array | None = ..., v_descale: Array | None = ...,
    return_lse: Literal[True], dropout_seed: int | None = ..., compute_dtype: Any = ...,
    out: A | None = ..., lse_out: A | None = ...,
) -> tuple[A, A]: ...
@overload
def flash_attn_varlen_kvpacked_func(
    q: A, kv: A, cu_seqlens_q: Array, cu_seqlens_k: Array, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int | None, int | None] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., *, return_attn_probs: Literal[True],
    q_descale: Array | None = ..., k_descale: Array | None = ..., v_descale: Array | None = ...,
    return_lse: bool = ..., dropout_seed: int | None = ..., compute_dtype: Any = ...,
    out: A | None = ..., lse_out: A | None = ...,
) -> tuple[A, A, A | None]: ...
@overload
def flash_attn_varlen_kvpacked_func(
    q: A, kv: A, cu_seqlens_q: Array, cu_seqlens_k: Array, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int | None, int | None] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: bool = ..., *,
    q_descale: Array | None = ..., k_descale: Array | None = ..., v_descale: Array | None = ...,
    return_lse: bool = ..., dropout_seed: int | None = ..., compute_dtype: Any = ...,
    out: A | None = ..., lse_out: A | None = ...,
) -> A | tuple[A, A] | tuple[A, A, A | None]: ...
# fmt: on
@recorded(shapes.of_varlen, **FLASH)
def flash_attn_varlen_kvpacked_func(
    q: Array,
    kv: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    q_descale: Array | None = None,
    k_descale: Array | None = None,
    v_descale: Array | None = None,
    return_lse: bool = False,
    dropout_seed: int | None = None,
    compute_dtype: Any = None,
    out: Array | None = None,
    lse_out: Array | None = None,
) -> Any:
    """flash-attn's flash_attn_varlen_kvpacked_func: `flash_attn_varlen_func` with k and v in one array.

    `kv` is (total_k, 2, num_heads_kv, head_dim).  Parameters, results and errors as for `flash_attn_varlen_func`.
    """
    function = "flash_attn_varlen_kvpacked_func"
    arrays = {"q": ("q", q), **unpacked(function, "kv", kv, 2, "total_k")}
    arrays |= {"cu_seqlens_q": ("cu_seqlens_q", cu_seqlens_q), "cu_seqlens_k": ("cu_seqlens_k", cu_seqlens_k)}
    longest_q = reading.integer(function, "max_seqlen_q", max_seqlen_q, low=0)
    longest_k = reading.integer(function, "max_seqlen_k", max_seqlen_k, low=0)
    return flash_answer(
        function, arrays,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        q_descale, k_descale, v_descale, return_lse, dropout_seed, compute_dtype, out, lse_out,
        (longest_q, longest_k),
    )  # fmt: skip
