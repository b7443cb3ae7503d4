"""Hopper's instructions as NVRTC compiles them: the machine code has what their names say; no GPU needed."""

import re
import subprocess

import pytest
from resources import disassembler

from cupyattn.cuda.making import compiler, source

WIDTHS = range(16, 257, 16)

PRODUCTS = """
namespace cupyattn {
template <typename Element, bool kByColumns, int kBlocks>
DEVICE void both(float (&c)[kBlocks][4], uint64 left, uint64 right, const uint32 (&a)[4], bool accumulate) {
    ptx::wgmma<Element, kByColumns>(c, left, right, accumulate);
    ptx::wgmma<Element, kByColumns>(c, a, right, true);
}
template <int kBlocks>
__global__ void __launch_bounds__(128, 1) products(float* out, uint64 left, uint64 right, uint32 given) {
    float c[kBlocks][4];
    uint32 a[1][4] = {{given, given + 1, given + 2, given + 3}};
    float* mine = out + threadIdx.x * kBlocks * 4;
    for (int j = 0; j < kBlocks; ++j)
        for (int i = 0; i < 4; ++i) c[j][i] = mine[4 * j + i];
    ptx::hold(c);
    ptx::hold(a);
    ptx::wgmma_fence();
    both<Half, false>(c, left, right, a[0], given != 0);
    both<Half, true>(c, left, right, a[0], given != 0);
    both<BFloat16, false>(c, left, right, a[0], given != 0);
    both<BFloat16, true>(c, left, right, a[0], given != 0);
    both<Float8, false>(c, left, right, a[0], given != 0);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::hold(c);
    for (int j = 0; j < kBlocks; ++j)
        for (int i = 0; i < 4; ++i) mine[4 * j + i] = c[j][i];
}
}  // namespace cupyattn
"""
OTHERS = """
namespace cupyattn {
template <int kKind>
__global__ void __launch_bounds__(384, 1) others(const __grid_constant__ TensorMap map, float* out, int n) {
    const uint32 base = ptx::shared_memory(), barrier = base + 8192;
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(barrier, 1);
        ptx::fence_mbarrier_init();
        ptx::prefetch_map(map);
    }
    ptx::barrier();
    if (ptx::warpgroup() == 0) {
        ptx::fewer_registers<24>();
        if (threadIdx.x == 0) {
            ptx::mbarrier_arrive_expect(barrier, n);
            ptx::load_box(base, map, barrier, 0, n, 2, 3, 4, ptx::kKeepInL2);
        }
        return;
    }
    ptx::more_registers<240>();
    ptx::mbarrier_wait(barrier, n & 1);
    ptx::pin(out[0], base);
    ptx::store_matrices(base + 16 * ptx::lane(), n, n + 1, n + 2, ptx::pack_float8(out[0], out[1], out[2], out[3]));
    ptx::fence_async_proxy();
    ptx::named_barrier(1, 256);
    ptx::named_barrier_arrive(2, 256);
    if (threadIdx.x == 128) {
        ptx::store_box(map, base, 0, n, 2, 3, 4);
        ptx::commit_stores();
        ptx::wait_stores_read<0>();
        ptx::mbarrier_arrive(barrier);
    }
    const uint32 pair = ptx::bits(out[5]);
    out[6 + threadIdx.x] = ptx::add_round_down(ptx::widen(Float8{static_cast<uint8>(n)}), out[4]) +
                           ptx::probe_finite<Half>(pair, 0) + ptx::probe_finite<BFloat16>(pair, 0) +
                           ptx::permute_bytes(pair, n, 0x6420);
}
}  // namespace cupyattn
"""


@pytest.fixture
def machine_code(nvrtc, tmp_path):
    """A function of text and expression to the lines of machine code."""
    tool = disassembler()
    if tool is None:
        pytest.skip("needs nvdisasm (nvidia-cuda-nvdisasm)")

    def lines(text, expression):
        cubin = compiler.compile_cubin(
            source.join("instructions/ptx90.cuh") + text, f"cupyattn::{expression}", "sm_90a"
        )
        assert cubin.spills == 0
        assert "warning" not in cubin.log
        assert "wgmma" not in cubin.log  # ptxas says so when it makes them wait for each other
        path = tmp_path / "kernel.cubin"
        path.write_bytes(cubin.image)
        done = subprocess.run([tool, "-c", str(path)], capture_output=True, text=True, check=True)
        return re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", done.stdout, re.MULTILINE)

    return lines


