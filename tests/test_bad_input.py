"""What cannot be meant is refused: with the right exception, before anything is computed, in words that help.

A message names the function, the argument as the caller wrote it, and what came.  Every case is a call that
works (`good`) with some of its arguments replaced, so that it is refused for the reason it is named after.
"""

import re
import tracemalloc
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import SEED

import cupyattn

NAN, INF = float("nan"), float("inf")

ATTENTION, BACKWARD, EXPLAIN = "attention", "attention_backward", "explain"
SDPA = "scaled_dot_product_attention"
FLASH, QKV, KV = "flash_attn_func", "flash_attn_qkvpacked_func", "flash_attn_kvpacked_func"
VARLEN_QKV, VARLEN_KV = "flash_attn_varlen_qkvpacked_func", "flash_attn_varlen_kvpacked_func"
VARLEN, PAGED = "flash_attn_varlen_func", "flash_attn_varlen_func of pages"
USED = "flash_attn_varlen_func of pages of which so many keys are used"
KVCACHE = "flash_attn_with_kvcache"  # the other bad calls of it are in test_kvcache.py
ROTARY, PACKED = "apply_rotary_emb", "apply_rotary_emb of a packed x"
MERGE, UNPAD, PAD, COST = "merge_states", "unpad_input", "pad_input", "kv_cache_bytes"
CASCADE, TABLES = "cascade_attention", "rotary_tables"
LINEAR, LINEAR_BACKWARD = "linear_attention", "linear_attention_backward"
SCHEDULE = "get_scheduler_metadata"


def floats(*shape, dtype="float32"):
    return np.random.default_rng(SEED).standard_normal(shape).astype(dtype)


def ints(*values, dtype="int32"):
    return np.array(values, dtype)


def huge(*shape):
    """An array of any size in a few bytes of memory."""
    return np.broadcast_to(np.zeros((), np.float32), shape)


def good(call):
    """Arguments with which a call works."""
    q, k, v = floats(2, 5, 4, 8), floats(2, 5, 2, 8), floats(2, 5, 2, 8)
    starts = {"cu_seqlens_q": ints(0, 2, 5), "cu_seqlens_k": ints(0, 3, 5), "max_seqlen_q": 3, "max_seqlen_k": 3}
    pages = {"k": floats(4, 2, 2, 8), "v": floats(4, 2, 2, 8), "block_table": ints([0, 3], [2, 1])}
    tables = {"cos": floats(6, 3), "sin": floats(6, 3)}
    gates = {"decay": -abs(floats(2, 5, 2)), "beta": floats(2, 5, 2), "state": floats(2, 2, 8, 8)}
    gates["rule"] = "gated_delta"
    return {
        ATTENTION: {"q": q, "k": k, "v": v},
        BACKWARD: {"dout": floats(2, 5, 4, 8), "q": q, "k": k, "v": v},
        EXPLAIN: {"q": q, "k": k, "v": v},
        SDPA: {"query": floats(2, 4, 5, 8), "key": floats(2, 4, 5, 8), "value": floats(2, 4, 5, 8)},
        FLASH: {"q": q, "k": k, "v": v},
        QKV: {"qkv": floats(2, 5, 3, 4, 8)},
        KV: {"q": q, "kv": floats(2, 5, 2, 2, 8)},
        VARLEN: {"q": q[0], "k": k[0], "v": v[0], **starts},
        VARLEN_QKV: {"qkv": floats(5, 3, 4, 8), "cu_seqlens": starts["cu_seqlens_q"], "max_seqlen": 3},
        VARLEN_KV: {"q": q[0], "kv": floats(5, 2, 2, 8), **starts},
        PAGED: {"q": q[0], **pages, **starts},
        USED: {"q": q[0], **pages, **starts, "cu_seqlens_k": None, "seqused_k": ints(3, 2)},
        KVCACHE: {"q": q, "k_cache": floats(2, 9, 2, 8), "v_cache": floats(2, 9, 2, 8), "cache_seqlens": 7},
        ROTARY: {"x": q, **tables},
        PACKED: {"x": q[0], "cu_seqlens": ints(0, 2, 5), **tables},
        CASCADE: {"q": q[:, :3], "k_prefix": k[0], "v_prefix": v[0], "k": k, "v": v},
        TABLES: {"positions": 6, "dim": 8, "scaling": {"rope_type": "linear", "factor": 2.0}},
        LINEAR: {"q": q, "k": k, "v": v, **gates},
        LINEAR_BACKWARD: {"dout": floats(2, 5, 4, 8), "q": q, "k": k, "v": v, **gates},
        MERGE: {"outs": [q, q + 1], "lses": [floats(2, 4, 5), floats(2, 4, 5) + 1]},
        UNPAD: {"hidden_states": q, "attention_mask": np.ones((2, 5), bool)},
        PAD: {"hidden_states": floats(3, 8), "indices": ints(0, 2, 5), "batch": 2, "seqlen": 3},
        COST: {"layers": 2, "num_heads_kv": 2, "head_dim": 64, "dtype": "float16"},
        SCHEDULE: {
            "batch_size": 2,
            "max_seqlen_q": 1,
            "max_seqlen_k": 9,
            "num_heads_q": 4,
            "num_heads_kv": 2,
            "headdim": 8,
            "cache_seqlens": ints(7, 3),
        },
    }[call]


class Bad(NamedTuple):
    name: str
    call: str
    error: type[Exception]
    says: tuple[str, ...]
    """Words of the message: the argument's name, and what came.  The function's name is always expected."""
    changes: dict[str, Any]
    """Arguments instead of the good call's."""
    made: Callable[[], dict[str, Any]]
    """More of them, made in the test: the library they need may be absent."""

    @property
    def function(self):
        return self.call.partition(" ")[0]

    def arguments(self):
        return {**good(self.call), **self.changes, **self.made()}


def bad(name, call, error, *says, made=dict, **changes):
    return Bad(name, call, error, says, changes, made)


# ---------------------------------------------------------------------------------------------------
# Arrays that should not have come
# ---------------------------------------------------------------------------------------------------


def in_library(name, /, **arrays):
    """The same arrays in another library."""
    library = pytest.importorskip({"dask": "dask.array", "jax": "jax.numpy"}.get(name, name))
    return {word: library.asarray(array) for word, array in arrays.items()}


def elsewhere(library, call=None, /, **arrays):
    """Makes arrays in another library, once a test asks for them: a good call's, some of them replaced."""
    return lambda: in_library(library, **{**(good(call) if call else {}), **arrays})


def q_of(name):
    """A q of a dtype that NumPy does not have."""
    return {"q": floats(2, 5, 4, 8).astype(getattr(pytest.importorskip("ml_dtypes"), name))}


def in_float8(call, *names):
    """A good call's arrays, or some of them, in float8_e4m3fn."""
    kind = pytest.importorskip("ml_dtypes").float8_e4m3fn
    return {name: array.astype(kind) for name, array in good(call).items() if not names or name in names}


def read_only():
    array = floats(2, 5, 4, 8)
    array.flags.writeable = False
    return array


def matrix():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        return np.matrix(np.eye(5, dtype=np.float32))


def sparse():
    arrays = in_library("torch", **good(SDPA))
    return {**arrays, "query": arrays["query"].to_sparse()}


def nested():
    arrays = in_library("torch", **good(SDPA))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's own: nested tensors are a prototype
        return {**arrays, "key": pytest.importorskip("torch").nested.nested_tensor(list(arrays["key"]))}


def on_meta(*names):
    """torch tensors, some of them without memory."""
    arrays = in_library("torch", **good(SDPA))
    return {name: array.to("meta") if name in names else array for name, array in arrays.items()}


def on_two_devices():
    strict = pytest.importorskip("array_api_strict")
    arrays = in_library("array_api_strict", **good(ATTENTION))
    return {**arrays, "k": arrays["k"].to_device(strict.Device("device1"))}


def of_unknown_size():
    arrays = in_library("dask", **good(ATTENTION))
    return {**arrays, "q": arrays["q"][arrays["q"][:, 0, 0, 0] > -9]}


# ---------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------

# fmt: off
SHAPES = [
    bad("q_of_three_axes", ATTENTION, ValueError, "q", "(5, 4, 8)", "4 axes", q=floats(5, 4, 8)),
    bad("k_of_five_axes", ATTENTION, ValueError, "k", "(1, 2, 5, 2, 8)", k=floats(1, 2, 5, 2, 8)),
    bad("v_without_axes", ATTENTION, ValueError, "v", "()", v=floats()),
    bad("heads_do_not_divide", ATTENTION, ValueError, "k", "(2, 5, 3, 8)", "num_heads_k = 3", k=floats(2, 5, 3, 8)),
    bad("heads_of_v_do_not_divide", ATTENTION, ValueError, "v", "num_heads_v = 3", v=floats(2, 5, 3, 8)),
    bad("more_key_heads_than_query_heads", ATTENTION, ValueError, "k", "num_heads_k = 8", k=floats(2, 5, 8, 8)),
    bad("no_key_heads", ATTENTION, ValueError, "k", "num_heads_k = 0", k=floats(2, 5, 0, 8)),
    bad("head_dims_differ", ATTENTION, ValueError, "q", "k", "head_dim", "(2, 5, 2, 6)", k=floats(2, 5, 2, 6)),
    bad("k_is_transposed", ATTENTION, ValueError, "k looks transposed", "(2, 5, 8, 2)", k=floats(2, 5, 8, 2)),
    bad("k_and_v_of_different_lengths", ATTENTION, ValueError, "v", "seqlen_k", "(2, 6, 2, 8)", v=floats(2, 6, 2, 8)),
    bad("batches_do_not_fit", ATTENTION, ValueError, "q", "batch", "(3, 5, 4, 8)", q=floats(3, 5, 4, 8)),
    bad("bhsd_arrays_called_bshd", ATTENTION, ValueError, "q", "(2, 4, 5, 8)", q=floats(2, 4, 5, 8), layout="bhsd"),
    bad("an_axis_too_long", ATTENTION, ValueError, "q", "(1, 2147483648, 1, 8)", q=huge(1, 2**31, 1, 8)),
    bad("sdpa_query_of_one_axis", SDPA, ValueError, "query", "(8,)", query=floats(8)),
    bad("sdpa_value_without_axes", SDPA, ValueError, "value", "()", value=floats()),
    bad("sdpa_head_dims_differ", SDPA, ValueError, "query", "key", "(2, 4, 5, 6)", key=floats(2, 4, 5, 6)),
    bad("sdpa_lengths_differ", SDPA, ValueError, "value", "(2, 4, 6, 8)", value=floats(2, 4, 6, 8)),
    bad("sdpa_fewer_key_heads", SDPA, ValueError, "key", "num_heads_k = 2", "enable_gqa", key=floats(2, 2, 5, 8)),
    bad(
        "sdpa_heads_do_not_divide", SDPA, ValueError, "number of heads of key", "query", "num_heads_k = 3",
        key=floats(2, 3, 5, 8), enable_gqa=True,
    ),
    bad("sdpa_batches_do_not_fit", SDPA, ValueError, "query", "key", "(3, 4, 5, 8)", key=floats(3, 4, 5, 8)),
    bad("flash_q_of_three_axes", FLASH, ValueError, "q", "(5, 4, 8)", q=floats(5, 4, 8)),
    bad("flash_heads_do_not_divide", FLASH, ValueError, "v", "num_heads_v = 3", v=floats(2, 5, 3, 8)),
    bad("flash_head_dims_differ", FLASH, ValueError, "q", "(2, 5, 4, 7)", q=floats(2, 5, 4, 7)),
    bad("qkv_of_four_axes", QKV, ValueError, "qkv", "(2, 5, 12, 8)", qkv=floats(2, 5, 12, 8)),
    bad("qkv_of_two", QKV, ValueError, "qkv", "(2, 5, 2, 4, 8)", "3", qkv=floats(2, 5, 2, 4, 8)),
    bad("kv_of_four_axes", KV, ValueError, "kv", "(2, 5, 2, 8)", kv=floats(2, 5, 2, 8)),
    bad("kv_of_three", KV, ValueError, "kv", "(2, 5, 3, 2, 8)", "2", kv=floats(2, 5, 3, 2, 8)),
    bad("kv_heads_do_not_divide", KV, ValueError, "kv", "num_heads_k = 3", kv=floats(2, 5, 2, 3, 8)),
    bad("kv_of_another_head_dim", KV, ValueError, "kv", "(2, 5, 2, 6)", kv=floats(2, 5, 2, 2, 6)),
    bad("kvpacked_q_of_three_axes", KV, ValueError, "q", "(5, 4, 8)", q=floats(5, 4, 8)),
]

