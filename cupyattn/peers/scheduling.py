"""flash-attn 3's get_scheduler_metadata: whose work is what, once for all layers of a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cupyattn import reading
from cupyattn.allowed import currently_allowed
from cupyattn.arrays import Visit, enter, untraced
from cupyattn.corridor import plan_for, schedule_on_gpu
from cupyattn.plan import with_num_splits
from cupyattn.problem import FLOATS, Array, Problem, Spec
from cupyattn.reading import Options, refusal

FUNCTION = "get_scheduler_metadata"


@untraced
def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Array,
    qkv_dtype: Any = "bfloat16",
    headdim_v: int | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k_new: Array | None = None,
    cache_leftpad: Array | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Array:
    """flash-attn 3's get_scheduler_metadata: what thread blocks have to do in a step, for all of its layers.

    `flash_attn_with_kvcache` on a GPU makes it for itself at every call, and not if it is given as
    `scheduler_metadata`.  Names, order and defaults are flash-attn 3's.

    Parameters
    ----------
    batch_size, max_seqlen_q, num_heads_q, num_heads_kv, headdim, headdim_v : int
        Sizes of the calls, `max_seqlen_q` that of `q` if it is not packed; `headdim_v` is by default `headdim`.
    max_seqlen_k : int
        Places that the cache has for a sequence: ``k_cache.shape[1]``, or page_size times ``block_table.shape[1]``.
    cache_seqlens : array of int32, shape (batch_size,)
        As in the calls, before what is new is appended.
    qkv_dtype : dtype or str
        Of q, k and v.
    cu_seqlens_q, cu_seqlens_k_new : array of int32, shape (batch_size + 1,), optional
        As in the calls.
    cache_leftpad : array of int32, shape (batch_size,), optional
        As in the calls.
    page_size : int, optional
        Of a cache in pages.
    max_seqlen_k_new : int
        New tokens of each sequence, or with `cu_seqlens_k_new` of all together.
    causal, window_size, num_splits
        As in the calls.
    has_softcap : bool
        Whether the calls have a softcap.
    attention_chunk, sm_margin
        0: there are no chunks, and no multiprocessors are kept free.
    pack_gqa
        Without effect: what shares keys is packed.

    Returns
    -------
    metadata : array of int32
        Where `cache_seqlens` is; one axis, and empty where nothing is to be known: on the CPU, and where pieces of work
        are too many, or too few, to be cut.

    Raises
    ------
    TypeError
        An index array is not int32; a number is none.
    ValueError
        Shapes do not fit together; a number is out of range; `attention_chunk` or `sm_margin` is not 0.
    NotImplementedError
        No implementation takes the calls.

    Notes
    -----
    What it says is where to cut, and nothing else: with metadata of other lengths the results are right, and thread
    blocks have unequal shares.

    References
    ----------
    flash-attn 3, hopper/flash_attn_interface.py, get_scheduler_metadata.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> lengths = np.array([3, 700], np.int32)
    >>> cupyattn.get_scheduler_metadata(2, 1, 1024, 32, 8, 128, lengths, "float16").shape
    (0,)
    """
    for name, number in (("attention_chunk", attention_chunk), ("sm_margin", sm_margin)):
        reading.integer(FUNCTION, name, number, low=0, high=0)
    given = {"cache_seqlens": cache_seqlens, "cu_seqlens_q": cu_seqlens_q}
    given |= {"cu_seqlens_k_new": cu_seqlens_k_new, "cache_leftpad": cache_leftpad}
    needed = {name: (name, x) for name, x in given.items() if x is not None or name == "cache_seqlens"}
    visit = enter(FUNCTION, needed)
    counts = {"batch_size": batch_size, "max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
    counts |= {"num_heads_q": num_heads_q, "num_heads_kv": num_heads_kv, "headdim": headdim}
    counts |= {"headdim_v": headdim if headdim_v is None else headdim_v, "max_seqlen_k_new": max_seqlen_k_new}
    sizes = {name: reading.integer(FUNCTION, name, x, low=0) for name, x in counts.items()}
    if page_size is not None:
        page_size = reading.integer(FUNCTION, "page_size", page_size, low=1)
    specs = _specs_of_calls(visit, sizes, _dtype(qkv_dtype), page_size)
    options = Options(
        axes="bshd" if cu_seqlens_q is None else "thd",
        window=reading.window(FUNCTION, "window_size", window_size),
        causal=reading.flag(FUNCTION, "causal", causal),
        softcap=float(reading.flag(FUNCTION, "has_softcap", has_softcap)),
        max_seqlen_q=0 if cu_seqlens_q is None else sizes["max_seqlen_q"],
        takes_float8=True,
        cached=True,
    )
    splits = reading.integer(FUNCTION, "num_splits", num_splits, low=0)
    return _metadata(visit, specs, reading.read(FUNCTION, tuple(specs.items()), options), splits)


def _metadata(visit: Visit, specs: Mapping[str, Spec], problem: Problem, splits: int) -> Array:
    if visit.kind == "cpu":
        return visit.library.bring(np.zeros(0, np.int32), visit.arrays["cache_seqlens"])
    plan = with_num_splits(plan_for(FUNCTION, problem, visit.device(), currently_allowed()), problem, splits)
    return schedule_on_gpu(visit, specs, problem, plan)


def _specs_of_calls(visit: Visit, sizes: Mapping[str, int], dtype: str, page_size: int | None) -> dict[str, Spec]:
    """Those of arrays like the ones that calls will have, and of those that are here."""
    batch, rows, places = (sizes[name] for name in ("batch_size", "max_seqlen_q", "max_seqlen_k"))
    heads, heads_kv, dim, dim_v = (sizes[name] for name in ("num_heads_q", "num_heads_kv", "headdim", "headdim_v"))
    here = dict(visit.specs)
    specs = {"q": Spec("q", (batch, rows, heads, dim), dtype)}
    if "cu_seqlens_q" in here:
        specs["q"] = Spec("q", (batch * rows, heads, dim), dtype)
    lead: tuple[int, int] = (batch, places)
    if page_size is not None:
        pages = -(-places // page_size)
        lead = (max(1, batch * pages), page_size)
        specs["block_table"] = Spec("block_table", (batch, pages), "int32")
    specs |= {
        "k": Spec("k_cache", (*lead, heads_kv, dim), dtype),
        "v": Spec("v_cache", (*lead, heads_kv, dim_v), dtype),
    }
    if new := sizes["max_seqlen_k_new"]:
        lead_new = (new,) if "cu_seqlens_k_new" in here else (batch, new)
        specs |= {
            "k_new": Spec("k", (*lead_new, heads_kv, dim), dtype),
            "v_new": Spec("v", (*lead_new, heads_kv, dim_v), dtype),
        }
    elif "cu_seqlens_k_new" in here:
        shown = (here["cu_seqlens_k_new"].name, here["cu_seqlens_k_new"].shape)
        raise ValueError(refusal(FUNCTION, "max_seqlen_k_new is needed with cu_seqlens_k_new", shown))
    return specs | here


def _dtype(dtype: Any) -> str:
    """The name of a dtype of any library."""
    try:
        name = str(np.dtype(dtype))
    except TypeError:
        name = str(dtype).rsplit(".", 1)[-1]
    if name not in FLOATS and name != "float8_e4m3fn":
        rule = f"qkv_dtype has to be one of {', '.join(FLOATS)} and float8_e4m3fn"
        raise ValueError(refusal(FUNCTION, rule, ("qkv_dtype", dtype)))
    return name
