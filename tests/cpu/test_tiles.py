"""How parts are cut into tiles and blocks: what is remembered of it."""

import tracemalloc

import numpy as np

import cupyattn


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