HUGE = [
    bad(
        "huge_result", ATTENTION, ValueError, "q", "(2147483647, 1048576, 1024, 1)",
        q=huge(2**31 - 1, 2**20, 2**10, 1), k=huge(1, 2**20, 1, 1), v=huge(1, 2**20, 1, 1),
    ),
    bad(
        "huge_result_of_sdpa", SDPA, ValueError, "query", "(1048576, 1048576, 1024, 8)",
        query=huge(2**20, 2**20, 2**10, 8), value=huge(1, 1, 5, 8),
    ),
    bad(
        "huge_batch_by_broadcasting", SDPA, ValueError, "query", "(1073741824, 1, 1, 5, 8)",
        query=huge(2**30, 1, 1, 5, 8), key=huge(2**30, 1, 5, 8),
    ),
    bad(
        "huge_values", FLASH, ValueError, "v", "(2, 5, 1, 2147483647)",
        v=huge(2, 5, 1, 2**31 - 1), q=huge(2, 2**30, 4, 8),
    ),
    bad("huge_packed_result", VARLEN, ValueError, "q", "(2147483647, 1048576, 8)", q=huge(2**31 - 1, 2**20, 8)),
    bad(
        "huge_dropout_mask", VARLEN, ValueError, "q", "2147483647",
        max_seqlen_q=2**31 - 1, max_seqlen_k=2**31 - 1, dropout_p=0.5, dropout_seed=1, return_attn_probs=True,
    ),
    bad(
        "huge_dropout_mask_of_few_rows", FLASH, ValueError, "q", "k", "(1, 16777216, 1, 1)", "(1, 1073741824, 1, 1)",
        q=huge(1, 2**24, 1, 1), k=huge(1, 2**30, 1, 1), v=huge(1, 2**30, 1, 1),
        dropout_p=0.5, dropout_seed=1, return_attn_probs=True,
    ),
    bad(
        "huge_lse_of_no_values", ATTENTION, ValueError, "q", "(1048576, 1048576, 1024, 1)",
        q=huge(2**20, 2**20, 2**10, 1), k=huge(1, 2, 1, 1), v=huge(1, 2, 1, 0), return_lse=True,
    ),
    bad(
        "huge_gradients", BACKWARD, ValueError, "q", "(1048576, 1048576, 1024, 8)",
        q=huge(2**20, 2**20, 2**10, 8), dout=huge(2**20, 2**20, 2**10, 8),
    ),
    bad(
        "huge_plan", EXPLAIN, ValueError, "q", "(2147483647, 2147483647, 2147483647, 8)",
        q=(2**31 - 1, 2**31 - 1, 2**31 - 1, 8), k=(1, 1, 1, 8), v=(1, 1, 1, 8),
    ),
    bad(
        "huge_state", MERGE, ValueError, "outs[0]", "(1048576, 1048576, 1024, 1)",
        outs=[huge(2**20, 2**20, 2**10, 1)], lses=[huge(2**20, 2**10, 2**20)],
    ),
    bad(
        "huge_rotation", ROTARY, ValueError, "x", "(1048576, 1048576, 1024, 2)",
        x=huge(2**20, 2**20, 2**10, 2), cos=huge(2**20, 1), sin=huge(2**20, 1),
    ),
    bad("huge_padding", PAD, ValueError, "batch", "1073741824", "seqlen", "1048576", batch=2**30, seqlen=2**20),
    bad("padding_past_64_bits", PAD, ValueError, "batch", "2147483647", batch=2**31 - 1, seqlen=2**31 - 1),
]

DIAGONALS = [
    bad(
        "causal_without_alignment", ATTENTION, ValueError, "alignment", "(2, 3, 4, 8)",
        q=floats(2, 3, 4, 8), causal=True,
    ),
    bad(
        "window_without_alignment", ATTENTION, ValueError, "alignment", "seqlen_q = 3", "seqlen_k = 5",
        q=floats(2, 3, 4, 8), window_size=(2, None),
    ),
    bad(
        "alibi_without_alignment", ATTENTION, ValueError, "alignment", "top-left", "bottom-right", "seqlen_q = 3",
        q=floats(2, 3, 4, 8), alibi_slopes=floats(4),
    ),
    bad("unknown_alignment", ATTENTION, ValueError, "alignment", "'middle'", "'top-left'", alignment="middle"),
    bad("alignment_true", ATTENTION, ValueError, "alignment", "True", alignment=True),
    bad("unknown_layout", ATTENTION, ValueError, "layout", "'sbhd'", "'bshd'", "'bhsd'", layout="sbhd"),
    bad("packed_layout", ATTENTION, ValueError, "layout", "'thd'", layout="thd"),
    bad("no_layout", ATTENTION, ValueError, "layout", "None", layout=None),
    bad("unknown_layout_of_states", MERGE, ValueError, "layout", "'hsd'", "'thd'", layout="hsd"),
    bad("window_of_three", ATTENTION, TypeError, "window_size", "(1, 2, 3)", window_size=(1, 2, 3)),
    bad("window_of_one_number", FLASH, TypeError, "window_size", "3", window_size=3),
    bad("window_as_text", FLASH, TypeError, "window_size", "'11'", window_size="11"),
    bad("window_of_floats", FLASH, TypeError, "window_size", "1.5", window_size=(1.5, 0)),
    bad("window_of_bools", ATTENTION, TypeError, "window_size", "True", window_size=(True, 0)),
    bad("window_before_minus_one", KV, ValueError, "window_size", "-2", window_size=(0, -2)),
    bad("window_past_32_bits", QKV, ValueError, "window_size", "2147483648", window_size=(2**31, 0)),
    bad("no_window", VARLEN, TypeError, "window_size", "None", window_size=None),
]

MASKS = [
    bad("mask_of_other_sizes", ATTENTION, ValueError, "mask", "(5, 6)", "(2, 4, 5, 5)", mask=np.ones((5, 6), bool)),
    bad("mask_of_too_many_axes", ATTENTION, ValueError, "mask", "(1, 1, 1, 5, 5)", mask=np.ones((1, 1, 1, 5, 5), bool)),
    bad("mask_of_integers", ATTENTION, TypeError, "mask", "(5, 5)", "int64", mask=np.ones((5, 5), int)),
    bad("mask_of_floats", ATTENTION, TypeError, "mask", "float32", "bias", mask=floats(5, 5)),
    bad("mask_as_list", ATTENTION, TypeError, "mask", "list", mask=[[True] * 5] * 5),
    bad("bias_of_other_sizes", ATTENTION, ValueError, "bias", "(3, 5, 5)", bias=floats(3, 5, 5)),
    bad("bias_of_integers", ATTENTION, TypeError, "bias", "int32", bias=np.ones((5, 5), np.int32)),
    bad("bias_of_bools", ATTENTION, TypeError, "bias", "bool", bias=np.ones((5, 5), bool)),
    bad("bias_as_number", ATTENTION, TypeError, "bias", "float", bias=1.0),
    bad(
        "sdpa_mask_and_causal", SDPA, ValueError, "attn_mask", "is_causal", "True",
        attn_mask=np.ones((5, 5), bool), is_causal=True,
    ),
    bad(
        "sdpa_mask_of_other_sizes", SDPA, ValueError, "attn_mask", "(4, 5)", "(2, 4, 5, 5)",
        attn_mask=np.ones((4, 5), bool),
    ),
    bad("sdpa_bias_of_other_sizes", SDPA, ValueError, "attn_mask", "(3, 5, 5)", attn_mask=floats(3, 5, 5)),
    bad("sdpa_mask_of_integers", SDPA, TypeError, "attn_mask", "!= 0", "int64", attn_mask=np.ones((5, 5), int)),
    bad("sdpa_bias_of_another_dtype", SDPA, TypeError, "attn_mask", "float64", attn_mask=floats(5, 5, dtype="float64")),
    bad("sdpa_mask_as_list", SDPA, TypeError, "attn_mask", "list", attn_mask=[[0.0] * 5] * 5),
    bad("slopes_of_three_heads", ATTENTION, ValueError, "alibi_slopes", "(3,)", "(2, 4)", alibi_slopes=floats(3)),
    bad("slopes_of_three_sequences", FLASH, ValueError, "alibi_slopes", "(3, 4)", alibi_slopes=floats(3, 4)),
    bad("slopes_of_integers", FLASH, TypeError, "alibi_slopes", "int32", alibi_slopes=ints(1, 2, 3, 4)),
    bad("slopes_as_list", QKV, TypeError, "alibi_slopes", "list", alibi_slopes=[1.0] * 4),
    bad("slopes_of_a_packed_batch", VARLEN, ValueError, "alibi_slopes", "(1, 4)", "(2, 4)", alibi_slopes=floats(1, 4)),
    bad("sinks_of_key_heads", ATTENTION, ValueError, "sinks", "(2,)", "(4,)", sinks=floats(2)),
    bad("sinks_of_two_axes", ATTENTION, ValueError, "sinks", "(2, 4)", sinks=floats(2, 4)),
    bad("sinks_of_integers", ATTENTION, TypeError, "sinks", "int32", sinks=ints(0, 0, 0, 0)),
    bad("sinks_as_number", ATTENTION, TypeError, "sinks", "float", sinks=0.0),
]

