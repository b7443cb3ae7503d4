"""Control flow (9.7.12), and what warps, blocks and clusters do together: barriers and votes (9.7.13), shuffles
(9.7.9.6), products of a warp (9.7.14)."""

from ptx.signatures import at_line, calls

# ---- Control flow ----------------------------------------------------------------------------------------------------


def branch(body, operands):
    """9.7.12.3; .uni promises that all active threads take it."""
    if len(operands) != 1:
        raise body.unknown(f"{len(operands)} operands")
    return f"goto {body.label(operands[0])};"


def leave(body, operands):
    """ret (9.7.12.6)."""
    if operands:
        raise body.unknown(f"{len(operands)} operands")
    return "return;"


def call_function(body, operands):
    """9.7.12.5, of a function without results by its name."""
    if len(operands) != 2 or not (operands[1].startswith("(") and operands[1].endswith(")")):
        raise body.unknown("a call of this kind")
    function, name = body.callee(operands[0])
    given = [body.parameter(text.strip()) for text in operands[1][1:-1].split(",") if text.strip()]
    if [size for _, size in given] != [parameter.bytes for parameter in function.parameters]:
        raise body.unknown(f"arguments that are not those of {function.name}")
    return f"{name}({', '.join(['t', *(argument for argument, _ in given)])});"


FORMS = {"bra": branch, "bra.uni": branch, "ret": leave, "ret.uni": leave, "call.uni": call_function}


# ---- Warps -----------------------------------------------------------------------------------------------------------


def shuffle(mode):
    """9.7.9.6: `d` or `d|p`, where p says whether the lane read is within its bounds."""

    def write(body, operands):
        if len(operands) != 5:
            raise body.unknown(f"{len(operands)} operands")
        to, bar, in_range = (text.strip() for text in operands[0].partition("|"))
        to = f"&{body.register(to, 'u32')}"
        in_range = f"&{body.register(in_range, 'bool')}" if bar else "&nowhere"
        given = ", ".join(body.value(operand, "u32") for operand in operands[1:])
        call = f"shfl_sync(t, {body.site}, Shuffle::{mode}, {given}, {to}, {in_range});"
        return f"{{ {at_line(body)}bool nowhere; (void)nowhere; {call} }}"

    return write


def product(kind):
    """9.7.14.5: D = A B + C; C may be D."""

    def write(body, operands):
        if len(operands) != 4:
            raise body.unknown(f"{len(operands)} operands")
        d = body.registers(operands[0], "u32", 4)
        a, b, c = (body.values(text, "u32", n) for text, n in zip(operands[1:], (4, 2, 4), strict=True))
        given = f"const u32 a[4] = {{{', '.join(a)}}}, b[2] = {{{', '.join(b)}}}, c[4] = {{{', '.join(c)}}};"
        stores = " ".join(f"{name} = d[{index}];" for index, name in enumerate(d))
        return f"{{ {at_line(body)}u32 d[4]; {given} mma_m16n8k16_{kind}(t, {body.site}, d, a, b, c); {stores} }}"

    return write


def load_matrices(transposes):
    """9.7.14.5.15."""

    def write(body, operands):
        if len(operands) != 2:
            raise body.unknown(f"{len(operands)} operands")
        stores = (f"{name} = d[{index}];" for index, name in enumerate(body.registers(operands[0], "u32", 4)))
        call = f"ldmatrix_x4(t, {body.site}, {transposes}, {body.address(operands[1], 'u32')}, d);"
        return f"{{ {at_line(body)}u32 d[4]; {call} {' '.join(stores)} }}"

    return write


def store_matrices(transposes):
    """9.7.14.5.16."""

    def write(body, operands):
        if len(operands) != 2:
            raise body.unknown(f"{len(operands)} operands")
        given = ", ".join(body.values(operands[1], "u32", 4))
        call = f"stmatrix_x4(t, {body.site}, {transposes}, {body.address(operands[0], 'u32')}, given);"
        return f"{{ {at_line(body)}const u32 given[4] = {{{given}}}; {call} }}"

    return write


FORMS |= {f"shfl.sync.{mode}.b32": shuffle(mode) for mode in ("idx", "bfly", "up", "down")}
FORMS |= {f"mma.sync.aligned.m16n8k16.row.col.f32.{x}.{x}.f32": product(x) for x in ("f16", "bf16")}
for trans, transposes in (("", "false"), ("trans.", "true")):
    FORMS[f"ldmatrix.sync.aligned.m8n8.x4.{trans}shared.b16"] = load_matrices(transposes)
    FORMS[f"stmatrix.sync.aligned.m8n8.x4.{trans}shared.b16"] = store_matrices(transposes)
FORMS |= calls(
    {
        # 9.7.13.9
        "vote.sync.any.pred": "bool = vote_any(thread, site, bool, u32)",
        "vote.sync.all.pred": "bool = vote_all(thread, site, bool, u32)",
        "vote.sync.ballot.b32": "u32 = vote_ballot(thread, site, bool, u32)",
        # 9.7.13.1, 9.7.13.2
        "bar.sync": ("bar_sync(thread, site, u32, (-1))", "bar_sync(thread, site, u32, s64)"),
        "bar.arrive": "bar_arrive(thread, site, u32, s64)",
        "bar.red.or.pred": "bool = bar_red_or(thread, site, u32, bool)",
        "bar.warp.sync": "bar_warp_sync(thread, site, u32)",
        # 9.7.13.3
        "barrier.cluster.arrive.release.aligned": "barrier_cluster_arrive_release(thread, site)",
        "barrier.cluster.arrive.relaxed.aligned": "barrier_cluster_arrive_relaxed(thread, site)",
        "barrier.cluster.wait.acquire.aligned": "barrier_cluster_wait_acquire(thread, site)",
        # 9.7.19.5
        "setmaxnreg.inc.sync.aligned.u32": "setmaxnreg_inc(thread, site, constant)",
        "setmaxnreg.dec.sync.aligned.u32": "setmaxnreg_dec(thread, site, constant)",
    }
)
