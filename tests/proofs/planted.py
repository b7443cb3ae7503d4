"""Bugs planted in the assembly of `instructions/` and `tiles/`, and in the PTX text: each has to be caught.

By numbers that miss the definition's bar, by a rule that the executor enforces, or by `fences.violations`.  The first
kind of bug is a piece of text in a CUDA source and what takes its place, as in `tests/mutants.py`; the second is an
edit of what NVRTC made of it: what a compiler may do where a `volatile`, a clobber or a dependency is missing.

What cannot be caught this way, each tried and found to pass:

- A `volatile` or a "memory" clobber that is missing, where NVRTC emits the very same PTX all the same: so it is with
  both `ld.shared` and with `ldmatrix` (13.5, compared).  What runs is the PTX; what another compiler might make of the
  source is not in it.  The edits of the text below are what such a compiler could do, and those are caught.
- Accumulators and fragments that are not held (`ptx::hold`), for the same reason: `fences.violations` looks at what
  order NVRTC has left, and ptxas comes after all that is looked at here.
- `ptx::pin`, whose store never happens: its purpose is the order in which ptxas issues what has two orders.
- A probe of values that multiplies by one in place of zero: it finds all that is not finite, and sums that overflow
  besides; then values are mended that needed it not.  The numbers are right, it costs time.
- A number widened without its sign (cvt.s64.s32 as cvt.u64.u32), where it is not negative in any call.
- One wgmma.fence of several, where no register is written in front of it: the others are enough.
- What only time shows, or a memory model weaker than this one's.
"""

import re
from typing import NamedTuple

import emulated
import numpy as np
import ptx
from cases import DISTANCES
from emulated import operands, options_of, problem_of
from emulator import CUDA, path_of
from proofs import fences
from proofs.executed import executed

from cupyattn.plan.hopper import Switches, hopper_tile

SEED = 3
ORDERS = ((1, 0), (2, 0), (0, 0), (1, 1), (1, 2), (2, 1))
"""Schedules and seeds, until one catches the bug."""


class Planted(NamedTuple):
    """A bug in a CUDA source."""

    name: str
    source: str
    """The file's name, wherever it lies."""
    old: str
    """Has to be there exactly once."""
    new: str
    group: str
    """The call that has to notice."""

    @property
    def sources(self):
        path = path_of(self.source)
        text = (CUDA / path).read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: the text to replace is {text.count(self.old)} times in {path}")
        return {path: text.replace(self.old, self.new)}

    edit = None


class Edited(NamedTuple):
    """A bug in the PTX text."""

    name: str
    edit: object
    """A function of the text."""
    group: str

    sources = None


# ---------------------------------------------------------------------------------------------------
# Calls
# ---------------------------------------------------------------------------------------------------

BOTTOM = {"causal": True, "alignment": "bottom-right"}
WINDOW = {"window_size": (70, 20), "alignment": "bottom-right"}


def _call(
    kernel, dtype="float16", seqlens=(200, 300), dims=(64, 64), heads=(1, 1, 1), options=None, tile=None, **edits
):
    def call(sources, schedule, seed):
        arrays = operands(np.random.default_rng(SEED), dtype, "bshd", 1, heads, seqlens, dims)
        asked = options_of(**(options or {}))
        given = {"tile": hopper_tile(problem_of(arrays, asked))._replace(**tile)} if tile else {}
        emulated.check(arrays, asked, kernel, schedule, seed, sources=sources, **given, **edits)

    call.target = "sm_90a" if kernel == "hopper" else "sm_80"
    return call


def _apart(sources, schedule, seed):
    """Slopes by distances whose sign changes inside of a tile."""
    arrays, asked, _ = DISTANCES["every third token"](np.random.default_rng(SEED), "float16")
    emulated.check(arrays, asked, "flash", schedule, seed, sources=sources)


