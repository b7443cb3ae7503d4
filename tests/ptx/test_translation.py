"""PTX text into C++: what is not known is refused by its line, and what is known does what the ISA says.

Expected numbers are by hand, from the ISA's sections.
"""

import re

import numpy as np
import pytest

import ptx
from ptx import opcodes_arithmetic, opcodes_copies, opcodes_memory, opcodes_warps
from ptx.text import Unknown, read, split_operands
from ptx.translation import FORMS, literal, translate

HEAD = ".version 9.0\n.target sm_90a\n.address_size 64\n"
REGISTERS = ".reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<19>; .reg .b64 %rd<9>; .reg .b32 %f<9>;\n"


def entry(body, before="", directives=""):
    """A kernel of one pointer, `out`, which is in %rd1."""
    head = f"{HEAD}{before}.visible .entry probe(.param .u64 out)\n{directives}{{\n{REGISTERS}"
    return f"{head}ld.param.u64 %rd1, [out];\n{body}\nret;\n}}\n"


# ---------------------------------------------------------------------------------------------------
# What is not known
# ---------------------------------------------------------------------------------------------------

UNKNOWN = {
    # Instructions and modifiers
    "popc.b32 %r1, %r2;": "instruction popc.b32",
    "add.sat.s32 %r1, %r2, %r3;": "instruction add.sat.s32",
    "add.b32 %r1, %r2, %r3;": "instruction add.b32",
    "fma.rn.f32 %f1, %f2, %f3, %f4;": "instruction fma.rn.f32",
    "max.NaN.ftz.f32 %f1, %f2, %f3;": "instruction max.NaN.ftz.f32",
    "ex2.approx.f32 %f1, %f2;": "instruction ex2.approx.f32",
    "setp.lt.b32 %p1, %r1, %r2;": "instruction setp.lt.b32",
    "cvt.rn.f16.f32 %rs1, %f1;": "instruction cvt.rn.f16.f32",
    "cvt.sat.u8.u32 %r1, %r2;": "instruction cvt.sat.u8.u32",
    "mul.s32 %r1, %r2, %r3;": "instruction mul.s32",
    "mad.hi.s32 %r1, %r2, %r3, %r4;": "instruction mad.hi.s32",
    "ld.global.nc.u32 %r1, [%rd1];": "instruction ld.global.nc.u32",
    "ld.volatile.global.u32 %r1, [%rd1];": "instruction ld.volatile.global.u32",
    "ld.acquire.gpu.u32 %r1, [%rd1];": "instruction ld.acquire.gpu.u32",
    "atom.add.relaxed.gpu.global.s32 %r1, [%rd1], 1;": "instruction atom.add.relaxed.gpu.global.s32",
    "red.global.add.u32 [%rd1], 1;": "instruction red.global.add.u32",
    "fence.acq_rel.cta;": "instruction fence.acq_rel.cta",
    "fence.proxy.async;": "instruction fence.proxy.async",
    "membar.gl;": "instruction membar.gl",
    "barrier.sync 0;": "instruction barrier.sync",
    "bar.red.and.pred %p1, 0, %p2;": "instruction bar.red.and.pred",
    "barrier.cluster.arrive.relaxed;": "instruction barrier.cluster.arrive.relaxed",
    "shfl.bfly.b32 %r1, %r2, 1, 31;": "instruction shfl.bfly.b32",
    "vote.sync.uni.pred %p1, %p2, -1;": "instruction vote.sync.uni.pred",
    "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r1, %r2}, [%r3];": "instruction ldmatrix",
    "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 %r1, %r2, %r3, %r4;": "instruction mma",
    "cp.async.ca.shared.global [%r1], [%rd1], 16;": "an operand that is not 4",
    "cp.async.ca.shared.global.L2::128B [%r1], [%rd1], 4;": "instruction cp.async.ca.shared.global",
    "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%rd1, {%r1, %r2, %r3, %r4}], [%r5];": "instruction",
    "mbarrier.test_wait.parity.shared::cta.b64 %p1, [%r1], %r2;": "instruction mbarrier.test_wait",
    "wgmma.mma_async.sync.aligned.m64n12k16.f32.f16.f16 {%f1}, %rd1, %rd2, %p1, 1, 1, 0, 0;": "instruction wgmma",
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.bf16 {%f1}, %rd1, %rd2, %p1, 1, 1, 0, 0;": "instruction wgmma",
    "exit;": "instruction exit",
    "trap;": "instruction trap",
    "bra.convergent there;": "instruction bra.convergent",
    "!;": "not an instruction",
    # Address spaces
    "ld.const.u32 %r1, [%rd1];": "instruction ld.const.u32",
    "ld.shared::cta.u32 %r1, [%r2];": "instruction ld.shared::cta.u32",
    "st.shared::cluster.u32 [%r1], %r2;": "instruction st.shared::cluster.u32",
    "st.async.shared::cluster.u32 [%r1], %r2;": "instruction st.async",
    "cvta.to.shared.u64 %rd2, %rd1;": "instruction cvta.to.shared.u64",
    "cvta.shared.u64 %rd2, %rd1;": "instruction cvta.shared.u64",
    "isspacep.global %p1, %rd1;": "instruction isspacep.global",
    # Operands
    "add.s32 %r1, %r2;": "2 operands",
    "add.s32 %r1, %r2, %r3, %r4;": "4 operands",
    "add.s32 %r1, %r2, %rd3;": "%rd3 is u64, not u32",
    "add.s32 %rd1, %r2, %r3;": "%rd1 is u64, not u32",
    "add.s32 5, %r2, %r3;": "5 is no register",
    "add.s32 %r1, %r2, %p3;": "%p3 is bool, not u32",
    "add.s32 %r1, -%r2, %r3;": "operand -%r2",
    "add.s32 %r1, !%r2, %r3;": "operand !%r2",
    "add.s32 %r1, %r19, %r3;": "there is no register %r19",
    "add.s32 %r1, %r01, %r3;": "there is no register %r01",
    "add.s32 %r1, %q1, %r3;": "operand %q1",
    "add.s32 %r1, %r2, 4294967296;": "operand 4294967296",
    "add.s32 %r1, %r2, -2147483649;": "operand -2147483649",
    "add.s16 %rs1, %rs2, 65536;": "operand 65536",
    "add.s16 %rs1, %rs2, -32769;": "operand -32769",
    "add.s32 %r1, %r2, 017;": "operand 017",
    "add.s32 %r1, %r2, 0b11;": "operand 0b11",
    "add.s32 %r1, %r2, 1.5;": "operand 1.5",
    "add.s64 %rd1, %rd2, 0f3F800000;": "operand 0f3F800000",
    "add.ftz.f32 %f1, %f2, 0d3FF0000000000000;": "operand 0d3FF0000000000000",
    "mov.u32 %r1, %clock;": "operand %clock",
    "mov.u32 %r1, %tid.y;": "operand %tid.y",
    "mov.u64 %rd2, %tid.x;": "operand %tid.x",
    "mov.u64 %rd2, nothing;": "operand nothing",
    "mov.b64 {%r1, %r2, %r3}, %rd1;": "a vector of so many",
    "mov.b32 {%r1, %r2}, %r3;": "%r1 is u32, not u16",
    "setp.eq.s32 %p1|%p2, %r1, %r2;": "%p1|%p2 is no register",
    "setp.eq.and.s32 %p1, %r1, %r2;": "3 operands",
    "cvt.s64.s32 %r1, %r2;": "a register narrower than its type",
    "cvt.u32.u64 %r1, %r2;": "a register narrower than its type",
    "cvt.s64.s32 %rd1, 5;": "5 is no register with bits",
    "ld.global.u32 %r1, [%r2];": "%r2 is u32, not u64",
    "ld.global.u32 %r1, %rd2;": "address %rd2",
    "ld.global.u32 %r1, [%rd2-4];": "address [%rd2-4]",
    "ld.global.u32 %r1, [%rd2+%rd3];": "address [%rd2+%rd3]",
    "ld.global.u32 %rs1, [%rd2];": "a register narrower than its type",
    "ld.global.u32 %p1, [%rd2];": "%p1 is no register with bits",
    "ld.global.v2.u32 {%r1, %r2, %r3}, [%rd2];": "has not 2 elements",
    "ld.global.v4.u64 {%rd1, %rd2, %rd3, %rd4}, [%rd2];": "instruction ld.global.v4.u64",
    "ld.shared.u32 %r1, [%rd2];": "%rd2 is u64, not u32",
    "st.global.u32 [%rd1], %rs1;": "a register narrower than its type",
    "st.param.b32 [x+0], %r1;": "there is no parameter x",
    "bar.sync %r1, %r2, %r3;": "3 operands",
    "lop3.b32 %r1, %r2, %r3, %r4, %r5;": "%r5 is no constant",
    "cp.async.wait_group %r1;": "%r1 is no constant",
    "cp.async.cg.shared.global [%r1], [%rd1], 8;": "an operand that is not 16",
    "mbarrier.arrive.shared::cta.b64 %rd1, [%r1];": "an operand that is not _",
    "wgmma.wait_group.sync.aligned -1;": "-1 is no constant",
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f1, %f2, %f3, %f4}, %rd1, %rd2, %p1, 2, 1, 0, 0;": "2 is no",
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f1, %f2, %f3, %f4}, %rd1, %rd2, %p1, 1, 0, 0, 0;": "of 0",
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f1, %f2, %f3}, %rd1, %rd2, %p1, 1, 1, 0, 0;": "has not 4",
    "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%f1, %f2, %f3, %f4}, %rd1, %rd2, %p1, 1, 1, 0, 0;": "8 op",
    "bra nowhere;": "there is no label nowhere",
    "call.uni nowhere, ();": "there is no function nowhere",
    "call.uni (%r1), probe, ();": "a call of this kind",
    "ret 5;": "1 operands",
    # Guards
    "@%r1 bra there;": "%r1 is u32, not bool",
    "@%p1 popc.b32 %r1, %r2;": "instruction popc.b32",
    "@1 mov.u32 %r1, 0;": "1 is no register",
    # Directives
    ".shared .align 4 .b8 x[16];": "a directive",
    ".local .align 32 .b8 x[16];": "a directive",
    ".local .align 4 .b32 x[16];": "a directive",
    ".const .b32 x;": "a directive",
    ".reg .b128 %x;": "type of a register",
    ".reg .b32 %x<;": "name %x<",
    ".reg .b32 %r<5>;": "%r<5> again",
    ".param .b32 x;": "a parameter outside of a call's braces",
    '.pragma "something";': "a directive",
    ".branchtargets a, b;": "a directive",
    ".loc 1;": "a directive",
}


