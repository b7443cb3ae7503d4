"""flash-attn's functions of dense arrays: causal masks are aligned bottom-right."""

from __future__ import annotations

from typing import Any, Literal, overload

from cupyattn.arrays import recorded, shapes
from cupyattn.peers.flash_call import FLASH, check_hints, flash_answer, seqlens, split_size, unpacked
from cupyattn.problem import A, Array
from cupyattn.repeating import repeated


# fmt: off
@overload
def flash_attn_func(
    q: A, k: A, v: A, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int | None, int | None] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: Literal[False] = ..., *,
    q_descale: Array | None = ..., k_descale: Array | None = ..., v_descale: Array | None = ...,
    return_lse: Literal[False] = ..., dropout_seed: int | None = ..., compute_dtype: Any = ...,
    seqlens_q: Array | None = ..., seqlens_k: Array | None = ...,
    num_splits: int = ..., pack_gqa: bool | None = ..., sm_margin: int = ..., attention_chunk: int = ...,
    qv: A | None = ..., out: A | None = ..., lse_out: A | None = ...,
) -> A: ...
@overload
def flash_attn_func(
    q: A, k: A, v: A, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int | None, int | None] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: Literal[False] = ..., *,
    q_descale: Array | None = ..., k_descale: Array | None = ..., v_descale: Array | None = ...,
    return_lse: Literal[True], dropout_seed: int | None = ..., compute_dtype: Any = ...,
    seqlens_q: Array | None = ..., seqlens_k: Array | None = ...,
    num_splits: int = ..., pack_gqa: bool | None = ..., sm_margin: int = ..., attention_chunk: int = ...,
    qv: A | None = ..., out: A | None = ..., lse_out: A | None = ...,
) -> tuple[A, A]: ...
@overload
def flash_attn_func(
    q: A, k: A, v: A, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int | None, int | None] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., *, return_attn_probs: Literal[True],
    q_descale: Array | None = ..., k_descale: Array | None = ..., v_descale: Array | None = ...,
    return_lse: bool = ..., dropout_seed: int | None = ..., compute_dtype: Any = ...,
    seqlens_q: Array | None = ..., seqlens_k: Array | None = ...,
    num_splits: int = ..., pack_gqa: bool | None = ..., sm_margin: int = ..., attention_chunk: int = ...,
    qv: A | None = ..., out: A | None = ..., lse_out: A | None = ...,
) -> tuple[A, A, A | None]: ...
@overload
def flash_attn_func(
    q: A, k: A, v: A, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int | None, int | None] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: bool = ..., *,
    q_descale: Array | None = ..., k_descale: Array | None = ..., v_descale: Array | None = ...,
    return_lse: bool = ..., dropout_seed: int | None = ..., compute_dtype: Any = ...,
    seqlens_q: Array | None = ..., seqlens_k: Array | None = ...,
    num_splits: int = ..., pack_gqa: bool | None = ..., sm_margin: int = ..., attention_chunk: int = ...,
    qv: A | None = ..., out: A | None = ..., lse_out: A | None = ...,
) -> A | tuple[A, A] | tuple[A, A, A | None]: ...
# fmt: on
@recorded(shapes.of_flash, **FLASH)
@repeated()
def flash_attn_func(
    q: Array,
    k: Array,
    v: Array,
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
    seqlens_q: Array | None = None,
    seqlens_k: Array | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    attention_chunk: int = 0,
    qv: Array | None = None,
    out: Array | None = None,
    lse_out: Array | None = None,
) -> Any:
    """flash-attn's flash_attn_func, for any array library; causal and windows are aligned bottom-right.

    Parameters
    ----------
    q : array, shape (batch, seqlen_q, num_heads, head_dim)
    k, v : array, shape (batch, seqlen_k, num_heads_kv, head_dim)
        `num_heads_kv` divides `num_heads`.
    dropout_p, softmax_scale, causal, softcap, alibi_slopes, dropout_seed, compute_dtype, out, lse_out
        As for `attention`; `lse_out` if an lse is returned.
    seqlens_q, seqlens_k : array of int32, shape (batch,), optional
        How many rows and keys of each sequence there are, as for `attention`; flash-attn 3's seqused.
    q_descale, k_descale, v_descale : array of float32, optional
        Factors of q, k and v in float8_e4m3fn, broadcast to (batch, num_heads_kv); flash-attn 3's.
    num_splits : int
        Splits of a sequence's keys on a GPU, at most; 0: chosen there (flash-attn 3's default is 1).  With 1 the result
        of a sequence does not depend on the rest of the batch.  The CPU does not split.
    pack_gqa : bool, optional
        Accepted for flash-attn's sake, as `deterministic`: what shares keys is packed anyway.
    sm_margin, attention_chunk, qv
        flash-attn 3's, accepted where they ask for nothing: 0, 0 and None.
    window_size : (left, right)
        Query ``i`` sees keys from ``i + seqlen_k - seqlen_q - left`` to ``... + right``, both inclusive;
        -1 or None: no limit.  `causal` sets right to 0.
    deterministic : bool
        Accepted for flash-attn's sake: results and gradients here are the same in every run.
    return_attn_probs : bool
        Return (out, lse, S_dmask).  S_dmask is None without dropout; with it, the weights of shape
        (batch, num_heads, seqlen_q, seqlen_k), negative where dropped.
    return_lse : bool
        Return (out, lse).

    Returns
    -------
    out : array, shape (batch, seqlen_q, num_heads, head_dim)
        In the dtype of q, or bfloat16 if that is float8_e4m3fn.
    lse : array, shape (batch, num_heads, seqlen_q)
        -inf where a query sees no key (flash-attn 2 has +inf there, which cannot be merged).

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `attention`.
    """
    function = "flash_attn_func"
    arrays = {"q": ("q", q), "k": ("k", k), "v": ("v", v), **seqlens(seqlens_q, seqlens_k)}
    check_hints(function, pack_gqa, sm_margin, attention_chunk, qv)
    return flash_answer(
        function, arrays,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        q_descale, k_descale, v_descale, return_lse, dropout_seed, compute_dtype, out, lse_out,
        split_size=split_size(function, num_splits, k),
    )  # fmt: skip


