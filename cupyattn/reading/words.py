"""Keywords of others: what a word is called here, or where the thing is that somebody asked for."""

from __future__ import annotations

from collections.abc import Sequence

from cupyattn.reading.refusals import refusal

SAME = (
    *(("q", "query"), ("k", "key"), ("v", "value")),
    ("causal", "is_causal"),
    ("softmax_scale", "scale"),
    ("mask", "attn_mask"),
    ("bias", "attn_mask"),
    ("window_size", "local_window_size"),
    ("sinks", "learnable_sink"),
    ("block_table", "page_table"),
    ("return_lse", "return_softmax_lse", "return_residual"),
    ("implementation", "backend"),
    ("seqlens_q", "query_seq_lengths", "seqused_q"),
    ("seqlens_k", "key_value_seq_lengths", "seqused_k"),
    ("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k"),
    ("max_seqlen", "max_seqlen_q", "max_seqlen_k"),
    *(("decay", "g"), ("state", "initial_state", "past_state"), ("return_state", "output_final_state")),
    ("rule", "update_rule"),
)
"""Words of torch, JAX, flash-attn, flash-linear-attention, ONNX and ours for one thing."""
ELSEWHERE = {
    "attention takes it": (
        *("softmax_scale", "softcap", "window_size", "alibi_slopes", "sinks", "mask", "bias", "alignment", "layout"),
        *("dropout_p", "dropout_seed", "fixed_split_size", "compute_dtype", "causal", "return_lse"),
        *("q_descale", "k_descale", "v_descale", "out", "lse_out", "seqlens_q", "seqlens_k"),
    ),
    "flash_attn_func and its kind return lse and weights": ("return_attn_probs",),
    "flash_attn_varlen_func takes sequences of different lengths, packed as by unpad_input": (
        *("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen", "max_seqlen_q", "max_seqlen_k"),
    ),
    "flash_attn_varlen_func, flash_attn_with_kvcache and PagedCache have pages": ("block_table", "page_table"),
    "flash_attn_with_kvcache takes it": (
        *("k_cache", "v_cache", "cache_seqlens", "cache_batch_idx", "cache_leftpad", "cu_seqlens_k_new", "num_splits"),
        *("rotary_cos", "rotary_sin", "rotary_interleaved", "rotary_seqlens", "check_indices"),
        *("scheduler_metadata",),
    ),
    "fewer key heads than query heads serve groups anyway: leave it out": ("enable_gqa",),
    "results are the same in every run: leave it out": ("deterministic",),
    "attention takes it, and implementations says it to all calls in a with": ("implementation", "backend"),
    "what runs is chosen by shapes and devices, see explain: leave it out": (*("pack_gqa", "sm_margin"),),
}
"""What to do with a word, where a function has none for the same."""


def unknown_words(function: str, strangers: Sequence[str], words: Sequence[str]) -> str:
    """The text of an error about keywords that a function does not have, but maybe another of its kind."""
    shown = []
    for stranger in strangers:
        others = dict.fromkeys(word for group in SAME if stranger in group for word in group)
        here = " or ".join(word for word in others if word in words)
        there = [(text, word) for word in (stranger, *others) for text, those in ELSEWHERE.items() if word in those]
        if here:
            shown.append((stranger, f"here it is {here}"))
        elif there:
            text, word = there[0]
            shown.append((stranger, text if word == stranger else f"{text}, as {word}"))
        else:
            shown.append((stranger, "nobody has one of this name"))
    rule = f"has no argument {', '.join(strangers)}; it has {', '.join(words)}"
    return refusal(function, rule, *shown)
