"""What happens later: copies (9.7.9.25), mbarriers (9.7.13.15), products of a warpgroup (9.7.15)."""

import re

from ptx.signatures import at_line, call, calls

FORMS = calls(
    {
        # cp.async (9.7.9.25.3): 16 bytes, of which fewer may be read and zeros are written behind them
        **dict.fromkeys(
            ("cp.async.cg.shared.global", "cp.async.cg.shared.global.L2::128B"),
            ("cp_async_16(thread, [u32], [u64], 16, (16))", "cp_async_16(thread, [u32], [u64], 16, u32)"),
        ),
        "cp.async.ca.shared.global": "cp_async_4(thread, [u32], [u64], 4)",
        "cp.async.commit_group": "cp_async_commit_group(thread)",
        "cp.async.wait_group": "cp_async_wait_group(thread, constant)",
        # Bulk copies (9.7.9.25.4)
        "cp.async.bulk.commit_group": "cp_async_bulk_commit_group(thread)",
        "cp.async.bulk.wait_group": "cp_async_bulk_wait_group(thread, constant, (false))",
        "cp.async.bulk.wait_group.read": "cp_async_bulk_wait_group(thread, constant, (true))",
        "prefetch.tensormap": "prefetch_tensormap(thread, [u64])",  # 9.7.9.15
        "mapa.shared::cluster.u32": "u32 = mapa_shared_cluster(thread, u32, u32)",  # 9.7.9.23
        # mbarriers; `_` is where a state would go that nobody asks for
        "mbarrier.init.shared::cta.b64": "mbarrier_init(thread, [u32], u32)",
        "mbarrier.arrive.shared::cta.b64": "mbarrier_arrive(thread, _, [u32], (false))",
        "mbarrier.arrive.shared::cluster.b64": "mbarrier_arrive(thread, _, [u32], (true))",
        "mbarrier.arrive.expect_tx.shared::cta.b64": "mbarrier_arrive_expect_tx(thread, _, [u32], u32)",
        "mbarrier.try_wait.parity.shared::cta.b64": "bool = mbarrier_try_wait_parity(thread, [u32], u32)",
        # 9.7.15.7
        "wgmma.fence.sync.aligned": "wgmma_fence(thread, site)",
        "wgmma.commit_group.sync.aligned": "wgmma_commit_group(thread, site)",
        "wgmma.wait_group.sync.aligned": "wgmma_wait_group(thread, site, constant)",
    }
)


def wait_all(body, operands):
    """9.7.9.25.3.3: as commit_group, and wait_group 0."""
    steps = (call("cp_async_commit_group(thread)"), call("cp_async_wait_group(thread, (0))"))
    return " ".join(step(body, operands) for step in steps)


FORMS["cp.async.wait_all"] = wait_all


# ---- Boxes of tensor maps (9.7.9.25.5) -------------------------------------------------------------------------------


def map_and_corner(body, text):
    """Of [map, {x, y, z, u, v}]: the map's address, and a declaration of `corner`."""
    met = re.fullmatch(r"\[\s*([\w$%]+)\s*,\s*(\{[^}]*\})\s*\]", text)
    if not met:
        raise body.unknown(f"tensor coordinates {text}")
    corner = ", ".join(body.values(met[2], "u32", 5))
    return body.value(met[1], "u64"), f"const u32 corner[5] = {{{corner}}};"


def load_box(multicasts):
    """To this block, or to all of `ranks`, whose mbarriers get the bytes."""

    def write(body, operands):
        if len(operands) != 4 + multicasts:
            raise body.unknown(f"{len(operands)} operands")
        where, corner = map_and_corner(body, operands[1])
        to, barrier = body.address(operands[0], "u32"), body.address(operands[2], "u32")
        ranks = f"true, {body.value(operands[3], 'u16')}" if multicasts else "false, 0"
        given = f"{to}, {where}, {barrier}, corner, {ranks}, {body.value(operands[-1], 'u64')}"
        return f"{{ {at_line(body)}{corner} cp_async_bulk_tensor_5d_load(t, {given}); }}"

    return write


def store_box(body, operands):
    if len(operands) != 2:
        raise body.unknown(f"{len(operands)} operands")
    where, corner = map_and_corner(body, operands[0])
    given = f"{where}, {body.address(operands[1], 'u32')}, corner"
    return f"{{ {at_line(body)}{corner} cp_async_bulk_tensor_5d_store(t, {given}); }}"


_LOAD = "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
FORMS[f"{_LOAD}.L2::cache_hint"] = load_box(False)
FORMS[f"{_LOAD}.multicast::cluster.L2::cache_hint"] = load_box(True)
FORMS["cp.async.bulk.tensor.5d.global.shared::cta.bulk_group"] = store_box


# ---- Products of a warpgroup (9.7.15.5) ------------------------------------------------------------------------------


def multiply(columns, number):
    """D = A B + D, A from registers or from shared memory.

    Behind the operands stand whether D is added, signs of A and B, and for numbers of 16 bits whether they are
    transposed: of A only where it is in shared memory.
    """

    def write(body, operands):
        if len(operands) < 6:
            raise body.unknown(f"{len(operands)} operands")
        d = ", ".join(f"&{name}" for name in body.registers(operands[0], "u32", columns // 2))
        in_registers = operands[1].startswith("{")
        if in_registers:
            a = ", ".join(f"&{name}" for name in body.registers(operands[1], "u32", 4))
            declared, descriptor = f"u32* const a[4] = {{{a}}};", "0"
        else:
            declared, descriptor = "u32* const* const a = nullptr;", body.value(operands[1], "u64")
        signs, transposes = operands[4:6], operands[6:]
        if len(transposes) != (0 if number == "e4m3" else 1 if in_registers else 2):
            raise body.unknown(f"{len(operands)} operands")
        signs = [body.immediate(text, -1, 1) for text in signs]
        if 0 in signs:
            raise body.unknown("a sign of 0")
        transposes = [str(bool(body.immediate(text, 0, 1))).lower() for text in transposes]
        transposes = ["false"] * (2 - len(transposes)) + transposes
        about = [columns, f"Number::{number}", str(not in_registers).lower(), body.value(operands[3], "bool")]
        about = ", ".join(map(str, [*about, *signs, *transposes]))
        given = f"about, d, {descriptor}, a, {body.value(operands[2], 'u64')}"
        return (
            f"{{ {at_line(body)}u32* const d[] = {{{d}}}; {declared} const WarpgroupProduct about = {{{about}}}; "
            f"wgmma_mma_async(t, {body.site}, {given}); }}"
        )

    return write


for _columns in range(8, 257, 8):
    for _number, _depth in (("f16", 16), ("bf16", 16), ("e4m3", 32)):
        _form = f"wgmma.mma_async.sync.aligned.m64n{_columns}k{_depth}.f32.{_number}.{_number}"
        FORMS[_form] = multiply(_columns, _number)
