"""What is read from a cubin's ELF is what ptxas reported."""

import re
import struct

import pytest

from cupyattn.cuda.making.compiler import compile_cubin
from cupyattn.cuda.making.elf import kernels, whole

TARGETS = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a"]

HUNGRY = """
template <int kLength>
__device__ __noinline__ float sum(const float* x, int start) {
    float kept[kLength];
    for (int i = 0; i < kLength; ++i) kept[i] = x[i] * start;
    float total = 0;
    for (int i = 0; i < kLength; ++i) total += kept[(start + i) % kLength];
    return total;
}
template <int kLength>
__global__ void hungry(float* x, int start) {
    __shared__ float shared[kLength];
    shared[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = sum<kLength>(shared, start);
}
"""
FRUGAL = "template <int kValue> __global__ void frugal(float* x) { x[threadIdx.x] = kValue; }"


def said(log, pattern):
    """The number that ptxas reported of the only kernel; zero if it did not mention it."""
    numbers = re.findall(pattern, log)
    assert len(numbers) <= 1, "more than one kernel"
    return int(numbers[0]) if numbers else 0


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("text", "expression"), [(HUNGRY, "hungry<96>"), (FRUGAL, "frugal<3>")])
def test_registers_local_and_shared_memory_are_what_ptxas_reports(text, expression, target):
    cubin = compile_cubin(text, expression, target)
    assert cubin.resources.registers == said(cubin.log, r"Used (\d+) registers") > 0
    assert cubin.resources.local_memory == said(cubin.log, r"(\d+) bytes cumulative stack size")
    assert cubin.resources.shared_memory == said(cubin.log, r"(\d+) bytes smem")
    assert (cubin.resources.shared_memory == 96 * 4) == (text is HUNGRY)
    assert (cubin.resources.local_memory >= 96 * 4) == (text is HUNGRY)


@pytest.mark.usefixtures("nvrtc")
def test_each_kernel_of_a_cubin_is_found_with_its_own_resources():
    many = """
    extern "C" __global__ void one(float* x) { __shared__ float s[8]; s[threadIdx.x] = *x; *x = s[threadIdx.x ^ 1]; }
    extern "C" __global__ void two(float* x) { *x = 1; }
    """
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(many, "many.cu", (), ())
    nvrtc.compileProgram(program, ("-arch=sm_80",))
    found = kernels(whole(nvrtc.getCUBIN(program)))
    nvrtc.destroyProgram(program)
    assert {name: resources.shared_memory for name, resources in found.items()} == {"one": 32, "two": 0}


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("target", TARGETS)
def test_the_tables_of_a_compiled_cubin_lie_inside_it(target):
    image = compile_cubin(FRUGAL, "frugal<3>", target).image
    programs, sections = struct.unpack_from("<QQ", image, 32)
    program_size, num_programs, section_size, num_sections = struct.unpack_from("<4H", image, 54)
    assert num_programs > 0
    assert num_sections > 0
    assert programs + program_size * num_programs <= len(image)
    assert sections + section_size * num_sections <= len(image)


@pytest.mark.usefixtures("nvrtc")
def test_the_last_byte_is_put_back_once():
    image = compile_cubin(FRUGAL, "frugal<3>", "sm_90a").image
    assert whole(image[:-1]) == image
    assert whole(image) == image


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("read", [whole, kernels])
def test_half_a_cubin_is_refused(read):
    image = compile_cubin(FRUGAL, "frugal<3>", "sm_90a").image
    with pytest.raises(ValueError, match="bytes are missing"):
        read(image[: len(image) // 2])


@pytest.mark.parametrize("read", [whole, kernels])
@pytest.mark.parametrize("image", [b"", b"\x7fELF", b"PTX" * 100, b"\x7fELF\x01\x01" + bytes(100)])
def test_what_is_no_cubin_is_refused(read, image):
    with pytest.raises(ValueError, match="not a cubin"):
        read(image)
