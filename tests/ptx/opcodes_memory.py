"""Loads, stores and addresses (9.7.9), an atomic addition (9.7.13.5), fences (9.7.13.4)."""

from ptx.opcodes_arithmetic import bits_of, number_of
from ptx.signatures import at_line, calls

SPACES = {
    "": ("generic_memory", "u64"),
    "global.": ("global_memory", "u64"),
    "shared.": ("shared_memory", "u32"),
    "local.": ("local_memory", "u64"),
    "param.": ("parameter_memory", "u64"),
}
"""What checks an address (5.1), and its bits: in 32 all of shared memory lies."""
UNWRITTEN = ("local.", "param.")
"""Spaces whose function does not ask whether it is a store."""
CACHES = {"global.": ("", "cg.")}
"""Cache operators (9.7.9.1): hints, where they are."""
KINDS = (*(f"{letter}{size}" for size in (8, 16, 32, 64) for letter in "bsu"), "f32", "f64")
VECTORS = {"": 1, "v2.": 2, "v4.": 4}


def access(body, space, address, size, writes):
    """A pointer `at` to bytes that may be accessed: the beginning of a compound statement."""
    name, bits = SPACES[space]
    flag = "" if space in UNWRITTEN else f", {'true' if writes else 'false'}"
    pointer = "u8*" if writes else "const u8*"
    return f"{{ {at_line(body)}{pointer} at = {name}(t, {body.address(address, bits)}, {size}{flag});"


def load(space, count, kind):
    """9.7.9.8: extended by the sign, or zeros, to a wider register."""
    size = bits_of(kind)[1] // 8

    def write(body, operands):
        if len(operands) != 2:
            raise body.unknown(f"{len(operands)} operands")
        code = [access(body, space, operands[1], count * size, False)]
        for index, element in enumerate(body.vector(operands[0], count)):
            name, bits = body.any_register(element)
            if int(bits[1:]) < 8 * size:
                raise body.unknown("a register narrower than its type")
            code.append(f"{name} = ({bits})read<{number_of(kind)}>(at + {index * size});")
        return " ".join([*code, "}"])

    return write


def store(space, count, kind):
    """9.7.9.11: the low bits of a wider register."""
    bits, size = bits_of(kind)
    size //= 8

    def write(body, operands):
        if len(operands) != 2:
            raise body.unknown(f"{len(operands)} operands")
        code = [access(body, space, operands[0], count * size, True)]
        for index, element in enumerate(body.vector(operands[1], count)):
            if body.find(element):
                value, found = body.any_register(element)
                if int(found[1:]) < 8 * size:
                    raise body.unknown("a register narrower than its type")
            else:
                value = body.value(element, bits)
            code.append(f"write<{bits}>(at + {index * size}, ({bits}){value});")
        return " ".join([*code, "}"])

    return write


def pass_on(kind):
    """st.param of an argument (7.1): to the variable that the call hands on."""
    bits, size = bits_of(kind)

    def write(body, operands):
        if len(operands) != 2 or not operands[0].endswith("+0]"):
            raise body.unknown("an argument's place")
        name, bytes_there = body.parameter(operands[0].strip("[]").removesuffix("+0"))
        if 8 * bytes_there != size:
            raise body.unknown(f"an argument of {bytes_there} bytes")
        return f"{name} = {body.value(operands[1], bits)};"

    return write


def same_address(body, operands):
    """cvta (9.7.9.20): a generic address is the address itself, of buffers, of the stack, of parameters."""
    if len(operands) != 2:
        raise body.unknown(f"{len(operands)} operands")
    return f"{body.register(operands[0], 'u64')} = {body.value(operands[1], 'u64')};"


def accesses():
    for kind in KINDS:
        for vector, count in VECTORS.items():
            if count * bits_of(kind)[1] > 128:
                continue
            for space in SPACES:
                for cache in CACHES.get(space, ("",)):
                    yield f"ld.{space}{cache}{vector}{kind}", load(space, count, kind)
                    if space != "param.":
                        yield f"st.{space}{cache}{vector}{kind}", store(space, count, kind)


FORMS = dict(accesses())
FORMS |= {f"st.param.{kind}": pass_on(kind) for kind in ("b32", "b64")}
FORMS |= {f"cvta.{to}{space}.u64": same_address for to in ("", "to.") for space in ("global", "local", "param")}
FORMS |= calls(
    {
        "atom.add.acq_rel.gpu.global.s32": "u32 = atom_add_acq_rel_gpu_global_s32(thread, [u64], u32)",
        "fence.acq_rel.gpu": "fence_acq_rel_gpu(thread)",
        "fence.proxy.async.shared::cta": "fence_proxy_async(thread)",
        "fence.mbarrier_init.release.cluster": "fence_mbarrier_init(thread)",
    }
)
