"""PTX text into statements: what is written and where. What it means is for `translation`.

    module = read(text)
    module.entry.statements[3]      # Statement(line=41, kind="instruction", text="mov.u32 %r1, %tid.x")
    module.places(41)               # ["instructions/ptx.cuh:13", "hopper.cu:304"]: from where it was inlined to where

Sections are those of the PTX ISA 9.0. A module is read from its first character to its last, and what no rule here
reads raises `Unknown`: nothing is skipped.
"""

import re
from bisect import bisect_left, bisect_right
from functools import cached_property
from typing import NamedTuple

BYTES = {"pred": 1, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "b32": 4, "u32": 4, "s32": 4,
         "f32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8}  # fmt: skip
"""Of a number of each fundamental type (5.2.1)."""
BASE_ALIGNMENT = 1024
"""Of dynamic shared memory: `kSharedBase` of the runtime."""


class Unknown(Exception):
    """What the executor does not know: it says the line, and is never passed over."""

    def __init__(self, line, text, why):
        super().__init__(f"PTX line {line}: {why}: {text.strip()}")
        self.line = line


class Statement(NamedTuple):
    """Of a function's body (4.3)."""

    line: int
    kind: str
    """"{", "}", "label", "directive" or "instruction"."""
    text: str


class Parameter(NamedTuple):
    """Of a function (5.1.6)."""

    name: str
    bytes: int
    alignment: int


class Function(NamedTuple):
    """An .entry or a .func (11.2)."""

    kind: str
    name: str
    line: int
    parameters: tuple[Parameter, ...]
    directives: dict[str, str]
    """Performance-tuning and cluster directives (11.4, 11.7): {"maxntid": "512, 1, 1"}."""
    statements: tuple[Statement, ...]


class Constant(NamedTuple):
    """A variable in .global space (5.4), which only has what it is initialised with."""

    line: int
    name: str
    alignment: int
    kind: str
    count: int
    values: tuple[str, ...]


class Place(NamedTuple):
    """A .loc (11.5.4): the source line of all instructions behind it, and at which place it was inlined."""

    file: int
    line: int
    column: int
    caller: tuple[int, int, int] | None


class Module:
    """All that a text declares."""

    def __init__(self):
        self.target = None
        self.constants: dict[str, Constant] = {}
        self.shared: set[str] = set()
        self.functions: list[Function] = []
        self.files: dict[int, str] = {}
        self.locations: list[tuple[int, Place]] = []
        """Lines of .loc, ascending."""

    @cached_property
    def entry(self):
        """The one kernel."""
        found = [function for function in self.functions if function.kind == "entry"]
        if len(found) != 1:
            raise Unknown(1, ", ".join(function.name for function in found), "not one entry")
        return found[0]

    @cached_property
    def instructions(self):
        """Text of the instructions of each line."""
        found = {}
        for function in self.functions:
            for line, kind, text in function.statements:
                if kind == "instruction":
                    found[line] = f"{found[line]}; {text}" if line in found else text
        return found

    def places(self, line):
        """Where in the source the instruction of a line is from, and who inlined that; without line info, nowhere."""
        index = bisect_right(self.locations, line, key=lambda location: location[0]) - 1
        function = max((function.line for function in self.functions if function.line <= line), default=0)
        found = []
        while index >= 0 and self.locations[index][0] >= function:
            place = self.locations[index][1]
            found.append(f"{self.files.get(place.file, place.file)}:{place.line}")
            if place.caller is None:
                break
            # NVVM writes a .loc of the call itself in front of the inlined ones.
            index = next((i for i in reversed(range(index)) if self.locations[i][1][:3] == place.caller), -1)
        return found


def read(text):
    """A whole module."""
    return _Reader(_without_comments(text)).module()


def split_operands(text):
    """Operands between commas, those in brackets of any kind whole."""
    found, depth = [""], 0
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            found.append("")
        else:
            found[-1] += character
    return tuple(operand.strip() for operand in found if operand.strip() or len(found) > 1)


def _without_comments(text):
    """Blanks instead (4.2); every line keeps its number."""
    pattern = re.compile(r'"[^"\n]*"|//[^\n]*|/\*.*?\*/', re.DOTALL)
    return pattern.sub(lambda met: met[0] if met[0][0] == '"' else re.sub(r"[^\n]", " ", met[0]), text)


_NAME = r"[\w$%]+"
_HEAD = re.compile(r"\.version\s+[\d.]+\s+\.target\s+(?P<target>\w+)\s+\.address_size\s+64\b")
_FILE = re.compile(r'\.file\s+(?P<number>\d+)\s+"(?P<path>[^"\n]*)"[^\n]*')
_SECTION = re.compile(r"\.section\s+\.debug_\w+\s*\{[^}]*\}")
_SHARED = re.compile(rf"\.extern\s+\.shared\s+\.align\s+(?P<alignment>\d+)\s+\.b8\s+(?P<name>{_NAME})\[\]\s*;")
_CONSTANT = re.compile(
    rf"(?:\.(?:visible|weak)\s+)?\.global\s+\.align\s+(?P<alignment>\d+)\s+\.(?P<kind>\w+)\s+(?P<name>{_NAME})"
    r"(?:\[(?P<count>\d+)\])?(?:\s*=\s*(?P<values>\{[\s\w,.+-]*\}|[\w.+-]+))?\s*;"
)
_FUNCTION = re.compile(
    rf"(?:\.(?:visible|weak)\s+)?\.(?P<kind>entry|func)\s+(?P<name>{_NAME})\s*\((?P<parameters>[^)]*)\)"
    r"(?P<directives>[\s\w.,]*)(?P<opening>[{;])"
)
_PARAMETER = re.compile(rf"\.param(?:\s+\.align\s+(\d+))?\s+\.(\w+)\s+({_NAME})(?:\[(\d+)\])?")
_TUNING = re.compile(r"\.(maxntid|minnctapersm|reqnctapercluster|explicitcluster|noinline)\b\s*(\d+(?:\s*,\s*\d+)*)?")
_LABEL = re.compile(rf"({_NAME})\s*:(?!:)")
_LOC = re.compile(
    r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)(?:\s*,\s*function_name\s+[\w$+]+\s*,\s*inlined_at\s+(\d+)\s+(\d+)\s+(\d+))?[ \t]*\n"
)


