"""Loading a kernel, as far as it can be seen without a GPU: what CuPy is asked for, on which device, how often."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from cupyattn.cuda.making import elf, module
from cupyattn.cuda.making.cache import Entry
from cupyattn.cuda.making.module import Specialisation, kernel

WANTED = Specialisation("flash.cu", "cupyattn::flash<1>", 128, 66560)


class FakeCupy:
    """Two GPUs of which one is current, and a list of what was asked for."""

    def __init__(self):
        self.asked = []
        self.current = None
        self.capabilities = ["90", "120"]
        runtime = SimpleNamespace(driverGetVersion=lambda: 12080)
        driver = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8, funcSetAttribute=self.set_attribute)
        function = SimpleNamespace(Module=lambda: Module(self))
        self.cuda = SimpleNamespace(Device=self.device, runtime=runtime, driver=driver, function=function)

    def device(self, index):
        return Device(self, index)

    def set_attribute(self, pointer, attribute, value):
        assert self.current is not None, "the attribute is of the function on the current device"
        self.asked.append((self.current, *pointer, attribute, value))


class Device:
    def __init__(self, cupy, index):
        self._cupy, self._index = cupy, index
        self.compute_capability = cupy.capabilities[index]

    def __enter__(self):
        self._cupy.current = self._index

    def __exit__(self, *_):
        self._cupy.current = None


class Module:
    def __init__(self, cupy):
        self._cupy = cupy

    def load(self, image):
        assert isinstance(image, bytes)
        assert self._cupy.current is not None, "a module is loaded into the current device's context"
        self._image = image

    def get_function(self, name):
        return SimpleNamespace(ptr=(self._image, name), module=self)


@pytest.fixture
def cupy(monkeypatch):
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    kernel.cache_clear()
    yield fake
    kernel.cache_clear()


@pytest.fixture
def found(monkeypatch):
    """The cubins that were looked for."""
    calls = []

    def find(source, expression, target, *, driver):
        calls.append((source, expression, target, driver))
        return Entry(target.encode(), None, "_Zflash", elf.Resources(168, 0, 0), "13.0")

    monkeypatch.setattr(module, "find", find)
    return calls


@pytest.mark.parametrize(("index", "target"), [(0, "sm_90a"), (1, "sm_120a")])
def test_the_cubin_is_for_the_devices_architecture_and_no_newer_than_its_driver(cupy, found, index, target):
    kernel(WANTED, index)
    assert found == [("flash.cu", "cupyattn::flash<1>", target, 12)]


@pytest.mark.parametrize("index", [0, 1])
def test_it_is_loaded_on_its_device_with_its_shared_memory_allowed(cupy, found, index):
    kernel(WANTED, index)
    assert cupy.asked == [(index, [b"sm_90a", b"sm_120a"][index], "_Zflash", 8, 66560)]


def test_it_is_loaded_once_for_each_device_and_specialisation(cupy, found):
    other = Specialisation("flash.cu", "cupyattn::flash<2>", 128, 66560)
    functions = [kernel(wanted, index) for wanted in (WANTED, other) for index in (0, 1)]
    again = [kernel(replace(wanted), index) for wanted in (WANTED, other) for index in (0, 1)]
    assert again == functions
    assert len(set(map(id, functions))) == len(cupy.asked) == 4


def test_a_gpu_without_kernels_is_refused_before_anything_is_looked_for(cupy, found):
    cupy.capabilities[0] = "75"
    with pytest.raises(ValueError, match=r"8\.0 or newer \(Ampere\), not 7\.5"):
        kernel(WANTED, 0)
    assert found == []