# fmt: off
@overload
def flash_attn_qkvpacked_func(
    qkv: A, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int | None, int | None] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: Literal[False] = ..., *,
    q_descale: Array | None = ..., k_descale: Array | None = ..., v_descale: Array | None = ...,
    return_lse: Literal[False] = ..., dropout_seed: int | None = ..., compute_dtype: Any = ...,
    seqlens_q: Array | None = ..., seqlens_k: Array | None = ...,
    out: A | None = ..., lse_out: A | None = ...,
) -> A: ...
@overload
def flash_attn_qkvpacked_func(
    qkv: A, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int | None, int | None] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: Literal[False] = ..., *,
    q_descale: Array | None = ..., k_descale: Array | None = ..., v_descale: Array | None = ...,
    return_lse: Literal[True], dropout_seed: int | None = ..., compute_dtype: Any = ...,
    seqlens_q: Array | None = ..., seqlens_k: Array | None = ...,
    out: A | None = ..., lse_out: A | None = ...,
) -> tuple[A, A]: ...
@overload
def flash_attn_qkvpacked_func(
    qkv: A, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int | None, int | None] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., *, return_attn_probs: Literal[True],
    q_descale: Array | None = ..., k_descale: Array | None = ..., v_descale: Array | None = ...,
    return_lse: bool = ..., dropout_seed: int | None = ..., compute_dtype: Any = ...,
    seqlens_q: Array | None = ..., seqlens_k: Array | None = ...,
    out: A | None = ..., lse_out: A | None = ...,
) -> tuple[A, A, A | None]: ...
@overload
def flash_attn_qkvpacked_func(
    qkv: A, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int | None, int | None] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: bool = ..., *,
    q_descale: Array | None = ..., k_descale: Array | None = ..., v_descale: Array | None = ...,
    return_lse: bool = ..., dropout_seed: int | None = ..., compute_dtype: Any = ...,
    seqlens_q: Array | None = ..., seqlens_k: Array | None = ...,
    out: A | None = ..., lse_out: A | None = ...,
) -> A | tuple[A, A] | tuple[A, A, A | None]: ...
# fmt: on
@recorded(shapes.of_flash, **FLASH)
def flash_attn_qkvpacked_func(
    qkv: Array,
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
    seqlens_q: Array | None = None,
    seqlens_k: Array | None = None,
    out: Array | None = None,
    lse_out: Array | None = None,
) -> Any:
    """flash-attn's flash_attn_qkvpacked_func: `flash_attn_func` of one array (batch, seqlen, 3, num_heads, head_dim).

    Parameters, results and errors as for `flash_attn_func`.
    """
    function = "flash_attn_qkvpacked_func"
    arrays = unpacked(function, "qkv", qkv, 3, "batch, seqlen") | seqlens(seqlens_q, seqlens_k)
    return flash_answer(
        function, arrays,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        q_descale, k_descale, v_descale, return_lse, dropout_seed, compute_dtype, out, lse_out,
    )  # fmt: skip


