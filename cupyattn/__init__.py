"""Exact attention for any array: NumPy, CuPy, torch, JAX and every other array-API library.

`attention` is the whole of it; the functions under their peers' names (`scaled_dot_product_attention`,
`flash_attn_func`, ...) are for code that exists already.  Importing this imports NumPy and
nothing else: what one function, one array library or one device needs comes with its first call.
"""

from typing import TYPE_CHECKING

from cupyattn import serving
from cupyattn.allowed import implementations
from cupyattn.api import Gradients, attention, attention_backward
from cupyattn.doors import opened_late
from cupyattn.plan import Plan

if TYPE_CHECKING:
    from cupyattn.cache import (
        Cache,
        DynamicCache,
        LayeredCache,
        OffloadedCache,
        PagedCache,
        PrefixCache,
        SlidingWindowCache,
        StaticCache,
        kv_cache_bytes,
    )
    from cupyattn.explaining import explain
    from cupyattn.linear import LinearGradients, linear_attention, linear_attention_backward
    from cupyattn.merging import merge_states
    from cupyattn.peers import (
        apply_rotary_emb,
        flash_attn_func,
        flash_attn_kvpacked_func,
        flash_attn_qkvpacked_func,
        flash_attn_varlen_func,
        flash_attn_varlen_kvpacked_func,
        flash_attn_varlen_qkvpacked_func,
        pad_input,
        rotary_tables,
        scaled_dot_product_attention,
        unpad_input,
    )
    from cupyattn.peers.cascade import cascade_attention
    from cupyattn.peers.kvcache import flash_attn_with_kvcache
    from cupyattn.peers.scheduling import get_scheduler_metadata

__version__ = "0.2.0"

__all__ = [
    "Cache",
    "DynamicCache",
    "Gradients",
    "LayeredCache",
    "LinearGradients",
    "OffloadedCache",
    "PagedCache",
    "Plan",
    "PrefixCache",
    "SlidingWindowCache",
    "StaticCache",
    "__version__",
    "apply_rotary_emb",
    "attention",
    "attention_backward",
    "cascade_attention",
    "explain",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "implementations",
    "kv_cache_bytes",
    "linear_attention",
    "linear_attention_backward",
    "merge_states",
    "pad_input",
    "rotary_tables",
    "scaled_dot_product_attention",
    "unpad_input",
]

serving.begin()

if not TYPE_CHECKING:  # or every misspelt name would be one, of type Any
    __getattr__ = opened_late(
        __name__,
        {
            "cache": (
                "Cache",
                "DynamicCache",
                "LayeredCache",
                "OffloadedCache",
                "PagedCache",
                "PrefixCache",
                "SlidingWindowCache",
                "StaticCache",
                "kv_cache_bytes",
            ),
            "explaining": ("explain",),
            "linear": ("LinearGradients", "linear_attention", "linear_attention_backward"),
            "merging": ("merge_states",),
            "peers": (
                "apply_rotary_emb",
                "flash_attn_func",
                "flash_attn_kvpacked_func",
                "flash_attn_qkvpacked_func",
                "flash_attn_varlen_func",
                "flash_attn_varlen_kvpacked_func",
                "flash_attn_varlen_qkvpacked_func",
                "pad_input",
                "rotary_tables",
                "scaled_dot_product_attention",
                "unpad_input",
            ),
            "peers.cascade": ("cascade_attention",),
            "peers.kvcache": ("flash_attn_with_kvcache",),
            "peers.scheduling": ("get_scheduler_metadata",),
        },
    )


def __dir__() -> list[str]:
    return list(__all__)
