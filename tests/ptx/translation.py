"""A module's statements into C++ that calls `runtime/instructions.h`: a local variable for each register, a goto for
each branch.

    translated = translate(text)
    translated.source    # C++: `void kernel(Thread&)`, its basic blocks, its constants
    translated.blocks    # what each of `visits` counts

A register is bits, an unsigned integer of its size, and holds poison until it is written. Which instructions there are
stands in `opcodes_*.py`: a form, that is an opcode with all its modifiers, is in `FORMS` or it is `Unknown`.
"""

import re
from collections import Counter
from itertools import count
from typing import NamedTuple

from ptx import opcodes_arithmetic, opcodes_copies, opcodes_memory, opcodes_warps
from ptx.text import BYTES, Module, Unknown, read, split_operands

FORMS = opcodes_arithmetic.FORMS | opcodes_memory.FORMS | opcodes_warps.FORMS | opcodes_copies.FORMS
"""Each form that we know, and what writes C++ for it: a function of a `Body` and the operands."""

BITS = {"bool": 1, "u8": 8, "u16": 16, "u32": 32, "u64": 64}
"""Of the C++ types of registers."""
REGISTERS = {kind: "bool" if kind == "pred" else f"u{8 * size}" for kind, size in BYTES.items()}
REGISTERS |= {"f16x2": "u32", "bf16x2": "u32"}
"""The C++ type of a register of each type (5.2.1): sizes have to agree, types may be mixed (9.2)."""
POISON = {"bool": "true", "u8": "0xFF", "u16": "0xFFFF", "u32": "0xFFFFFFFFu", "u64": "0xFFFFFFFFFFFFFFFFull"}
"""What a register holds before it is written: a nan, an address nowhere."""

_INTEGER = r"-?(0[xX][0-9a-fA-F]+|0|[1-9]\d*)U?"
"""None in octal, as 010, or in binary (4.5.1)."""

SPECIAL = {
    "%tid.x": "t.number",
    "%laneid": "t.lane",
    "%ctaid.x": "t.block[0]",
    "%ctaid.y": "t.block[1]",
    "%ctaid.z": "t.block[2]",
    "%cluster_ctarank": "t.rank",
    "%ntid.x": "launch.threads",
    "%nctaid.x": "launch.grid[0]",
    "%nctaid.y": "launch.grid[1]",
    "%nctaid.z": "launch.grid[2]",
}
"""Special registers (10), all of 32 bits."""


class Block(NamedTuple):
    """Instructions that are visited together: a basic block's, or one that has a guard and whose guard held."""

    function: str
    line: int
    forms: Counter
    guarded: bool


class Shared(NamedTuple):
    """What functions of a module have in common while they are translated."""

    blocks: list[Block]
    used: set[str]
    """Constants whose address is taken; of the others, hundreds, a kernel's text has no need."""
    numbers: count
    """Of instructions."""


class Translated(NamedTuple):
    module: Module
    source: str
    blocks: list[Block]


def translate(text):
    """A module's text, which has one .entry."""
    module = read(text)
    assert module.entry
    shared = Shared([], set(), count())
    blocks, used = shared.blocks, shared.used
    bodies = [Body(module, function, shared).translate() for function in module.functions]
    heads = [f"static {signature(function)};" for function in module.functions if function.kind == "func"]
    kept = [constant for name, constant in module.constants.items() if name in used]
    names = [variable(constant.name) for constant in kept]
    regions = ", ".join(f"{{(u64){name}, (u64){name} + sizeof {name}}}" for name in names)
    lines = [
        '#include "thread.h"',
        *map(_definition, kept),
        *heads,
        *bodies,
        f"extern const int kNumBlocks; const int kNumBlocks = {len(blocks)};",
        f"static const Region regions[] = {{{regions or '{0, 0}'}}};",
        f"const Region* constants(int* count) {{ *count = {len(kept)}; return regions; }}",
    ]
    return Translated(module, "\n".join(lines) + "\n", blocks)


