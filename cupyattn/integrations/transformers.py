"""cupyattn as an attention implementation of Hugging Face transformers, 5.0 or newer.

    from cupyattn.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="cupyattn")

A model calls `attend` once a layer, with tensors (batch, heads, seqlen, head_dim) and whatever else it knows.
What it knows and we do not is refused, since it may change the meaning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache, partial
from typing import Any

from cupyattn import reading
from cupyattn.api import attention, attention_backward
from cupyattn.reading import refusal

FUNCTION = "cupyattn in transformers"

MEANINGLESS = frozenset(
    {
        *("position_ids", "cache_position", "use_cache", "past_key_values", "return_dict", "output_hidden_states"),
        *("output_router_logits", "num_items_in_batch", "logits_to_keep", "token_type_ids", "mm_token_type_ids"),
        "deterministic",  # results here are the same in every run
    }
)
"""Arguments that models pass through and that change nothing about attention, or did so before, in the mask."""

REFUSED = {
    "output_attentions": "the weights are never in memory; choose attn_implementation='eager' for them",
    "head_mask": "heads cannot be masked",
    "cache": "continuous batching is for transformers' own implementations",
    "indices": "keys chosen by their indices are not supported",
    "block_indices": "keys chosen by their blocks are not supported",
    "sinks": "a sink for every query is not supported; s_aux, one for every head, is",
}
"""Arguments that change the meaning in a way that is not offered."""

PACKED = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"})
"""What says where sequences packed into one row start; the mask says it, too, if position_ids do."""


def register(name: str = "cupyattn", *, compute_dtype: Any = None, ignored: Iterable[str] = ()) -> None:
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
        Names of arguments that a model passes to attention and that may be left out of account.  Others that
        are not known raise a TypeError, which names them.

    Raises
    ------
    ImportError
        transformers is not installed, or older than 5.0.
    TypeError, ValueError
        `name` or `ignored` are not names, or `compute_dtype` is not one of those above.

    Notes
    -----
    Rows that see no key, those of left padding, give zeros, where ``"eager"`` gives the mean of all values; no
    token depends on them.  Dropout applies while the module is training, its seed is drawn from torch's generator.
    ``output_attentions=True`` raises: weights are never in memory.  Models that do not ask for implementations
    by name (Bloom, for one) keep their own; transformers warns of it.

    Under torch.compile a layer's attention is one operator, ``torch.ops.cupyattn.attention``, without a graph
    break; the operator has gradients.  What it does is not fused with anything.

    Gradients exist on the CPU only, as for `cupyattn.attention`.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(refusal("register", "name has to be a word", ("name", repr(name))))
    names = frozenset([ignored] if isinstance(ignored, str) else ignored)
    if not all(isinstance(each, str) for each in names):
        raise TypeError(refusal("register", "ignored has to hold names of arguments", ("ignored", repr(ignored))))
    compute = reading.compute_dtype("register", compute_dtype)
    try:
        import transformers
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        rule = "needs transformers 5.0 or newer and torch: pip install 'transformers>=5' torch"
        raise ImportError(refusal("register", rule)) from error
    if int(transformers.__version__.partition(".")[0]) < 5:
        rule = "needs transformers 5.0 or newer"
        raise ImportError(refusal("register", rule, ("transformers", transformers.__version__)))
    _define_operator()
    transformers.AttentionInterface.register(name, partial(attend, compute_dtype=compute, ignored=names))
    # Without a mask function of its own an implementation is handed no mask at all, padding or not.
    transformers.AttentionMaskInterface.register(name, sdpa_mask)


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
    **others: Any,
) -> tuple[Any, None]:
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

    Returns
    -------
    out : Tensor, shape (batch, seqlen_q, num_heads, head_dim_v)
    weights : None
    """
    import torch

    _refuse_unknown(module, attention_mask, others, ignored)
    mask, bias = _mask_and_bias(module, attention_mask, position_bias)
    left = right = None
    if attention_mask is None:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        if sliding_window is not None:
            left = right = sliding_window - 1
        if causal:
            right = 0
    if query.shape[0] == 1 < key.shape[0]:  # learned queries, the same for a whole batch
        query = query.expand(key.shape[0], -1, -1, -1)
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    dropout_p = float(dropout) if module.training else 0.0
    # Of several queries without a mask the first sees the first key, whatever room a cache has; a lone one is the last.
    several = query.shape[2] > 1
    rest: tuple[Any, ...] = (left, right, several, scaling, softcap or 0.0, dropout_p, compute_dtype)
    if torch.compiler.is_compiling():
        seed = torch.randint(0, 2**63 - 1, (), device="cpu") if dropout_p > 0.0 else None
        return torch.ops.cupyattn.attention(q, k, v, mask, bias, s_aux, seed, *rest), None
    return attention(q, k, v, **_keywords(mask, bias, s_aux, None, *rest)), None


