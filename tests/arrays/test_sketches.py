"""Arrays without values, by which calls are rehearsed."""

import numpy as np
import pytest

from cupyattn.arrays import Sketch
from cupyattn.problem import NAMED_DEVICES

SHAPE = (4, 5, 6)
SKETCH = Sketch(SHAPE, "float16", NAMED_DEVICES["H100"])


@pytest.mark.parametrize(
    "index",
    [
        (slice(None), 2),
        (slice(1, 3), slice(None, None, 2), 0),
        (..., slice(-2, None)),
        (slice(0, 9), ..., 1),
        (None, ...),
        1,
        slice(3, 1),
        (0, 0, 0),
    ],
    ids=str,
)
def test_a_sketch_is_indexed_as_an_array_is(index):
    assert SKETCH[index].shape == np.empty(SHAPE)[index].shape


def test_a_sketch_is_reshaped_and_turned_as_an_array_is():
    xp = SKETCH.__array_namespace__()
    assert xp.reshape(SKETCH, (2, -1)).shape == (2, 60)
    assert xp.permute_dims(SKETCH, (2, 0, 1)).shape == (6, 4, 5)


def test_what_is_made_of_a_sketch_has_its_dtype_and_device():
    part = SKETCH[0]
    assert (part.dtype, part.device) == ("float16", NAMED_DEVICES["H100"])