@pytest.mark.parametrize("statement", UNKNOWN)
def test_a_statement_that_is_not_known_is_refused_by_its_line(statement):
    text = entry(f"add.s32 %r1, %r2, %r3;\nthere:\n{statement}")
    line = text.split("\n").index(statement) + 1
    with pytest.raises(Unknown, match=rf"^PTX line {line}: .*{re.escape(UNKNOWN[statement])}") as error:
        translate(text)
    assert error.value.line == line


BEFORE = {
    ".const .align 4 .b32 x = 5;": "a module's directive",
    ".global .align 4 .b128 x;": "type",
    ".global .b32 x;": "a module's directive",
    ".global .align 4 .u32 x[2] = {1, 2, 3};": "more values than elements",
    ".extern .global .align 4 .u32 x;": "a module's directive",
    ".extern .shared .align 2048 .b8 x[];": "alignment of shared memory",
    ".shared .align 4 .b8 x[16];": "a module's directive",
    ".tex .u32 x;": "a module's directive",
    ".func (.param .b32 back) f(.param .b32 x) { ret; }": "a module's directive",
    ".func f(.reg .b32 x) { ret; }": "parameter",
    ".func f(.param .b32 x) .maxnreg 64 { ret; }": "a function's directive",
    ".alias f, g;": "a module's directive",
}


