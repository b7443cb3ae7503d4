"""The GPU's door on the CPU: torch's and CuPy's arrays in host memory, real launches under the emulator, and what
stands for the driver in between."""

import ctypes
import functools
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import emulator
import numpy as np
import pytest
from emulated import encode

from cupyattn import cuda, repeating
from cupyattn.cuda import appending, backward, merging, scheduling, scripting
from cupyattn.cuda.launching import gradients, launch, mapping, maps, memory
from cupyattn.problem import NAMED_DEVICES

H100 = NAMED_DEVICES["H100"]


class Driver:
    """What stands for the driver: kernels run under the emulator, on all memory that was ever looked at."""

    def __init__(self):
        self.launches, self.storages = [], {}
        self.stream, self.nodes = 0, None
        self.one_at_a_time = threading.Lock()

    def kernel(self, specialisation, index):
        emulator.require_compiler()
        built = emulator.build(specialisation.source, specialisation.expression)

        def launch(grid, block, arguments, shared_memory, stream):
            (record,) = arguments
            self.launches.append((specialisation, grid))
            self.queue(lambda: built.launch(record, grid, block[0], shared_memory, self.buffers()))

        return launch

    def queue(self, work):
        """Done at once, or at every replay of the graph that is being captured."""
        if self.nodes is None:
            with self.one_at_a_time:  # ranks that are threads
                work()
        else:
            self.nodes.append(work)

    @contextmanager
    def capture(self):
        """The graph of what is queued, as a function; memory that anybody looked at lives as long as the driver."""
        nodes = self.nodes = []
        yield lambda: [work() for work in nodes]
        self.nodes = None

    def look_at(self, storage):
        self.storages[storage.data_ptr()] = storage

    def look_at_numpy(self, array):
        self.storages[array.ctypes.data] = SimpleNamespace(nbytes=lambda: array.nbytes, array=array)

    def buffers(self):
        """(bytes, writable) of each storage, as the emulator wants to know."""
        return [
            (np.ctypeslib.as_array((ctypes.c_uint8 * storage.nbytes()).from_address(pointer)), True)
            for pointer, storage in list(self.storages.items())
            if storage.nbytes()
        ]


@pytest.fixture
def driver(monkeypatch):
    found = Driver()
    repeating.forget()
    for module in (cuda, appending, backward, merging, scheduling, scripting):
        monkeypatch.setattr(module, "kernel", found.kernel)
    monkeypatch.setattr(cuda, "device_of", lambda function, title, array: H100)
    monkeypatch.setattr(cuda, "_device", lambda index: H100)
    monkeypatch.setattr(maps, "encode", encode)
    monkeypatch.setattr(cuda, "_current", lambda index: cuda.NOTHING)
    for kind in (memory.CuPyMemory, memory.TorchMemory):
        monkeypatch.setattr(kind, "stream", lambda self, index: memory.Stream(found.stream))
        monkeypatch.setattr(kind, "is_capturing", lambda self, stream: found.nodes is not None)
    # Every test has an adapter of its own.
    monkeypatch.setattr(cuda, "_memory", functools.cache(cuda._memory.__wrapped__))
    yield found
    repeating.forget()


@pytest.fixture
def torch(driver, monkeypatch):
    """torch, whose CPU tensors say that they are on a GPU."""
    found = pytest.importorskip("torch")
    from cupyattn.arrays import plainness
    from cupyattn.arrays.torch import Torch

    monkeypatch.setattr(plainness, "_is_on_gpu", lambda array: True)
    monkeypatch.setattr(Torch, "place", lambda self, array: ("cuda", "cuda:0"))
    for name in ("view", "pointer"):
        real = getattr(memory.TorchMemory, name)

        def looking(self, array, *more, real=real):
            driver.look_at(array.untyped_storage())
            return real(self, array, *more)

        monkeypatch.setattr(memory.TorchMemory, name, looking)
    return found


@pytest.fixture
def copies_pay(monkeypatch):
    """What no tensor map reads is copied for it from eight tokens on."""
    monkeypatch.setattr(mapping, "MANY", 8)
    for room in (launch, gradients):
        room._recipe.cache_clear()
    yield
    for room in (launch, gradients):
        room._recipe.cache_clear()


def astray(x):
    """The same numbers of a tensor, two bytes behind a multiple of 16."""
    numbers = x.new_empty(x.numel() + 8)
    start = next(i for i in range(8) if (numbers.data_ptr() + 2 * i) % 16 == 2)
    return numbers[start : start + x.numel()].view(x.shape).copy_(x)
