"""The scalars of a call, once each of them is known to be right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from cupyattn.problem import Alignment, Axes, Distances, Mask, ScoreEdits, Sizes, Spec
from cupyattn.reading import scalars
from cupyattn.reading.refusals import refusal


class Options(NamedTuple):
    """The scalars of a call, checked one by one; together with the specs they make the Problem."""

    axes: Axes = "bshd"
    causal: bool = False
    alignment: Alignment | None = "bottom-right"
    window: tuple[int | None, int | None] = (None, None)
    softmax_scale: float | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    compute_dtype: str | None = None
    needs_lse: bool = False
    needs_dropout_mask: bool = False
    grouped_heads: bool = True
    """Key heads may be fewer than query heads.  If not, they may only be equal or one."""
    any_rank: bool = False
    """Any number of leading axes, broadcast against each other (torch)."""
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    takes_float8: bool = False
    """q, k and v may be FLOAT8, and then have descales."""
    cached: bool = False
    """k and v are a cache, or the pages of one."""
    distances: Distances | None = None
    """As `ScoreEdits.distances`; never a caller's."""

    def edits(self, head_dim: int, specs: Mapping[str, Spec]) -> ScoreEdits:
        scale = self.softmax_scale
        slopes, bias = specs.get("alibi_slopes"), specs.get("bias")
        return ScoreEdits(
            (float(head_dim) ** -0.5 if head_dim else 1.0) if scale is None else scale,
            self.softcap,
            None if slopes is None else slopes.shape,
            self.distances,
            None if bias is None else bias.shape,
            "sinks" in specs,
        )

    def mask(self, function: str, specs: Mapping[str, Spec], sizes: Sizes) -> Mask:
        left, right = self.window
        if self.causal:
            right = 0
        alignment = self.alignment
        has_diagonal = left is not None or right is not None or "alibi_slopes" in specs
        if alignment is None:
            used = [specs[word] for word in ("seqlens_q", "seqlens_k") if word in specs]
            if has_diagonal and (used or sizes.seqlen_q != sizes.seqlen_k):
                raise ValueError(
                    refusal(
                        function,
                        "alignment has to be chosen where seqlen_q and seqlen_k differ: 'top-left' puts the diagonal "
                        "at key 0 of row 0 (torch), 'bottom-right' at the last key of the last row (flash-attn)",
                        (specs["q"].name, specs["q"].shape, f"seqlen_q = {sizes.seqlen_q}"),
                        (specs["k"].name, specs["k"].shape, f"seqlen_k = {sizes.seqlen_k}"),
                        *((spec.name, spec.shape) for spec in used),
                    )
                )
            alignment = "bottom-right"
        array = specs.get("mask")
        return Mask(left, right, alignment, None if array is None else array.shape)


def attention_options(
    function: str,
    layout: str,
    causal: bool,
    alignment: str | None,
    window_size: Any,
    softmax_scale: float | None,
    softcap: float,
    dropout_p: float,
    compute_dtype: Any,
    return_lse: bool,
    takes_float8: bool = False,
) -> Options:
    """From the arguments of `attention` and its kind; each is refused under its own name."""
    return Options(
        axes=scalars.choice(function, "layout", layout, ("bshd", "bhsd")),
        causal=scalars.flag(function, "causal", causal),
        alignment=scalars.choice(function, "alignment", alignment, (None, "top-left", "bottom-right")),
        window=scalars.window(function, "window_size", window_size),
        softmax_scale=scalars.softmax_scale(function, "softmax_scale", softmax_scale),
        softcap=scalars.softcap(function, softcap),
        dropout_p=scalars.dropout_p(function, dropout_p),
        compute_dtype=scalars.compute_dtype(function, compute_dtype),
        needs_lse=scalars.flag(function, "return_lse", return_lse),
        takes_float8=takes_float8,
    )
