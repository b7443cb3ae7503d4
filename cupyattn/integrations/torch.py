"""The operators of torch that stand for cupyattn's functions in graphs: once this is imported, they are all there.

torch.compile, torch.export, make_fx and torch.jit.trace need no such import: an operator is defined where a call is
first recorded.  A program that was exported, by ``torch.export.load``, may run where nothing was recorded; and
``torch.ops.cupyattn`` may be called by name.

Operators take what the functions of their names take, in that order, by these rules: a pair is a list, with -1 for no
limit; what may be one number or an array is an argument of each kind; a drawn seed of dropout comes last, as a tensor;
a mapping is JSON; nothing is written to an `out`.  They give all results: out and lse, and S_dmask of flash-attn's
functions, empty if it is not asked for.  A number among results, the longest sequence of `unpad_input`, is the length
of a tensor.  ``onnx_attention`` is `cupyattn.integrations.onnx.attention`, and is told last what autocast casts to.

Examples
--------
>>> import torch
>>> import cupyattn.integrations.torch
>>> q = torch.ones(1, 3, 2, 8)
>>> out, lse = torch.ops.cupyattn.attention(q, q, q, causal=True)
>>> out.shape, lse.shape
(torch.Size([1, 3, 2, 8]), torch.Size([1, 2, 3]))
"""

from cupyattn.arrays import define_operators
from cupyattn.integrations import onnx
from cupyattn.linear import linear_attention
from cupyattn.merging import merge_states
from cupyattn.peers import (
    apply_rotary_emb,
    cascade,
    flash_attn_func,
    flash_attn_varlen_func,
    kvcache,
    pad_input,
    rotary_tables,
    scaled_dot_product_attention,
)

OF = (
    *(onnx.attention, linear_attention, merge_states, scaled_dot_product_attention, apply_rotary_emb, rotary_tables),
    *(flash_attn_func, flash_attn_varlen_func, pad_input, cascade.cascade_attention, kvcache.flash_attn_with_kvcache),
)
"""One of each room whose functions are operators, too, and that nobody has imported before it is asked for."""

define_operators()