NUMBERS = [
    bad("scale_nan", ATTENTION, ValueError, "softmax_scale", "nan", softmax_scale=NAN),
    bad("scale_infinite", FLASH, ValueError, "softmax_scale", "inf", softmax_scale=INF),
    bad("scale_nan_of_numpy", QKV, ValueError, "softmax_scale", "nan", softmax_scale=np.float32("nan")),
    bad("scale_as_text", ATTENTION, TypeError, "softmax_scale", "'0.5'", "str", softmax_scale="0.5"),
    bad("scale_as_array", ATTENTION, TypeError, "softmax_scale", "array([0.5])", softmax_scale=np.array([0.5])),
    bad("scale_as_array_of_text", FLASH, TypeError, "softmax_scale", "shape ()", softmax_scale=np.array("0.5")),
    bad("scale_as_array_of_bool", FLASH, TypeError, "softmax_scale", "shape ()", softmax_scale=np.array(True)),
    bad("scale_as_infinite_array", SDPA, ValueError, "scale", "inf", scale=np.array(INF)),
    bad("scale_as_bool", ATTENTION, TypeError, "softmax_scale", "True", "bool", softmax_scale=True),
    bad("scale_complex", ATTENTION, TypeError, "softmax_scale", "1j", "complex", softmax_scale=1j),
    bad("scale_past_float64", ATTENTION, ValueError, "softmax_scale", "finite", softmax_scale=10**400),
    bad("sdpa_scale_infinite", SDPA, ValueError, "scale", "-inf", scale=-INF),
    bad("sdpa_scale_as_list", SDPA, TypeError, "scale", "[0.5]", "list", scale=[0.5]),
    bad("softcap_negative", ATTENTION, ValueError, "softcap", "-30", softcap=-30),
    bad("softcap_nan", FLASH, ValueError, "softcap", "nan", softcap=NAN),
    bad("softcap_infinite", ATTENTION, ValueError, "softcap", "inf", softcap=INF),
    bad("softcap_none", ATTENTION, TypeError, "softcap", "None", "NoneType", softcap=None),
    bad("softcap_as_text", KV, TypeError, "softcap", "'30'", "str", softcap="30"),
    bad("dropout_negative", ATTENTION, ValueError, "dropout_p", "-0.1", dropout_p=-0.1),
    bad("dropout_above_one", FLASH, ValueError, "dropout_p", "1.5", dropout_p=1.5),
    bad("dropout_nan", SDPA, ValueError, "dropout_p", "nan", dropout_p=NAN),
    bad("dropout_infinite", VARLEN, ValueError, "dropout_p", "inf", dropout_p=INF),
    bad("dropout_as_bool", ATTENTION, TypeError, "dropout_p", "True", "bool", dropout_p=True),
    bad("dropout_as_text", QKV, TypeError, "dropout_p", "'0.1'", dropout_p="0.1"),
    bad("dropout_none", SDPA, TypeError, "dropout_p", "None", dropout_p=None),
    bad("seed_nan", ATTENTION, TypeError, "dropout_seed", "nan", "float", dropout_seed=NAN),
    bad("seed_negative", FLASH, ValueError, "dropout_seed", "-1", dropout_seed=-1),
    bad("seed_past_64_bits", SDPA, ValueError, "dropout_seed", "18446744073709551616", dropout_seed=2**64),
    bad("seed_float", QKV, TypeError, "dropout_seed", "1.0", "float", dropout_seed=1.0),
    bad("seed_bool", KV, TypeError, "dropout_seed", "True", "bool", dropout_seed=True),
    bad("seed_as_text", VARLEN, TypeError, "dropout_seed", "'7'", "str", dropout_seed="7"),
    bad("compute_float16", ATTENTION, ValueError, "compute_dtype", "float16", compute_dtype=np.float16),
    bad("compute_integers", SDPA, ValueError, "compute_dtype", "'int32'", compute_dtype="int32"),
    bad("compute_a_number", FLASH, ValueError, "compute_dtype", "64", compute_dtype=64),
    bad("causal_as_number", ATTENTION, TypeError, "causal", "1", causal=1),
    bad("causal_none", FLASH, TypeError, "causal", "None", causal=None),
    bad("causal_as_text", VARLEN, TypeError, "causal", "'yes'", causal="yes"),
    bad("return_lse_as_number", ATTENTION, TypeError, "return_lse", "1", return_lse=1),
    bad("is_causal_as_number", SDPA, TypeError, "is_causal", "0", is_causal=0),
    bad("is_causal_as_array", SDPA, TypeError, "is_causal", "array([ True])", is_causal=np.array([True])),
    bad("enable_gqa_as_number", SDPA, TypeError, "enable_gqa", "1", enable_gqa=1),
    bad("sdpa_return_lse_none", SDPA, TypeError, "return_lse", "None", return_lse=None),
    bad("deterministic_as_number", FLASH, TypeError, "deterministic", "1", deterministic=1),
    bad("return_attn_probs_as_number", KV, TypeError, "return_attn_probs", "1", return_attn_probs=1),
    bad("interleaved_as_number", ROTARY, TypeError, "interleaved", "1", interleaved=1),
    bad("inplace_none", ROTARY, TypeError, "inplace", "None", inplace=None),
]

KINDS = [
    bad("q_of_integers", ATTENTION, TypeError, "q", "(2, 5, 4, 8)", "int32", q=np.ones((2, 5, 4, 8), np.int32)),
    bad("q_complex", ATTENTION, TypeError, "q", "complex64", q=floats(2, 5, 4, 8, dtype="complex64")),
    bad("q_of_objects", ATTENTION, TypeError, "q", "object", q=floats(2, 5, 4, 8).astype(object)),
    bad("q_of_bools", ATTENTION, TypeError, "q", "bool", q=np.ones((2, 5, 4, 8), bool)),
    bad("q_of_text", ATTENTION, TypeError, "q", "str32", q=np.full((2, 5, 4, 8), "x")),
    bad("q_of_records", ATTENTION, TypeError, "q", "void32", q=np.zeros((2, 5, 4, 8), [("real", "f4")])),
    bad("v_of_integers", FLASH, TypeError, "v", "int8", v=np.ones((2, 5, 2, 8), np.int8)),
    bad("sdpa_key_of_integers", SDPA, TypeError, "key", "uint8", key=np.ones((2, 4, 5, 8), np.uint8)),
    bad("qkv_complex", QKV, TypeError, "qkv", "complex128", qkv=floats(2, 5, 3, 4, 8, dtype="complex128")),
    bad("dtypes_differ", ATTENTION, TypeError, "q", "k", "float32", "float64", k=floats(2, 5, 2, 8, dtype="float64")),
    bad(
        "sdpa_dtypes_differ", SDPA, TypeError, "value", "float16", "float32",
        value=floats(2, 4, 5, 8, dtype="float16"),
    ),
    bad("kv_of_another_dtype", KV, TypeError, "kv", "float64", kv=floats(2, 5, 2, 2, 8, dtype="float64")),
    bad("bfloat16_and_float32", ATTENTION, TypeError, "q", "bfloat16", "float32", made=lambda: q_of("bfloat16")),
    bad("float8", ATTENTION, TypeError, "q", "float8_e5m2", made=lambda: q_of("float8_e5m2")),
    bad("q_as_list", ATTENTION, TypeError, "q", "list", q=floats(2, 5, 4, 8).tolist()),
    bad("k_as_number", FLASH, TypeError, "k", "float", k=1.0),
    bad("v_as_text", ATTENTION, TypeError, "v", "str", v="values"),
    bad("k_as_bytes", ATTENTION, TypeError, "k", "bytes", k=b"keys"),
    bad("k_as_class", ATTENTION, TypeError, "k", "type", k=np.ndarray),
    bad("q_as_numpy_scalar", ATTENTION, TypeError, "q", "float32", q=np.float32(1)),
    bad("q_none", ATTENTION, TypeError, "q", "NoneType", q=None),
    bad("k_none", ATTENTION, TypeError, "k", "NoneType", k=None),
    bad("all_none", ATTENTION, TypeError, "q", "NoneType", q=None, k=None, v=None),
    bad("sdpa_query_none", SDPA, TypeError, "query", "NoneType", query=None),
    bad("sdpa_query_none_with_mask", SDPA, TypeError, "query", "NoneType", query=None, attn_mask=floats(5, 5)),
    bad("sdpa_value_none", SDPA, TypeError, "value", "NoneType", value=None),
    bad("flash_v_none", FLASH, TypeError, "v", "NoneType", v=None),
    bad("qkv_none", QKV, TypeError, "qkv", "NoneType", qkv=None),
    bad("kv_none", KV, TypeError, "kv", "NoneType", kv=None),
    bad("kvpacked_q_none", KV, TypeError, "q", "NoneType", q=None),
    bad("varlen_q_none", VARLEN, TypeError, "q", "NoneType", q=None),
    bad("q_as_matrix", SDPA, TypeError, "query", "matrix", query=matrix()),
    bad("q_masked", ATTENTION, TypeError, "q", "MaskedArray", q=np.ma.masked_invalid(floats(2, 5, 4, 8))),
    bad("qkv_masked", QKV, TypeError, "qkv", "MaskedArray", qkv=np.ma.array(floats(2, 5, 3, 4, 8))),
]