@pytest.mark.parametrize("declaration", BEFORE)
def test_a_declaration_that_is_not_known_is_refused_by_its_line(declaration):
    with pytest.raises(Unknown, match=rf"^PTX line 4: {BEFORE[declaration]}"):
        translate(entry("", f"{declaration}\n"))


@pytest.mark.parametrize("directive", [".maxnreg 32", ".reqntid 32", ".maxclusterrank 2", ".blocksareclusters"])
def test_a_directive_of_the_kernel_that_is_not_known_is_refused(directive):
    with pytest.raises(Unknown, match=r"^PTX line 4: a function's directive"):
        translate(entry("", directives=f"{directive}\n"))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (entry("").replace(".address_size 64", ".address_size 32"), "not a module's head"),
        (entry("").replace(".version 9.0\n", ""), "not a module's head"),
        (HEAD, "not one entry"),
        (entry("") + entry("").removeprefix(HEAD), "not one entry"),
        (entry("")[:-3], "a function without end"),
        (entry("") + "mov.u32 %r1, 0;", "a module's directive"),
        (entry("a:\na:"), "a label again"),
        (entry("", ".global .align 4 .u32 x = 4294967296;\n") + "", None),
        (entry("mov.u64 %rd2, x;", ".global .align 4 .u32 x = 4294967296;\n"), "value of x"),
        (entry(".reg .b32 r1;\nmov.b32 r1, 0;\nmov.b32 %r1, 0;"), "%r1 and r1 would be one variable"),
        (entry("{ bra inside; }\n{ inside: ret; }"), "there is no label inside"),
        (entry("{ .reg .b32 x; }\nmov.b32 x, 0;"), "x is no register"),
    ],
)
def test_a_text_that_is_no_module_or_names_what_is_not_there(text, why):
    if why is None:
        translate(text)  # a constant that nobody reads may be anything: there are hundreds
        return
    with pytest.raises(Unknown, match=re.escape(why)):
        translate(text)


