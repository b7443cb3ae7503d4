"""Continuous batching of transformers: requests packed into one row, their keys gathered from pages, or left there.

transformers batches for flash-attn, which is told where requests start, and for its own sdpa and eager, which get a
mask.  What is registered here is taken as flash-attn is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import wraps
from typing import Any

from cupyattn.peers import flash_attn_varlen_func
from cupyattn.peers.kvcache import flash_attn_with_kvcache


def admit(names: Collection[str]) -> None:
    """Have transformers batch under these names, from now on; they may become more.

    Every manager of batches passes two functions of transformers that ask for an implementation by its name.  Where
    there are none, in a transformers without them, names are left to what it says of them.
    """
    try:
        from transformers.generation.continuous_batching import continuous_api, initialization
        from transformers.generation.continuous_batching.cache import ATTN_TYPE_TO_ALLOCATOR, group_layers_by_attn_type

        manager = continuous_api.ContinuousBatchingManager
        switch, check_pages = manager.switch_to_cb_friendly_attn, initialization.ensure_decode_fast_path_is_available
    except (ImportError, AttributeError):
        return
    if getattr(switch, "knows_cupyattn", False):
        return

    @wraps(switch)
    def switch_to_cb_friendly_attn(self: Any, model: Any, *arguments: Any, **keywords: Any) -> Any:
        if model.config._attn_implementation in names:
            return None
        return switch(self, model, *arguments, **keywords)

    @wraps(check_pages)
    def ensure_decode_fast_path_is_available(config: Any, cb_config: Any, user_requested: bool) -> Any:
        if user_requested and config._attn_implementation in names:
            kinds = group_layers_by_attn_type(config)
            if all(ATTN_TYPE_TO_ALLOCATOR[kind].supports_block_table for kind in kinds):
                return None
        return check_pages(config, cb_config, user_requested)

    switch_to_cb_friendly_attn.knows_cupyattn = True  # type: ignore[attr-defined]
    manager.switch_to_cb_friendly_attn = switch_to_cb_friendly_attn  # type: ignore[method-assign]
    initialization.ensure_decode_fast_path_is_available = ensure_decode_fast_path_is_available


def is_batch(others: Mapping[str, Any], sinks: Any) -> bool:
    """Whether a call is one of continuous batching that can be answered without a mask of all rows and keys.

    It says in which pages keys are, or where they have come from; flash-attn's function for the latter has no sinks.
    """
    return others.get("block_table") is not None or (others.get("write_index") is not None and sinks is None)


def attend(
    query: Any,
    key: Any,
    value: Any,
    others: Mapping[str, Any],
    *,
    window_size: tuple[int | None, int | None],
    causal: bool,
    scale: float | None,
    softcap: float,
    sinks: Any,
    compute_dtype: str | None,
) -> Any:
    """Attention of all requests of a batch, (1, seqlen_q, num_heads, head_dim_v).

    Parameters
    ----------
    query, key, value : Tensor, shapes (1, num_heads, seqlen_q, head_dim), (1, num_heads_kv, seqlen_k, head_dim), ...
        Keys and values of all requests, end to end; with a block table those of the new tokens alone, one for each
        request, which go into the pages.
    others : mapping
        What transformers says of the batch.
    """
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    starts_q, starts_k = (others[name].to(q.device) for name in ("cu_seq_lens_q", "cu_seq_lens_k"))
    options: dict[str, Any] = {
        "causal": causal,
        "softmax_scale": scale,
        "softcap": softcap,
        "window_size": window_size,
        "compute_dtype": compute_dtype,
    }
    if others.get("block_table") is None:
        longest = int(others["max_length_q"]), int(others["max_length_k"])
        return flash_attn_varlen_func(q, k, v, starts_q, starts_k, *longest, **options)[None]
    count = q.shape[0]
    q, k, v = (x[:, None] for x in (q, k, v))
    places: dict[str, Any] = {
        "cache_seqlens": starts_k[1 : count + 1] - starts_k[:count] - 1,
        "block_table": others["block_table"],
    }
    k_cache, v_cache = others["k_cache"], others["v_cache"]
    out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, sinks=sinks, **places, **options)
    return out.transpose(0, 1)