def _definition(constant):
    """A variable in .global space; what has no initializer is zero (5.4.4)."""
    kind = REGISTERS[constant.kind]
    values = ", ".join(literal(value, kind) or _bad(constant, value) for value in constant.values)
    alignment = max(constant.alignment, 16)  # vectors of a constant's are aligned as in the runtime's buffers
    return f"alignas({alignment}) static const {kind} {variable(constant.name)}[{constant.count}] = {{{values}}};"


def _bad(constant, value):
    raise Unknown(constant.line, value, f"value of {constant.name}")


def variable(name, scope=0):
    """A register's or a symbol's name in C++, which has no % and no $ in names, and no names of inner scopes here."""
    return f"v{scope or ''}_{name.replace('%', '').replace('$', 'S_')}"


def signature(function):
    """Of the C++ function: parameters of a .func are 64 bits each, of which it reads its own."""
    if function.kind == "entry":
        return "void kernel(Thread& t)"
    return f"void {variable(function.name)}(Thread& t{''.join(f', u64 a{i}' for i in range(len(function.parameters)))})"


def literal(text, kind):
    """A constant of a C++ type (4.5), or None. Integers may be written as signed or as unsigned."""
    bits = BITS[kind]
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return f"0x{text[2:]}u" if bits == 32 else None
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return f"0x{text[2:]}ull" if bits == 64 else None
    if not re.fullmatch(_INTEGER, text):
        return None
    value = int(text.rstrip("U"), 0)
    if not -(1 << bits - 1) <= value < 1 << bits:
        return None
    value %= 1 << bits
    return f"({kind}){value}{'ull' if bits == 64 else 'u'}"


class Scope:
    """What a pair of braces declares (5.3, 4.4): registers, labels, parameters of calls."""

    def __init__(self, number, labels):
        self.number, self.labels = number, labels
        self.registers: dict[str, str] = {}
        self.families: dict[str, tuple[str, int]] = {}
        """Of `.reg .b32 %r<9>`: {"%r": ("b32", 9)}."""
        self.parameters: dict[str, tuple[str, int]] = {}
        """Their variable and their bytes."""