LIBRARIES = [
    bad(
        "numpy_and_torch", ATTENTION, TypeError, "q", "numpy.ndarray", "k", "torch.Tensor",
        made=elsewhere("torch", k=floats(2, 5, 2, 8)),
    ),
    bad(
        "numpy_and_torch_mask", SDPA, TypeError, "attn_mask", "numpy.ndarray", "torch.Tensor",
        made=elsewhere("torch", attn_mask=np.ones((5, 5), bool)),
    ),
    bad(
        "torch_and_numpy_mask_of_words", SDPA, TypeError, "attn_mask", "object", "torch.Tensor",
        made=elsewhere("torch", SDPA), attn_mask=np.full((5, 5), None),
    ),
    bad("numpy_and_jax", FLASH, TypeError, "v", "numpy.ndarray", made=elsewhere("jax", v=floats(2, 5, 2, 8))),
    bad("numpy_and_dask", FLASH, TypeError, "q", "dask.Array", made=elsewhere("dask", q=floats(2, 5, 4, 8))),
    bad(
        "strict_and_numpy", ATTENTION, TypeError, "q", "array_api_strict.Array", "k", "numpy.ndarray",
        made=elsewhere("array_api_strict", q=floats(2, 5, 4, 8)),
    ),
    bad(
        "rotation_by_torch", ROTARY, TypeError, "x", "numpy.ndarray", "cos", "torch.Tensor",
        made=elsewhere("torch", cos=floats(6, 3)),
    ),
    bad(
        "torch_and_numpy_states", MERGE, TypeError, "outs[0]", "torch.Tensor", "lses[0]", "numpy.ndarray",
        made=lambda: {"outs": list(in_library("torch", out=floats(2, 5, 4, 8)).values()), "lses": [floats(2, 4, 5)]},
    ),
    bad("torch_dout", BACKWARD, TypeError, "dout", "torch.Tensor", made=elsewhere("torch", dout=floats(2, 5, 4, 8))),
    bad("two_devices", ATTENTION, ValueError, "q", "CPU_DEVICE", "k", "device1", made=on_two_devices),
    bad("torch_sparse", SDPA, TypeError, "query", "torch.sparse_coo", made=sparse),
    bad("torch_nested", SDPA, TypeError, "key", "nested", made=nested),
    bad("torch_meta_and_cpu", SDPA, ValueError, "key", "meta", "query", "cpu", made=lambda: on_meta("key")),
    bad(
        "torch_integers", SDPA, TypeError, "key", "int64",
        made=elsewhere("torch", SDPA, key=np.ones((2, 4, 5, 8), np.int64)),
    ),
    bad(
        "torch_dtypes_differ", SDPA, TypeError, "query", "float16",
        made=elsewhere("torch", SDPA, query=floats(2, 4, 5, 8, dtype="float16")),
    ),
    bad("dask_of_unknown_size", ATTENTION, TypeError, "q", "unknown size", made=of_unknown_size),
    bad(
        "dask_dropout_without_seed", ATTENTION, ValueError, "dropout_seed",
        made=elsewhere("dask", ATTENTION), dropout_p=0.5,
    ),
    bad(
        "jax_dropout_without_seed", ATTENTION, ValueError, "dropout_seed",
        made=elsewhere("jax", ATTENTION), dropout_p=0.5,
    ),
    bad(
        "dask_rotation_in_place", ROTARY, TypeError, "x", "dask.array.Array", "(2, 5, 4, 8)",
        made=elsewhere("dask", ROTARY), inplace=True,
    ),
    bad(
        "jax_rotation_in_place", ROTARY, TypeError, "x", "jax.Array", "(2, 5, 4, 8)",
        made=elsewhere("jax", ROTARY), inplace=True,
    ),
    bad("dask_unpadding", UNPAD, TypeError, "hidden_states", "(2, 5, 4, 8)", made=elsewhere("dask", UNPAD)),
    bad(
        "torch_mask_of_numpy_rows", UNPAD, TypeError, "hidden_states", "numpy.ndarray", "attention_mask",
        made=elsewhere("torch", attention_mask=np.ones((2, 5), bool)),
    ),
    bad(
        "torch_and_numpy_indices", PAD, TypeError, "hidden_states", "numpy.ndarray", "indices", "torch.Tensor",
        made=elsewhere("torch", indices=ints(0, 2, 5)),
    ),
]

SEQUENCES = [
    bad("cache_past_its_end", KVCACHE, ValueError, "10 keys", "room for 9", cache_seqlens=10),
    bad(
        "cache_of_int64", KVCACHE, TypeError, "cache_seqlens", "int64", "cache_seqlens.astype(np.int32)",
        cache_seqlens=ints(7, 7, dtype="int64"),
    ),
    bad("starts_decrease", VARLEN, ValueError, "cu_seqlens_q", "[0, 4, 3]", "decrease", cu_seqlens_q=ints(0, 4, 3)),
    bad("starts_not_at_zero", VARLEN, ValueError, "cu_seqlens_k", "[1, 3, 5]", cu_seqlens_k=ints(1, 3, 5)),
    bad("starts_below_zero", VARLEN, ValueError, "cu_seqlens_k", "[-1, 3, 5]", cu_seqlens_k=ints(-1, 3, 5)),
    bad("starts_past_q", VARLEN, ValueError, "cu_seqlens_q", "[0, 3, 6]", "(5, 4, 8)", cu_seqlens_q=ints(0, 3, 6)),
    bad("starts_past_k", VARLEN, ValueError, "cu_seqlens_k", "[0, 3, 6]", "(5, 2, 8)", cu_seqlens_k=ints(0, 3, 6)),
    bad(
        "starts_of_int64", VARLEN, TypeError, "cu_seqlens_q", "int64", "cu_seqlens_q.astype(np.int32)",
        "to(torch.int32)", cu_seqlens_q=ints(0, 2, 5, dtype="int64"),
    ),
    bad(
        "starts_of_qkv_of_int64", VARLEN_QKV, TypeError, "int64", "cu_seqlens.astype(np.int32)",
        cu_seqlens=ints(0, 2, 5, dtype="int64"),
    ),
    bad("starts_of_qkv_past_it", VARLEN_QKV, ValueError, "cu_seqlens", "[0, 2, 6]", cu_seqlens=ints(0, 2, 6)),
    bad("longest_of_qkv_too_small", VARLEN_QKV, ValueError, "max_seqlen", "cu_seqlens", "2", max_seqlen=2),
    bad("longest_of_qkv_float", VARLEN_QKV, TypeError, "max_seqlen", "3.0", "float", max_seqlen=3.0),
    bad(
        "qkv_of_a_batch", VARLEN_QKV, ValueError, "qkv", "(total, 3, num_heads, head_dim)", "(1, 5, 3, 4, 8)",
        qkv=floats(1, 5, 3, 4, 8),
    ),
    bad(
        "kv_of_tokens_first_heads_second", VARLEN_KV, ValueError, "kv", "(total_k, 2, num_heads, head_dim)",
        "(5, 4, 2, 8)", kv=floats(5, 4, 2, 8),
    ),
    bad("longest_of_kv_too_small", VARLEN_KV, ValueError, "max_seqlen_k", "1", max_seqlen_k=1),
    bad("starts_of_uint32", VARLEN, TypeError, "cu_seqlens_k", "uint32", cu_seqlens_k=ints(0, 2, 5, dtype="uint32")),
    bad("starts_of_floats", VARLEN, TypeError, "cu_seqlens_k", "float32", cu_seqlens_k=floats(3)),
    bad("starts_as_list", VARLEN, TypeError, "cu_seqlens_q", "list", cu_seqlens_q=[0, 2, 5]),
    bad("starts_none", VARLEN, TypeError, "cu_seqlens_k", "NoneType", cu_seqlens_k=None),
    bad("starts_of_two_axes", VARLEN, ValueError, "cu_seqlens_q", "(1, 3)", cu_seqlens_q=ints([0, 2, 5])),
    bad("starts_of_nothing", VARLEN, ValueError, "cu_seqlens_q", "(0,)", cu_seqlens_q=ints(), cu_seqlens_k=ints()),
    bad(
        "starts_of_different_batches", VARLEN, ValueError, "cu_seqlens_q", "(3,)", "cu_seqlens_k", "(2,)",
        cu_seqlens_k=ints(0, 5),
    ),
    bad("longest_q_too_small", VARLEN, ValueError, "max_seqlen_q", "cu_seqlens_q", "[0, 2, 5]", "2", max_seqlen_q=2),
    bad("longest_k_too_small", VARLEN, ValueError, "max_seqlen_k", "cu_seqlens_k", "[0, 3, 5]", "1", max_seqlen_k=1),
    bad("longest_q_negative", VARLEN, ValueError, "max_seqlen_q", "-1", max_seqlen_q=-1),
    bad("longest_q_float", VARLEN, TypeError, "max_seqlen_q", "3.0", "float", max_seqlen_q=3.0),
    bad("longest_k_bool", VARLEN, TypeError, "max_seqlen_k", "True", "bool", max_seqlen_k=True),
    bad("longest_k_none", VARLEN, TypeError, "max_seqlen_k", "None", max_seqlen_k=None),
    bad("longest_k_past_32_bits", VARLEN, ValueError, "max_seqlen_k", "2147483648", max_seqlen_k=2**31),
    bad("packed_q_of_four_axes", VARLEN, ValueError, "q", "(1, 5, 4, 8)", q=floats(1, 5, 4, 8)),
    bad("packed_k_and_v_differ", VARLEN, ValueError, "k", "v", "(6, 2, 8)", v=floats(6, 2, 8)),
    bad("packed_heads_do_not_divide", VARLEN, ValueError, "k", "num_heads_k = 3", k=floats(5, 3, 8)),
    bad("packed_head_dims_differ", VARLEN, ValueError, "q", "k", "(5, 2, 4)", k=floats(5, 2, 4)),
    bad("pages_without_table", PAGED, ValueError, "k", "(4, 2, 2, 8)", block_table=None),
    bad("table_without_pages", VARLEN, ValueError, "k", "(5, 2, 8)", "block_table", block_table=ints([0, 3], [2, 1])),
    bad("page_past_the_last", PAGED, ValueError, "block_table", "4", "[0, 4]", block_table=ints([0, 4], [2, 1])),
    bad("page_negative", PAGED, ValueError, "block_table", "-1", block_table=ints([0, 1], [-1, 1])),
    bad("too_few_pages", PAGED, ValueError, "block_table", "(2, 1)", "2 pages", block_table=ints([0], [2])),
    bad(
        "table_of_int64", PAGED, TypeError, "block_table", "int64", "block_table.astype(np.int32)",
        block_table=ints([0, 3], [2, 1], dtype="int64"),
    ),
    bad("table_of_floats", PAGED, TypeError, "block_table", "float32", block_table=floats(2, 2)),
    bad("table_of_one_axis", PAGED, ValueError, "block_table", "(2,)", block_table=ints(0, 3)),
    bad("table_of_another_batch", PAGED, ValueError, "block_table", "(1, 2)", block_table=ints([0, 3])),
    bad("table_as_list", PAGED, TypeError, "block_table", "list", block_table=[[0, 3], [2, 1]]),
    bad("used_of_int64", VARLEN, TypeError, "seqused_k", "int64", seqused_k=ints(1, 2, dtype="int64")),
    bad("used_of_floats", VARLEN, TypeError, "seqused_q", "float32", seqused_q=floats(2)),
    bad("used_as_list", VARLEN, TypeError, "seqused_q", "list", seqused_q=[1, 2]),
    bad("used_of_three", VARLEN, ValueError, "seqused_k", "(3,)", seqused_k=ints(1, 1, 1)),
    bad("used_of_two_axes", VARLEN, ValueError, "seqused_q", "(1, 2)", seqused_q=ints([1, 1])),
    bad("used_past_the_keys", VARLEN, ValueError, "seqused_k", "[3, 3]", "[3, 2]", seqused_k=ints(3, 3)),
    bad("used_past_the_rows", VARLEN, ValueError, "seqused_q", "[3, 0]", "[2, 3]", seqused_q=ints(3, 0)),
    bad("used_negative", VARLEN, ValueError, "seqused_q", "[0, -1]", seqused_q=ints(0, -1)),
    bad("used_and_dropout", VARLEN, ValueError, "seqused_k", "dropout_p", seqused_k=ints(1, 1), dropout_p=0.5),
    bad("used_and_starts_of_pages", PAGED, ValueError, "cu_seqlens_k", "seqused_k", seqused_k=ints(1, 1)),
    bad("used_no_starts", VARLEN, TypeError, "cu_seqlens_k", "block_table", seqused_k=ints(1, 1), cu_seqlens_k=None),
    bad("starts_of_pages_none", PAGED, TypeError, "cu_seqlens_k", "NoneType", cu_seqlens_k=None),
    bad("used_of_pages_of_three", USED, ValueError, "seqused_k", "(3,)", "(3,)", seqused_k=ints(1, 1, 1)),
    bad("used_of_pages_of_two_axes", USED, ValueError, "seqused_k", "(1, 2)", seqused_k=ints([1, 1])),
    bad("used_of_pages_of_int64", USED, TypeError, "seqused_k", "int64", seqused_k=ints(1, 1, dtype="int64")),
    bad("used_of_pages_negative", USED, ValueError, "seqused_k", "[1, -1]", "negative", seqused_k=ints(1, -1)),
    bad("used_of_pages_too_long", USED, ValueError, "seqused_k", "[1, 4]", "max_seqlen_k", "3", seqused_k=ints(1, 4)),
    bad("used_of_pages_without_room", USED, ValueError, "block_table", "2 pages", block_table=ints([0], [2])),
    bad("used_of_pages_past_the_last", USED, ValueError, "block_table", "page 4", block_table=ints([0, 4], [2, 1])),
    bad("used_of_pages_past_the_rows", USED, ValueError, "seqused_q", "[3, 0]", "[2, 3]", seqused_q=ints(3, 0)),
    bad("used_of_pages_without_longest", USED, TypeError, "max_seqlen_k", "None", max_seqlen_k=None),
    bad("softmax_lse_as_number", USED, TypeError, "return_softmax_lse", "1", return_softmax_lse=1),
    bad("pages_of_no_keys", PAGED, ValueError, "k", "page", "(4, 0, 2, 8)", k=floats(4, 0, 2, 8), v=floats(4, 0, 2, 8)),
    bad("pages_of_k_and_v_differ", PAGED, ValueError, "k", "v", "(4, 1, 2, 8)", v=floats(4, 1, 2, 8)),
]

