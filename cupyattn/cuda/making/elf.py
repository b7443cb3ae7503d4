"""What a cubin says about its kernels, read from the ELF file itself: no tool and no GPU needed."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

_ENTRY = 0x10
"""The bit of a symbol's st_other that marks a kernel."""
_VALUE_FOLLOWS = 4
"""Format of a record in .nv.info with as many bytes behind it as its last field says."""
_MIN_STACK_SIZE, _REGISTERS = 0x12, 0x2F
_RESERVED = 1024
"""Bytes of a block's shared memory that the driver keeps from Hopper on; a kernel's section counts them."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What one kernel takes of a multiprocessor."""

    registers: int
    """Per thread."""
    local_memory: int
    """Bytes of stack per thread: spilled registers and arrays that did not fit in them."""
    shared_memory: int
    """Static bytes per block; the dynamic ones are asked for at launch."""


class _Section(NamedTuple):
    name: str
    offset: int
    size: int
    link: int


class _Header(NamedTuple):
    programs_offset: int
    sections_offset: int
    flags: int
    program_size: int
    num_programs: int
    section_size: int
    num_sections: int
    names: int

    @property
    def end(self) -> int:
        """Where the tables end; they are the last things in a cubin."""
        programs = self.programs_offset + self.program_size * self.num_programs
        return max(programs, self.sections_offset + self.section_size * self.num_sections)


def _header(image: bytes) -> _Header:
    if len(image) < 64 or not image.startswith(b"\x7fELF\x02\x01"):
        raise ValueError("not a cubin: no 64-bit ELF header")
    return _Header(*struct.unpack_from("<QQI2x5H", image, 32))


def whole(image: bytes) -> bytes:
    """The cubin with the last byte, a zero, that CuPy's getCUBIN takes for the end of a string and drops.

    In memory nobody misses it, since bytes objects end in a zero; a file without it is not a valid ELF file.
    """
    missing = _header(image).end - len(image)
    if missing > 1:
        raise ValueError(f"not a whole cubin: {missing} bytes are missing")
    return image + b"\0" if missing == 1 else image


def kernels(image: bytes) -> dict[str, Resources]:
    """The kernels in a cubin, by their names in it.

    Raises
    ------
    ValueError
        It is none, or not a whole one.
    """
    try:
        return _kernels(image)
    except (IndexError, KeyError, struct.error) as error:  # an ELF file, with tables that lead nowhere
        raise ValueError("not a cubin: its tables do not fit together") from error


def architecture(image: bytes) -> int:
    """What it was compiled for, without the letter: 90 for sm_90a.

    Raises
    ------
    ValueError
        It is no cubin.
    """
    return _architecture(image, _header(image))


def _kernels(image: bytes) -> dict[str, Resources]:
    header = _header(image)
    if header.end > len(image):
        raise ValueError(f"not a whole cubin: {header.end - len(image)} bytes are missing")
    sections = _sections(image, header)
    named = {section.name: section for section in sections}
    symbols = list(_symbols(image, sections, named[".symtab"]))
    counts: dict[tuple[int, int], int] = {}
    for attribute, symbol, value in _records(image, named[".nv.info"]):
        counts[attribute, symbol] = value
    reserved = _RESERVED if _architecture(image, header) >= 90 else 0
    found = {}
    for index, (name, is_kernel) in enumerate(symbols):
        if is_kernel:
            shared = named.get(f".nv.shared.{name}")
            found[name] = Resources(
                counts[_REGISTERS, index],
                counts.get((_MIN_STACK_SIZE, index), 0),
                shared.size - reserved if shared else 0,
            )
    return found


def _architecture(image: bytes, header: _Header) -> int:
    """90 for sm_90a; CUDA 13, whose cubins have ABI version 8, keeps it one byte further up than CUDA 12."""
    return header.flags >> (8 if image[8] >= 8 else 0) & 0xFF


def _sections(image: bytes, header: _Header) -> list[_Section]:
    rows = []
    for index in range(header.num_sections):
        at = header.sections_offset + index * header.section_size
        rows.append(struct.unpack_from("<II8x8xQQI", image, at))  # name, type, offset, size, link
    names = rows[header.names][2]
    return [_Section(_text(image, names + name), offset, size, link) for name, _, offset, size, link in rows]


def _symbols(image: bytes, sections: list[_Section], table: _Section) -> Iterator[tuple[str, bool]]:
    """Each symbol's name, and whether it is a kernel, in the order of their numbers."""
    names = sections[table.link].offset
    for at in range(table.offset, table.offset + table.size, 24):
        name, _, other = struct.unpack_from("<IBB", image, at)
        yield _text(image, names + name), bool(other & _ENTRY)


def _records(image: bytes, info: _Section) -> Iterator[tuple[int, int, int]]:
    """(attribute, symbol, value) of each record that is about a symbol."""
    at, end = info.offset, info.offset + info.size
    while at < end:
        kind, attribute, size = struct.unpack_from("<BBH", image, at)
        at += 4
        if kind == _VALUE_FOLLOWS:
            if size == 8:
                symbol, value = struct.unpack_from("<II", image, at)
                yield attribute, symbol, value
            at += size


def _text(image: bytes, start: int) -> str:
    return image[start : image.index(b"\0", start)].decode()
