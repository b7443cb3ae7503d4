"""What the calls of flash-attn's functions have in common, dense and packed."""

from __future__ import annotations

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
    "finish": lambda asked, found: as_asked(asked["return_lse"], asked["return_attn_probs"], asked["dropout_p"], found),
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
