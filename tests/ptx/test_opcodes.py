"""Instructions whose results need a warp, a block or a copy: which call of `runtime/instructions.h` they become.

By hand, from the operands' order in the ISA; what the calls then do is the runtime's tests' matter.
"""

import re

import numpy as np
import pytest

import ptx
from ptx.translation import translate

HEAD = ".version 9.0\n.target sm_90a\n.address_size 64\n.visible .entry probe(.param .u64 before, .param .u64 out) {\n"
HEAD += ".reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .b32 %f<9>;\n"
BOX = "[%rd1, {%r2, %r3, %r4, %r5, 0}]"
LOAD = "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
MMA = "mma.sync.aligned.m16n8k16.row.col.f32"
WGMMA = "wgmma.mma_async.sync.aligned.m64n8"
D = "{%f1, %f2, %f3, %f4}"

WRITTEN = {
    "shfl.sync.bfly.b32 %r1|%p1, %r2, %r3, 31, %r4;": (
        "shfl_sync(t, 0, Shuffle::bfly, v_r2, v_r3, (u32)31u, v_r4, &v_r1, &v_p1);"
    ),
    "shfl.sync.idx.b32 %r1, %r2, %r3, %r4, %r5;": (
        "shfl_sync(t, 0, Shuffle::idx, v_r2, v_r3, v_r4, v_r5, &v_r1, &nowhere);"
    ),
    "vote.sync.any.pred %p1, !%p2, %r1;": "v_p1 = vote_any(t, 0, !v_p2, v_r1);",
    "vote.sync.all.pred %p1, %p2, %r1;": "v_p1 = vote_all(t, 0, v_p2, v_r1);",
    "vote.sync.ballot.b32 %r1, %p2, %r3;": "v_r1 = vote_ballot(t, 0, v_p2, v_r3);",
    "bar.sync %r1;": "bar_sync(t, 0, v_r1, -1);",
    "bar.sync %r1, 256;": "bar_sync(t, 0, v_r1, (s64)(u32)256u);",
    "bar.arrive 2, 384;": "bar_arrive(t, 0, (u32)2u, (s64)(u32)384u);",
    "bar.red.or.pred %p1, 0, !%p2;": "v_p1 = bar_red_or(t, 0, (u32)0u, !v_p2);",
    "bar.warp.sync -1;": "bar_warp_sync(t, 0, (u32)4294967295u);",
    "barrier.cluster.arrive.release.aligned;": "barrier_cluster_arrive_release(t, 0);",
    "barrier.cluster.arrive.relaxed.aligned;": "barrier_cluster_arrive_relaxed(t, 0);",
    "barrier.cluster.wait.acquire.aligned;": "barrier_cluster_wait_acquire(t, 0);",
    "setmaxnreg.dec.sync.aligned.u32 40;": "setmaxnreg_dec(t, 0, 40);",
    "setmaxnreg.inc.sync.aligned.u32 232;": "setmaxnreg_inc(t, 0, 232);",
    f"{MMA}.bf16.bf16.f32 {D}, {{%r1, %r2, %r3, %r4}}, {{%r5, %r6}}, {{%f5, %f6, %f7, %f8}};": (
        "const u32 a[4] = {v_r1, v_r2, v_r3, v_r4}, b[2] = {v_r5, v_r6}, c[4] = {v_f5, v_f6, v_f7, v_f8}; "
        "mma_m16n8k16_bf16(t, 0, d, a, b, c); v_f1 = d[0]; v_f2 = d[1]; v_f3 = d[2]; v_f4 = d[3];"
    ),
    f"{MMA}.f16.f16.f32 {D}, {{%r1, %r2, %r3, %r4}}, {{%r5, %r6}}, {D};": "mma_m16n8k16_f16(t, 0, d, a, b, c);",
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r1, %r2, %r3, %r4}, [%r5+32];": (
        "ldmatrix_x4(t, 0, true, (u32)(v_r5 + (u32)32ll), d); v_r1 = d[0]; v_r2 = d[1]; v_r3 = d[2]; v_r4 = d[3];"
    ),
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%r5];": "ldmatrix_x4(t, 0, false, v_r5, d);",
    "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r5], {%r1, %r2, %r3, %r4};": (
        "const u32 given[4] = {v_r1, v_r2, v_r3, v_r4}; stmatrix_x4(t, 0, false, v_r5, given);"
    ),
    "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%r5], {%r1, %r2, %r3, %r4};": (
        "stmatrix_x4(t, 0, true, v_r5, given);"
    ),
    "cp.async.cg.shared.global.L2::128B [%r1], [%rd1], 16, %r2;": "cp_async_16(t, v_r1, v_rd1, v_r2);",
    "cp.async.cg.shared.global [%r1], [%rd1], 16;": "cp_async_16(t, v_r1, v_rd1, 16);",
    "cp.async.ca.shared.global [%r1], [%rd1], 4;": "cp_async_4(t, v_r1, v_rd1);",
    "cp.async.commit_group;": "cp_async_commit_group(t);",
    "cp.async.wait_group 1;": "cp_async_wait_group(t, 1);",
    "cp.async.wait_all;": "cp_async_commit_group(t); t.line = 6; cp_async_wait_group(t, 0);",
    "cp.async.bulk.commit_group;": "cp_async_bulk_commit_group(t);",
    "cp.async.bulk.wait_group.read 0;": "cp_async_bulk_wait_group(t, 0, true);",
    "cp.async.bulk.wait_group 1;": "cp_async_bulk_wait_group(t, 1, false);",
    f"{LOAD}.L2::cache_hint [%r1], {BOX}, [%r6], %rd2;": (
        "const u32 corner[5] = {v_r2, v_r3, v_r4, v_r5, (u32)0u}; "
        "cp_async_bulk_tensor_5d_load(t, v_r1, v_rd1, v_r6, corner, false, 0, v_rd2);"
    ),
    f"{LOAD}.multicast::cluster.L2::cache_hint [%r1], {BOX}, [%r6], %rs1, %rd2;": (
        "cp_async_bulk_tensor_5d_load(t, v_r1, v_rd1, v_r6, corner, true, v_rs1, v_rd2);"
    ),
    f"cp.async.bulk.tensor.5d.global.shared::cta.bulk_group {BOX}, [%r1];": (
        "cp_async_bulk_tensor_5d_store(t, v_rd1, v_r1, corner);"
    ),
    "prefetch.tensormap [%rd1];": "prefetch_tensormap(t, v_rd1);",
    "mapa.shared::cluster.u32 %r1, %r2, %r3;": "v_r1 = mapa_shared_cluster(t, v_r2, v_r3);",
    "mbarrier.init.shared::cta.b64 [%r1], %r2;": "mbarrier_init(t, v_r1, v_r2);",
    "mbarrier.arrive.shared::cta.b64 _, [%r1];": "mbarrier_arrive(t, v_r1, false);",
    "mbarrier.arrive.shared::cluster.b64 _, [%r1];": "mbarrier_arrive(t, v_r1, true);",
    "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], %r2;": "mbarrier_arrive_expect_tx(t, v_r1, v_r2);",
    "mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r1], %r2;": "v_p1 = mbarrier_try_wait_parity(t, v_r1, v_r2);",
    "fence.proxy.async.shared::cta;": "fence_proxy_async(t);",
    "fence.mbarrier_init.release.cluster;": "fence_mbarrier_init(t);",
    "fence.acq_rel.gpu;": "fence_acq_rel_gpu(t);",
    "atom.add.acq_rel.gpu.global.s32 %r1, [%rd1], %r2;": "v_r1 = atom_add_acq_rel_gpu_global_s32(t, v_rd1, v_r2);",
    "wgmma.fence.sync.aligned;": "wgmma_fence(t, 0);",
    "wgmma.commit_group.sync.aligned;": "wgmma_commit_group(t, 0);",
    "wgmma.wait_group.sync.aligned 1;": "wgmma_wait_group(t, 0, 1);",
    f"{WGMMA}k16.f32.bf16.bf16 {D}, %rd1, %rd2, %p1, 1, -1, 0, 1;": (
        "u32* const d[] = {&v_f1, &v_f2, &v_f3, &v_f4}; u32* const* const a = nullptr; "
        "const WarpgroupProduct about = {8, Number::bf16, true, v_p1, 1, -1, false, true}; "
        "wgmma_mma_async(t, 0, about, d, v_rd1, a, v_rd2);"
    ),
    f"{WGMMA}k16.f32.f16.f16 {D}, {{%r1, %r2, %r3, %r4}}, %rd2, 0, -1, 1, 1;": (
        "u32* const a[4] = {&v_r1, &v_r2, &v_r3, &v_r4}; "
        "const WarpgroupProduct about = {8, Number::f16, false, (bool)0u, -1, 1, false, true}; "
        "wgmma_mma_async(t, 0, about, d, 0, a, v_rd2);"
    ),
    f"{WGMMA}k32.f32.e4m3.e4m3 {D}, %rd1, %rd2, %p1, 1, 1;": "{8, Number::e4m3, true, v_p1, 1, 1, false, false};",
    "ld.global.cg.v2.f32 {%f1, %f2}, [%rd1+8];": "global_memory(t, (u64)(v_rd1 + (u64)8ll), 8, false);",
    "st.shared.v2.b32 [%r1], {%r2, %r3};": "shared_memory(t, v_r1, 8, true);",
    "ld.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1];": "generic_memory(t, v_rd1, 16, false);",
    "ld.param.u32 %r1, [out+4];": "parameter_memory(t, (u64)(((u64)launch.parameters + 8) + (u64)4ll), 4);",
    "clz.b32 %r1, %r2;": "v_r1 = clz_b32(v_r2);",
    "brev.b32 %r1, %r2;": "v_r1 = brev_b32(v_r2);",
    "prmt.b32 %r1, %r2, %r3, %r4;": "v_r1 = prmt_b32(v_r2, v_r3, v_r4);",
    "lop3.b32 %r1, %r2, %r3, %r4, 0x96;": "v_r1 = lop3_b32(v_r2, v_r3, v_r4, 150);",
    "bfi.b32 %r1, %r2, %r3, 3, 29;": "v_r1 = bfi_b32(v_r2, v_r3, (u32)3u, (u32)29u);",
    "bfi.b64 %rd1, %rd2, %rd3, 32, 32;": "v_rd1 = bfi_b64(v_rd2, v_rd3, (u32)32u, (u32)32u);",
    "cvt.rn.bf16x2.f32 %r1, %f1, %f2;": "v_r1 = cvt_rn_bf16x2_f32(v_f1, v_f2);",
    "fma.rn.ftz.f32 %f1, %f2, %f3, %f4;": "v_f1 = fma_rn_ftz_f32(v_f2, v_f3, v_f4);",
}