STATES = [
    bad("no_states", MERGE, ValueError, "outs", "lses", "0", outs=[], lses=[]),
    bad("more_outs_than_lses", MERGE, ValueError, "outs", "2", "lses", "1", lses=[floats(2, 4, 5)]),
    bad("outs_as_array", MERGE, TypeError, "outs", "ndarray", outs=floats(2, 2, 5, 4, 8)),
    bad("lses_as_generator", MERGE, TypeError, "lses", "list_iterator", lses=iter([])),
    bad("out_none", MERGE, TypeError, "outs[1]", "NoneType", outs=[floats(2, 5, 4, 8), None]),
    bad("out_as_list", MERGE, TypeError, "outs[1]", "list", outs=[floats(2, 5, 4, 8), [0.0]]),
    bad("out_of_three_axes", MERGE, ValueError, "outs[0]", "(5, 4, 8)", outs=[floats(5, 4, 8)] * 2),
    bad(
        "outs_of_two_shapes", MERGE, ValueError, "outs[1]", "(2, 5, 4, 6)",
        outs=[floats(2, 5, 4, 8), floats(2, 5, 4, 6)],
    ),
    bad("lse_in_the_order_of_out", MERGE, ValueError, "lses[0]", "(2, 5, 4)", "(2, 4, 5)", lses=[floats(2, 5, 4)] * 2),
    bad("lses_of_two_shapes", MERGE, ValueError, "lses[1]", "(1, 4, 5)", lses=[floats(2, 4, 5), floats(1, 4, 5)]),
    bad(
        "outs_of_two_dtypes", MERGE, TypeError, "outs[1]", "float16",
        outs=[floats(2, 5, 4, 8), floats(2, 5, 4, 8, dtype="float16")],
    ),
    bad("outs_of_integers", MERGE, TypeError, "outs[0]", "int64", outs=[np.ones((2, 5, 4, 8), int)] * 2),
    bad("lses_of_float16", MERGE, TypeError, "lses[0]", "float16", lses=[floats(2, 4, 5, dtype="float16")] * 2),
]

ROTATIONS = [
    bad("x_none", ROTARY, TypeError, "x", "NoneType", x=None),
    bad("x_as_list", ROTARY, TypeError, "x", "list", x=[[1.0]]),
    bad("x_of_three_axes", ROTARY, ValueError, "x", "(5, 4, 8)", x=floats(5, 4, 8)),
    bad("packed_x_of_four_axes", ROTARY, ValueError, "x", "(2, 5, 4, 8)", cu_seqlens=ints(0, 2)),
    bad("x_of_integers", ROTARY, TypeError, "x", "int64", x=np.ones((2, 5, 4, 8), int)),
    bad("cos_complex", ROTARY, TypeError, "cos", "complex64", cos=floats(6, 3, dtype="complex64")),
    bad("sin_none", ROTARY, TypeError, "sin", "NoneType", sin=None),
    bad("cos_and_sin_differ", ROTARY, ValueError, "cos", "(6, 3)", "sin", "(6, 2)", sin=floats(6, 2)),
    bad("cos_of_one_axis", ROTARY, ValueError, "cos", "(6,)", cos=floats(6), sin=floats(6)),
    bad(
        "rotary_dim_past_head_dim", ROTARY, ValueError, "cos", "(6, 5)", "(2, 5, 4, 8)",
        cos=floats(6, 5), sin=floats(6, 5),
    ),
    bad("too_few_positions", ROTARY, ValueError, "cos", "(4, 3)", "0 to 4", cos=floats(4, 3), sin=floats(4, 3)),
    bad("offset_past_cos", ROTARY, ValueError, "positions", "2 to 6", "(6, 3)", seqlen_offsets=2),
    bad("offset_negative", ROTARY, ValueError, "seqlen_offsets", "-1", seqlen_offsets=-1),
    bad("offset_bool", ROTARY, TypeError, "seqlen_offsets", "True", seqlen_offsets=True),
    bad("offset_float", ROTARY, TypeError, "seqlen_offsets", "float", seqlen_offsets=1.0),
    bad("offset_none", ROTARY, TypeError, "seqlen_offsets", "NoneType", seqlen_offsets=None),
    bad("offsets_as_list", ROTARY, TypeError, "seqlen_offsets", "list", seqlen_offsets=[0, 1]),
    bad("offsets_of_another_batch", ROTARY, ValueError, "seqlen_offsets", "(3,)", "(2,)", seqlen_offsets=ints(0, 0, 0)),
    bad("offsets_of_floats", ROTARY, TypeError, "seqlen_offsets", "float32", seqlen_offsets=floats(2)),
    bad("offsets_negative", ROTARY, ValueError, "positions", "-1", "(6, 3)", seqlen_offsets=ints(0, -1)),
    bad("longest_without_starts", ROTARY, ValueError, "max_seqlen", "5", "cu_seqlens", max_seqlen=5),
    bad("longest_of_x_too_small", PACKED, ValueError, "max_seqlen", "3", "2", max_seqlen=2),
    bad("longest_of_x_float", PACKED, TypeError, "max_seqlen", "3.0", max_seqlen=3.0),
    bad(
        "starts_of_x_int64", PACKED, TypeError, "cu_seqlens", "int64", "cu_seqlens.astype(np.int32)",
        cu_seqlens=ints(0, 2, 5, dtype="int64"),
    ),
    bad("starts_of_x_of_two_axes", PACKED, ValueError, "cu_seqlens", "(1, 2)", cu_seqlens=ints([0, 5])),
    bad("starts_of_x_not_at_zero", PACKED, ValueError, "cu_seqlens", "[1, 2, 5]", cu_seqlens=ints(1, 2, 5)),
    bad("starts_of_x_past_x", PACKED, ValueError, "cu_seqlens", "[0, 2, 6]", "(5, 4, 8)", cu_seqlens=ints(0, 2, 6)),
    bad(
        "in_place_read_only", ROTARY, ValueError, "x", "read-only", "(2, 5, 4, 8)",
        x=read_only(), inplace=True,
    ),
    bad("in_place_past_cos", ROTARY, ValueError, "positions", "2 to 6", seqlen_offsets=2, inplace=True),
    bad("in_place_offsets_negative", ROTARY, ValueError, "positions", "-1", seqlen_offsets=ints(0, -1), inplace=True),
    bad("in_place_cos_and_sin_differ", ROTARY, ValueError, "sin", "(6, 2)", sin=floats(6, 2), inplace=True),
    bad(
        "in_place_starts_decrease", PACKED, ValueError, "cu_seqlens", "[0, 6, 5]",
        cu_seqlens=ints(0, 6, 5), inplace=True,
    ),
]

