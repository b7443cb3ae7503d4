"""What a cache of keys and values will cost, before there is one."""

from __future__ import annotations

import reprlib
from typing import Any

from cupyattn import reading
from cupyattn.problem import ITEMSIZE


@reading.in_our_words
def kv_cache_bytes(
    layers: int,
    num_heads_kv: int,
    head_dim: int,
    dtype: Any,
    tokens: int = 1,
    batch: int = 1,
    *,
    head_dim_v: int | None = None,
    page_size: int = 1,
) -> int:
    """Bytes of the keys and values that a decoder keeps of its tokens.

    Each token leaves a key and a value in each key head of each layer, ``layers * num_heads_kv * (head_dim +
    head_dim_v)`` numbers.  How many query heads share a key head does not matter, which is what GQA and MQA are for.

    Parameters
    ----------
    layers : int
        Of the model; each has a cache of its own. 1 is what one of ours takes.
    num_heads_kv : int
        Key heads of a layer: all heads (MHA), some (GQA), or 1 (MQA).
    head_dim : int
        Numbers of a key.
    dtype : str, or a dtype of any library
        float16, bfloat16, float32, float64 or float8_e4m3fn.
    tokens : int
        Of each sequence, prompt and answer; by default 1, what a token costs.
    batch : int
        Sequences of so many tokens.
    head_dim_v : int, optional
        Numbers of a value, where these are not as many as those of a key.
    page_size : int
        Tokens of a page of `PagedCache`: sequences take whole ones.

    Returns
    -------
    int
        Bytes, of the numbers alone: block tables and lengths come to four bytes a page and a sequence.

    Raises
    ------
    TypeError
        If a number is not an integer.
    ValueError
        If a number is negative, page_size is 0, or no cache has this dtype.

    Examples
    --------
    Llama 3 8B has 32 layers and 32 query heads of 128 which share 8 key heads. What a token would cost with as many key
    heads as query heads, with these 8, and with one:

    >>> [kv_cache_bytes(32, heads, 128, "bfloat16") // 1024 for heads in (32, 8, 1)]  # KiB
    [512, 128, 16]

    and sixteen sequences of 8192 tokens with these 8, in GiB:

    >>> kv_cache_bytes(32, 8, 128, "bfloat16", tokens=8192, batch=16) / 2**30
    16.0
    """
    function = "kv_cache_bytes"
    sizes = {"layers": layers, "num_heads_kv": num_heads_kv, "head_dim": head_dim, "tokens": tokens, "batch": batch}
    if head_dim_v is not None:
        sizes["head_dim_v"] = head_dim_v
    read = {name: reading.integer(function, name, value, low=0) for name, value in sizes.items()}
    page = reading.integer(function, "page_size", page_size, low=1)
    kind = reading.dtype_name(dtype)
    if kind not in ITEMSIZE:
        rule = f"dtype has to be one of {', '.join(ITEMSIZE)}"
        raise ValueError(reading.refusal(function, rule, ("dtype", reprlib.repr(dtype))))
    numbers = read["num_heads_kv"] * (read["head_dim"] + read.get("head_dim_v", read["head_dim"]))
    whole = -(-read["tokens"] // page) * page
    return read["layers"] * read["batch"] * whole * numbers * ITEMSIZE[kind]
