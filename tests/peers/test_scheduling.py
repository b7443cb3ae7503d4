"""get_scheduler_metadata, and what flash_attn_with_kvcache takes of it, on the CPU."""

import inspect

import numpy as np
import pytest
from oracle import assert_same_bits

import cupyattn

LENGTHS = np.array([3, 14], np.int32)


def ask(**changes):
    given = {"batch_size": 2, "max_seqlen_q": 1, "max_seqlen_k": 16, "num_heads_q": 4, "num_heads_kv": 2, "headdim": 8}
    return cupyattn.get_scheduler_metadata(**{**given, "cache_seqlens": LENGTHS, **changes})


def test_it_has_the_arguments_of_flash_attn_3():
    names = "batch_size max_seqlen_q max_seqlen_k num_heads_q num_heads_kv headdim cache_seqlens qkv_dtype headdim_v"
    names += " cu_seqlens_q cu_seqlens_k_new cache_leftpad page_size max_seqlen_k_new causal window_size"
    names += " attention_chunk has_softcap num_splits pack_gqa sm_margin"
    assert list(inspect.signature(cupyattn.get_scheduler_metadata).parameters) == names.split()


def test_on_the_cpu_there_is_nothing_to_know():
    found = ask(causal=True, max_seqlen_k_new=1, page_size=4)
    assert (found.shape, found.dtype) == ((0,), np.int32)


def test_on_the_cpu_it_changes_nothing(rng):
    q, k, v = (rng.standard_normal((2, n, h, 8)) for n, h in ((1, 4), (16, 2), (16, 2)))
    expected = cupyattn.flash_attn_with_kvcache(q, k, v, cache_seqlens=LENGTHS)
    found = cupyattn.flash_attn_with_kvcache(q, k, v, cache_seqlens=LENGTHS, scheduler_metadata=ask())
    assert_same_bits(found, expected)


def test_on_the_cpu_what_was_made_for_a_gpu_is_refused_before_anything_is_written(rng):
    q, cache, new = (rng.standard_normal((2, n, h, 8)) for n, h in ((1, 4), (16, 2), (1, 2)))
    before, metadata = cache.copy(), np.arange(9, dtype=np.int32)
    with pytest.raises(ValueError, match=r"was made for other calls: get_scheduler_metadata makes \(0,\)"):
        cupyattn.flash_attn_with_kvcache(
            q, cache, cache.copy(), new, new, cache_seqlens=LENGTHS, scheduler_metadata=metadata
        )
    assert_same_bits(cache, before)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention_chunk": 1}, "attention_chunk"),
        ({"sm_margin": 2}, "sm_margin"),
        ({"num_heads_kv": 3}, "the number of heads of k_cache has to divide that of q"),
        ({"batch_size": 3}, "cache_seqlens has to have one entry per sequence"),
        ({"qkv_dtype": "int8"}, "qkv_dtype has to be one of"),
        ({"page_size": 0}, "page_size"),
        ({"cu_seqlens_k_new": np.array([0, 1, 2], np.int32)}, "max_seqlen_k_new is needed"),
    ],
)
def test_what_no_call_could_ask_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        ask(**changes)
