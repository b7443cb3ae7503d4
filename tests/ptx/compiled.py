"""PTX of a kernel, as NVRTC emits it: the options of `cupyattn.cuda.making`, for a compute_XX instead of an sm_XX.

    name, text = ptx_of(joined("flash.cu"), "cupyattn::flash_forward<...>", "sm_80")

Line info adds .loc, and changes no instruction. Another NVRTC than CuPy's is its library's path:
``ptx_of(..., nvrtc="/somewhere/libnvrtc.so.12")``.
"""

import ctypes
import hashlib
import os
import tempfile
from functools import cache
from pathlib import Path

from cupyattn.cuda.making import compiler, source


class CompilerError(Exception):
    """What NVRTC had to say."""


class Library:
    """An NVRTC by its path, with the names of CuPy's binding of it."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def call(self, name, *arguments):
        status = getattr(self.library, name)(*arguments)
        if status:
            raise CompilerError(f"{name}: {self.library.nvrtcGetErrorString(status).decode()}")

    def text(self, program, what):
        """What `nvrtcGet...Size` and `nvrtcGet...` say."""
        size = ctypes.c_size_t()
        self.call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        found = ctypes.create_string_buffer(size.value)
        self.call(f"nvrtcGet{what}", program, found)
        return found.value.decode()

    # The names are CuPy's.

    def getVersion(self):
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return major.value, minor.value

    def createProgram(self, text, name, headers, names):
        program = ctypes.c_void_p()
        self.call("nvrtcCreateProgram", ctypes.byref(program), text.encode(), name.encode(), 0, None, None)
        return program

    def addNameExpression(self, program, expression):
        self.call("nvrtcAddNameExpression", program, expression.encode())

    def compileProgram(self, program, options):
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        self.call("nvrtcCompileProgram", program, len(options), given)

    def getPTX(self, program):
        return self.text(program, "PTX")

    def getProgramLog(self, program):
        return self.text(program, "ProgramLog")

    def getLoweredName(self, program, expression):
        name = ctypes.c_char_p()
        self.call("nvrtcGetLoweredName", program, expression.encode(), ctypes.byref(name))
        return name.value.decode()

    def destroyProgram(self, program):
        self.call("nvrtcDestroyProgram", ctypes.byref(program))


@cache
def load(path=None):
    """NVRTC and its version: CuPy's, or the one at that path."""
    if path is None:
        return compiler.load()
    compiler.version()  # loads CuPy's, for which it would take any NVRTC that the process has already
    library = Library(path)
    return library, ".".join(map(str, library.getVersion()))


def joined(name, sources=None):
    """One text of a kernel and its headers; `sources` maps paths, "algorithm/mask.cuh", to texts to take instead."""
    if not sources:
        return source.join(name)
    with tempfile.TemporaryDirectory() as folder:
        texts = {path: (source.FOLDER / path).read_text() for path in source.sources()} | sources
        for path, text in texts.items():
            place = Path(folder) / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)
        return source.join(name, Path(folder))


def options_for(target, version):
    """Those of a cubin without ptxas's."""
    given = compiler._options(target.replace("sm_", "compute_"), version)
    return (*(option for option in given if not option.startswith("--ptxas")), "--generate-line-info")


def ptx_of(text, expression, target, nvrtc=None, folder=None):
    """The kernel's name, mangled, and the PTX; kept in `folder`, if one is named."""
    binding, version = load(nvrtc)
    options = options_for(target, version)
    key = hashlib.sha256(repr((text, expression, options, version)).encode()).hexdigest()[:24]
    kept = Path(folder) / f"{key}.ptx" if folder else None
    if kept and kept.exists():
        name, _, found = kept.read_text().partition("\n")
        return name.removeprefix("//"), found
    name, found = _compile(binding, version, text, expression, options)
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile("w", dir=kept.parent, delete=False) as file:
            file.write(f"//{name}\n{found}")
        os.replace(file.name, kept)
    return name, found


def _compile(binding, version, text, expression, options):
    program = binding.createProgram(text, "cupyattn.cu", (), ())
    try:
        binding.addNameExpression(program, expression)
        try:
            binding.compileProgram(program, options)
        except Exception as error:  # each binding has its own
            raise CompilerError(f"NVRTC {version}: {expression}:\n{binding.getProgramLog(program)}") from error
        found = binding.getPTX(program)
        found = (found if isinstance(found, str) else found.decode()).rstrip("\0")
        # NVRTC takes the paths of #line as relative to the current folder.
        return binding.getLoweredName(program, expression), found.replace(f'"{os.getcwd()}/', '"')
    finally:
        binding.destroyProgram(program)
