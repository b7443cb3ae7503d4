"""What NVRTC makes of small functions of integers, executed: g++ compiles a source as it is written, NVVM may not.

    kernel = compile_ptx(source.join("algorithm/mask.cuh") + PROBE, "probe::band<0>")
    kernel.run((band, 3, 9, found), [found])

A kernel of one thread, without floats, shared memory and calls.  An instruction that is not in the tables is an error,
and so is an access outside of the arrays.
"""

import ctypes
import operator
import re
import struct
from typing import NamedTuple

import numpy as np

from cupyattn.cuda.making import compiler


def compile_ptx(text, expression, target="compute_80"):
    """The kernel of that C++ name."""
    nvrtc, _ = compiler.load()
    program = nvrtc.createProgram(text, "cupyattn.cu", (), ())
    try:
        nvrtc.addNameExpression(program, expression)
        options = [option for option in compiler.OPTIONS if not option.startswith("--ptxas")]
        nvrtc.compileProgram(program, (f"-arch={target}", *options))
        found = nvrtc.getPTX(program)
        return Kernel(found if isinstance(found, str) else found.decode())
    finally:
        nvrtc.destroyProgram(program)


class Instruction(NamedTuple):
    guard: str | None
    """A predicate register, with ! before it if it has to be false."""
    name: str
    types: tuple[str, ...]
    operands: tuple[str, ...]


BITS = {"pred": 1, "s16": 16, "u16": 16, "b16": 16, "s32": 32, "u32": 32, "b32": 32, "s64": 64, "u64": 64, "b64": 64}
COMPARE = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}


def divide(a, b):
    """Rounded towards zero."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


ARITHMETIC = {
    "mov": lambda a: a,
    "cvta.to.global": lambda a: a,
    "neg": operator.neg,
    "not": operator.invert,
    "abs": abs,
    "add": operator.add,
    "sub": operator.sub,
    "mul.lo": operator.mul,
    "mad.lo": lambda a, b, c: a * b + c,
    "div": divide,
    "rem": lambda a, b: a - b * divide(a, b),
    "min": min,
    "max": max,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
}


def wrapped(value, kind):
    """The number that a register of that type holds instead."""
    bits = BITS[kind]
    value &= (1 << bits) - 1
    return value - (1 << bits) if kind[0] == "s" and value >> bits - 1 else value


class Kernel:
    """The one entry of a module."""

    def __init__(self, text):
        text = re.sub(r"//[^\n]*", "", text)
        parameters, body = re.search(r"\.entry\s+[\w$]+\(([^)]*)\)\s*\{(.*)\}\s*$", text, re.DOTALL).groups()
        self.parameters = re.findall(r"\.param\b[^,]*?([\w$]+)(?:\[\d+\])?\s*(?:,|$)", parameters.strip())
        self.code, self.labels = [], {}
        for statement in re.split(r"(?<=[;:])\s", body):
            self._read(" ".join(statement.split()))

    def _read(self, statement):
        if statement.endswith(":"):
            self.labels[statement[:-1]] = len(self.code)
        elif statement and not statement.startswith(".reg"):
            guard, opcode, operands = re.fullmatch(r"(?:@(\S+) )?(\S+?)(?: (.*))?;", statement).groups()
            parts = opcode.split(".")
            types = tuple(part for part in parts if part in BITS)
            name = ".".join(part for part in parts if part not in BITS)
            self.code.append(Instruction(guard, name, types, tuple(re.findall(r"\{[^}]*\}|[^\s,]+", operands or ""))))

    def run(self, arguments, arrays):
        """Arguments are structs as bytes, ints of 32 bits, and arrays; `arrays` are all that may be reached."""
        places = [(array.ctypes.data, array.nbytes) for array in arrays]
        space, addresses = b"", {}
        for name, argument in zip(self.parameters, arguments, strict=True):
            if isinstance(argument, np.ndarray):
                argument = struct.pack("<Q", argument.ctypes.data)
            space = space.ljust(-(-len(space) // 64) * 64, b"\0")
            addresses[name] = len(space)
            space += struct.pack("<i", argument) if isinstance(argument, int) else argument
        thread = Thread(addresses, space, places)
        at = 0
        while at < len(self.code):
            instruction, at = self.code[at], at + 1
            if not thread.holds(instruction.guard):
                continue
            if instruction.name == "ret":
                return
            if instruction.name in ("bra", "bra.uni"):
                at = self.labels[instruction.operands[0]]
            else:
                thread.step(instruction)


class Thread:
    """Registers, and what addresses lead to."""

    def __init__(self, parameters, space, places):
        self.registers = dict(parameters)
        self.space, self.places = space, places

    def holds(self, guard):
        return guard is None or bool(self.registers[guard.lstrip("!")]) != guard.startswith("!")

    def value(self, operand, kind):
        known = self.registers.get(operand)
        return wrapped(int(operand, 0) if known is None else known, kind)

    def address(self, operand):
        base, plus = re.fullmatch(r"\[([^+\]]+)(?:\+(-?\d+))?\]", operand).groups()
        return self.registers[base] + int(plus or 0)

    def step(self, instruction):
        _, name, types, operands = instruction
        to, *given = operands
        if name.startswith(("ld.", "st.")):
            self.access(instruction)
        elif name in ARITHMETIC:
            self.registers[to] = wrapped(ARITHMETIC[name](*(self.value(x, types[0]) for x in given)), types[0])
        elif name == "mul.wide":
            self.registers[to] = self.value(given[0], types[0]) * self.value(given[1], types[0])
        elif name in ("shl", "shr"):
            value, count = self.value(given[0], types[0]), self.value(given[1], "u32")
            self.registers[to] = wrapped(value << count if name == "shl" else value >> count, types[0])
        elif name == "cvt":
            self.registers[to] = wrapped(self.value(given[0], types[1]), types[0])
        elif name == "selp":
            chosen = given[0] if self.holds(given[2]) else given[1]
            self.registers[to] = self.value(chosen, types[0])
        elif name.startswith("setp.") and name[5:] in COMPARE:
            a, b = (self.value(x, types[0]) for x in given)
            self.registers[to] = COMPARE[name[5:]](a, b)
        else:
            raise NotImplementedError(f"{instruction}")

    def access(self, instruction):
        _, name, (kind,), operands = instruction
        loads, size = name.startswith("ld."), BITS[kind] // 8
        pointer, listed = operands[::-1] if loads else operands
        at = self.address(pointer)
        for register in listed.strip("{} ").replace(" ", "").split(","):
            if name in ("ld.param", "ld.param.v2"):
                found = self.space[at : at + size]
            elif name in ("ld.global", "ld.global.v2", "st.global", "st.global.v2"):
                if not any(start <= at and at + size <= start + length for start, length in self.places):
                    raise IndexError(f"{size} bytes at {at:#x} are nobody's: {instruction}")
                found = ctypes.string_at(at, size) if loads else b""
            else:
                raise NotImplementedError(f"{instruction}")
            if loads:
                self.registers[register] = wrapped(int.from_bytes(found, "little"), kind)
            else:
                ctypes.memmove(at, self.value(register, kind.replace("s", "u")).to_bytes(size, "little"), size)
            at += size