class _Reader:
    """A cursor."""

    def __init__(self, text):
        self.text, self.at = text, 0
        self.ends = [met.start() for met in re.finditer("\n", text)]
        self.found = Module()

    @property
    def line(self):
        return bisect_left(self.ends, self.at) + 1

    def unknown(self, why):
        return Unknown(self.line, self.text[self.at : self.at + 120].partition("\n")[0], why)

    def met(self, pattern):
        """Whether the pattern is here; then the cursor is behind it."""
        met = pattern.match(self.text, self.at)
        self.at = met.end() if met else self.at
        return met

    def module(self):
        rules = [(_SHARED, self.shared), (_CONSTANT, self.constant), (_FUNCTION, self.function), (_FILE, self.file)]
        self.met(_SPACE)
        if not (head := self.met(_HEAD)):
            raise self.unknown("not a module's head")
        self.found.target = head["target"]
        while self.met(_SPACE) and self.at < len(self.text):
            line = self.line
            for pattern, rule in rules:
                if met := self.met(pattern):
                    rule(met, line)
                    break
            else:
                if not self.met(_SECTION):
                    raise self.unknown("a module's directive")
        return self.found

    def shared(self, met, line):
        if int(met["alignment"]) > BASE_ALIGNMENT:
            raise Unknown(line, met[0], "alignment of shared memory")
        self.found.shared.add(met["name"])

    def file(self, met, line):
        self.found.files[int(met["number"])] = met["path"]

    def constant(self, met, line):
        if met["kind"] not in BYTES:
            raise Unknown(line, met[0], "type")
        values = tuple(split_operands((met["values"] or "").strip("{} \n\t")))
        count = int(met["count"] or 1)
        if len(values) > count:
            raise Unknown(line, met[0], "more values than elements")
        name = met["name"]
        self.found.constants[name] = Constant(line, name, int(met["alignment"]), met["kind"], count, values)

    def function(self, met, line):
        if met["opening"] == ";":
            return  # declared here, defined behind
        parameters = []
        for text in split_operands(met["parameters"]):
            whole = _PARAMETER.fullmatch(text)
            if not whole or whole[2] not in BYTES:
                raise Unknown(line, text, "parameter")
            size = BYTES[whole[2]]
            parameters.append(Parameter(whole[3], size * int(whole[4] or 1), int(whole[1] or size)))
        rest = _TUNING.sub("", met["directives"]).strip()
        if rest:
            raise Unknown(line, rest, "a function's directive")
        directives = {name: value.strip() for name, value in _TUNING.findall(met["directives"])}
        body = tuple(self.body())
        self.found.functions.append(Function(met["kind"], met["name"], line, tuple(parameters), directives, body))

    def body(self):
        """From behind a function's "{" to behind its "}", which comes last."""
        depth = 1
        while depth:
            self.met(_SPACE)
            line = self.line
            if self.at == len(self.text):
                raise self.unknown("a function without end")
            if (brace := self.text[self.at]) in "{}":
                self.at += 1
                depth += 1 if brace == "{" else -1
                yield Statement(line, brace, brace)
            elif place := self.met(_LOC):
                numbers = tuple(int(number) for number in place.groups() if number)
                self.found.locations.append((line, Place(*numbers[:3], numbers[3:] or None)))
            elif label := self.met(_LABEL):
                yield Statement(line, "label", label[1])
            else:
                whole = self.met(_STATEMENT)
                if not whole:
                    raise self.unknown("a statement")
                kind = "directive" if whole[1].startswith(".") else "instruction"
                yield Statement(line, kind, " ".join(whole[1].split()))


_SPACE = re.compile(r"\s*")
_STATEMENT = re.compile(r"([^;]+);")