_apart.target = "sm_80"
GROUPS = {
    "flash, distances": _apart,
    "flash": _call("flash", seqlens=(70, 150), heads=(2, 1, 2), options=BOTTOM),
    "flash, bfloat16": _call("flash", "bfloat16", (70, 150)),
    "flash, many rows": _call("flash", seqlens=(131, 65), options=BOTTOM),
    "splits": _call("splitkv", seqlens=(3, 300), heads=(2, 1, 1), num_splits=3),
    "hopper": _call("hopper"),
    "hopper, bfloat16": _call("hopper", "bfloat16"),
    "hopper, causal": _call("hopper", "bfloat16", options=BOTTOM),
    "hopper, window": _call("hopper", seqlens=(231, 100), options=WINDOW),
    "hopper, 96 columns": _call("hopper", seqlens=(130, 200), dims=(96, 96), options=BOTTOM),
    "hopper, 128 columns": _call("hopper", seqlens=(130, 200), dims=(128, 128)),
    "hopper, heads": _call("hopper", heads=(2, 2, 2)),
    "hopper, a block for all": _call("hopper", seqlens=(300, 700), heads=(2, 1, 1), tile={"persistent": True},
                                     num_workers=1),
    "cluster": _call("hopper", seqlens=(256, 600), dims=(128, 128),
                     tile={"cluster": 2, "block_q": 128, "block_k": 176}),
    "float8": _call("hopper", "float8_e4m3fn", (130, 400)),
    "weights in shared memory": _call("hopper", "bfloat16", (130, 300), tile={
        "block_q": 128, "block_k": 64, "switches": Switches(weights_in_shared=True)}),
}  # fmt: skip


def caught_by(bug, folder=None):
    """How a bug is caught, in words, or None."""
    call, how = GROUPS[bug.group], None
    with executed(call.target, edit=bug.edit, folder=folder) as watch:
        try:
            for schedule, seed in ORDERS:
                call(bug.sources, schedule, seed)
        except (AssertionError, ptx.ExecutorError, ptx.Unknown) as error:
            how = f"{type(error).__name__}: {error}"
        if how is None:
            rules = [violation for _, _, kernel in watch.built for violation in fences.violations(kernel.module)]
            how = f"{rules[0].rule}: line {rules[0].line}" if rules else None
    return how


# ---------------------------------------------------------------------------------------------------
# In the sources
# ---------------------------------------------------------------------------------------------------

