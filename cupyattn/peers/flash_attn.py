"""flash-attn's functions, dense and packed: causal masks are aligned bottom-right."""

from __future__ import annotations

from typing import Any

from cupyattn import reading
from cupyattn.arrays import destinations_of, enter, recorded, shapes
from cupyattn.corridor import answer
from cupyattn.problem import Array
from cupyattn.reading import Options, refusal

FLASH: Any = {
    "gives": ("out", "lse", "S_dmask"),
    "always": {"return_lse": True},
    "destinations": ("out", "lse_out"),
    "finish": lambda asked, found: _as_asked(
        asked["return_lse"], asked["return_attn_probs"], asked["dropout_p"], found
    ),
}
"""What their operators have in common."""


@recorded(shapes.of_flash, **FLASH)
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
    arrays = {"q": ("q", q), "k": ("k", k), "v": ("v", v), **_seqlens(seqlens_q, seqlens_k)}
    return _flash(
        function, arrays,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        q_descale, k_descale, v_descale, return_lse, dropout_seed, compute_dtype, out, lse_out,
    )  # fmt: skip


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
    arrays = _unpacked(function, "qkv", qkv, 3, "batch, seqlen") | _seqlens(seqlens_q, seqlens_k)
    return _flash(
        function, arrays,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        q_descale, k_descale, v_descale, return_lse, dropout_seed, compute_dtype, out, lse_out,
    )  # fmt: skip


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
    arrays = {"q": ("q", q), **_unpacked(function, "kv", kv, 2, "batch, seqlen"), **_seqlens(seqlens_q, seqlens_k)}
    return _flash(
        function, arrays,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        q_descale, k_descale, v_descale, return_lse, dropout_seed, compute_dtype, out, lse_out,
    )  # fmt: skip


