"""torch's function: causal masks are aligned top-left."""

from __future__ import annotations

from typing import Any, Literal, overload

from cupyattn import reading
from cupyattn.arrays import alignment_meant, enter, recorded, shapes
from cupyattn.corridor import answer
from cupyattn.problem import A, Array
from cupyattn.reading import Options, refusal
from cupyattn.repeating import repeated


# fmt: off
@overload
def scaled_dot_product_attention(
    query: A, key: A, value: A, attn_mask: Array | None = ..., dropout_p: float = ..., is_causal: bool = ..., *,
    scale: float | None = ..., enable_gqa: bool = ..., dropout_seed: int | None = ..., compute_dtype: Any = ...,
    return_lse: Literal[False] = ...,
) -> A: ...
@overload
def scaled_dot_product_attention(
    query: A, key: A, value: A, attn_mask: Array | None = ..., dropout_p: float = ..., is_causal: bool = ..., *,
    scale: float | None = ..., enable_gqa: bool = ..., dropout_seed: int | None = ..., compute_dtype: Any = ...,
    return_lse: Literal[True],
) -> tuple[A, A]: ...
@overload
def scaled_dot_product_attention(
    query: A, key: A, value: A, attn_mask: Array | None = ..., dropout_p: float = ..., is_causal: bool = ..., *,
    scale: float | None = ..., enable_gqa: bool = ..., dropout_seed: int | None = ..., compute_dtype: Any = ...,
    return_lse: bool,
) -> A | tuple[A, A]: ...
# fmt: on
@recorded(shapes.of_sdpa, ("out", "lse"), always={"return_lse": True}, finish=shapes.with_lse)
@repeated()
def scaled_dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    dropout_seed: int | None = None,
    compute_dtype: Any = None,
    return_lse: bool = False,
) -> Any:
    """torch.nn.functional.scaled_dot_product_attention, for any array library.

    Parameters
    ----------
    query : array, shape (..., num_heads, seqlen_q, head_dim)
        Any number of leading axes, including none (and no heads); float16, bfloat16, float32, float64.
    key, value : array, shapes (..., num_heads_kv, seqlen_k, head_dim), (..., num_heads_kv, seqlen_k, head_dim_v)
        Leading axes, heads included, broadcast against each other.
    attn_mask : array, optional
        Boolean (True: takes part) or additive, in the dtype of `query` or float32; broadcasts to
        (..., num_heads, seqlen_q, seqlen_k).  Not together with `is_causal`.  Or torch's causal_upper_left or
        causal_lower_right of these lengths.
    dropout_p : float
        Probability of dropping a weight; applies whenever it is not 0, as torch's does.
    is_causal : bool
        Query ``i`` sees keys ``0 .. i``: aligned top-left, as torch's is.
    scale : float, optional
        Multiplies the scores; finite.  Default ``head_dim ** -0.5``.
    enable_gqa : bool
        Let each key head serve a group of neighbouring query heads; key and value may differ in heads.
    dropout_seed, compute_dtype, return_lse
        As for `attention`.

    Returns
    -------
    out : array, shape (..., num_heads, seqlen_q, head_dim_v)
    lse : array, shape (..., num_heads, seqlen_q), only if `return_lse`

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `attention`; also if `attn_mask` and `is_causal` are both given.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> x = np.ones((2, 5, 4), np.float32)
    >>> cupyattn.scaled_dot_product_attention(x, x, x, is_causal=True).shape
    (2, 5, 4)
    """
    function = "scaled_dot_product_attention"
    causal = reading.flag(function, "is_causal", is_causal)
    if attn_mask is not None and causal:
        rule = "attn_mask and is_causal exclude each other; put the causal part into the mask"
        raise ValueError(refusal(function, rule, ("is_causal", is_causal), ("attn_mask", "given")))
    arrays: dict[str, tuple[str, Any]] = {"q": ("query", query), "k": ("key", key), "v": ("value", value)}
    meant = alignment_meant(attn_mask)
    if meant is not None:
        _check_lengths(function, arrays, meant[1])
        causal, attn_mask = True, None
    options = Options(
        axes="bhsd",
        causal=causal,
        alignment="top-left" if meant is None else meant[0],
        softmax_scale=reading.softmax_scale(function, "scale", scale),
        dropout_p=reading.dropout_p(function, dropout_p),
        compute_dtype=reading.compute_dtype(function, compute_dtype),
        needs_lse=reading.flag(function, "return_lse", return_lse),
        grouped_heads=reading.flag(function, "enable_gqa", enable_gqa),
        any_rank=True,
    )
    if attn_mask is not None:
        visit = enter(function, {**arrays, "bias": ("attn_mask", attn_mask)})
        specs = dict(visit.specs)
        kind = specs["bias"].dtype
        if kind not in ("bool", "float32", specs["q"].dtype):
            rule = f"attn_mask has to be bool, float32 or of query's dtype, {specs['q'].dtype}; attn_mask != 0 is bool"
            raise TypeError(refusal(function, rule, ("attn_mask", specs["bias"].shape, kind)))
        arrays = {word: (specs[word].name, array) for word, array in visit.arrays.items()}
        if kind == "bool":
            arrays["mask"] = arrays.pop("bias")
    found = answer(function, arrays, options, reading.dropout_seed(function, dropout_seed))
    if query.ndim == key.ndim == value.ndim == 2:  # no head axis came, so none goes
        found = {name: array[0, ...] for name, array in found.items()}
    return (found["out"], found["lse"]) if return_lse else found["out"]


def _check_lengths(function: str, arrays: dict[str, tuple[str, Any]], lengths: tuple[int, ...]) -> None:
    """Refuse a causal bias between other lengths than those of query and key."""
    shapes = [spec.shape for _, spec in enter(function, arrays).specs]
    if any(len(shape) > 1 and shape[-2] != length for shape, length in zip(shapes, lengths, strict=False)):
        rule = f"attn_mask is causal between {lengths[0]} queries and {lengths[1]} keys"
        raise ValueError(refusal(function, rule, ("query", shapes[0]), ("key", shapes[1])))
