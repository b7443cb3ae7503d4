"""What a cache will cost is what it does cost."""

import ml_dtypes
import numpy as np
import pytest

import cupyattn
from cupyattn import kv_cache_bytes


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", np.float16, np.dtype("f4"), ml_dtypes.bfloat16])
def test_it_is_what_arrays_of_that_size_take(dtype):
    k, v = np.zeros((3, 7, 2, 64), dtype), np.zeros((3, 7, 2, 32), dtype)
    assert kv_cache_bytes(5, 2, 64, dtype, tokens=7, batch=3, head_dim_v=32) == 5 * (k.nbytes + v.nbytes)


def test_a_dtype_of_torch_is_known():
    torch = pytest.importorskip("torch")
    assert kv_cache_bytes(1, 8, 128, torch.bfloat16) == 4096
    assert kv_cache_bytes(1, 8, 128, torch.float8_e4m3fn) == 2048


def test_query_heads_do_not_matter():
    llama = {heads: kv_cache_bytes(32, heads, 128, "bfloat16") for heads in (32, 8, 1)}
    assert llama == {32: 524288, 8: 131072, 1: 16384}
    assert llama[8] / llama[32] == 0.25


def test_sequences_take_whole_pages():
    cache = cupyattn.PagedCache(num_pages=8, page_size=16)
    rows = np.zeros((66, 2, 64), np.float32)
    cache.append(rows, rows, seqlens=[33, 33])
    used = 8 - cache.num_free_pages
    assert kv_cache_bytes(1, 2, 64, "float32", 33, 2, page_size=16) == used * 16 * 2 * 2 * 64 * 4
