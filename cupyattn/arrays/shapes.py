"""Shape and dtype of what each public function returns, from its arguments: what a graph is made of before it runs.

Nothing here compares a size with another, so that a graph whose sizes are symbols is one for all of them.  Whether the
arguments fit each other has been found out before, see `outlines`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cupyattn.reading import refusal

Values = Mapping[str, Any]
"""Arguments by the caller's names; torch's tensors, with or without values."""
Result = tuple[tuple[Any, ...], Any]
"""Shape and dtype."""
Results = Callable[[Values], list[Result]]
Finish = Callable[[Values, Any], Any]
"""What was asked, and an operator's results, to what the function returns."""


def with_lse(asked: Values, found: Any) -> Any:
    """What was asked of out and lse."""
    return tuple(found) if asked["return_lse"] else found[0]


def of_attention(values: Values) -> list[Result]:
    """out and lse."""
    q, k, v = (values[name] for name in ("q", "k", "v"))
    heads, rows = (1, 2) if values["layout"] == "bhsd" else (2, 1)
    batch = _broadcast(q.shape[:1], k.shape[:1], v.shape[:1])
    return [((*batch, *q.shape[1:3], v.shape[3]), _out(q)), ((*batch, q.shape[heads], q.shape[rows]), _lse(q))]


def of_sdpa(values: Values) -> list[Result]:
    """out and lse; a query without heads has none in its results, if key and value have none either."""
    operands = [values[name] for name in ("query", "key", "value")]
    q, _, v = operands
    if values["enable_gqa"]:
        heads = q.shape[-3:-2] if q.dim() > 2 else (1,)
        lead = (*_broadcast(*(x.shape[:-3] for x in operands)), *heads)
    else:
        lead = _broadcast(*(x.shape[:-2] for x in operands))
    if values["enable_gqa"] and all(x.dim() == 2 for x in operands):
        lead = ()
    return [((*lead, q.shape[-2], v.shape[-1]), _out(q)), ((*lead, q.shape[-2]), _lse(q))]


def of_flash(values: Values) -> list[Result]:
    """out, lse, and flash-attn's S_dmask, which is empty if it was not asked for."""
    q, k, v = _unpacked(values)
    batch = _broadcast(q.shape[:1], k.shape[:1], v.shape[:1])
    results = [((*batch, *q.shape[1:3], v.shape[3]), _out(q)), ((*batch, q.shape[2], q.shape[1]), _lse(q))]
    return [*results, _dropout_mask(values, q, (*batch, q.shape[2], q.shape[1], k.shape[1]))]


def of_varlen(values: Values) -> list[Result]:
    """The same of sequences packed end to end."""
    q, _, v = _unpacked(values)
    starts = values["cu_seqlens"] if "cu_seqlens" in values else values["cu_seqlens_q"]
    results = [((*q.shape[:2], v.shape[-1]), _out(q)), ((q.shape[1], q.shape[0]), _lse(q))]
    longest = [values.get(name, values.get("max_seqlen")) for name in ("max_seqlen_q", "max_seqlen_k")]
    return [*results, _dropout_mask(values, q, (starts.shape[0] - 1, q.shape[1], *longest))]


def of_kvcache(values: Values) -> list[Result]:
    """out and lse of rows before a cache."""
    q, v = values["q"], values["v_cache"]
    lse = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return [((*q.shape[:-1], v.shape[-1]), _out(q)), (lse, _lse(q))]


def of_cascade(values: Values) -> list[Result]:
    q, v = values["q"], values["v"]
    return [((*q.shape[:3], v.shape[3]), _out(q)), ((q.shape[0], q.shape[2], q.shape[1]), _lse(q))]


def of_states(values: Values) -> list[Result]:
    return [(tuple(x.shape), x.dtype) for x in (values["outs"][0], values["lses"][0])]


def of_rotary(values: Values) -> list[Result]:
    return [(tuple(x.shape), x.dtype) for x in values["x"]]


def of_padded(values: Values) -> list[Result]:
    rows = values["hidden_states"]
    return [((values["batch"], values["seqlen"], *rows.shape[1:]), rows.dtype)]