SOURCES = [
    Planted("two accumulators of wgmma swapped", "wgmma.cuh",
            '"%0, %1, %2, %3,',
            '"%1, %0, %2, %3,',
            "hopper"),
    Planted("two far accumulators swapped", "wgmma.cuh",
            "%56, %57, %58, %59",
            "%57, %56, %58, %59",
            "hopper"),
    Planted("accumulators' blocks swapped in the constraints", "wgmma.cuh",
            "SUMS_48, BLOCK(6), BLOCK(7)",
            "SUMS_48, BLOCK(7), BLOCK(6)",
            "hopper"),
    Planted("tnspB the other way, A in registers, bf16", "wgmma.cuh",
            '"k16.f32.bf16.bf16", ", %" #q, i, j, k, l, o, p, , "n"(int(kByColumns))',
            '"k16.f32.bf16.bf16", ", %" #q, i, j, k, l, o, p, , "n"(int(!kByColumns))',
            "hopper, bfloat16"),
    Planted("tnspA set instead of tnspB", "wgmma.cuh",
            '"k16.f32.f16.f16", ", 0, %" #l',
            '"k16.f32.f16.f16", ", 1, %" #l',
            "hopper"),
    Planted("b negated", "wgmma.cuh",
            'right ", p, 1, 1" order',
            'right ", p, 1, -1" order',
            "hopper"),
    Planted("descriptors a and b swapped", "wgmma.cuh",
            '"l"(a), "l"(b), "r"(added)',
            '"l"(b), "l"(a), "r"(added)',
            "hopper"),
    Planted("scale-d upside down", "wgmma.cuh",
            "setp.ne.b32 p",
            "setp.eq.b32 p",
            "hopper"),
    Planted("registers of A 1 and 2 swapped", "wgmma.cuh",
            '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)',
            '"r"(a[0]), "r"(a[2]), "r"(a[1]), "r"(a[3]), "l"(b)',
            "hopper"),
    Planted("absolute values with their sign", "ptx.cuh",
            "return fabsf(x);", "return x;",
            "flash, distances"),
    Planted("halves of pack swapped, f16", "ptx.cuh",
            'asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));',
            'asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(low), "f"(high));',
            "flash"),
    Planted("halves of pack swapped, bf16", "ptx.cuh",
            'asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));',
            'asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(low), "f"(high));',
            "hopper, bfloat16"),
    Planted("registers of A swapped in mma.sync", "ptx.cuh",
            "f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}",
            "f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%6,%5,%7}",
            "flash"),
    Planted("operands b of mma.sync swapped", "ptx.cuh",
            '{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"\n'
            '            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])\n'
            '            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));\n'
            "    else",
            '{%4,%5,%6,%7}, {%9,%8}, {%0,%1,%2,%3};"\n'
            '            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])\n'
            '            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));\n'
            "    else",
            "flash, bfloat16"),
    Planted("ldmatrix not transposed", "ptx.cuh",
            "x4.trans.shared",
            "x4.shared",
            "flash"),
    Planted("ldmatrix registers swapped", "ptx.cuh",
            "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}",
            "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %2, %1, %3}",
            "flash"),
    Planted("cp.async of what is not valid", "tile.cuh",
            "row.exists && column < num_cols ? count : 0",
            "row.exists && column < num_cols ? 0 : count",
            "flash"),
    Planted("cp.async: wait for one group less", "ptx.cuh",
            'cp.async.wait_group %0;" ::"n"(kPending)',
            'cp.async.wait_group %0;" ::"n"(kPending + 1)',
            "flash"),
    Planted("cp.async: no commit", "ptx.cuh",
            'asm volatile("cp.async.commit_group;" ::: "memory");',
            "",
            "flash"),
    Planted("no __syncthreads", "ptx.cuh",
            "DEVICE void barrier() { __syncthreads(); }",
            "DEVICE void barrier() { }",
            "flash"),
    Planted("shuffle of another lane", "ptx.cuh",
            "__shfl_xor_sync(~0u, value, mask)",
            "__shfl_xor_sync(~0u, value, mask ^ 4)",
            "flash"),
    Planted("ld.shared.v4 registers swapped", "ptx.cuh",
            "ld.shared.v4.b32 {%0, %1, %2, %3}",
            "ld.shared.v4.b32 {%0, %2, %1, %3}",
            "flash"),
    Planted("swizzle modes of descriptors mixed up", "tile90.cuh",
            "kSwizzle == 128 ? 1 : kSwizzle == 64 ? 2 : 3",
            "kSwizzle == 128 ? 2 : kSwizzle == 64 ? 1 : 3",
            "hopper"),
    Planted("swizzle mode of 64 bytes", "tile90.cuh",
            "kSwizzle == 64 ? 2 : 3",
            "kSwizzle == 64 ? 3 : 2",
            "hopper, 96 columns"),
    Planted("stride offset halved", "tile90.cuh",
            "(kAlignment >> 4) << 32",
            "(kAlignment >> 5) << 32",
            "hopper"),
    Planted("leading offset of columns", "tile90.cuh",
            "descriptor(base, kSlab)",
            "descriptor(base, 16)",
            "hopper, 128 columns"),
    Planted("swizzle mode one bit lower", "tile90.cuh",
            "kMode << 62",
            "kMode << 61",
            "hopper"),
    Planted("step along rows not in 16 bytes", "tile90.cuh",
            "step % kSteps * 32) >> 4",
            "step % kSteps * 32) >> 3",
            "hopper"),
    Planted("parity of a wait upside down", "ptx90.cuh",
            '"r"(barrier), "r"(parity)\n'
            '        : "memory");',
            '"r"(barrier), "r"(parity ^ 1)\n'
            '        : "memory");',
            "hopper"),
    Planted("branch of the wait upside down", "ptx90.cuh",
            "@!ended bra.uni again",
            "@ended bra.uni again",
            "hopper"),
    Planted("no loop in the wait", "ptx90.cuh",
            '"@!ended bra.uni again; }"',
            '"}"',
            "hopper"),
    Planted("expects half of the bytes", "ptx90.cuh",
            'mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)',
            'mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes / 2)',
            "hopper"),
    Planted("one arrival more than there are", "ptx90.cuh",
            '"r"(barrier), "r"(arrivals)',
            '"r"(barrier), "r"(arrivals + 1)',
            "hopper"),
    Planted("no fence of mbarriers", "ptx90.cuh",
            'asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");',
            "",
            "hopper"),
    Planted("no fence of proxies", "ptx90.cuh",
            'asm volatile("fence.proxy.async.shared::cta;" ::: "memory");',
            "",
            "hopper"),
    Planted("no fence of proxies: turned float8", "ptx90.cuh",
            'asm volatile("fence.proxy.async.shared::cta;" ::: "memory");',
            "",
            "float8"),
    Planted("no fence of proxies: weights in shared memory", "ptx90.cuh",
            'asm volatile("fence.proxy.async.shared::cta;" ::: "memory");',
            "",
            "weights in shared memory"),
    Planted("coordinates of a box swapped", "ptx90.cuh",
            "{%3, %4, %5, %6, %7}",
            "{%3, %5, %4, %6, %7}",
            "hopper"),
    Planted("heads and batches of a box swapped", "ptx90.cuh",
            "{%3, %4, %5, %6, %7}",
            "{%3, %4, %5, %7, %6}",
            "hopper, heads"),
    Planted("coordinates of a stored box swapped", "ptx90.cuh",
            "{%2, %3, %4, %5, %6}], [%1]",
            "{%2, %3, %5, %4, %6}], [%1]",
            "hopper"),
    Planted("coordinates of a box for several swapped", "ptx90.cuh",
            "{%4, %5, %6, %7, %8}",
            "{%4, %6, %5, %7, %8}",
            "cluster"),
    Planted("multicast to one block alone", "ptx90.cuh",
            '"h"(static_cast<uint16>(ranks))',
            '"h"(static_cast<uint16>(1))',
            "cluster"),
    Planted("mapa of the rank", "ptx90.cuh",
            '"mapa.shared::cluster.u32 there, %0, %1;\\n"',
            '"mapa.shared::cluster.u32 there, %0, 0;\\n"',
            "cluster"),
    Planted("no barrier of the cluster", "ptx90.cuh",
            "asm "
            'volatile("barrier.cluster.arrive.relaxed.aligned;\\nbarrier.cluster.wait.acquire.'
            'aligned;" ::: "memory");',
            "",
            "cluster"),
    Planted("cluster barrier without waiting", "ptx90.cuh",
            "barrier.cluster.arrive.relaxed.aligned;\\nbarrier.cluster.wait.acquire.aligned;",
            "barrier.cluster.arrive.relaxed.aligned;",
            "cluster"),
    Planted("store not waited for", "ptx90.cuh",
            'asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");',
            "",
            "hopper, a block for all"),
    Planted("store not committed", "ptx90.cuh",
            'asm volatile("cp.async.bulk.commit_group;" ::: "memory");',
            "",
            "hopper, a block for all"),
    Planted("stmatrix registers swapped", "ptx90.cuh",
            "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4}",
            "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %3, %2, %4}",
            "hopper"),
    Planted("wgmma: wait for one group less", "ptx90.cuh",
            'wgmma.wait_group.sync.aligned %0;" ::"n"(kPending)',
            'wgmma.wait_group.sync.aligned %0;" ::"n"(kPending + 1)',
            "hopper"),
    Planted("wgmma: no commit", "ptx90.cuh",
            'asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");',
            "",
            "hopper"),
    Planted("named barriers all one", "ptx90.cuh",
            'bar.sync %0, %1;" ::"r"(id)',
            'bar.sync %0, %1;" ::"r"(1)',
            "hopper"),
    Planted("named barrier of 128 threads", "ptx90.cuh",
            'bar.sync %0, %1;" ::"r"(id), "r"(threads)',
            'bar.sync %0, %1;" ::"r"(id), "r"(threads / 2)',
            "hopper"),
    Planted("pairs of float8 swapped", "ptx90.cuh",
            "mov.b32 %0, {low, high}",
            "mov.b32 %0, {high, low}",
            "float8"),
    Planted("halves of pairs of float8 swapped", "ptx90.cuh",
            "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1",
            "cvt.rn.satfinite.e4m3x2.f32 low, %1, %2",
            "float8"),
    Planted("prmt's operands swapped", "ptx90.cuh",
            "__byte_perm(a, b, selector)",
            "__byte_perm(b, a, selector)",
            "float8"),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------
# In the PTX text
# ---------------------------------------------------------------------------------------------------


def _index(lines, pattern, place=0, after=0):
    """The line of a place among those that have the pattern."""
    return [index for index, line in enumerate(lines) if index >= after and re.search(pattern, line)][place]


def _edit_of_lines(change):
    """An edit that changes a list of lines."""

    def edit(text):
        lines = text.split("\n")
        change(lines)
        return "\n".join(lines)

    return edit


def _drop(pattern, place):
    """Without one instruction."""

    def change(lines):
        index = _index(lines, pattern, place)
        lines[index] = re.sub(pattern + r"[^;]*;", "", lines[index])

    return _edit_of_lines(change)


def _substitute(pattern, to, count=0, flags=0):
    return lambda text: re.sub(pattern, to, text, count=count, flags=flags)


def _sums_of(line):
    """The accumulators of a product."""
    return re.findall(r"%\w+", line[line.index("wgmma.mma_async") :].split("}")[0])


@_edit_of_lines
def _use_early(lines):
    """The first use of scores goes in front of the wait for them, which lets one group go on."""
    wait = _index(lines, r"wgmma\.wait_group\.sync\.aligned 1;")
    products = [line for line in lines[:wait] if "wgmma.mma_async" in line]
    sums = {*_sums_of(products[0]), *_sums_of(products[-1])}
    for index in range(wait + 1, len(lines)):
        found = re.match(r"\s*(?:max|mul|fma|sub|add)\.\S+\s+%\w+, (.*);", lines[index])
        if found and sums & set(re.findall(r"%\w+", found[1])):
            lines.insert(wait, lines.pop(index))
            return


def _in_flight(lines):
    """(The wait for all products after the first such wait, the last product before it.)"""
    wait = _index(lines, r"wgmma\.wait_group\.sync\.aligned 0;", 1)
    return wait, max(index for index in range(wait) if "wgmma.mma_async" in lines[index])


@_edit_of_lines
def _scale_early(lines):
    wait, product = _in_flight(lines)
    register = _sums_of(lines[product])[0]
    lines.insert(wait, f"\tmul.ftz.f32 \t{register}, {register}, 0f3F800000;")


@_edit_of_lines
def _overwrite_a(lines):
    wait, product = _in_flight(lines)
    register = re.search(r"\}, \{(%\w+)", lines[product])[1]
    lines.insert(wait, f"\tmov.b32 \t{register}, 0;")


@_edit_of_lines
def _other_power(lines):
    """In the middle one of all powers of two, another operand."""
    index = _index(lines, r"ex2\.approx", sum("ex2.approx" in line for line in lines) // 2)
    other = re.search(r"%\w+(?=;)", lines[_index(lines, r"ex2\.approx", 0)])[0]
    lines[index] = re.sub(r"%\w+;", f"{other};", lines[index])


def _without_last_before(words, mark):
    """The last `words` before the last `mark` go."""

    def edit(text):
        before, mark_itself, behind = text.rpartition(mark)
        return "".join(before.rpartition(words)[::2]) + mark_itself + behind

    return edit


@_edit_of_lines
def _wait_behind_barrier(lines):
    """cp.async.wait_group goes behind the barrier that tells the others."""
    wait = _index(lines, r"cp\.async\.wait_group")
    line = lines.pop(wait)
    lines.insert(_index(lines, r"bar\.sync", 0, wait) + 1, line)


@_edit_of_lines
def _commit_before_products(lines):
    product = _index(lines, r"wgmma\.mma_async")
    commit = _index(lines, r"wgmma\.commit_group", 0, product)
    lines.insert(product, lines.pop(commit))


TEXTS = [
    Edited("an accumulator is read before the wait", _use_early, "hopper"),
    Edited("an accumulator is scaled while under way", _scale_early, "hopper"),
    Edited("a register of A is overwritten while under way", _overwrite_a, "hopper"),
    Edited("a wait for products is gone", _drop(r"wgmma\.wait_group\.sync\.aligned", 1), "hopper"),
    Edited("all wgmma.fence are gone", _substitute(r"wgmma\.fence\.sync\.aligned;", ""), "hopper"),
    Edited("the first wgmma.fence is gone", _drop(r"wgmma\.fence\.sync\.aligned", 0), "hopper"),
    Edited("products are committed before they are asked for", _commit_before_products, "hopper"),
    Edited("the fence of proxies before results are stored is gone", _without_last_before(
        "fence.proxy.async.shared::cta;", "cp.async.bulk.tensor.5d.global"), "hopper"),
    Edited("a barrier is gone", _drop(r"bar\.sync", 1), "flash"),
    Edited("copies waited for behind the barrier that tells of them", _wait_behind_barrier, "flash"),
    Edited("the smaller of unsigned numbers", _substitute(r"\b(max|min)\.s32", r"\1.u32"), "flash, many rows"),
    Edited("a power of two of another number", _other_power, "hopper"),
    Edited("a choice the other way", _substitute(r"(selp\.[fb]32\s+%\w+), (\S+), (\S+), (%\w+;)",
                                                r"\1, \3, \2, \4", 40), "hopper, causal"),
    Edited("a shared address taken for a global one", _substitute(r"\bld\.shared\.v4", "ld.global.v4"), "flash"),
    Edited("global memory by 32 bits of its address", _substitute(
        r"(cp\.async\.cg\S+ \[%\w+\], \[)(%\w+)", r"and.b64 \2, \2, 4294967295; \1\2", 1), "flash"),
    Edited("a predicate the other way", _substitute(r"@%(p\d+) bra", r"@!%\1 bra", 1), "splits"),
    Edited("an unsigned comparison", _substitute(r"setp\.(lt|gt|le|ge)\.s32", r"setp.\1.u32"), "hopper, window"),
]  # fmt: skip

BUGS = (*SOURCES, *TEXTS)
