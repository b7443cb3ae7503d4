"""How parts are cut into tiles and blocks: what is remembered of it."""

import tracemalloc

import numpy as np
import pytest

import cupyattn
from cupyattn.cpu.tiles import EDGE, band_cuts
from cupyattn.problem import Mask, Span


def test_what_is_remembered_of_many_lengths_is_little(rng):
    """It was some 60 KB for each: masks of all edges."""

    def call(length):
        q = np.ones((1, length, 2, 8), np.float32)
        cupyattn.attention(q, q, q, causal=True)
        cupyattn.attention(q, q, q, window_size=(37, 5))

    call(1200)
    tracemalloc.start()
    try:
        for length in range(500, 900, 4):
            call(length)
        assert tracemalloc.get_traced_memory()[0] < 12e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("first", [0, 1, 100, 512])
def test_what_all_rows_see_is_no_block_of_a_few_keys(first):
    """Each block is a step, however few keys it has: only the last one may have few."""
    cuts = band_cuts(Mask(right=0), Span(first, first + 256), 2048, 2048, 4096, False)
    lengths = [cut.keys.stop - cut.keys.start for cut in cuts]
    assert (cuts[0].keys.start, sum(lengths), cuts[-1].keys.stop) == (0, first + 256, first + 256)
    assert min(lengths[:-1]) >= EDGE
