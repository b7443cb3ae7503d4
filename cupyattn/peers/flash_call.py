"""What the calls of flash-attn's functions have in common, dense and packed."""

from __future__ import annotations

import math
from typing import Any

from cupyattn import reading
from cupyattn.arrays import destinations_of, enter
from cupyattn.corridor import answer
from cupyattn.problem import Array
from cupyattn.reading import Options, refusal

FLASH: Any = {
    "gives": ("out", "lse", "S_dmask"),
    "always": {"return_lse": True},
    "destinations": ("out", "lse_out"),
    "finish": lambda asked, found: as_asked(
        asked["return_lse"] or asked.get("return_softmax_lse", False),
        asked["return_attn_probs"],
        asked["dropout_p"],
        found,
    ),
}
"""What their operators have in common."""


def flash_answer(
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
    split_size: int | None = None,
) -> Any:
    """What flash-attn's functions have in common; `longest` are the max_seqlens of packed sequences,
    `split_size` keys are a split."""
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
    found = answer(function, arrays, options, reading.dropout_seed(function, dropout_seed), split_size, into=into)
    if wants_probs:
        return found["out"], found["lse"], found.get("dropout_mask")
    return (found["out"], found["lse"]) if wants_lse else found["out"]


def check_hints(function: str, pack_gqa: Any, sm_margin: Any, attention_chunk: Any, qv: Any) -> None:
    """What flash-attn 3 has and nothing here, where it asks for nothing; and `pack_gqa`, which changes no result."""
    if pack_gqa is not None:
        reading.flag(function, "pack_gqa", pack_gqa)
    if reading.integer(function, "sm_margin", sm_margin, low=0) > 0:
        rule = "sm_margin has to be 0: no multiprocessors are kept free"
        raise ValueError(refusal(function, rule, ("sm_margin", sm_margin)))
    if reading.integer(function, "attention_chunk", attention_chunk, low=0) > 0:
        rule = "attention_chunk has to be 0: attention takes chunks, as a mask of them"
        raise ValueError(refusal(function, rule, ("attention_chunk", attention_chunk)))
    if qv is not None:
        rule = (
            "qv has to be None: instead of it concatenate q and qv, and k and v, along head_dim, and give softmax_scale"
        )
        raise NotImplementedError(refusal(function, rule))


def split_size(function: str, num_splits: Any, keys: Any) -> int | None:
    """Keys of each of at most so many splits, of all keys or of a k that has them; None: whoever plans chooses."""
    count = reading.integer(function, "num_splits", num_splits, low=0)
    if count == 0:
        return None
    longest: int = keys if isinstance(keys, int) else 1
    if not isinstance(keys, int) and len(shape := enter(function, {"k": ("k", keys)}).specs[0][1].shape) > 1:
        longest = shape[1]  # a shape that is wrong is refused later, with all that is
    return math.ceil(max(1, longest) / count)


def seqlens(seqlens_q: Array | None, seqlens_k: Array | None) -> dict[str, tuple[str, Any]]:
    return {"seqlens_q": ("seqlens_q", seqlens_q), "seqlens_k": ("seqlens_k", seqlens_k)}


def as_asked(wants_lse: bool, wants_probs: bool, dropout_p: float, found: Any) -> Any:
    """Of an operator's results, which are out, lse and S_dmask."""
    if wants_probs:
        return found[0], found[1], found[2] if dropout_p > 0.0 else None
    return (found[0], found[1]) if wants_lse else found[0]


def unpacked(function: str, name: str, packed: Array, count: int, axes: str) -> dict[str, tuple[str, Any]]:
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
