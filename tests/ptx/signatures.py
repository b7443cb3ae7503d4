"""How most instructions are written down: form by form, the C++ call that they become.

    forms = calls({"fma.rn.ftz.f32": "u32 = fma_rn_ftz_f32(u32, u32, u32)"})

A signature is the function of `runtime/instructions.h` with what its arguments are, operands from left to right:

    u32 =           in front: the destination, a register of this C++ type; the first operand
    u16 u32 u64 bool  an operand that is read: a register of this C++ type, or a constant
    s64             one of 32 bits, widened
    [u32] [u64]     an address of so many bits
    constant        an operand that has to be written as a number
    _   16   4      an operand that has to be this very text, and is not handed on
    thread          the thread; its line is set before, since such a call may fail
    site            a number that names the instruction
    (true) (-1)     handed on as it stands, without an operand

Where operands may be left out, several signatures stand side by side, and their number decides.
"""

import re

OPERANDS = ("u16", "u32", "u64", "bool", "s64", "[u32]", "[u64]", "constant", "_", "16", "4")


def calls(table):
    """Forms with what writes them."""
    return {form: call(*([text] if isinstance(text, str) else text)) for form, text in table.items()}


def call(*signatures):
    """What writes a call of one of these signatures."""
    parsed = [_parse(text) for text in signatures]

    def write(body, operands):
        for result, name, arguments in parsed:
            if len(operands) == (result is not None) + sum(argument in OPERANDS for argument in arguments):
                return _write(body, operands, result, name, arguments)
        raise body.unknown(f"{len(operands)} operands")

    return write


def _parse(text):
    result, name, arguments = re.fullmatch(r"(?:(\w+) = )?(\w+)\((.*)\)", text).groups()
    return result, name, tuple(argument.strip() for argument in arguments.split(",")) if arguments else ()


def _write(body, operands, result, name, arguments):
    rest = list(operands)
    to = f"{body.register(rest.pop(0), result)} = " if result else ""
    given = []
    for argument in arguments:
        if argument == "thread":
            given.append("t")
        elif argument == "site":
            given.append(str(body.site))
        elif argument.startswith("("):
            given.append(argument.strip("()"))
        elif argument in ("_", "16", "4"):
            if rest.pop(0) != argument:
                raise body.unknown(f"an operand that is not {argument}")
        else:
            given.append(_operand(body, rest.pop(0), argument))
    return f"{at_line(body) if 'thread' in arguments else ''}{to}{name}({', '.join(given)});"


def _operand(body, text, kind):
    if kind == "constant":
        return str(body.immediate(text))
    if kind.startswith("["):
        return body.address(text, kind.strip("[]"))
    return f"(s64){body.value(text, 'u32')}" if kind == "s64" else body.value(text, kind)


def at_line(body):
    """Says where the thread is, for errors."""
    return f"t.line = {body.line}; "
