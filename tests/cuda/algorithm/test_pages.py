"""Where keys in pages lie, as compiled: whatever a block table says, in a page that there is, or nowhere."""

import numpy as np
import pytest
from ptx.alone import BEGIN, PARAMS, TARGETS, built, numbers, planted, rows_of, run

pytestmark = pytest.mark.usefixtures("nvrtc")

LARGEST = 2**31 - 1
CASES = 30_000
ELEMENTS = {"cupyattn::Float8": 1, "cupyattn::BFloat16": 2, "float": 4}
ENTRIES = 6
"""Of a sequence's row of the table."""
DATA = 2**60
"""The head's first number in page 0; nothing is read there."""
PROBE = f"""
#include "algorithm/pages.cuh"
namespace alone {{
using namespace cupyattn;
template <typename Element>
__global__ void row(int count, const Params* params, const int* keys, const int* indices, int64* found) {{
    {BEGIN}
    Sequence sequence{{}};
    sequence.index = indices[i];
    const Element* data = reinterpret_cast<const Element*>({DATA}ll);
    found[2 * i] = page_of(keys[i], sequence, params[i]);
    found[2 * i + 1] = reinterpret_cast<int64>(row_in_pages(data, params[i].k, keys[i], sequence, params[i]));
}}
}}
"""


def hold_rows(rng, kernel, size):
    """Pages and addresses of keys, for tables of any numbers and strides beyond 32 bits."""
    made = np.zeros(CASES, PARAMS)
    table = numbers(rng, (CASES, ENTRIES)).astype(np.int32)
    counts = np.where(rng.random(CASES) < 0.5, rng.integers(1, 9, CASES), numbers(rng, CASES, 1, LARGEST))
    likely = rng.random((CASES, ENTRIES)) < 0.5
    table[likely] = ((rng.random((CASES, ENTRIES)) * (counts[:, None] + 2)) - 1)[likely].clip(-1, LARGEST)
    indices = rng.integers(0, 3, CASES).astype(np.int32)
    sizes = numbers(rng, CASES, 1, LARGEST // ENTRIES)
    keys = np.minimum(sizes * rng.integers(0, ENTRIES + 1, CASES) + rng.integers(-1, 2, CASES), sizes * ENTRIES - 1)
    keys = np.maximum(keys, 0).astype(np.int32)
    # The table's pointer is so far in front of the row as `index` strides are.
    steps = rng.choice([0, ENTRIES, -ENTRIES, 2**31 + 5, 2**33], CASES)
    ahead = (4 * indices.astype(np.int64) * steps).astype(np.uint64)
    made["at"]["block_table"], made["block_table_row"] = rows_of(table) - ahead, steps
    made["page_size"], made["num_pages"] = sizes, counts
    made["k"][:, 0], made["k"][:, 1] = numbers(rng, CASES, 0, 2**26), numbers(rng, CASES, 0, 2**22)
    found = run(kernel, [made, keys, indices], np.zeros((CASES, 2), np.int64), reached=[table])
    entries, rest = divmod(keys, sizes)
    pages = table[np.arange(CASES), entries]
    exists = (pages >= 0) & (pages < counts)
    assert 0.1 < exists.mean() < 0.9
    np.testing.assert_array_equal(found[:, 0], np.where(exists, pages, -1))
    exact = pages.astype(object) * made["k"][:, 0] + rest.astype(object) * made["k"][:, 1]
    expected = np.where(exists, (DATA + size * exact) % 2**64, 0)  # as addresses are counted
    np.testing.assert_array_equal(found[:, 1].view(np.uint64), expected.astype(np.uint64))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("element", ELEMENTS)
def test_rows_of_any_tables_are_in_pages_that_there_are(rng, element, target):
    hold_rows(rng, built(PROBE, f"alone::row<{element}>", target), ELEMENTS[element])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("page < params.num_pages", "page <= params.num_pages"),
        ("data + page * strides.batch", "data + page * static_cast<int>(strides.batch)"),
    ],
    ids=["one page too many", "a product that wraps"],
)
def test_a_fault_in_pages_is_found(rng, old, new):
    sources = planted("algorithm/pages.cuh", old, new)
    with pytest.raises(AssertionError):
        hold_rows(rng, built(PROBE, "alone::row<cupyattn::BFloat16>", "sm_80", sources), 2)