@recorded(shapes.of_varlen, **FLASH)
def flash_attn_varlen_func(
    q: Array,
    k: Array,
    v: Array,
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
    block_table: Array | None = None,
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
    """flash-attn's flash_attn_varlen_func: sequences of different lengths, packed end to end.

    Parameters
    ----------
    q : array, shape (total_q, num_heads, head_dim)
    k, v : array, shape (total_k, num_heads_kv, head_dim)
        Or pages, (num_pages, page_size, num_heads_kv, head_dim), any page size, if `block_table` is given.
    cu_seqlens_q, cu_seqlens_k : array of int32, shape (batch + 1,)
        Where each sequence starts, and the end of the last one; a sequence may be empty.  Rows of q after
        the end give zeros.  No other integers, as in flash-attn: on a GPU they would cost one more launch.
    max_seqlen_q, max_seqlen_k : int
        At least the longest sequence.
    block_table : array of int32, shape (batch, pages of a sequence), optional
        The page of each page_size keys; entries after a sequence's last page are not looked at.
    others
        As for `flash_attn_func`; `alibi_slopes` (num_heads,) or (batch, num_heads).

    Returns
    -------
    out : array, shape (total_q, num_heads, head_dim)
    lse : array, shape (num_heads, total_q)

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `attention`; also if cu_seqlens decrease, run past their array or exceed max_seqlen, or if
        block_table names a page that does not exist.

    Notes
    -----
    On a GPU nobody waits for the values of cu_seqlens and block_table, so that wrong ones are not refused there: what
    they name outside the arrays is cut off, and rows of `out` that they leave out are not set.
    """
    function = "flash_attn_varlen_func"
    arrays = {
        "q": ("q", q),
        "k": ("k", k),
        "v": ("v", v),
        "cu_seqlens_q": ("cu_seqlens_q", cu_seqlens_q),
        "cu_seqlens_k": ("cu_seqlens_k", cu_seqlens_k),
        "block_table": ("block_table", block_table),
    }
    longest_q = reading.integer(function, "max_seqlen_q", max_seqlen_q, low=0)
    longest_k = reading.integer(function, "max_seqlen_k", max_seqlen_k, low=0)
    return _flash(
        function, arrays,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        q_descale, k_descale, v_descale, return_lse, dropout_seed, compute_dtype, out, lse_out,
        (longest_q, longest_k),
    )  # fmt: skip


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
    arrays = {**_unpacked(function, "qkv", qkv, 3, "total"), "cu_seqlens_q": starts, "cu_seqlens_k": starts}
    longest = reading.integer(function, "max_seqlen", max_seqlen, low=0)
    return _flash(
        function, arrays,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        q_descale, k_descale, v_descale, return_lse, dropout_seed, compute_dtype, out, lse_out,
        (longest, longest),
    )  # fmt: skip


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
    arrays = {"q": ("q", q), **_unpacked(function, "kv", kv, 2, "total_k")}
    arrays |= {"cu_seqlens_q": ("cu_seqlens_q", cu_seqlens_q), "cu_seqlens_k": ("cu_seqlens_k", cu_seqlens_k)}
    longest_q = reading.integer(function, "max_seqlen_q", max_seqlen_q, low=0)
    longest_k = reading.integer(function, "max_seqlen_k", max_seqlen_k, low=0)
    return _flash(
        function, arrays,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        q_descale, k_descale, v_descale, return_lse, dropout_seed, compute_dtype, out, lse_out,
        (longest_q, longest_k),
    )  # fmt: skip


def _flash(
    function: str,
    arrays: dict[str, tuple[str, Any]],
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Any,
    softcap: float,
    alibi_slopes: Array | None,
    deterministic: bool,
    return_attn_probs: bool,
    q_descale: Array | None,
    k_descale: Array | None,
    v_descale: Array | None,
    return_lse: bool,
    dropout_seed: int | None,
    compute_dtype: Any,
    out: Array | None,
    lse_out: Array | None,
    longest: tuple[int, int] | None = None,
) -> Any:
    """What flash-attn's functions have in common; `longest` are the max_seqlens of packed sequences."""
    reading.flag(function, "deterministic", deterministic)
    wants_probs = reading.flag(function, "return_attn_probs", return_attn_probs)
    wants_lse = reading.flag(function, "return_lse", return_lse)
    options = Options(
        axes="bshd" if longest is None else "thd",
        causal=reading.flag(function, "causal", causal),
        window=reading.window(function, "window_size", window_size),
        softmax_scale=reading.softmax_scale(function, "softmax_scale", softmax_scale),
        softcap=reading.softcap(function, softcap),
        dropout_p=reading.dropout_p(function, dropout_p),
        compute_dtype=reading.compute_dtype(function, compute_dtype),
        needs_lse=wants_lse or wants_probs,
        needs_dropout_mask=wants_probs,
        max_seqlen_q=0 if longest is None else longest[0],
        max_seqlen_k=0 if longest is None else longest[1],
        takes_float8=True,
    )
    arrays |= {
        "alibi_slopes": ("alibi_slopes", alibi_slopes),
        "q_descale": ("q_descale", q_descale),
        "k_descale": ("k_descale", k_descale),
        "v_descale": ("v_descale", v_descale),
    }
    into = destinations_of(function, out, lse_out, options.needs_lse)
    found = answer(function, arrays, options, reading.dropout_seed(function, dropout_seed), into=into)
    if wants_probs:
        return found["out"], found["lse"], found.get("dropout_mask")
    return (found["out"], found["lse"]) if wants_lse else found["out"]


def _seqlens(seqlens_q: Array | None, seqlens_k: Array | None) -> dict[str, tuple[str, Any]]:
    return {"seqlens_q": ("seqlens_q", seqlens_q), "seqlens_k": ("seqlens_k", seqlens_k)}


def _as_asked(wants_lse: bool, wants_probs: bool, dropout_p: float, found: Any) -> Any:
    """Of an operator's results, which are out, lse and S_dmask."""
    if wants_probs:
        return found[0], found[1], found[2] if dropout_p > 0.0 else None
    return (found[0], found[1]) if wants_lse else found[0]


def _unpacked(function: str, name: str, packed: Array, count: int, axes: str) -> dict[str, tuple[str, Any]]:
    """The q, k, v (or k, v) in an axis of a packed array, the third from the end, as views."""
    shape = enter(function, {name: (name, packed)}).specs[0][1].shape
    rank = len(axes.split(",")) + 3
    if len(shape) != rank or shape[-3] != count:
        rule = f"{name} has to be ({axes}, {count}, num_heads, head_dim)"
        raise ValueError(refusal(function, rule, (name, shape)))
    words, lead = ("q", "k", "v")[-count:], (slice(None),) * (rank - 3)
    shown = ", ".join(":" * len(lead))
    return {
        word: (f"{name}[{shown}, {i}]", packed[(*lead, i, slice(None), slice(None))]) for i, word in enumerate(words)
    }