def test_no_form_is_in_two_tables():
    tables = (opcodes_arithmetic.FORMS, opcodes_memory.FORMS, opcodes_warps.FORMS, opcodes_copies.FORMS)
    assert sum(map(len, tables)) == len(FORMS)


# ---------------------------------------------------------------------------------------------------
# What is known
# ---------------------------------------------------------------------------------------------------

ONE = "mov.u32 %r1, 4294967295;"  # -1 as a signed number
RESULTS = {
    # Constants
    "a signed and an unsigned constant are the same bits": (f"{ONE} sub.s32 %r2, %r1, -1; cvt.u64.u32 %rd9, %r2;", 0),
    "hexadecimal": ("mov.u64 %rd9, 0xFFFFFFFFFFFFFFFE;", -2),
    "a float's bits": ("mov.f32 %f1, 0fBF800000; cvt.u64.u32 %rd9, %f1;", 0xBF800000),
    "the least number": ("mov.u32 %r1, -2147483648; cvt.s64.s32 %rd9, %r1;", -(2**31)),
    # Signs
    "s32 to s64": (f"{ONE} cvt.s64.s32 %rd9, %r1;", -1),
    "u32 to u64": (f"{ONE} cvt.u64.u32 %rd9, %r1;", 2**32 - 1),
    "s32 to u64 is the sign's": (f"{ONE} cvt.u64.s32 %rd9, %r1;", -1),
    "s8 of a wider register": ("mov.u32 %r1, 0x1FF; cvt.s32.s8 %r2, %r1; cvt.s64.s32 %rd9, %r2;", -1),
    "u8 of a wider register": ("mov.u32 %r1, 0x1FF; cvt.u32.u8 %r2, %r1; cvt.s64.s32 %rd9, %r2;", 255),
    "u32 to u16 to u64": ("mov.u32 %r1, 0x12345678; cvt.u16.u32 %rs1, %r1; cvt.u64.u16 %rd9, %rs1;", 0x5678),
    "s16 in a register of 32 bits": ("mov.u32 %r1, 0x8000; cvt.s16.s32 %r2, %r1; cvt.s64.s32 %rd9, %r2;", -32768),
    "ld.s32 into 64 bits": (f"{ONE} st.global.u32 [%rd2], %r1; ld.global.s32 %rd9, [%rd2];", -1),
    "ld.u32 into 64 bits": (f"{ONE} st.global.u32 [%rd2], %r1; ld.global.u32 %rd9, [%rd2];", 2**32 - 1),
    "ld.s16 into 32 bits": (
        f"{ONE} st.global.u16 [%rd2], %r1; ld.global.s16 %r2, [%rd2]; cvt.s64.s32 %rd9, %r2;",
        -1,
    ),
    "ld.u8 into 16 bits": (f"{ONE} st.global.u8 [%rd2], %r1; ld.global.u8 %rs2, [%rd2]; cvt.u64.u16 %rd9, %rs2;", 255),
    "mul.wide.s32": (f"{ONE} mul.wide.s32 %rd9, %r1, 3;", -3),
    "mul.wide.u32": (f"{ONE} mul.wide.u32 %rd9, %r1, 3;", 3 * (2**32 - 1)),
    "mul.wide.u16": ("mov.u16 %rs1, 65535; mul.wide.u16 %r1, %rs1, %rs1; cvt.u64.u32 %rd9, %r1;", 65535**2),
    "mul.wide.s16": ("mov.u16 %rs1, 65535; mul.wide.s16 %r1, %rs1, 2; cvt.s64.s32 %rd9, %r1;", -2),
    "mul.hi.s32": (f"{ONE} mul.hi.s32 %r2, %r1, 2; cvt.s64.s32 %rd9, %r2;", -1),
    "mul.hi.u32": (f"{ONE} mul.hi.u32 %r2, %r1, 2; cvt.s64.s32 %rd9, %r2;", 1),
    "mul.hi.s64": ("mov.u64 %rd3, -1; mul.hi.s64 %rd9, %rd3, 2;", -1),
    "mul.hi.u64": ("mov.u64 %rd3, -1; mul.hi.u64 %rd9, %rd3, 2;", 1),
    "mad.wide.s32": (f"{ONE} mov.u64 %rd3, 10; mad.wide.s32 %rd9, %r1, 3, %rd3;", 7),
    "mad.lo.s32": (f"{ONE} mad.lo.s32 %r2, %r1, 3, 5; cvt.s64.s32 %rd9, %r2;", 2),
    "min.s32": (f"{ONE} min.s32 %r2, %r1, 5; cvt.s64.s32 %rd9, %r2;", -1),
    "min.u32": (f"{ONE} min.u32 %r2, %r1, 5; cvt.s64.s32 %rd9, %r2;", 5),
    "max.s64": ("mov.u64 %rd3, -1; max.s64 %rd9, %rd3, 5;", 5),
    "max.u64": ("mov.u64 %rd3, -1; max.u64 %rd9, %rd3, 5;", -1),
    "a sum wraps": ("mov.u32 %r1, 2147483647; add.s32 %r2, %r1, 1; cvt.s64.s32 %rd9, %r2;", -(2**31)),
    "a product of 16 bits wraps": (
        "mov.u16 %rs1, 65535; mul.lo.s16 %rs2, %rs1, %rs1; cvt.u64.u16 %rd9, %rs2;",
        1,
    ),
    "the least number has no opposite": (
        "mov.u32 %r1, -2147483648; neg.s32 %r2, %r1; abs.s32 %r2, %r2; cvt.s64.s32 %rd9, %r2;",
        -(2**31),
    ),
    "div.s32 towards zero": ("mov.u32 %r1, -7; div.s32 %r2, %r1, 2; cvt.s64.s32 %rd9, %r2;", -3),
    "rem.s32 has the dividend's sign": ("mov.u32 %r1, -7; rem.s32 %r2, %r1, 2; cvt.s64.s32 %rd9, %r2;", -1),
    "div.u32": (f"{ONE} div.u32 %r2, %r1, 2; cvt.s64.s32 %rd9, %r2;", 2**31 - 1),
    "shr.s32": (f"{ONE} shr.s32 %r2, %r1, 4; cvt.s64.s32 %rd9, %r2;", -1),
    "shr.u32": (f"{ONE} shr.u32 %r2, %r1, 4; cvt.s64.s32 %rd9, %r2;", 2**28 - 1),
    "shr.s16": ("mov.u16 %rs1, -2; shr.s16 %rs2, %rs1, 1; cvt.s64.s16 %rd9, %rs2;", -1),
    "shr.u16": ("mov.u16 %rs1, -2; shr.u16 %rs2, %rs1, 1; cvt.s64.s16 %rd9, %rs2;", 32767),
    "shr.s64 by more than there are": ("mov.u64 %rd3, -5; shr.s64 %rd9, %rd3, 64;", -1),
    "shl.b32 by more than there are": (f"{ONE} shl.b32 %r2, %r1, 32; cvt.u64.u32 %rd9, %r2;", 0),
    "lt.s16": ("mov.u16 %rs1, -1; setp.lt.s16 %p1, %rs1, 0; selp.u64 %rd9, 1, 2, %p1;", 1),
    "lt.u16": ("mov.u16 %rs1, -1; setp.lt.u16 %p1, %rs1, 0; selp.u64 %rd9, 1, 2, %p1;", 2),
    "ge.s64": ("mov.u64 %rd3, -1; setp.ge.s64 %p1, %rd3, 0; selp.u64 %rd9, 1, 2, %p1;", 2),
    "ge.u64": ("mov.u64 %rd3, -1; setp.ge.u64 %p1, %rd3, 0; selp.u64 %rd9, 1, 2, %p1;", 1),
    # Predicates
    "a comparison and a predicate": (
        "setp.eq.u32 %p1, 1, 1; setp.ne.and.u32 %p2, 1, 1, %p1; setp.ne.xor.u32 %p3, 1, 1, %p1; "
        "selp.u64 %rd9, 1, 0, %p2; selp.u64 %rd3, 2, 0, %p3; add.s64 %rd9, %rd9, %rd3;",
        2,
    ),
    "the predicate behind may be negated": (
        "setp.eq.u32 %p1, 1, 2; setp.eq.and.u32 %p2, 1, 1, !%p1; selp.u64 %rd9, 1, 0, %p2;",
        1,
    ),
    "each way to combine": (
        "mov.pred %p1, -1; setp.ne.or.u32 %p2, 1, 1, %p1; setp.eq.xor.u32 %p3, 1, 1, %p1; "
        "setp.eq.and.u32 %p4, 1, 1, %p1; "
        "selp.u64 %rd9, 1, 0, %p2; selp.u64 %rd3, 2, 0, %p3; selp.u64 %rd4, 4, 0, %p4; "
        "or.b64 %rd9, %rd9, %rd3; or.b64 %rd9, %rd9, %rd4;",
        5,
    ),
    "logic of predicates": (
        "mov.pred %p1, -1; mov.pred %p2, 0; and.pred %p3, %p1, %p2; or.pred %p4, %p1, %p2; not.pred %p3, %p3; "
        "and.pred %p3, %p3, %p4; selp.u64 %rd9, 1, 0, %p3;",
        1,
    ),
    "a guard holds": ("mov.u64 %rd9, 1; setp.eq.u32 %p1, 1, 1; @%p1 mov.u64 %rd9, 2;", 2),
    "a guard's opposite": ("mov.u64 %rd9, 1; setp.eq.u32 %p1, 1, 1; @!%p1 mov.u64 %rd9, 2;", 1),
    "nan is not less": ("setp.lt.f32 %p1, 0f7FC00000, 0f3F800000; selp.u64 %rd9, 1, 0, %p1;", 0),
    "or unordered": ("setp.ltu.ftz.f32 %p1, 0f7FC00000, 0f3F800000; selp.u64 %rd9, 1, 0, %p1;", 1),
    # Vectors
    "64 bits from two": ("mov.u32 %r1, 1; mov.u32 %r2, 2; mov.b64 %rd9, {%r1, %r2};", 2 << 32 | 1),
    "64 bits into two": ("mov.u64 %rd3, 0x200000001; mov.b64 {%r1, %r2}, %rd3; cvt.u64.u32 %rd9, %r2;", 2),
    "32 bits from halves": (
        "mov.u16 %rs1, 1; mov.u16 %rs2, -1; mov.b32 %r1, {%rs1, %rs2}; cvt.u64.u32 %rd9, %r1;",
        0xFFFF0001,
    ),
    "a vector's places": (
        "mov.u32 %r1, 3; mov.u32 %r2, 4; st.global.v2.u32 [%rd2], {%r1, %r2}; ld.global.v2.u32 {%r3, %r4}, [%rd2]; "
        "shl.b32 %r4, %r4, 8; or.b32 %r3, %r3, %r4; cvt.u64.u32 %rd9, %r3;",
        0x403,
    ),
    "bytes of a vector": (
        "mov.u16 %rs1, 0x1FF; st.global.v4.u8 [%rd2], {%rs1, 2, %rs1, 4}; ld.global.u32 %rd9, [%rd2];",
        0x04FF02FF,
    ),
    "a store behind an address": (
        "mov.u32 %r1, 9; add.s64 %rd3, %rd2, 8; st.global.u32 [%rd3+-8], %r1; ld.global.u32 %rd9, [%rd2+0];",
        9,
    ),
    # Scopes and labels
    "a name hides the one around it": (
        "{ .reg .b64 x; mov.u64 x, 1; { .reg .b64 x; mov.u64 x, 2; } mov.u64 %rd9, x; }",
        1,
    ),
    "a register around is seen": ("{ .reg .b64 y; mov.u64 y, 1; { .reg .b32 z; mov.u64 y, 2; } mov.u64 %rd9, y; }", 2),
    "a label of this name is elsewhere, too": (
        "mov.u64 %rd9, 0; { bra done; mov.u64 %rd9, 5; done: } "
        "{ bra done; mov.u64 %rd9, 6; done: add.s64 %rd9, %rd9, 1; }",
        1,
    ),
    "a loop": ("mov.u64 %rd9, 0; again: add.s64 %rd9, %rd9, 1; setp.lt.s64 %p1, %rd9, 5; @%p1 bra again;", 5),
    "a loop in a scope": (
        "{ .reg .pred p; mov.u64 %rd9, 0; loop: add.s64 %rd9, %rd9, 2; setp.lt.s64 p, %rd9, 5; @p bra.uni loop; }",
        6,
    ),
    # Poison
    "a register that nobody wrote": ("{ .reg .b64 x; mov.u64 %rd9, x; }", -1),
    "a predicate that nobody wrote": ("{ .reg .pred x; selp.u64 %rd9, 1, 0, x; }", 1),
    "local memory that nobody wrote": ("mov.u64 %rd3, here; ld.local.u64 %rd9, [%rd3+8];", -1),
    # Variables, calls
    "a constant in memory": ("mov.u64 %rd3, codes; ld.global.u32 %rd9, [%rd3+4];", 0x07060504),
    "what is not initialised is zero": ("mov.u64 %rd3, codes; ld.global.u32 %rd9, [%rd3+8];", 0),
    "local memory": ("mov.u64 %rd3, here; mov.u32 %r1, 8; st.local.u32 [%rd3+4], %r1; ld.local.u32 %rd9, [%rd3+4];", 8),
    "local memory by a generic address": (
        "mov.u64 %rd3, here; cvta.local.u64 %rd4, %rd3; mov.u32 %r1, 7; st.u32 [%rd4], %r1; ld.local.u32 %rd9, [%rd3];",
        7,
    ),
    "a call": (
        "mov.u32 %r1, 20; { .param .b64 p0; st.param.b64 [p0+0], %rd2; .param .b32 p1; st.param.b32 [p1+0], %r1; "
        "call.uni helper, (p0, p1); } ld.global.u32 %rd9, [%rd2];",
        22,
    ),
    "a launch's sizes": (
        "mov.u32 %r1, %ntid.x; mov.u32 %r2, %nctaid.x; mad.lo.u32 %r1, %r1, 10, %r2; cvt.u64.u32 %rd9, %r1;",
        321,
    ),
    "shared memory begins behind the system's": ("mov.u32 %r1, space; cvt.u64.u32 %rd9, %r1;", 1024),
    "its address in 64 bits": ("mov.u64 %rd9, space;", 1024),
}