def _refuse_unknown(module: Any, attention_mask: Any, others: Mapping[str, Any], ignored: frozenset[str]) -> None:
    layer = ("layer", type(module).__name__)
    for name, given in others.items():
        if given is None or given is False or name in MEANINGLESS or name in ignored:
            continue
        came = (name, type(given).__name__)
        if name in REFUSED:
            raise NotImplementedError(refusal(FUNCTION, f"{name}: {REFUSED[name]}", came, layer))
        if name in PACKED:
            if attention_mask is None:
                rule = f"{name} without a mask; pass position_ids that start again with each sequence, and no mask"
                raise NotImplementedError(refusal(FUNCTION, rule, came, layer))
            continue
        rule = f"{name} is not known here, and may change what attention means; register(ignored=[{name!r}]) ignores it"
        raise TypeError(refusal(FUNCTION, rule, came, layer))


def _mask_and_bias(module: Any, attention_mask: Any, position_bias: Any) -> tuple[Any, Any]:
    """Who may be seen, and what is added to the scores; each may be None."""
    if attention_mask is None:
        return None, position_bias
    shape = getattr(attention_mask, "shape", None)
    if shape is None or not hasattr(attention_mask, "is_floating_point") or len(shape) != 4:
        rule = "attention_mask has to be a tensor (batch, num_heads, seqlen_q, seqlen_k), or broadcast to it"
        came = ("attention_mask", type(attention_mask).__name__, "" if shape is None else str(tuple(shape)))
        raise ValueError(refusal(FUNCTION, rule, came, ("layer", type(module).__name__)))
    if not attention_mask.is_floating_point():
        return attention_mask, position_bias
    return None, attention_mask if position_bias is None else position_bias + attention_mask


def _keywords(
    mask: Any,
    bias: Any,
    sinks: Any,
    seed: Any,
    left: int | None,
    right: int | None,
    first_row_first_key: bool,
    scale: float | None,
    softcap: float,
    dropout_p: float,
    compute_dtype: str | None,
) -> dict[str, Any]:
    """The operator's arguments after query, key and value, as `cupyattn.attention` calls them."""
    return {
        "mask": mask,
        "bias": bias,
        "sinks": sinks,
        "dropout_seed": None if seed is None else int(seed),
        "window_size": (left, right),
        "alignment": "top-left" if first_row_first_key else "bottom-right",
        "softmax_scale": scale,
        "softcap": softcap,
        "dropout_p": dropout_p,
        "compute_dtype": compute_dtype,
    }


@cache
def _define_operator() -> None:
    """The operator that stands for a call in a compiled graph, and its gradients.

    Once for a process: torch gives no name twice.
    """
    import torch

    arguments = (
        "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias, Tensor? sinks, Tensor? seed, int? left, "
        "int? right, bool first_row_first_key, float? scale, float softcap, float dropout_p, str? compute_dtype"
    )
    optional = ("bias", "sinks")

    def forward(query: Any, key: Any, value: Any, *rest: Any) -> Any:
        return attention(query, key, value, **_keywords(*rest))

    def shape_of_forward(query: Any, key: Any, value: Any, *rest: Any) -> Any:
        return query.new_empty((*query.shape[:3], value.shape[3]))

    def backward(dout: Any, query: Any, key: Any, value: Any, *rest: Any) -> Any:
        keywords = _keywords(*rest)
        found = attention_backward(dout, query, key, value, **keywords)
        # An operator has to return tensors: an empty one where there was no argument.
        edits = (query.new_empty(0) if keywords[name] is None else getattr(found, f"d{name}") for name in optional)
        return found.dq, found.dk, found.dv, *edits

    def shape_of_backward(
        dout: Any, query: Any, key: Any, value: Any, mask: Any, bias: Any, sinks: Any, *_: Any
    ) -> Any:
        given = (query, key, value, bias, sinks)
        return tuple(query.new_empty(0) if x is None else x.new_empty(x.shape) for x in given)

    def remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:7])
        ctx.options = inputs[7:]

    def differentiate(ctx: Any, dout: Any) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        dq, dk, dv, dbias, dsinks = torch.ops.cupyattn.attention_backward(dout, *tensors, *ctx.options)
        _, bias, sinks = tensors[3:6]
        edits = (None, None if bias is None else dbias, None if sinks is None else dsinks, None)
        return dq, dk, dv, *edits, *(None for _ in ctx.options)

    make = torch.library.custom_op
    operator = make("cupyattn::attention", forward, mutates_args=(), schema=f"({arguments}) -> Tensor")
    results = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
    gradient = make(
        "cupyattn::attention_backward", backward, mutates_args=(), schema=f"(Tensor dout, {arguments}) -> {results}"
    )
    operator.register_fake(shape_of_forward)
    gradient.register_fake(shape_of_backward)
    operator.register_autograd(differentiate, setup_context=remember)