class Body:
    """A function on its way into C++. What writes an instruction asks it for operands."""

    def __init__(self, module, function, shared):
        self.module, self.function, self.shared, self.blocks = module, function, shared, shared.blocks
        self.line, self.site = function.line, -1
        """Of the instruction: its line, and its number in the module."""
        self.text = function.name
        self.scopes: list[Scope] = []
        self.num_scopes = 0
        self.variables: dict[str, tuple[str, int | str]] = {}
        """C++ type and owner: the number of a scope with the name there."""
        self.arrays: dict[str, tuple[str, int, int]] = {}
        """Of local memory: variable, bytes and alignment."""
        self.code: list[str] = []

    # ---- Operands (6): expressions of a C++ type -------------------------------------------------------------------

    def unknown(self, why):
        return Unknown(self.line, self.text, why)

    def find(self, name):
        """A register's variable and C++ type, or None."""
        family = re.fullmatch(r"(%[a-zA-Z_]+)(\d+)", name)
        for scope in reversed(self.scopes):
            kind = scope.registers.get(name)
            if kind is None and family and family[1] in scope.families:
                kind, count = scope.families[family[1]]
                if int(family[2]) >= count or str(int(family[2])) != family[2]:
                    raise self.unknown(f"there is no register {name}")
            if kind is not None:
                return self.declare(variable(name, scope.number), REGISTERS[kind], name), REGISTERS[kind]
        return None

    def declare(self, name, kind, owner):
        if self.variables.setdefault(name, (kind, owner)) != (kind, owner):
            raise self.unknown(f"{owner} and {self.variables[name][1]} would be one variable")
        return name

    def any_register(self, text):
        """Variable and type of a register that may be wider than the instruction's type (9.4.1)."""
        found = self.find(text)
        if found is None or found[1] == "bool":
            raise self.unknown(f"{text} is no register with bits")
        return found

    def register(self, text, kind):
        """A register to be written."""
        found = self.find(text)
        if found is None:
            raise self.unknown(f"{text} is no register")
        if found[1] != kind:
            raise self.unknown(f"{text} is {found[1]}, not {kind}")
        return found[0]

    def value(self, text, kind):
        """An operand to be read: a register, a constant, the address of a variable."""
        if text.startswith("!") and kind == "bool":
            return f"!{self.register(text[1:], 'bool')}"
        if self.find(text):
            return self.register(text, kind)
        constant = literal(text, kind)
        if constant is None:
            constant = SPECIAL.get(text) if kind == "u32" else self.symbol(text) if kind == "u64" else None
        if constant is None and kind in ("u32", "u64") and text in self.module.shared:
            constant = f"({kind})kSharedBase"  # in 64 bits from NVRTC 12, and no generic address: loads refuse it
        if constant is None:
            raise self.unknown(f"operand {text} of type {kind}")
        return constant

    def symbol(self, name):
        """The address of a variable in memory, of 64 bits, or None."""
        if name in self.module.constants:
            self.shared.used.add(name)
            return f"(u64){variable(name)}"
        if name in self.arrays:
            return f"(u64){self.arrays[name][0]}"
        offset = 0
        for index, parameter in enumerate(self.function.parameters):
            offset = -(-offset // parameter.alignment) * parameter.alignment
            if parameter.name == name:
                return f"((u64)launch.parameters + {offset})" if self.function.kind == "entry" else f"(u64)&a{index}"
            offset += parameter.bytes
        return None

    def immediate(self, text, lowest=0, highest=2**31 - 1):
        """An operand that has to be a constant."""
        if not re.fullmatch(_INTEGER, text) or not lowest <= int(text.rstrip("U"), 0) <= highest:
            raise self.unknown(f"{text} is no constant from {lowest} to {highest}")
        return int(text.rstrip("U"), 0)

    def address(self, text, kind="u64"):
        """An operand [base], [base+8] or [base+-8] (6.4.1)."""
        found = re.fullmatch(r"\[\s*([\w$%]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        if not found:
            raise self.unknown(f"address {text}")
        base = self.value(found[1], kind)
        return f"({kind})({base} + ({kind}){found[2]}ll)" if int(found[2] or 0) else base

    def vector(self, text, count):
        """The operands of {a, b} (6.4.3)."""
        found = split_operands(text[1:-1]) if text.startswith("{") and text.endswith("}") else (text,)
        if len(found) != count:
            raise self.unknown(f"{text} has not {count} elements")
        return found

    def values(self, text, kind, count):
        return [self.value(element, kind) for element in self.vector(text, count)]

    def registers(self, text, kind, count):
        return [self.register(element, kind) for element in self.vector(text, count)]

    def parameter(self, name):
        """Of a call: its variable and its bytes."""
        for scope in reversed(self.scopes):
            if name in scope.parameters:
                return scope.parameters[name]
        raise self.unknown(f"there is no parameter {name}")

    def label(self, name):
        """A label of this scope or of one around it (4.4)."""
        for scope in reversed(self.scopes):
            if name in scope.labels:
                return variable(name, scope.number).replace("v", "L", 1)
        raise self.unknown(f"there is no label {name}")

    def callee(self, name):
        """Of a call: a .func with its name in C++."""
        for function in self.module.functions:
            if function.name == name and function.kind == "func":
                return function, variable(name)
        raise self.unknown(f"there is no function {name}")

    # ---- Statements ------------------------------------------------------------------------------------------------

    def translate(self):
        statements = self.function.statements
        labels = self._labels(statements)
        self._open(labels[-1])
        self._begin_block()
        for index, statement in enumerate(statements):
            self.line, self.text = statement.line, statement.text
            if statement.kind == "{":
                self._open(labels[index])
            elif statement.kind == "}":
                self.scopes.pop()
            elif statement.kind == "label":
                self.code.append(f"{self.label(statement.text)}:;")
                self._begin_block()
            elif statement.kind == "directive":
                self._directive(statement.text)
            else:
                self._instruction(statement.text)
        head = signature(self.function)
        lines = [f"{kind} {name} = {POISON[kind]};" for name, (kind, _) in self.variables.items()]
        for name, size, alignment in self.arrays.values():
            lines += [f"alignas({alignment}) u8 {name}[{size}];", f"memset({name}, 0xFF, {size});"]
        static = "static " if self.function.kind == "func" else ""
        return "\n    ".join([f"{static}{head} {{", *lines, *self.code]) + "\n}"

    def _labels(self, statements):
        """Of each scope, by the statement that opens it; -1 for the function's."""
        found, open_scopes = {-1: set()}, [-1]
        for index, (line, kind, text) in enumerate(statements):
            if kind == "{":
                open_scopes.append(index)
                found[index] = set()
            elif kind == "}":
                open_scopes.pop()
            elif kind == "label":
                if text in found[open_scopes[-1]]:
                    raise Unknown(line, text, "a label again")
                found[open_scopes[-1]].add(text)
        return found

    def _open(self, labels):
        self.scopes.append(Scope(self.num_scopes, labels))
        self.num_scopes += 1

    def _begin_block(self):
        """One may be empty: between a branch and a label."""
        self.blocks.append(Block(self.function.name, self.line, Counter(), False))
        self.block = self.blocks[-1]
        self.code.append(f"++visits[{len(self.blocks) - 1}];")

    def _directive(self, text):
        scope = self.scopes[-1]
        if met := re.fullmatch(r"\.reg \.(\w+) (.+)", text):  # 5.1.1, 5.4.6
            if met[1] not in REGISTERS:
                raise self.unknown("type of a register")
            for name in split_operands(met[2]):
                self._declare_registers(scope, met[1], name)
        elif met := re.fullmatch(r"\.local \.align (1|2|4|8|16) \.b8 ([\w$%]+)\[(\d+)\]", text):  # 5.1.5
            self.arrays[met[2]] = (variable(met[2], scope.number), int(met[3]), int(met[1]))
        elif met := re.fullmatch(r"\.param \.(b32|b64) ([\w$%]+)", text):  # 7.1
            if len(self.scopes) == 1:
                raise self.unknown("a parameter outside of a call's braces")
            name = self.declare(variable(met[2], scope.number), "u64", met[2])
            scope.parameters[met[2]] = (name, BYTES[met[1]])
        elif not re.fullmatch(r'\.pragma "(nounroll|used_bytes_mask \d+)"', text):  # 11.4: hints
            raise self.unknown("a directive")

    def _declare_registers(self, scope, kind, name):
        family = re.fullmatch(r"(%[a-zA-Z_]+)<(\d+)>", name)
        if family:
            known, key, entry = scope.families, family[1], (kind, int(family[2]))
        elif re.fullmatch(r"%?[a-zA-Z_][\w$]*", name):
            known, key, entry = scope.registers, name, kind
        else:
            raise self.unknown(f"name {name}")
        if key in known:
            raise self.unknown(f"{name} again")
        known[key] = entry

    def _instruction(self, text):
        met = re.fullmatch(r"(?:@(!?[\w$%]+) )?([a-z]\w*(?:\.\w+(?:::\w+)*)*)(?: (.*))?", text)
        if not met:
            raise self.unknown("not an instruction")
        guard, form, operands = met.groups()
        if form not in FORMS:
            raise self.unknown(f"instruction {form}")
        self.site = next(self.shared.numbers)
        code = FORMS[form](self, split_operands(operands or ""))
        if guard:  # 9.3
            self.blocks.append(Block(self.function.name, self.line, Counter([form]), True))
            sign, name = ("!", guard[1:]) if guard[0] == "!" else ("", guard)
            code = f"if ({sign}{self.register(name, 'bool')}) {{ ++visits[{len(self.blocks) - 1}]; {code} }}"
        else:
            self.block.forms[form] += 1
        self.code.append(code)
        if form.partition(".")[0] in ("bra", "ret"):
            self._begin_block()