DECLARED = (
    ".global .align 4 .b8 codes[12] = {0, 1, 2, 3, 4, 5, 6, 7};\n"
    ".extern .shared .align 1024 .b8 space[];\n"
    ".func helper(.param .b64 a, .param .b32 b);\n"
)
HELPER = (
    ".func helper(.param .b64 a, .param .b32 b)\n{ .reg .b64 %rd<3>; .reg .b32 %r<3>; ld.param.u64 %rd1, [a]; "
    "ld.param.u32 %r1, [b]; add.s32 %r1, %r1, 2; st.global.u32 [%rd1], %r1; ret; }\n"
)


@pytest.fixture(scope="module")
def results():
    """All cases in one kernel: every thread but the first leaves, since they write to the same places."""
    ptx.require_compiler()
    body = ".local .align 8 .b8 here[16]; .reg .b64 %rd9; mov.u32 %r1, %tid.x; setp.ne.u32 %p1, %r1, 0; @%p1 ret;\n"
    body += f"add.s64 %rd2, %rd1, {8 * len(RESULTS)};\n"
    for index, (text, _) in enumerate(RESULTS.values()):
        body += f"{{ {text}\nst.global.u64 [%rd1+{8 * index}], %rd9; }}\n"
    kernel = ptx.assemble(entry(body, DECLARED) + HELPER)
    found = np.zeros(len(RESULTS) + 2, np.int64)
    kernel.launch(found.ctypes.data.to_bytes(8, "little"), (1, 1, 1), 32, 0, [(found, True)])
    return dict(zip(RESULTS, found.tolist(), strict=False)), kernel