@pytest.mark.parametrize("instruction", WRITTEN)
def test_operands_are_where_the_call_wants_them(instruction):
    source = translate(f"{HEAD}{instruction}\nret;\n}}\n").source
    assert WRITTEN[instruction] in source
    assert ("t.line = 6;" in source) == bool(re.search(r"\(t[,)]", source)), "a call that may fail, or wait, has a line"


def test_special_registers_are_of_the_thread_and_the_launch():
    ptx.require_compiler()
    names = ("%tid.x", "%laneid", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%ntid.x", "%nctaid.x", "%nctaid.y", "%nctaid.z")
    names += ("%cluster_ctarank",)
    place = "mov.u32 %r1, %ctaid.z; mov.u32 %r2, %ctaid.y; mad.lo.u32 %r1, %r1, 3, %r2; mov.u32 %r2, %ctaid.x;\n"
    place += "mad.lo.u32 %r1, %r1, 4, %r2; mov.u32 %r2, %tid.x; mad.lo.u32 %r1, %r1, 64, %r2;\n"
    place += f"mul.wide.u32 %rd2, %r1, {4 * len(names)}; ld.param.u64 %rd1, [out]; add.s64 %rd1, %rd1, %rd2;\n"
    stores = "".join(f"mov.u32 %r1, {name}; st.global.u32 [%rd1+{4 * i}], %r1;\n" for i, name in enumerate(names))
    kernel = ptx.assemble(f"{HEAD}{place}{stores}ret;\n}}\n".replace("out) {", "out)\n.reqnctapercluster 2, 1, 1\n{"))
    found = np.zeros((2, 3, 4, 64, len(names)), np.uint32)
    record = bytes(8) + found.ctypes.data.to_bytes(8, "little")
    kernel.launch(record, (4, 3, 2), 64, 0, [(found, True)], cluster=2)
    z, y, x, thread = np.indices(found.shape[:-1])
    sizes = [np.full_like(x, size) for size in (64, 4, 3, 2)]
    np.testing.assert_array_equal(found, np.stack([thread, thread % 32, x, y, z, *sizes, x % 2], axis=-1))
