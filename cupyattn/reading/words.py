"""Arguments that a function does not take as they came: unknown, missing, too many; and the keywords of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any, ParamSpec, TypeVar

from cupyattn.reading.refusals import refusal

P = ParamSpec("P")
R = TypeVar("R")
BY_POSITION = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
SAME = (
    *(("q", "query"), ("k", "key"), ("v", "value")),
    ("causal", "is_causal"),
    ("softmax_scale", "scale"),
    ("mask", "attn_mask"),
    ("bias", "attn_mask"),
    ("window_size", "local_window_size"),
    ("sinks", "learnable_sink", "s_aux"),
    ("block_table", "page_table"),
    ("return_lse", "return_softmax_lse", "return_residual"),
    ("implementation", "backend"),
    ("seqlens_q", "query_seq_lengths", "seqused_q"),
    ("seqlens_k", "key_value_seq_lengths", "seqused_k", "cache_seqlens"),
    ("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k"),
    ("max_seqlen", "max_seqlen_q", "max_seqlen_k"),
    *(("decay", "g"), ("state", "initial_state", "past_state"), ("return_state", "output_final_state")),
    ("rule", "update_rule"),
    *(("layers", "num_layers", "num_hidden_layers"), ("num_heads_kv", "num_key_value_heads", "num_kv_heads")),
    *(("dim", "head_dim", "headdim"), ("page_size", "block_size"), ("batch", "batch_size")),
    *(("theta", "base", "rope_theta"), ("scaling", "rope_scaling", "rope_parameters")),
)
"""Words of torch, JAX, flash-attn, flash-linear-attention, vLLM, transformers, ONNX and ours for one thing."""
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
        *("k_cache", "v_cache", "cache_seqlens", "cache_batch_idx", "cache_leftpad", "cu_seqlens_k_new"),
        *("rotary_cos", "rotary_sin", "rotary_interleaved", "rotary_seqlens", "check_indices"),
        *("scheduler_metadata",),
    ),
    "flash_attn_func, flash_attn_varlen_func and flash_attn_with_kvcache take it": ("num_splits",),
    "fewer key heads than query heads serve groups anyway: leave it out": ("enable_gqa",),
    "results are the same in every run: leave it out": ("deterministic",),
    "attention takes it, and implementations says it to all calls in a with": ("implementation", "backend"),
    "what runs is chosen by shapes and devices, see explain: leave it out": (*("pack_gqa", "sm_margin"),),
    "flash-attn 3 has it; here flash_attn_func takes None for it, and says what is the same": ("qv",),
    "flash-attn 3 has it; attention takes it as a mask of chunks": ("attention_chunk",),
    "no code of the caller's runs inside: attention takes arrays, as mask and bias": ("score_mod", "block_mask"),
}
"""What to do with a word, where a function has none for the same."""
OF_PACKED = {
    "seqlens_q": "flash_attn_varlen_func takes it, as seqused_q; here a sequence has the rows that cu_seqlens say",
    "seqlens_k": "flash_attn_varlen_func takes it, as seqused_k; here a sequence has the keys that cu_seqlens say",
}
"""Instead, where sequences are packed: what `attention` takes for dense ones is no help there."""


def in_our_words(function: Callable[P, R]) -> Callable[P, R]:
    """A function or method that says of itself, by its own name, which arguments it does not take."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except TypeError:
            if text := wrong_call(function, args, kwargs):
                raise TypeError(text) from None
            raise

    return call


def wrong_call(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], name: str = "") -> str:
    """What to say of arguments that a function cannot be called with; nothing if it can."""
    asked = signature(function)
    name = name or function.__name__
    if next(iter(asked.parameters), "") == "self":
        owner = type(args[0]).__name__ if args else "Cache"
        named = getattr(args[0], "_named", None) if args else None  # of a layer: by whom its method was called
        name = owner if name == "__init__" else named(name) if named else f"{owner}.{name}"
        asked, args = asked.replace(parameters=list(asked.parameters.values())[1:]), args[1:]
    try:
        asked.bind(*args, **kwargs)
    except TypeError:
        return _wrong(name, asked, args, kwargs)
    return ""


def _wrong(function: str, asked: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    parameters = [x for x in asked.parameters.values() if x.kind is not Parameter.VAR_KEYWORD]
    takes_any = len(parameters) < len(asked.parameters)
    words = [x.name for x in parameters]
    strangers = [] if takes_any else [word for word in kwargs if word not in words]
    if strangers:
        return unknown_words(function, strangers, words)
    by_position = [x.name for x in parameters if x.kind in BY_POSITION]
    if len(args) > len(by_position):
        rule = f"takes {', '.join(by_position) or 'nothing'} by position, and all else by name; it has"
        return refusal(function, f"{rule} {', '.join(words) or 'no arguments'}", ("given by position", len(args)))
    given = by_position[: len(args)]
    if twice := [word for word in given if word in kwargs]:
        return refusal(function, f"{', '.join(twice)} is given by position and by name", ("by position", given))
    needed = [x.name for x in parameters if x.default is Parameter.empty and x.kind is not Parameter.VAR_POSITIONAL]
    missing = [word for word in needed if word not in (*given, *kwargs)]
    rule = f"needs {', '.join(needed)}, and {', '.join(missing)} did not come"
    return refusal(function, rule, ("given", ", ".join((*given, *kwargs)) or "nothing"))


def unknown_words(function: str, strangers: Sequence[str], words: Sequence[str]) -> str:
    """The text of an error about keywords that a function does not have, but maybe another of its kind."""
    shown = []
    packed = OF_PACKED if any(word.startswith("cu_seqlens") for word in words) else {}
    for stranger in strangers:
        others = dict.fromkeys(word for group in SAME if stranger in group for word in group)
        here = " or ".join(word for word in others if word in words)
        there = [(text, word) for word in (stranger, *others) for text, those in ELSEWHERE.items() if word in those]
        if here:
            shown.append((stranger, f"here it is {here}"))
        elif texts := [packed[word] for word in others if word in packed]:
            shown.append((stranger, texts[0]))
        elif there:
            text, word = there[0]
            shown.append((stranger, text if word == stranger else f"{text}, as {word}"))
        elif near := _near(stranger, words):
            shown.append((stranger, f"perhaps {' or '.join(near)}"))
        else:
            shown.append((stranger, "no function here has one of this name"))
    rule = f"has no argument {', '.join(strangers)}; it has {', '.join(words) or 'none'}"
    return refusal(function, rule, *shown)


def _near(stranger: str, words: Sequence[str]) -> list[str]:
    """Words that a misspelt or shortened one may have been meant for, the likeliest first; three at most."""
    from difflib import get_close_matches

    parts = {part for part in stranger.split("_") if len(part) > 2}
    sharing = [word for word in words if stranger in word.split("_") or word in parts]
    return list(dict.fromkeys((*get_close_matches(stranger, words, cutoff=0.75), *sharing)))[:3]