@pytest.mark.parametrize("case", RESULTS)
def test_an_instruction_does_what_the_isa_says(case, results):
    assert results[0][case] == RESULTS[case][1]


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("4294967295", "u32", "(u32)4294967295u"),
        ("-2147483648", "u32", "(u32)2147483648u"),
        ("4294967296", "u32", None),
        ("-2147483649", "u32", None),
        ("18446744073709551615", "u64", "(u64)18446744073709551615ull"),
        ("-9223372036854775809", "u64", None),
        ("255", "u8", "(u8)255u"),
        ("256", "u8", None),
        ("-1", "bool", "(bool)1u"),
        ("2", "bool", None),
        ("0f3F800000", "u32", "0x3F800000u"),
        ("0f3F80000", "u32", None),
        ("12U", "u32", "(u32)12u"),
    ],
)
def test_a_constant_is_within_the_limits_of_signed_or_unsigned_numbers(text, kind, expected):
    assert literal(text, kind) == expected


def test_operands_are_split_at_commas_outside_of_brackets():
    assert split_operands("{%r1, %r2}, [%rd1, {0, 1}], (a, b), 5") == ("{%r1, %r2}", "[%rd1, {0, 1}]", "(a, b)", "5")
    assert split_operands("") == ()


def test_comments_and_strings_keep_every_line_in_its_place():
    text = entry('/* two\nlines; */ .pragma "nounroll"; // mov.u32 %r1, 0;\nadd.s32 %r1, %r2, %r3;')
    lines = text.split("\n")
    assert lines[read(text).entry.statements[-3].line - 1] == "add.s32 %r1, %r2, %r3;"


def test_what_was_visited_is_counted_guard_by_guard(results):
    forms, visited = results[1].forms, results[1].visited_forms
    written = sum(text.count("mov.pred") for text, _ in RESULTS.values())
    assert forms["mov.pred"] == visited["mov.pred"] == written
    assert visited["ret"] == 1 + 31 + 1  # of the thread, of those that left at once, and of the function that it called
    assert visited["bra"] == 4 + 2
    assert results[1].launches[0].instructions == visited.total()
    skipped = {block.line: dict(block.forms) for block, _ in results[1].unvisited}
    assert skipped
    assert all(forms in ({"mov.u64": 1}, {"bra": 1}) for forms in skipped.values())
