"""Where operands lie, as values."""

import pytest

from cupyattn.cuda.launching import views
from cupyattn.cuda.launching.memory import TorchMemory, copied

LIE = {
    "as kernels read them": ((2,), lambda x: x(2, 5, 3, 8)),
    "in steps of two": ((2,), lambda x: x(2, 5, 3, 16)[..., ::2]),
    "several batch axes": ((2, 3), lambda x: x(2, 3, 5, 3, 8)),
    "several batch axes of which one is shared": ((2, 3), lambda x: x(2, 1, 5, 3, 8)),
    "several batch axes of one": ((2, 3), lambda x: x(1, 1, 5, 3, 8)),
    "several batch axes of one, in steps": ((2, 3), lambda x: x(1, 1, 5, 3, 16)[..., ::2]),
    "several batch axes of one, off 16 bytes": ((2, 3), lambda x: x(15 * 8 + 1)[1:].view(1, 1, 5, 3, 8)),
    "several batch axes of one, heads turned": ((2, 3), lambda x: x(1, 1, 3, 5, 8).transpose(2, 3)),
    "no batch axis": ((2, 3), lambda x: x(5, 3, 16)[..., ::2]),
}


@pytest.mark.parametrize(("batch_shape", "make"), LIE.values(), ids=LIE)
def test_where_a_copy_will_lie_is_known_before_it_is_made(batch_shape, make):
    torch = pytest.importorskip("torch")
    array = make(lambda *shape: torch.zeros(shape, dtype=torch.float16))
    memory = TorchMemory()
    before = memory.view(array, "float16")
    told = views.once_copied("k", before, batch_shape)
    if views.has_to_be_copied("k", *before[1:], batch_shape):
        array = copied(memory, "k", array, batch_shape)
    made = memory.view(array, "float16")
    assert (told.shape, told.dtype, told.pointer % 16) == (made.shape, made.dtype, made.pointer % 16)
    assert views.broadcast_strides(*told[1:3]) == views.broadcast_strides(*made[1:3])
