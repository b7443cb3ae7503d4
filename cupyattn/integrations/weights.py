"""The weights of attention, for models that are asked for them: in tiles of rows, each from its scores and its lse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cupyattn.api import attention

TILE_BYTES = 2**25
"""Of the scores of a tile; a tile has a row at least."""


def with_weights(
    query: Any,
    key: Any,
    value: Any,
    keywords: Mapping[str, Any],
    last: int | None = None,
    *,
    hooked: bool = True,
) -> tuple[Any, Any]:
    """Attention, and what each key has of each row: exp(score - lse), without dropout and without what a sink has.

    Weights are computed by torch, so that they have the gradients that scores and lse have.

    Parameters
    ----------
    query, key, value : Tensor
        (batch, seqlen_q, num_heads, head_dim), (batch, seqlen_k, num_heads_kv, head_dim or head_dim_v).
    keywords : mapping
        Of `cupyattn.attention`.
    last : int, optional
        Weights of so many last rows alone.
    hooked : bool
        Whether hooks of saved tensors, as those of checkpointing are, are told of what is saved for the weights.

    Returns
    -------
    out : Tensor, shape (batch, seqlen_q, num_heads, head_dim_v)
    weights : Tensor, shape (batch, num_heads, rows, seqlen_k)
        In the queries' dtype; a row that sees no key has zeros.
    """
    out, lse = attention(query, key, value, **keywords, return_lse=True)
    if hooked:
        return out, _weights(query, key, lse, keywords, last)
    from torch.autograd.graph import saved_tensors_hooks

    # Detached, an output that is saved does not hold on to itself; autograd ties it to its graph again.
    with saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor):
        return out, _weights(query, key, lse, keywords, last)


def _weights(query: Any, key: Any, lse: Any, keywords: Mapping[str, Any], last: int | None) -> Any:
    import torch

    batch, count, num_heads, head_dim = query.shape
    seqlen = key.shape[1]
    first = 0 if last is None else max(0, count - last)
    scale, softcap, mask, bias = (keywords[name] for name in ("softmax_scale", "softcap", "mask", "bias"))
    shift = 0 if keywords["alignment"] == "top-left" else seqlen - count
    exact = query.device.type == "cpu" and keywords["compute_dtype"] != "float32"
    dtype = torch.float64 if exact or query.dtype == torch.float64 else torch.float32
    q, scale = query.transpose(1, 2), head_dim**-0.5 if scale is None else scale
    k = key.transpose(1, 2).to(dtype).repeat_interleave(num_heads // key.shape[2], dim=1).transpose(2, 3)
    step = max(1, TILE_BYTES // max(1, batch * num_heads * seqlen * dtype.itemsize))
    columns = torch.arange(seqlen, device=query.device)
    tiles = []
    for start in range(first, count, step):
        rows = slice(start, min(start + step, count))
        scores = scale * (q[:, :, rows].to(dtype) @ k)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + _of_rows(bias, rows)
        ends = torch.arange(rows.start, rows.stop, device=query.device) + shift
        hidden = _outside(columns - ends[:, None], *keywords["window_size"])
        if mask is not None:
            hidden = ~_of_rows(mask, rows) if hidden is None else hidden | ~_of_rows(mask, rows)
        sums = lse[:, :, rows, None].to(dtype)
        nothing = torch.isneginf(sums)
        hidden = nothing if hidden is None else hidden | nothing
        tiles.append(
            torch.exp(torch.where(hidden, -torch.inf, scores) - torch.where(nothing, 0.0, sums)).to(query.dtype)
        )
    return torch.cat(tiles, dim=2) if tiles else query.new_zeros((batch, num_heads, 0, seqlen))


def _of_rows(edit: Any, rows: slice) -> Any:
    """Of a mask or a bias, which may be the same for all rows."""
    return edit if edit.ndim < 2 or edit.shape[-2] == 1 else edit[..., rows, :]


def _outside(distance: Any, left: int | None, right: int | None) -> Any:
    """Which keys a window hides, by how far they are behind the row's own; None: none."""
    hidden = None if left is None else distance < -left
    if right is None:
        return hidden
    return distance > right if hidden is None else hidden | (distance > right)