@pytest.mark.parametrize("width", WIDTHS)
def test_products_of_every_width_are_one_instruction(machine_code, width):
    products = [line for line in machine_code(PRODUCTS, f"products<{width // 8}>") if "GMMA" in line]
    wanted = [
        *("HGMMA.64x{}x16.F32", "HGMMA.64x{}x16.F32", "HGMMA.64x{}x16.F32.BF16", "HGMMA.64x{}x16.F32.BF16"),
        "QGMMA.64x{}x32.F32.E4M3.E4M3",
    ]
    sums = set()
    for index, (from_shared, from_registers) in enumerate(zip(products[::2], products[1::2], strict=True)):
        name = re.escape(wanted[index].format(width))
        right = r"gdesc\[UR\d+\]" + (r"\.tnspB" if index in (1, 3) else "")
        shared = re.fullmatch(rf"{name} (R\d+), {right}, \1, U?P\d+(, gsb0)?", from_shared)
        registers = re.fullmatch(rf"{name} (R\d+), R\d+, {right}, \1(, gsb0)?", from_registers)
        assert shared, from_shared
        assert registers, from_registers
        sums |= {shared[1], registers[1]}
    assert len(products) == 2 * len(wanted)
    assert len(sums) == 1


def test_accumulators_are_numbered_in_order():
    text = (source.FOLDER / "instructions/wgmma.cuh").read_text()
    names = re.findall(r"#define NAMES_(\d+) +(?:NAMES_(\d+) )?\"(.*)\"", text)
    sums = re.findall(r"#define SUMS_(\d+) +(?:SUMS_(\d+), )?(.*)", text)
    assert [int(width) for width, _, _ in names] == [int(width) for width, _, _ in sums] == list(WIDTHS)
    for width, before, numbers in names:
        assert int(before or 0) == int(width) - 16
        assert re.findall(r"%(\d+)", numbers) == [str(i) for i in range(int(width) // 2 - 8, int(width) // 2)]
    for width, before, blocks in sums:
        assert int(before or 0) == int(width) - 16
        assert re.findall(r"BLOCK\((\d+)\)", blocks) == [str(int(width) // 8 - 2), str(int(width) // 8 - 1)]
    lines = re.findall(r"^WGMMA\((.*)\)$", text, re.MULTILINE)
    assert [tuple(map(int, line.split(", "))) for line in lines] == [
        (width, *range(width // 2, width // 2 + 7)) for width in WIDTHS
    ]


def test_every_other_function_is_its_instruction(machine_code):
    code = "\n".join(machine_code(OTHERS, "others<0>"))
    for pattern in (
        r"SYNCS\.EXCH\.64",  # mbarrier_init
        r"UTMACCTL\.PF",  # prefetch_map
        r"SYNCS\.ARRIVE\.TRANS64 ",  # mbarrier_arrive_expect
        r"SYNCS\.ARRIVE\.TRANS64\.A1T0",  # mbarrier_arrive
        r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT",  # mbarrier_wait
        r"UTMALDG\.5D",  # load_box
        r"UTMASTG\.5D",  # store_box
        r"UTMACMDFLUSH",  # commit_stores
        r"USETMAXREG\.DEALLOC",
        r"USETMAXREG\.TRY_ALLOC",
        r"STSM\.16\.M88\.4",
        r"FENCE\.VIEW\.ASYNC\.S",
        r"BAR\.SYNC",
        r"BAR\.ARV",
        r"FADD\.FTZ\.RM",
        r"F2FP\.SATFINITE\.E4M3",
        r"HFMA2\.MMA",
        r"HFMA2\.BF16",
        r"PRMT",
    ):
        assert re.search(pattern, code), pattern