def of_unpadded(values: Values) -> list[Result]:
    """The packed rows, of which there are as many as a mask says; its longest sequence is the length of a tensor."""
    import torch

    try:
        context = torch.library.get_ctx()
    except RuntimeError:
        context = None
    if context is None:
        rule = "needs the values of attention_mask, on which the number of rows depends"
        raise TypeError(refusal("unpad_input", rule, ("attention_mask", tuple(values["attention_mask"].shape))))
    rows = values["hidden_states"]
    total, longest = context.new_dynamic_size(), context.new_dynamic_size()
    starts = values["attention_mask"].shape[0]
    return [
        ((total, *rows.shape[2:]), rows.dtype),
        ((total,), torch.int64),
        ((starts + 1,), torch.int32),
        ((longest,), rows.dtype),
        ((starts,), torch.int32),
    ]


def of_tables(values: Values) -> list[Result]:
    """Cosines and sines."""
    import json

    import torch

    scaling = json.loads(values["scaling"] or "{}")
    share = 1.0 if scaling.get("rope_type") == "proportional" else scaling.get("partial_rotary_factor") or 1.0
    shape = (*values["positions"].shape, int(values["dim"] * share) // 2)
    return [(shape, getattr(torch, values["dtype"]))] * 2


def of_linear(values: Values) -> list[Result]:
    """out, and the state after the last token."""
    import torch

    q, v, state = values["q"], values["v"], values["state"]
    heads = 1 if values["layout"] == "bhsd" else 2
    kind = state.dtype if state is not None else torch.float64 if q.dtype == torch.float64 else torch.float32
    return [((*q.shape[:-1], v.shape[-1]), q.dtype), ((q.shape[0], v.shape[heads], q.shape[-1], v.shape[-1]), kind)]


def of_onnx(values: Values) -> list[Result]:
    """Y, present keys and values, and scores, which are empty if they were not asked for."""
    import torch

    q, k, v = (_heads_first(values[word], values[count]) for word, count in _HEADS)
    (batch, heads, rows, _), (_, heads_kv, keys, head_dim), head_dim_v = q, k, v[3]
    if values["past_key"] is not None:
        keys = keys + values["past_key"].shape[2]
    flat = values["Q"].dim() == 3
    out = (batch, rows, heads * head_dim_v) if flat else (batch, heads, rows, head_dim_v)
    scores = (0,) if values["qk_matmul_output_mode"] is None else (batch, heads, rows, keys)
    present = [(batch, heads_kv, keys, head_dim), (batch, heads_kv, keys, head_dim_v)]
    kind = values["Q"].dtype
    cast = values["autocast"] is not None and kind != torch.float64
    return [(out, getattr(torch, values["autocast"]) if cast else kind), *((x, kind) for x in (*present, scores))]


_HEADS = (("Q", "q_num_heads"), ("K", "kv_num_heads"), ("V", "kv_num_heads"))


def _heads_first(array: Any, heads: Any) -> Any:
    """(batch, heads, seqlen, head_dim), of this or of heads side by side."""
    if array.dim() == 4:
        return array.shape
    return array.shape[0], heads, array.shape[1], array.shape[2] // heads


def of_linear_gradients(values: Values) -> list[Result]:
    """Those of what was given."""
    given = [values[name] for name in ("q", "k", "v", "decay", "beta", "state")]
    return [(tuple(x.shape), x.dtype) for x in given if x is not None]


def of_gradients(values: Values) -> list[Result]:
    """Those of what was given."""
    given = [values[name] for name in ("q", "k", "v", "bias", "sinks", "alibi_slopes")]
    return [(tuple(x.shape), x.dtype) for x in given if x is not None]


def _unpacked(values: Values) -> list[Any]:
    """q, k and v, out of what may hold two or three of them in its third axis from the end."""
    if "qkv" in values:
        return list(values["qkv"].unbind(-3))
    return [values["q"], *values["kv"].unbind(-3)] if "kv" in values else [values[name] for name in ("q", "k", "v")]


def _broadcast(*shapes: Any) -> tuple[Any, ...]:
    import torch

    broadcast: Any = torch.broadcast_shapes
    return tuple(broadcast(*shapes))


def _out(q: Any) -> Any:
    import torch

    return torch.bfloat16 if q.dtype == torch.float8_e4m3fn else q.dtype


def _lse(q: Any) -> Any:
    import torch

    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _dropout_mask(values: Values, q: Any, shape: tuple[Any, ...]) -> Result:
    asked = values["return_attn_probs"] and values["dropout_p"] > 0.0
    return (shape if asked else (0,)), _out(q)
