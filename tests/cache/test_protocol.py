"""What caches say of themselves."""

import numpy as np
import pytest

import cupyattn
from cupyattn import DynamicCache, PagedCache, StaticCache


@pytest.mark.parametrize(
    ("cache", "said"),
    [
        (DynamicCache(), "2 sequences of 3 tokens, 4 heads of 8 (of values 4 of 16), numpy.ndarray of float32"),
        (StaticCache(5), "2 sequences of 3 tokens, 4 heads of 8 (of values 4 of 16), numpy.ndarray of float32"),
        (PagedCache(8, 4), "2 sequences of 3 tokens, 4 heads of 8 (of values 4 of 16), numpy.ndarray of float32"),
    ],
    ids=lambda x: type(x).__name__ if not isinstance(x, str) else "",
)
def test_a_cache_says_what_is_in_it(cache, said):
    name = type(cache).__name__
    assert repr(cache).startswith(f"<{name}: empty")
    cache.append(np.zeros((2, 3, 4, 8), "f4"), np.zeros((2, 3, 4, 16), "f4"))
    assert repr(cache).startswith(f"<{name}: {said}, {cache.nbytes} bytes")


def test_a_paged_cache_says_how_many_pages_are_free():
    cache = PagedCache(8, 4)
    tokens = np.zeros((5, 1, 8), "f4")
    cache.append(tokens, tokens, seqlens=[4, 1])
    assert "2 sequences of 1 to 4 tokens, 1 head of 8, " in repr(cache)
    assert repr(cache).endswith(", 6 of 8 pages free>")


def test_a_layered_cache_says_what_layers_it_has():
    cache = cupyattn.LayeredCache(3)
    assert repr(cache) == "<LayeredCache: 3 layers of DynamicCache, empty>"
    tokens = np.zeros((1, 1, 2, 8), "f4")
    cache.update(tokens, tokens, 0)
    assert repr(cache).startswith("<LayeredCache: 3 layers of DynamicCache, 1 sequence of ")
