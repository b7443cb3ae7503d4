"""Host time of a call on a GPU that was made before, with CuPy's arrays, and a stand-in for the driver.

No GPU is asked anything: arrays lie in host memory, all results in one piece of it, kernels are functions that do
nothing.  What is left is what the package does between a call and its launches.  Real launches, CuPy's pool, and maps
that have to be encoded come on top.
"""

import contextlib
import functools
import time
from unittest import mock

import numpy as np

import cupyattn
from cupyattn import cuda, repeating
from cupyattn.cuda import appending, scheduling, scripting
from cupyattn.cuda.launching import maps, memory
from cupyattn.problem import NAMED_DEVICES

from .common import Benchmark, tracked

H100 = NAMED_DEVICES["H100"]


@contextlib.contextmanager
def standing_in():
    """CuPy's memory on the host, and nothing where the driver would be; yields what makes an array of a shape."""
    import cupy

    def on_host(num_bytes):
        array = np.zeros(num_bytes, np.uint8)
        return cupy.cuda.UnownedMemory(array.ctypes.data, num_bytes, array, device_id=0)

    def array(*shape, dtype="float16"):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(on_host(size + 512), 0))

    one = cupy.cuda.MemoryPointer(on_host(1 << 26), 0)
    nothing = functools.cache(lambda what, index: lambda *launch: None)
    stream = memory.Stream(0)
    with contextlib.ExitStack() as stack:
        replace = mock.patch.object
        for module in (cuda, appending, scheduling, scripting):
            stack.enter_context(replace(module, "kernel", nothing))
        stack.enter_context(replace(cuda, "device_of", lambda function, title, like: H100))
        stack.enter_context(replace(cuda, "_current", lambda index: cuda.NOTHING))
        encode = functools.lru_cache(4096)(lambda wanted, address: bytes(maps.SIZE))
        stack.enter_context(replace(maps, "encode", encode))
        stack.enter_context(replace(memory.CuPyMemory, "stream", lambda self, index: stream))
        stack.enter_context(cupy.cuda.using_allocator(lambda num_bytes: one))
        stack.callback(repeating.forget)
        repeating.forget()
        yield array


def prefill(array):
    q, k, v = array(2, 512, 16, 128), array(2, 512, 4, 128), array(2, 512, 4, 128)
    return lambda: cupyattn.attention(q, k, v, causal=True)


def prefill_in_place(array):
    q, k, v, out = array(2, 512, 16, 128), array(2, 512, 4, 128), array(2, 512, 4, 128), array(2, 512, 16, 128)
    return lambda: cupyattn.attention(q, k, v, causal=True, out=out)


def flash_attn_func(array):
    q, k, v = array(2, 512, 16, 128), array(2, 512, 4, 128), array(2, 512, 4, 128)
    return lambda: cupyattn.flash_attn_func(q, k, v, causal=True)


def sdpa(array):
    q, k, v = array(2, 16, 512, 128), array(2, 16, 512, 128), array(2, 16, 512, 128)
    return lambda: cupyattn.scaled_dot_product_attention(q, k, v, is_causal=True)


def decode(array):
    q, k, v = array(1, 1, 16, 128), array(1, 4096, 4, 128), array(1, 4096, 4, 128)
    return lambda: cupyattn.attention(q, k, v)


def decode_step(array, **more):
    """Of a cache, with a token for it."""
    q, new = array(4, 1, 16, 128), array(4, 1, 4, 128)
    k_cache, v_cache, lengths = array(4, 4096, 4, 128), array(4, 4096, 4, 128), array(4, dtype="int32")
    return lambda: cupyattn.flash_attn_with_kvcache(q, k_cache, v_cache, new, new, cache_seqlens=lengths, causal=True)


def decode_pages(array):
    q = array(4, 1, 16, 128)
    pages, lengths, table = array(512, 16, 4, 128), array(4, dtype="int32"), array(4, 128, dtype="int32")
    return lambda: cupyattn.flash_attn_with_kvcache(q, pages, pages, cache_seqlens=lengths, block_table=table)


CALLS = {
    "attention": prefill,
    "attention, out=": prefill_in_place,
    "flash_attn_func": flash_attn_func,
    "scaled_dot_product_attention": sdpa,
    "attention, one row": decode,
    "flash_attn_with_kvcache, k=": decode_step,
    "flash_attn_with_kvcache, pages": decode_pages,
}


BAR = 15
"""us: most that a call may take that was made before."""


def processor_time(call, turns, number=400):
    """us of the processor for a call, of the best turn: a neighbour costs less of it than of the clock's."""
    call()
    call()
    best = float("inf")
    for _ in range(turns):
        start = time.process_time()
        for _ in range(number):
            call()
        best = min(best, (time.process_time() - start) / number)
    return 1e6 * best


def reading_each_time():
    """No call is like one that was made before."""
    return mock.patch.object(repeating.Memory, "look", return_value=None)


class Repeated(Benchmark):
    """A call of CuPy's arrays on an H100 that was made before, less all that the driver would do."""

    params = (list(CALLS),)
    param_names = ("call",)

    def setup(self, call):
        try:
            import cupy  # noqa: F401 - asv skips what says so before it is measured
        except ImportError:
            raise NotImplementedError("CuPy is not installed") from None

    @tracked("us of the processor", BAR, "Overhead: a call on a GPU that was made before")
    def track_again(self, call):
        with standing_in() as array:
            return processor_time(CALLS[call](array), self.turns)

    @tracked("us of the processor", name="Overhead: a call on a GPU that is read each time")
    def track_read(self, call):
        with standing_in() as array, reading_each_time():
            return processor_time(CALLS[call](array), self.turns)


def main():
    """Print both, of each call."""
    print(f"{'us of the processor':32}{'read each time':>16}{'made again':>12}")
    for name in CALLS:
        bench = Repeated()
        print(f"{name:32}{bench.track_read(name):16.1f}{bench.track_again(name):12.1f}")


if __name__ == "__main__":
    main()