# fmt: off
@overload
def flash_attn_kvpacked_func(
    q: A, kv: A, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int | None, int | None] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: Literal[False] = ..., *,
    q_descale: Array | None = ..., k_descale: Array | None = ..., v_descale: Array | None = ...,
    return_lse: Literal[False] = ..., dropout_seed: int | None = ..., compute_dtype: Any = ...,
    seqlens_q: Array | None = ..., seqlens_k: Array | None = ...,
    out: A | None = ..., lse_out: A | None = ...,
) -> A: ...
@overload
def flash_attn_kvpacked_func(
    q: A, kv: A, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int | None, int | None] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: Literal[False] = ..., *,
    q_descale: Array | None = ..., k_descale: Array | None = ..., v_descale: Array | None = ...,
    return_lse: Literal[True], dropout_seed: int | None = ..., compute_dtype: Any = ...,
    seqlens_q: Array | None = ..., seqlens_k: Array | None = ...,
    out: A | None = ..., lse_out: A | None = ...,
) -> tuple[A, A]: ...
@overload
def flash_attn_kvpacked_func(
    q: A, kv: A, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int | None, int | None] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., *, return_attn_probs: Literal[True],
    q_descale: Array | None = ..., k_descale: Array | None = ..., v_descale: Array | None = ...,
    return_lse: bool = ..., dropout_seed: int | None = ..., compute_dtype: Any = ...,
    seqlens_q: Array | None = ..., seqlens_k: Array | None = ...,
    out: A | None = ..., lse_out: A | None = ...,
) -> tuple[A, A, A | None]: ...
@overload
def flash_attn_kvpacked_func(
    q: A, kv: A, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int | None, int | None] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: bool = ..., *,
    q_descale: Array | None = ..., k_descale: Array | None = ..., v_descale: Array | None = ...,
    return_lse: bool = ..., dropout_seed: int | None = ..., compute_dtype: Any = ...,
    seqlens_q: Array | None = ..., seqlens_k: Array | None = ...,
    out: A | None = ..., lse_out: A | None = ...,
) -> A | tuple[A, A] | tuple[A, A, A | None]: ...
# fmt: on
@recorded(shapes.of_flash, **FLASH)
def flash_attn_kvpacked_func(
    q: Array,
    kv: Array,
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
    seqlens_q: Array | None = None,
    seqlens_k: Array | None = None,
    out: Array | None = None,
    lse_out: Array | None = None,
) -> Any:
    """flash-attn's flash_attn_kvpacked_func: `flash_attn_func` with k and v in one array.

    `kv` is (batch, seqlen_k, 2, num_heads_kv, head_dim).  Parameters, results and errors as for `flash_attn_func`.
    """
    function = "flash_attn_kvpacked_func"
    arrays = {"q": ("q", q), **unpacked(function, "kv", kv, 2, "batch, seqlen"), **seqlens(seqlens_q, seqlens_k)}
    return flash_answer(
        function, arrays,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        q_descale, k_descale, v_descale, return_lse, dropout_seed, compute_dtype, out, lse_out,
    )  # fmt: skip
