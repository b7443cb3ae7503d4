"""cupyattn as an attention implementation of Hugging Face transformers, 5.0 or newer.

    from cupyattn.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="cupyattn")

A model calls `attend` once a layer, with tensors (batch, heads, seqlen, head_dim) and whatever else it knows.

An argument can change what attention means only if one of transformers' own attention functions reads it, or the layer
names it when it calls.  Of the first kind are the parameters of `attend`, `REFUSED` and `PACKED`; what the layer names
and we do not know is refused.  All else came along in a model's ``**kwargs``, for its loss or out of a collator, and
changes nothing, as with "eager" and "sdpa".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from cupyattn import reading
from cupyattn.api import attention
from cupyattn.integrations import batching, models
from cupyattn.integrations.weights import with_weights
from cupyattn.reading import refusal

FUNCTION = "cupyattn in transformers"

MEANINGLESS = frozenset(
    {
        *("position_ids", "cache_position", "use_cache", "past_key_values"),
        "deterministic",  # results here are the same in every run
    }
)
"""Arguments that layers name and that change nothing about attention, or did so before, in the mask."""

REFUSED = {
    "head_mask": "heads cannot be masked",
    "cache": "this transformers batches in another way than 5.24, which is known here",
    "indices": "keys chosen by their indices are not supported",
    "block_indices": "keys chosen by their blocks are not supported",
    "sinks": "a sink for every query is not supported; s_aux, one for every head, is",
}
"""Arguments that change the meaning in a way that is not offered."""

PACKED = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"})
"""What says where sequences packed into one row start."""


def register(
    name: str = "cupyattn", *, compute_dtype: Any = None, ignored: Iterable[str] = (), last_queries: int | None = None
) -> None:
    """Register attention and its masks with transformers, for every model of this process.

    Afterwards ``attn_implementation=name`` chooses it, in ``from_pretrained``, ``_from_config`` and
    ``model.set_attn_implementation``, for tensors on the CPU and on an NVIDIA GPU.

    Parameters
    ----------
    name : str
        What to register under.  Registering again replaces what was there.
    compute_dtype : {"float64", "float32"}, optional
        Of the arithmetic on the CPU, as for `cupyattn.attention`.  Default float64, rounded once.
    ignored : iterable of str
        Names of arguments that a model's layers hand to attention and that may be left out of account.  Others that
        they name and are not known here raise a TypeError.
    last_queries : int, optional
        Of the weights of each layer, if a model is asked for them, those of so many last queries; default all.

    Raises
    ------
    ImportError
        transformers is not installed, or older than 5.0.
    TypeError, ValueError
        `name` or `ignored` are not names, `name` means something else to transformers, `compute_dtype` is not one of
        those above, or `last_queries` not an integer from 1 on.

    Notes
    -----
    Rows that see no key, those of left padding, give zeros, where ``"eager"`` gives the mean of all values; no
    token depends on them.  Dropout applies while the module is training, its seed is drawn from torch's generator.
    ``model(..., output_attentions=True)`` gives the weights, (batch, num_heads, seqlen_q, seqlen_k), without dropout,
    for which scores are computed once more, some rows at a time; torch.compile leaves such a call as it is.  Models
    whose layers are not told of that wish (GPT-2, OPT, Siglip and others) give them with transformers 5.2 or newer, and
    None before.

    Under torch.autocast queries, keys and values are cast as torch's own attention casts them.

    Models that do not hand their attention over (Bloom, for one), that look a class up by the name (Falcon) or support
    no implementation but their own (NllbMoe) keep ``"eager"``, however they are made, and a warning names them.  It is
    told by the flags and the source of their class: the first registration wraps the method of transformers,
    ``PreTrainedModel.get_correct_attn_implementation``, that every way of making a model passes.  Other names than
    those registered here go through it unchanged.

    ``generate_batch`` (continuous batching) packs requests into one row and says where they start; with
    ``max_blocks_per_request`` in its configuration, one token of each request is appended to its pages and attends to
    them by `flash_attn_with_kvcache`.  ``"paged|"`` before the name is accepted and means the same.

    Sequences packed into one row, told by ``cu_seq_lens_q`` and ``cu_seq_lens_k`` or by ``seq_idx``, do not see each
    other, whatever the mask says; where attention is in chunks (Llama 4), these are counted in each of them.

    Arguments that neither transformers' attention functions read nor the layer names, those of a loss or a collator's
    columns, change nothing.

    Under torch.compile, torch.export, torch.jit.trace and make_fx a layer's attention is one operator,
    ``torch.ops.cupyattn.attention``, without a graph break, as every call of `cupyattn.attention` is; the operator has
    gradients.  What it does is not fused with anything.

    Gradients exist on the CPU only, as for `cupyattn.attention`.
    """
    models.refuse_name(name)
    names = frozenset([ignored] if isinstance(ignored, str) else ignored)
    if not all(isinstance(each, str) for each in names):
        raise TypeError(refusal("register", "ignored has to hold names of arguments", ("ignored", repr(ignored))))
    compute = reading.compute_dtype("register", compute_dtype)
    last = None if last_queries is None else reading.integer("register", "last_queries", last_queries, low=1)
    try:
        import torch  # noqa: F401 - transformers can be imported without it
        import transformers
    except ImportError as error:
        rule = "needs transformers 5.0 or newer and torch: pip install 'transformers>=5' torch"
        raise ImportError(refusal("register", rule)) from error
    if int(transformers.__version__.partition(".")[0]) < 5:
        rule = "needs transformers 5.0 or newer"
        raise ImportError(refusal("register", rule, ("transformers", transformers.__version__)))
    models.admit(name)
    batching.admit(models.NAMES)
    from cupyattn.integrations import torch as operators  # noqa: F401 - which are there once this is imported

    try:
        from transformers.utils.output_capturing import _active_collector as collector
    except ImportError:  # before 5.2
        collector = None  # type: ignore[assignment]
    function = partial(attend, compute_dtype=compute, ignored=names, last_queries=last, collector=collector)
    for each in (name, f"paged|{name}"):  # as transformers has two names for its own
        transformers.AttentionInterface.register(each, function)
        # Without a mask function of its own an implementation is handed no mask at all, padding or not.
        transformers.AttentionMaskInterface.register(each, models.mask)


def attend(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Any = None,
    sliding_window: int | None = None,
    position_bias: Any = None,
    *,
    compute_dtype: str | None = None,
    ignored: frozenset[str] = frozenset(),
    last_queries: int | None = None,
    collector: Any = None,
    output_attentions: bool | None = False,
    **others: Any,
) -> tuple[Any, Any]:
    """One layer's attention, as transformers calls it.

    Parameters
    ----------
    module : torch.nn.Module
        The layer, asked for `is_causal` and whether it is `training`.
    query : Tensor, shape (batch, num_heads, seqlen_q, head_dim)
    key, value : Tensor, shapes (batch, num_heads_kv, seqlen_k, head_dim), (batch, num_heads_kv, seqlen_k, head_dim_v)
    attention_mask : Tensor that broadcasts to (batch, num_heads, seqlen_q, seqlen_k), or None
        Boolean (True: may be seen) or additive.  It is the whole truth about who sees whom, windows included.
        None: causal if the layer is, a single query sees every key.
    scaling, softcap
        As `softmax_scale` and `softcap` of `cupyattn.attention`.
    dropout : float
        As `dropout_p`, while the layer is training.
    is_causal : bool, optional
        Instead of the layer's own.
    s_aux : Tensor, shape (num_heads,), optional
        Sinks.
    sliding_window : int, optional
        A query sees itself and so many keys less one before it, and as many after it if it is not causal.
    position_bias : Tensor that broadcasts like the mask, optional
        Added to the scores.
    collector : object, optional
        What transformers' models collect from their layers while they run: `get()` gives it by its names.

    Returns
    -------
    out : Tensor, shape (batch, seqlen_q, num_heads, head_dim_v)
    weights : Tensor, shape (batch, num_heads, rows, seqlen_k), or None
        With `output_attentions`, or where they are collected, those of the last `last_queries` rows, or of all.
    """
    _refuse_unknown(module, others, ignored)
    collected = not output_attentions and collector is not None and _are_collected(module, collector)
    if (output_attentions or collected) and (_is_recorded() or batching.is_batch(others, s_aux)):
        rule = "output_attentions: weights are neither for compiled or traced calls nor for continuous batching"
        raise NotImplementedError(refusal(FUNCTION, rule, ("layer", type(module).__name__)))
    mask, numbers = _mask_or_numbers(module, attention_mask)
    left = right = None
    if attention_mask is None:
        left = right = None if sliding_window is None else sliding_window - 1
        if getattr(module, "is_causal", True) if is_causal is None else is_causal:
            right = 0
    is_batch = attention_mask is None and position_bias is None and batching.is_batch(others, s_aux)
    if not is_batch and any(others.get(name) is not None for name in PACKED):
        together = _packed(module, query, key, others, left, right)
        mask, numbers = _of_sequences(module, together, mask, numbers)
        left = right = None
    bias = numbers if position_bias is None else position_bias if numbers is None else position_bias + numbers
    query, key, value, bias = _as_autocast_does(query, key, value, bias)
    if is_batch:
        said: dict[str, Any] = {"scale": scaling, "softcap": softcap or 0.0, "sinks": s_aux}
        said |= {"window_size": (left, right), "causal": right == 0, "compute_dtype": compute_dtype}
        return batching.attend(query, key, value, others, **said), None
    if query.shape[0] == 1 < key.shape[0]:  # learned queries, the same for a whole batch
        query = query.expand(key.shape[0], -1, -1, -1)
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    dropout_p = float(dropout) if module.training else 0.0
    # Of several queries without a mask the first sees the first key, whatever room a cache has; a lone one is the last.
    several = bool(query.shape[2] > 1)
    rest: tuple[Any, ...] = (left, right, several, scaling, softcap or 0.0, dropout_p, compute_dtype)
    keywords = _keywords(mask, bias, s_aux, *rest)
    if output_attentions or collected:
        # A layer that is checkpointed is computed again when nothing is collected: it must not save more for that.
        return with_weights(q, k, v, keywords, last_queries, hooked=not collected)
    return attention(q, k, v, **keywords), None


def _is_recorded() -> bool:
    """Whether calls are written down to be repeated with other numbers: torch.compile, export, jit.trace, make_fx."""
    import torch

    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    return bool(torch._C._len_torch_dispatch_stack())


def _are_collected(module: Any, collector: Any) -> bool:
    """Whether a model around this layer collects weights of attention, of which not every layer is told."""
    import torch

    # Of a model that is not compiled as a whole; a layer from which anything is collected has a hook then, too.
    if torch.compiler.is_dynamo_compiling() and not collector.compiling and not module._forward_hooks:
        return False
    names = collector.get()
    return names is not None and any(name.endswith("attentions") for name in names)


def _as_autocast_does(query: Any, *others: Any) -> tuple[Any, ...]:
    """In autocast's dtype where it is enabled, which torch's own attention would do; float64 stays."""
    import torch

    given = (query, *others)
    kind = query.device.type
    if not torch.is_autocast_enabled(kind):
        return given
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in given)


def _refuse_unknown(module: Any, others: Mapping[str, Any], ignored: frozenset[str]) -> None:
    layer = ("layer", type(module).__name__)
    for name, given in others.items():
        if given is None or given is False or name in MEANINGLESS or name in ignored or name in PACKED:
            continue
        came = (name, type(given).__name__)
        if name in REFUSED:
            raise NotImplementedError(refusal(FUNCTION, f"{name}: {REFUSED[name]}", came, layer))
        if models.names(type(module), name):
            rule = f"{name} is not known here, and may change what attention means"
            raise TypeError(refusal(FUNCTION, f"{rule}; register(ignored=[{name!r}]) ignores it", came, layer))


def _mask_or_numbers(module: Any, attention_mask: Any) -> tuple[Any, Any]:
    """Who may be seen, or what is added to the scores; None for what the mask is not."""
    import torch

    if attention_mask is None:
        return None, None
    layer = ("layer", type(module).__name__)
    shape = getattr(attention_mask, "shape", None)
    if shape is None or not isinstance(attention_mask, torch.Tensor) or len(shape) != 4:
        rule = "attention_mask has to be a tensor (batch, num_heads, seqlen_q, seqlen_k), or broadcast to it"
        came = ("attention_mask", type(attention_mask).__name__, "" if shape is None else str(tuple(shape)))
        raise ValueError(refusal(FUNCTION, rule, came, layer))
    if attention_mask.dtype == torch.bool:
        return attention_mask, None
    if not attention_mask.is_floating_point():
        rule = "attention_mask has to be boolean, or numbers to add; pass mask.bool() if 1 marks what may be seen"
        raise TypeError(refusal(FUNCTION, rule, ("attention_mask", attention_mask.dtype, str(tuple(shape))), layer))
    return None, attention_mask


def _packed(module: Any, query: Any, key: Any, others: Mapping[str, Any], left: int | None, right: int | None) -> Any:
    """Who sees whom in sequences packed into one row: boolean, (1 or batch, 1, seqlen_q, seqlen_k).

    A window, and what is causal, counts from the end of each sequence, as flash-attn has it.
    """
    import torch

    starts: list[Any] = [others.get("cu_seq_lens_q"), others.get("cu_seq_lens_k")]
    lengths = query.shape[2], key.shape[2]
    sequences = others.get("seq_idx")
    came = [(name, type(others[name]).__name__) for name in sorted(PACKED) if others.get(name) is not None]
    layer = ("layer", type(module).__name__)
    rows, columns = (torch.arange(length, device=query.device) for length in lengths)
    if starts[0] is not None and starts[1] is not None:
        if query.shape[0] != 1:
            rule = f"cu_seq_lens are of sequences packed into one row, not {query.shape[0]}; pass an attention_mask"
            raise ValueError(refusal(FUNCTION, rule, *came, layer))
        first, second = (
            torch.searchsorted(start, indices.to(start.dtype), right=True)
            for start, indices in zip(starts, (rows, columns), strict=True)
        )
        # How far a token is from the end of its sequence; what lies behind the last one is a sequence, too.
        ends = [torch.cat([start, start.new_full((1,), length)]) for start, length in zip(starts, lengths, strict=True)]
        rows, columns = rows - ends[0][first], columns - ends[1][second]
        same = (first[:, None] == second)[None]
    elif sequences is not None and sequences.shape[-1] == lengths[0] == lengths[1]:
        same = sequences[:, :, None] == sequences[:, None, :]
    else:
        rule = "where packed sequences start is said by cu_seq_lens_q and cu_seq_lens_k, by seq_idx, or in a mask alone"
        raise ValueError(refusal(FUNCTION, rule, *came, layer))
    distance = columns - rows[:, None]
    if left is not None:
        same = same & (distance >= -left)
    if right is not None:
        same = same & (distance <= right)
    return same[:, None]


def _of_sequences(module: Any, together: Any, mask: Any, numbers: Any) -> tuple[Any, Any]:
    """Mask and numbers for packed sequences, of which `together` says who is in one with whom.

    Where attention is in chunks, and transformers does not know of sequences, its mask counts these from the start of
    the row.  Such a mask is known by its numbers, which nobody waits for, and is made anew; a caller's own is not.
    """
    import torch

    given = numbers if mask is None else mask
    config, (rows, columns) = getattr(module, "config", None), (together.shape[-2], together.shape[-1])
    size = getattr(config, "attention_chunk_size", None)
    if not size or given is None or given.shape[-2:] != together.shape[-2:] or columns < rows:
        return together if mask is None else mask & together, numbers
    row, column = (torch.arange(count, device=given.device) for count in (rows, columns))
    row, causal = row[:, None], column <= row[:, None]
    # Each token sees itself, unless it is padding; transformers leaves that on the left out when it counts.
    token = (given == 0 if mask is None else mask).diagonal(dim1=-2, dim2=-1)[..., None, :]
    start = (token.cumsum(-1) == 0).sum(-1, keepdim=True)
    first = (together[..., :rows] & token).int().argmax(-1, keepdim=True)
    token = torch.nn.functional.pad(token, (0, columns - rows))
    by_row, by_sequence = (causal & token & ((row - at) // size == (column - at) // size) for at in (start, first))
    if mask is None:
        lowest = numbers.new_full((), torch.finfo(numbers.dtype).min)
        known = numbers == torch.where(by_row, torch.zeros_like(lowest), lowest)
    else:
        known = mask == by_row
    made = known.all(-1, keepdim=True).all(-2, keepdim=True)
    if columns > rows and _is_chunked(module) and (_is_recorded() or not bool(made.all() | together.all())):
        rule = "chunks of packed sequences cannot be counted over a cache of earlier tokens; pass use_cache=False"
        came = ("queries", rows), ("keys", columns), ("layer", type(module).__name__)
        raise NotImplementedError(refusal(FUNCTION, rule, *came))
    together = together & (by_sequence | ~made)
    return (together, numbers.masked_fill(made, 0)) if mask is None else (together & (mask | made), None)


def _is_chunked(module: Any) -> bool:
    """Whether a layer's attention is in chunks; those of a model that does not say it of each are."""
    kinds, place = getattr(module.config, "layer_types", None), getattr(module, "layer_idx", None)
    return kinds is None or place is None or kinds[place] == "chunked_attention"


def _keywords(
    mask: Any,
    bias: Any,
    sinks: Any,
    left: int | None,
    right: int | None,
    first_row_first_key: bool,
    scale: float | None,
    softcap: float,
    dropout_p: float,
    compute_dtype: str | None,
) -> dict[str, Any]:
    """What is said besides query, key and value, as `cupyattn.attention` calls it."""
    return {
        "mask": mask,
        "bias": bias,
        "sinks": sinks,
        "window_size": (left, right),
        "alignment": "top-left" if first_row_first_key else "bottom-right",
        "softmax_scale": scale,
        "softcap": softcap,
        "dropout_p": dropout_p,
        "compute_dtype": compute_dtype,
    }