PADDING = [
    bad("rows_none", UNPAD, TypeError, "hidden_states", "NoneType", hidden_states=None),
    bad("rows_as_list", UNPAD, TypeError, "hidden_states", "list", hidden_states=[[1.0]]),
    bad("rows_of_one_axis", UNPAD, ValueError, "hidden_states", "(5,)", hidden_states=floats(5)),
    bad("row_mask_none", UNPAD, TypeError, "attention_mask", "NoneType", attention_mask=None),
    bad(
        "row_mask_transposed", UNPAD, ValueError, "attention_mask", "(5, 2)", "(2, 5)",
        attention_mask=np.ones((5, 2), bool),
    ),
    bad("row_mask_of_floats", UNPAD, TypeError, "attention_mask", "float32", attention_mask=floats(2, 5)),
    bad("row_mask_of_twos", UNPAD, ValueError, "attention_mask", "2", attention_mask=np.full((2, 5), 2)),
    bad("row_mask_negative", UNPAD, ValueError, "attention_mask", "-1", attention_mask=np.full((2, 5), -1)),
    bad("row_mask_masked", UNPAD, TypeError, "attention_mask", "MaskedArray", attention_mask=np.ma.ones((2, 5), bool)),
    bad("unused_of_other_sizes", UNPAD, ValueError, "unused_mask", "(2, 4)", unused_mask=np.ones((2, 4), bool)),
    bad("unused_of_floats", UNPAD, TypeError, "unused_mask", "float32", unused_mask=floats(2, 5)),
    bad("packed_rows_none", PAD, TypeError, "hidden_states", "NoneType", hidden_states=None),
    bad("packed_rows_without_axes", PAD, ValueError, "hidden_states", "()", hidden_states=floats()),
    bad("indices_none", PAD, TypeError, "indices", "NoneType", indices=None),
    bad("indices_as_list", PAD, TypeError, "indices", "list", indices=[0, 2, 5]),
    bad("indices_of_floats", PAD, TypeError, "indices", "float32", indices=floats(3)),
    bad("indices_of_bools", PAD, TypeError, "indices", "bool", indices=np.ones(3, bool)),
    bad("indices_of_other_rows", PAD, ValueError, "indices", "(2,)", "(3, 8)", indices=ints(0, 2)),
    bad("indices_of_two_axes", PAD, ValueError, "indices", "(1, 3)", indices=ints([0, 2, 5])),
    bad("index_past_the_batch", PAD, ValueError, "indices", "0 to 6", "5", indices=ints(0, 2, 6)),
    bad("index_negative", PAD, ValueError, "indices", "-1 to 5", indices=ints(-1, 2, 5)),
    bad("index_twice", PAD, ValueError, "indices", "different", "(3,)", indices=ints(2, 2, 5)),
    bad("batch_negative", PAD, ValueError, "batch", "-1", batch=-1),
    bad("batch_float", PAD, TypeError, "batch", "2.0", "float", batch=2.0),
    bad("batch_bool", PAD, TypeError, "batch", "True", "bool", batch=True),
    bad("seqlen_as_text", PAD, TypeError, "seqlen", "'3'", "str", seqlen="3"),
    bad("batch_too_small", PAD, ValueError, "indices", "0 to 5", "2", batch=1),
]

GRADIENTS = [
    bad("dout_none", BACKWARD, TypeError, "dout", "NoneType", dout=None),
    bad("dout_as_list", BACKWARD, TypeError, "dout", "list", dout=[1.0]),
    bad("dout_of_other_sizes", BACKWARD, ValueError, "dout", "(2, 5, 2, 8)", "(2, 5, 4, 8)", dout=floats(2, 5, 2, 8)),
    bad("dout_to_be_broadcast", BACKWARD, ValueError, "dout", "(1, 1, 1, 1)", dout=floats(1, 1, 1, 1)),
    bad(
        "dout_of_another_dtype", BACKWARD, TypeError, "dout", "float64", "float32",
        dout=floats(2, 5, 4, 8, dtype="float64"),
    ),
    bad("backward_q_none", BACKWARD, TypeError, "q", "NoneType", q=None),
    bad("out_of_other_sizes", BACKWARD, ValueError, "out", "(2, 4, 5, 8)", out=floats(2, 4, 5, 8)),
    bad("out_of_another_dtype", BACKWARD, TypeError, "out", "float16", out=floats(2, 5, 4, 8, dtype="float16")),
    bad("lse_of_other_sizes", BACKWARD, ValueError, "lse", "(2, 5, 4)", "(2, 4, 5)", lse=floats(2, 5, 4)),
    bad("lse_of_another_dtype", BACKWARD, TypeError, "lse", "float64", "float32", lse=floats(2, 4, 5, dtype="float64")),
    bad("dlse_of_other_sizes", BACKWARD, ValueError, "dlse", "(4, 5)", dlse=floats(4, 5)),
    bad("backward_dropout_without_seed", BACKWARD, ValueError, "dropout_seed", dropout_p=0.5),
    bad("backward_heads_do_not_divide", BACKWARD, ValueError, "v", "num_heads_v = 3", v=floats(2, 5, 3, 8)),
    bad("backward_scale_nan", BACKWARD, ValueError, "softmax_scale", "nan", softmax_scale=NAN),
    bad("backward_mask_of_integers", BACKWARD, TypeError, "mask", "int64", mask=np.ones((5, 5), int)),
    bad("backward_unknown_layout", BACKWARD, ValueError, "layout", "'thd'", layout="thd"),
]

FLOAT8 = [
    bad(
        "float8_of_another_kind", ATTENTION, TypeError, "q", "float8_e5m2", "float8_e4m3fn",
        made=lambda: q_of("float8_e5m2"),
    ),
    bad(
        "float8_queries_of_wider_keys", ATTENTION, TypeError, "q", "k", "one dtype", "float8_e4m3fn", "float32",
        made=lambda: q_of("float8_e4m3fn"),
    ),
    bad(
        "sdpa_of_float8", SDPA, TypeError, "query", "float8_e4m3fn", "for attention, flash-attn's functions and caches",
        made=lambda: in_float8(SDPA),
    ),
    bad(
        "gradients_of_float8", BACKWARD, TypeError, "q", "float8_e4m3fn", "has no gradients",
        made=lambda: in_float8(BACKWARD, "q", "k", "v"),
    ),
    bad("rotation_of_float8", ROTARY, TypeError, "x", "float8_e4m3fn", made=lambda: in_float8(ROTARY, "x")),
    bad(
        "state_of_float8", MERGE, TypeError, "outs[0]", "float8_e4m3fn",
        made=lambda: {"outs": [in_float8(ATTENTION)["q"]], "lses": [floats(2, 4, 5)]},
    ),
    bad(
        "float8_bias", ATTENTION, TypeError, "bias", "float8_e4m3fn",
        made=lambda: {**in_float8(ATTENTION), "bias": in_float8(ATTENTION)["q"][0, :, 0, :5]},
    ),
    bad(
        "descale_of_float32", ATTENTION, TypeError, "q_descale", "float8_e4m3fn", "q is float32",
        q_descale=floats(2, 2),
    ),
    bad("flash_descale_of_float32", FLASH, TypeError, "v_descale", "v_descale is for", v_descale=floats(2, 2)),
    bad(
        "descale_of_float64", ATTENTION, TypeError, "k_descale", "has to be float32", "float64",
        made=lambda: {**in_float8(ATTENTION), "k_descale": floats(2, 2, dtype="float64")},
    ),
    bad(
        "descale_of_query_heads", ATTENTION, ValueError, "q_descale", "(batch, num_heads_kv)", "(2, 4)", "(2, 2)",
        made=lambda: {**in_float8(ATTENTION), "q_descale": floats(2, 4)},
    ),
    bad(
        "descale_of_every_number", FLASH, ValueError, "k_descale", "(2, 5, 2, 8)",
        made=lambda: {**in_float8(FLASH), "k_descale": floats(2, 5, 2, 8)},
    ),
    bad(
        "descale_as_number", ATTENTION, TypeError, "v_descale", "float",
        made=lambda: {**in_float8(ATTENTION), "v_descale": 0.5},
    ),
    bad(
        "descale_of_tokens", VARLEN, ValueError, "k_descale", "(5, 2)", "(2, 2)",
        made=lambda: {**in_float8(VARLEN, "q", "k", "v"), "k_descale": floats(5, 2)},
    ),
    bad(
        "explained_descale_of_other_sizes", EXPLAIN, ValueError, "v_descale", "(3, 2)",
        dtype="float8_e4m3fn", q=(2, 5, 4, 8), k=(2, 5, 2, 8), v=(2, 5, 2, 8), v_descale=(3, 2),
    ),
    bad(
        "explained_gradients_of_float8", EXPLAIN, TypeError, "q", "float8_e4m3fn", "has no gradients",
        dtype="float8_e4m3fn", q=(2, 5, 4, 8), k=(2, 5, 2, 8), v=(2, 5, 2, 8), backward=True,
    ),
]

