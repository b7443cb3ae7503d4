"""Which edits of scores a kernel is compiled for."""

from dataclasses import replace

import pytest

from cupyattn.cuda.making.catalogue import (
    ALIBI,
    BIAS,
    CAUSAL_ALIBI,
    DROPOUT,
    LOW_CAP,
    SCALE_FIRST,
    SOFTCAP,
    edits_of,
)
from cupyattn.problem import FLOAT8, Distances, Layout, Mask, Problem, ScoreEdits, Sizes

CAUSAL = Mask(right=0)


def edits(dtype="bfloat16", mask=None, dropout_p=0.0, scale=0.125, **edited):
    sizes = Sizes((2,), 8, 2, 2, 128, 128, 64, 64)
    problem = Problem(
        sizes, Layout("bshd"), dtype, mask=mask or Mask(), edits=ScoreEdits(scale, **edited), dropout_p=dropout_p
    )
    return edits_of(problem)


@pytest.mark.parametrize(
    ("softcap", "dtype", "found"),
    [
        (50.0, "bfloat16", SOFTCAP | LOW_CAP),
        (128.0, "float16", SOFTCAP | LOW_CAP),
        (30.0, FLOAT8, SOFTCAP | LOW_CAP),
        (129.0, "float16", SOFTCAP),
        (1e-9, "float16", SOFTCAP),
        (50.0, "float32", SOFTCAP),
        (0.0, "float16", 0),
    ],
)
def test_a_low_cap_of_few_bits_does_without_the_polynomial(softcap, dtype, found):
    assert edits(dtype, softcap=softcap) == found


@pytest.mark.parametrize(
    ("given", "more"),
    [
        ({"mask": CAUSAL}, CAUSAL_ALIBI),
        ({"mask": CAUSAL, "dropout_p": 0.1}, DROPOUT | CAUSAL_ALIBI),
        ({"mask": Mask(left=20, right=0)}, CAUSAL_ALIBI),
        ({"mask": CAUSAL, "dtype": "float32"}, CAUSAL_ALIBI),
        ({"mask": Mask(right=1)}, 0),
        ({}, 0),
        ({"mask": CAUSAL, "dtype": FLOAT8}, 0),
        ({"mask": CAUSAL, "scale": 1e-9}, 0),
        ({"mask": CAUSAL, "scale": -1.0}, SCALE_FIRST),
        ({"mask": CAUSAL, "softcap": 200.0}, SOFTCAP),
        ({"mask": CAUSAL, "bias": (1, 1, 128, 128)}, BIAS),
    ],
)
def test_slopes_under_a_causal_mask_are_added_to_products(given, more):
    assert edits(alibi_slopes=(8,), **given) == ALIBI | more


TOP_LEFT, SHIFTED = Mask(right=0, alignment="top-left"), Mask(right=4, alignment="top-left")


@pytest.mark.parametrize(
    ("mask", "distances", "more"),
    [
        (TOP_LEFT, Distances(0, 3), CAUSAL_ALIBI),
        (TOP_LEFT, Distances(-1, 3), 0),
        (SHIFTED, Distances(12, 3), CAUSAL_ALIBI),
        (SHIFTED, Distances(11, 3), 0),
        (Mask(right=1000, alignment="top-left"), Distances(3 * 127, 3), CAUSAL_ALIBI),
        (Mask(alignment="top-left"), Distances(3 * 127, 3), CAUSAL_ALIBI),
        (Mask(alignment="top-left"), Distances(3 * 127 - 1, 3), 0),
        (Mask(right=-5, alignment="top-left"), Distances(-15, 3), CAUSAL_ALIBI),
        (Mask(right=-5, alignment="top-left"), Distances(-16, 3), 0),
    ],
)
def test_slopes_are_added_to_products_where_no_distance_is_below_zero(mask, distances, more):
    """Of keys that are seen, up to key 127; |first + step * (row - key)|."""
    assert edits(mask=mask, alibi_slopes=(8,), distances=distances) == ALIBI | more


def test_distances_are_not_counted_from_where_a_mask_is_aligned():
    """200 keys for 128 rows: under the mask the first row sees up to key 72."""
    sizes = Sizes((2,), 8, 2, 2, 128, 200, 64, 64)
    problem = Problem(sizes, Layout("bshd"), "float16", CAUSAL, ScoreEdits(0.1, alibi_slopes=(8,)))
    for first, more in ((72, CAUSAL_ALIBI), (71, 0)):
        apart = replace(problem.edits, distances=Distances(first, 1))
        assert edits_of(replace(problem, edits=apart)) == ALIBI | more
