"""The functions users already know, under their names: torch's, flash-attn's and FlashInfer's.

Positional order, defaults and meaning are the peer's, so that changing the import is the whole
migration; what is keyword-only after ``*`` is ours.

A room is imported when one of its functions is first asked for; `kvcache`, `scheduling` and `cascade`, which are for
decoding, are asked for by their own names.  `appending`, new keys on their way into a cache, and `overlap`, which of
its tokens share bytes, are what `kvcache` is made of; `frequencies`, how fast features turn, of what `tables` is.
"""

from typing import TYPE_CHECKING

from cupyattn.doors import opened_late

if TYPE_CHECKING:
    from cupyattn.peers.flash_attn import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func
    from cupyattn.peers.padding import pad_input, unpad_input
    from cupyattn.peers.rotary import apply_rotary_emb
    from cupyattn.peers.tables import rotary_tables
    from cupyattn.peers.torch import scaled_dot_product_attention
    from cupyattn.peers.varlen import (
        flash_attn_varlen_func,
        flash_attn_varlen_kvpacked_func,
        flash_attn_varlen_qkvpacked_func,
    )

__all__ = [
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
]

if not TYPE_CHECKING:  # or every misspelt name would be one, of type Any
    __getattr__ = opened_late(
        __name__,
        {
            "flash_attn": ("flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func"),
            "padding": ("pad_input", "unpad_input"),
            "rotary": ("apply_rotary_emb",),
            "tables": ("rotary_tables",),
            "torch": ("scaled_dot_product_attention",),
            "varlen": (
                "flash_attn_varlen_func",
                "flash_attn_varlen_kvpacked_func",
                "flash_attn_varlen_qkvpacked_func",
            ),
        },
    )