PLANS = [
    bad("unknown_device", EXPLAIN, ValueError, "device", "'h100'", "H100", "cpu", device="h100"),
    bad("device_as_number", EXPLAIN, ValueError, "device", "0", device=0),
    bad("device_as_list", EXPLAIN, ValueError, "device", "['H100']", device=["H100"]),
    bad("out_of_another_shape", ATTENTION, ValueError, "out", "(5, 4, 8)", "(2, 5, 4, 8)", out=floats(5, 4, 8)),
    bad("flash_out_of_another_dtype", FLASH, TypeError, "out", "float64", out=floats(2, 5, 4, 8, dtype="float64")),
    bad("out_a_list", QKV, TypeError, "out", "list", out=[1.0]),
    bad("out_of_torch", VARLEN, TypeError, "out", "torch", made=elsewhere("torch", out=floats(5, 4, 8))),
    bad("out_a_view_of_zeros", KV, ValueError, "out", "read-only", out=huge(2, 5, 4, 8)),
    bad("out_of_jax", FLASH, TypeError, "out", "immutable", made=elsewhere("jax", FLASH, out=floats(2, 5, 4, 8))),
    bad("lse_out_without_lse", KVCACHE, ValueError, "lse_out", "return_softmax_lse=True", lse_out=floats(2, 4, 5)),
    bad("lse_out_of_another_shape", MERGE, ValueError, "lse_out", "(2, 5, 4)", lse_out=floats(2, 5, 4)),
    bad("seqlens_of_int64", ATTENTION, TypeError, "seqlens_k", "int64", seqlens_k=ints(1, 2, dtype="int64")),
    bad("seqlens_too_few", FLASH, ValueError, "seqlens_q", "(1,)", "(2,)", seqlens_q=ints(3)),
    bad("seqlens_too_long", BACKWARD, ValueError, "seqlens_q", "[5, 6]", "from 0 to 5", seqlens_q=ints(5, 6)),
    bad("seqlens_with_a_mask", ATTENTION, ValueError, "mask", seqlens_q=ints(1, 2), mask=np.ones((5, 5), bool)),
    bad("seqlens_explained", EXPLAIN, ValueError, "seqlens_k", "(3,)", seqlens_k=ints(1, 2, 3)),
    bad("implementation_unknown", ATTENTION, ValueError, "implementation", "'flesh'", implementation="flesh"),
    bad("implementation_of_none", ATTENTION, ValueError, "implementation", "at least one", implementation=()),
    bad("implementation_a_number", ATTENTION, TypeError, "implementation", "int", implementation=3),
    bad("implementation_of_numbers", BACKWARD, TypeError, "implementation", "int", implementation=("numpy", 3)),
    bad("implementation_of_gradients", EXPLAIN, ValueError, "implementation", "'backward'", implementation="backward"),
    bad("explain_q_none", EXPLAIN, TypeError, "q", "NoneType", q=None),
    bad("shape_as_number", EXPLAIN, TypeError, "q", "int", q=5),
    bad("shape_negative", EXPLAIN, ValueError, "q", "-5", q=(2, -5, 4, 8)),
    bad("shape_of_floats", EXPLAIN, TypeError, "k", "5.0", k=(2, 5.0, 2, 8)),
    bad("shape_of_three_axes", EXPLAIN, ValueError, "q", "(5, 4, 8)", q=(5, 4, 8)),
    bad("shapes_do_not_fit", EXPLAIN, ValueError, "v", "(2, 6, 2, 8)", v=(2, 6, 2, 8)),
    bad("shape_of_mask_does_not_fit", EXPLAIN, ValueError, "mask", "(5, 6)", mask=(5, 6)),
    bad("dtype_of_integers", EXPLAIN, TypeError, "q", "int8", q=(2, 5, 4, 8), dtype="int8"),
    bad("explain_seed_negative", EXPLAIN, ValueError, "dropout_seed", "-1", dropout_seed=-1),
    bad("explain_causal_as_number", EXPLAIN, TypeError, "causal", "1", causal=1),
]

PREFIXES = [
    bad("prefix_none", CASCADE, TypeError, "k_prefix", "NoneType", k_prefix=None),
    bad("prefix_of_each_sequence", CASCADE, ValueError, "k_prefix", "(2, 5, 2, 8)", k_prefix=floats(2, 5, 2, 8)),
    bad("prefix_of_another_head_dim", CASCADE, ValueError, "k_prefix", "(5, 2, 4)", k_prefix=floats(5, 2, 4)),
    bad("prefix_of_another_dtype", CASCADE, TypeError, "k_prefix", "int32", k_prefix=np.ones((5, 2, 8), np.int32)),
    bad("prefix_values_of_another_length", CASCADE, ValueError, "v_prefix", "(4, 2, 8)", v_prefix=floats(4, 2, 8)),
    bad("prefix_values_of_another_head_dim", CASCADE, ValueError, "v_prefix", "(5, 2, 4)", v_prefix=floats(5, 2, 4)),
    bad("prefix_of_other_heads", CASCADE, ValueError, "k_prefix", "(5, 1, 8)", k_prefix=floats(5, 1, 8)),
    bad("cascade_heads_do_not_divide", CASCADE, ValueError, "k", "num_heads = 3", q=floats(2, 3, 3, 8)),
    bad("cascade_q_of_another_head_dim", CASCADE, ValueError, "q", "(2, 3, 4, 4)", q=floats(2, 3, 4, 4)),
    bad("tail_of_another_batch", CASCADE, ValueError, "k", "(1, 5, 2, 8)", k=floats(1, 5, 2, 8)),
    bad("tail_packed", CASCADE, ValueError, "v", "(5, 2, 8)", v=floats(5, 2, 8)),
    bad("more_queries_than_own_keys", CASCADE, ValueError, "seqlen_q", "(2, 6, 4, 8)", q=floats(2, 6, 4, 8)),
    bad("cascade_causal_as_number", CASCADE, TypeError, "causal", "1", causal=1),
    bad("cascade_sinks_of_key_heads", CASCADE, ValueError, "sinks", "(2,)", sinks=floats(2)),
]

PAIRS = [
    bad("pair_of_one", ROTARY, TypeError, "x", "of length 1", x=(floats(2, 5, 4, 8),)),
    bad("pair_with_nothing", ROTARY, TypeError, "x[1]", "NoneType", x=(floats(2, 5, 4, 8), None)),
    bad("pair_of_integers", ROTARY, TypeError, "x[1]", "int64", x=(floats(2, 5, 4, 8), np.ones((2, 5, 4, 8), int))),
    bad("pair_of_three_axes", ROTARY, ValueError, "x[0]", "(5, 4, 8)", x=(floats(5, 4, 8), floats(2, 5, 4, 8))),
    bad("pair_too_long", ROTARY, ValueError, "positions", "0 to 6", x=(floats(2, 5, 4, 8), floats(2, 7, 4, 8))),
]


def rule(name, **said):
    """A scaling of `rotary_tables`."""
    return {"rope_type": name, **said}


YARN = rule("yarn", factor=2.0, original_max_position_embeddings=8)
LLAMA3 = rule("llama3", factor=2.0, original_max_position_embeddings=8, low_freq_factor=1.0, high_freq_factor=4.0)
LONGROPE = rule("longrope", original_max_position_embeddings=8, short_factor=[1.0] * 4, long_factor=[2.0] * 4)
ROTARY_TABLES = [
    bad("positions_none", TABLES, TypeError, "positions", "NoneType", positions=None),
    bad("positions_below_0", TABLES, ValueError, "positions", "-1", positions=-1),
    bad("positions_as_list", TABLES, TypeError, "positions", "list", positions=[0, 1]),
    bad("positions_true", TABLES, TypeError, "positions", "True", positions=True),
    bad("positions_of_floats", TABLES, TypeError, "positions", "float32", positions=floats(3)),
    bad("positions_unsigned", TABLES, TypeError, "positions", "uint8", positions=ints(0, 1, dtype="uint8")),
    bad(
        "positions_of_float64_in_jax", TABLES, TypeError, "jax.Array", "float64",
        made=lambda: in_library("jax", positions=ints(0)), dtype="float64",
    ),
    bad("dim_odd", TABLES, ValueError, "dim", "7", dim=7),
    bad("dim_zero", TABLES, ValueError, "dim", "0", dim=0),
    bad("dim_float", TABLES, TypeError, "dim", "8.0", dim=8.0),
    bad(
        "dim_odd_in_part", TABLES, ValueError, "dim", "8", "partial_rotary_factor", "3",
        scaling={"partial_rotary_factor": 0.4},
    ),
    bad(
        "dim_of_two_growing", TABLES, ValueError, "dim", "4",
        dim=2, scaling=rule("dynamic", factor=2.0), max_position_embeddings=8,
    ),
    bad("theta_one", TABLES, ValueError, "theta", "1", theta=1),
    bad("theta_as_string", TABLES, TypeError, "theta", "'10k'", theta="10k"),
    bad(
        "theta_twice", TABLES, ValueError, "theta", "100.0", "scaling['rope_theta']", "50.0",
        theta=100.0, scaling={"rope_theta": 50},
    ),
    bad("tables_of_integers", TABLES, TypeError, "dtype", "'int32'", dtype="int32"),
    bad("tables_of_float8", TABLES, TypeError, "dtype", "'float8_e4m3fn'", dtype="float8_e4m3fn"),
    bad("scaling_as_number", TABLES, TypeError, "scaling", "2.0", "float", scaling=2.0),
    bad("scaling_unknown", TABLES, ValueError, "scaling['rope_type']", "'axial'", "'yarn'", scaling=rule("axial")),
    bad("scaling_of_two_types", TABLES, ValueError, "type", "'linear'", "'yarn'", scaling={**YARN, "type": "linear"}),
    bad("scaling_with_a_stranger", TABLES, ValueError, "mrope_section", scaling={"mrope_section": [2, 1, 1]}),
    bad(
        "scaling_with_anothers_word", TABLES, ValueError, "'linear'", "beta_fast",
        scaling=rule("linear", factor=2.0, beta_fast=32),
    ),
    bad(
        "scaling_with_an_argument", TABLES, ValueError, "max_position_embeddings",
        scaling=rule("dynamic", factor=2.0, max_position_embeddings=8),
    ),
    bad("linear_without_factor", TABLES, ValueError, "'linear'", "factor", scaling=rule("linear")),
    bad(
        "dynamic_of_no_length", TABLES, ValueError, "'dynamic'", "max_position_embeddings",
        scaling=rule("dynamic", factor=2.0),
    ),
    bad(
        "yarn_of_no_length", TABLES, ValueError, "'yarn'", "original_max_position_embeddings",
        scaling=rule("yarn", factor=2.0),
    ),
    bad(
        "longrope_of_no_growth", TABLES, ValueError, "'longrope'", "factor", "max_position_embeddings",
        scaling=LONGROPE,
    ),
    bad("factor_below_1", TABLES, ValueError, "scaling['factor']", "0.5", scaling=rule("linear", factor=0.5)),
    bad("factor_nan", TABLES, ValueError, "scaling['factor']", "nan", scaling=rule("linear", factor=NAN)),
    bad("factor_as_string", TABLES, TypeError, "scaling['factor']", "'2'", scaling=rule("linear", factor="2")),
    bad(
        "part_above_1", TABLES, ValueError, "scaling['partial_rotary_factor']", "1.5",
        scaling={"partial_rotary_factor": 1.5},
    ),
    bad(
        "part_of_nothing", TABLES, ValueError, "scaling['partial_rotary_factor']", "0",
        scaling={"partial_rotary_factor": 0},
    ),
    bad("most_positions_float", TABLES, TypeError, "max_position_embeddings", "8.0", max_position_embeddings=8.0),
    bad("most_positions_zero", TABLES, ValueError, "max_position_embeddings", "0", max_position_embeddings=0),
    bad("beta_zero", TABLES, ValueError, "scaling['beta_slow']", "0", scaling={**YARN, "beta_slow": 0}),
    bad("truncate_as_number", TABLES, TypeError, "scaling['truncate']", "1", scaling={**YARN, "truncate": 1}),
    bad("mscale_negative", TABLES, ValueError, "scaling['mscale']", "-1", scaling={**YARN, "mscale": -1}),
    bad(
        "trained_on_half_a_token", TABLES, TypeError, "scaling['original_max_position_embeddings']", "8.5",
        scaling={**YARN, "original_max_position_embeddings": 8.5},
    ),
    bad(
        "high_below_low", TABLES, ValueError, "scaling['high_freq_factor']", "0.5",
        scaling={**LLAMA3, "high_freq_factor": 0.5},
    ),
    bad(
        "short_factors_too_few", TABLES, ValueError, "scaling['short_factor']", "3", "4",
        scaling={**LONGROPE, "factor": 2.0, "short_factor": [1.0] * 3},
    ),
    bad(
        "long_factors_none", TABLES, ValueError, "'longrope'", "long_factor",
        scaling={**LONGROPE, "factor": 2.0, "long_factor": None},
    ),
    bad(
        "long_factors_a_number", TABLES, ValueError, "scaling['long_factor']", "2.0",
        scaling={**LONGROPE, "factor": 2.0, "long_factor": 2.0},
    ),
    bad(
        "long_factor_negative", TABLES, ValueError, "scaling['long_factor'][3]", "-1.0",
        scaling={**LONGROPE, "factor": 2.0, "long_factor": [1.0, 1.0, 1.0, -1.0]},
    ),
]

LINEARS = [
    bad("linear_q_none", LINEAR, TypeError, "q", "NoneType", q=None),
    bad("linear_q_of_three_axes", LINEAR, ValueError, "q", "(5, 4, 8)", q=floats(5, 4, 8)),
    bad("linear_q_of_integers", LINEAR, TypeError, "q", "int64", q=np.ones((2, 5, 4, 8), int)),
    bad("linear_k_of_float64", LINEAR, TypeError, "k", "float64", k=floats(2, 5, 2, 8, dtype="float64")),
    bad(
        "linear_v_by_torch", LINEAR, TypeError, "v", "torch.Tensor",
        made=lambda: in_library("torch", v=floats(2, 5, 2, 8)),
    ),
    bad("linear_heads_do_not_divide", LINEAR, ValueError, "num_heads = 3", "(2, 5, 3, 8)", q=floats(2, 5, 3, 8)),
    bad("linear_no_key_heads", LINEAR, ValueError, "num_heads_kv = 0", k=floats(2, 5, 0, 8), v=floats(2, 5, 0, 8)),
    bad("linear_heads_of_v", LINEAR, ValueError, "k and v", "(2, 5, 1, 8)", v=floats(2, 5, 1, 8)),
    bad("linear_head_dims_differ", LINEAR, ValueError, "head_dim", "(2, 5, 4, 6)", q=floats(2, 5, 4, 6)),
    bad("linear_lengths_differ", LINEAR, ValueError, "seqlen", "(2, 6, 4, 8)", q=floats(2, 6, 4, 8)),
    bad("linear_batches_differ", LINEAR, ValueError, "batch", "(1, 5, 4, 8)", q=floats(1, 5, 4, 8)),
    bad("rule_unknown", LINEAR, ValueError, "rule", "'retention'", "'gated_delta'", rule="retention"),
    bad("decay_missing", LINEAR, ValueError, "decay", "'gated_delta'", "None", decay=None),
    bad("beta_missing", LINEAR, ValueError, "beta", "None", beta=None),
    bad("decay_of_linear", LINEAR, ValueError, "decay", "'linear'", "(2, 5, 2)", beta=None, rule="linear"),
    bad("beta_of_gated", LINEAR, ValueError, "beta", "'gated'", rule="gated"),
    bad(
        "decay_of_query_heads", LINEAR, ValueError, "decay", "(2, 5, 4)", "(2, 5, 2) or (2, 5, 2, 8)",
        decay=floats(2, 5, 4),
    ),
    bad("decay_of_integers", LINEAR, TypeError, "decay", "int32", decay=np.zeros((2, 5, 2), np.int32)),
    bad("beta_of_features", LINEAR, ValueError, "beta", "(2, 5, 2, 8)", "of one head", beta=floats(2, 5, 2, 8)),
    bad("beta_as_number", LINEAR, TypeError, "beta", "0.5", "float", beta=0.5),
    bad("state_transposed", LINEAR, ValueError, "state", "(2, 8, 8, 2)", "(2, 2, 8, 8)", state=floats(2, 8, 8, 2)),
    bad("state_of_query_heads", LINEAR, ValueError, "state", "(2, 4, 8, 8)", state=floats(2, 4, 8, 8)),
    bad("linear_scale_nan", LINEAR, ValueError, "scale", "nan", scale=NAN),
    bad("linear_scale_as_string", LINEAR, TypeError, "scale", "'1'", scale="1"),
    bad("linear_layout_thd", LINEAR, ValueError, "layout", "'thd'", layout="thd"),
    bad("linear_layout_turned", LINEAR, ValueError, "num_heads_kv = 5", layout="bhsd", q=floats(2, 4, 2, 8)),
    bad(
        "linear_words_of_others", LINEAR, TypeError,
        "g              here it is decay", "initial_state  here it is state", "softmax_scale  here it is scale",
        "causal         attention takes it",
        g=None, initial_state=None, softmax_scale=1.0, causal=True, update_rule="delta",
    ),
    bad("chunk_of_nothing", LINEAR, ValueError, "chunk_size", "0", chunk_size=0),
    bad("chunk_of_half_a_token", LINEAR, TypeError, "chunk_size", "0.5", chunk_size=0.5),
    bad("return_state_as_number", LINEAR, TypeError, "return_state", "1", return_state=1),
    bad("dout_of_linear_none", LINEAR_BACKWARD, TypeError, "dout", "NoneType", dout=None),
    bad("dout_of_linear_turned", LINEAR_BACKWARD, ValueError, "dout", "(2, 4, 5, 8)", dout=floats(2, 4, 5, 8)),
    bad(
        "dout_of_linear_float64", LINEAR_BACKWARD, TypeError, "dout", "float64",
        dout=floats(2, 5, 4, 8, dtype="float64"),
    ),
    bad(
        "dlast_state_of_tokens", LINEAR_BACKWARD, ValueError, "dlast_state", "(2, 5, 2, 8)",
        dlast_state=floats(2, 5, 2, 8),
    ),
    bad(
        "dlast_state_float64", LINEAR_BACKWARD, TypeError, "dlast_state", "float64",
        dlast_state=floats(2, 2, 8, 8, dtype="float64"),
    ),
    bad("backward_rule_unknown", LINEAR_BACKWARD, ValueError, "rule", "'delta_rule'", rule="delta_rule"),
]

COSTS = [
    bad("cost_of_int8", COST, ValueError, "dtype", "'int8'", dtype="int8"),
    bad("cost_without_dtype", COST, ValueError, "dtype", "None", dtype=None),
    bad("cost_of_layers_below_0", COST, ValueError, "layers", "-1", layers=-1),
    bad("cost_of_half_a_head", COST, TypeError, "num_heads_kv", "2.5", "float", num_heads_kv=2.5),
    bad("cost_of_many_tokens", COST, TypeError, "tokens", "'many'", "str", tokens="many"),
    bad("cost_of_pages_of_nothing", COST, ValueError, "page_size", "0", page_size=0),
    bad("cost_of_a_batch_of_true", COST, TypeError, "batch", "True", "bool", batch=True),
]
SCHEDULES = [
    bad("schedule_of_wide_lengths", SCHEDULE, TypeError, "cache_seqlens", "int64",
        cache_seqlens=np.array([7, 3], np.int64)),
    bad("schedule_of_too_many_lengths", SCHEDULE, ValueError, "cache_seqlens", "(3,)", cache_seqlens=ints(7, 3, 1)),
    bad("schedule_of_no_number_of_heads", SCHEDULE, TypeError, "num_heads_q", "'many'", "str", num_heads_q="many"),
    bad("schedule_of_chunks", SCHEDULE, ValueError, "attention_chunk", "64", attention_chunk=64),
    bad("schedule_of_integers", SCHEDULE, ValueError, "qkv_dtype", "int8", qkv_dtype="int8"),
]
# fmt: on

TABLE = [
    *SHAPES, *HUGE, *DIAGONALS, *MASKS, *NUMBERS, *KINDS, *LIBRARIES, *SEQUENCES, *STATES, *ROTATIONS, *PADDING,
    *GRADIENTS, *FLOAT8, *PLANS, *PREFIXES, *COSTS, *PAIRS, *ROTARY_TABLES, *LINEARS, *SCHEDULES,
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------
# The tests
# ---------------------------------------------------------------------------------------------------


def refusal_of(case, arguments):
    """The message with which a bad call is refused."""
    with pytest.raises((ValueError, TypeError)) as caught:
        getattr(cupyattn, case.function)(**arguments)
    assert type(caught.value) is case.error
    return str(caught.value)


def contains(message, words):
    """Whether the message has these words as words: "q" is not in "query", "-1" not in "-12"."""
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", message) is not None


def contents(value):
    """All that an argument holds, to be compared with what it holds later."""
    if isinstance(value, dict):
        return {name: contents(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [contents(item) for item in value]
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype, (value if value.size < 2**20 else value.base).tobytes()
    try:
        return np.asarray(value).tobytes()
    except (TypeError, ValueError, RuntimeError, NotImplementedError):  # sparse, nested, meta, on another device
        return repr(value)


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_is_refused_in_words_that_help(case):
    message = refusal_of(case, case.arguments())
    assert message.startswith(f"{case.function}: ")
    assert [words for words in case.says if not contains(message, words)] == []


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_leaves_every_array_as_it_was(case):
    arguments = case.arguments()
    before = contents(arguments)
    refusal_of(case, arguments)
    assert contents(arguments) == before


@pytest.mark.parametrize("case", HUGE, ids=lambda case: case.name)
def test_a_huge_size_is_refused_before_memory_is_asked_for(case):
    arguments = case.arguments()
    tracemalloc.start()
    try:
        refusal_of(case, arguments)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("call", sorted({case.call for case in TABLE}))
def test_the_call_that_the_bad_ones_change_is_good(call):
    getattr(cupyattn, call.partition(" ")[0])(**good(call))


def test_every_public_function_has_bad_calls():
    public = {name for name in cupyattn.__all__ if callable(getattr(cupyattn, name)) and name.islower()}
    assert {case.function for case in TABLE} == public - {"implementations"}  # whose bad calls are in test_allowed.py


def test_there_are_ninety_bad_calls_of_different_names():
    assert len({case.name for case in TABLE}) == len(TABLE) >= 90


@pytest.mark.parametrize(
    ("message", "words", "expected"),
    [("f: no\n    q  (2, 3)", "q", True), ("f: no\n    query  (2, 3)", "q", False), ("came -12", "-1", False)],
)
def test_words_are_found_as_words(message, words, expected):
    assert contains(message, words) is expected
