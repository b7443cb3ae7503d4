"""Source text into a cubin for one architecture, through NVRTC: no GPU needed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from cupyattn.cuda.making import elf

OPTIONS = (
    "-std=c++17",
    "-default-device",
    # Numbers below 2^-126 become zero, as in CuPy's own kernels and in flash-attn's: among weights they are
    # nothing, and exp2 and division need no extra steps for them.
    "-ftz=true",
    "--ptxas-options=-v",
    "-diag-suppress=177",  # a variable that one specialisation does not use
)
"""Besides the architecture.  No -I: see `source`."""

SEED = "-frandom-seed=0"
"""So that the same text gives the same bytes everywhere.  Without it, names that are local to a text get a random
number and the process's; NVRTC before 12.9 does not know it, and there a cubin may be kept twice."""

INSTALL = "pip install cupyattn[cuda12] or cupyattn[cuda13], whichever CUDA version your driver supports"
"""What brings CuPy, and NVRTC with it."""
FOLDER_OF_CUPY = "set CUPY_CACHE_DIR to a folder that it can write to: without one CuPy cannot be imported"

_TARGETS = {
    (8, 0): "sm_80",
    (8, 6): "sm_86",
    (8, 7): "sm_87",
    (8, 9): "sm_89",
    (9, 0): "sm_90a",
    (10, 0): "sm_100a",
    (12, 0): "sm_120a",
}


@dataclass(frozen=True)
class Cubin:
    """One compiled kernel."""

    image: bytes
    """A complete ELF file."""
    name: str
    """The kernel's name in it, mangled."""
    resources: elf.Resources
    nvrtc: str
    """The compiler's version, "13.5"."""
    log: str
    """What NVRTC and ptxas said: registers, spills, warnings."""

    @property
    def spills(self) -> int:
        """Bytes per thread of all instructions that store a spilled register, by the log."""
        return sum(map(int, re.findall(r"(\d+) bytes spill stores", self.log)))


def target_for(compute_capability: tuple[int, int]) -> str:
    """The architecture to compile for: "sm_90a" for (9, 0).

    The "a" variants have instructions that run on that one architecture only; a GPU that is not in the
    table gets the plain one.

    Raises
    ------
    ValueError
        The GPU is older than Ampere.
    """
    major, minor = compute_capability
    if compute_capability < (8, 0):
        raise ValueError(f"the kernels need compute capability 8.0 or newer (Ampere), not {major}.{minor}")
    return _TARGETS.get(compute_capability, f"sm_{major}{minor}")


def load() -> tuple[Any, str]:
    """CuPy's binding of NVRTC, and NVRTC's version, "13.5".

    Raises
    ------
    RuntimeError
        CuPy or NVRTC is not installed; the message says which.
    """
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError(f"CuPy, through which kernels are compiled, cannot be imported: {INSTALL}") from error
    except OSError as error:  # it makes a folder in the user's home
        raise RuntimeError(f"CuPy cannot make its folder ({error}): {FOLDER_OF_CUPY}") from error
    try:
        from cupy.cuda import nvrtc

        major, minor = nvrtc.getVersion()
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # depends on how CuPy looks for the library
        raise _unusable(cupy) from error
    return nvrtc, f"{major}.{minor}"


def _unusable(cupy: Any) -> RuntimeError:
    hint = f"{_package_for(cupy)}; or use cubins that were built before"
    return RuntimeError(f"NVRTC, CUDA's run-time compiler, cannot be loaded: {hint}")


def _package_for(cupy: Any) -> str:
    """How to install the NVRTC that this CuPy loads, and no other."""
    major = cupy.cuda.runtime.runtimeGetVersion() // 1000
    package = "nvidia-cuda-nvrtc-cu12" if major == 12 else f"'nvidia-cuda-nvrtc=={major}.*'"
    return f"pip install --upgrade {package}, since CuPy here is for CUDA {major}"


@cache
def version() -> str | None:
    """NVRTC's version; None if it cannot be loaded."""
    try:
        return load()[1]
    except RuntimeError:
        return None


def check(target: str) -> None:
    """Raise RuntimeError, and say what to install, unless NVRTC is there and knows this architecture."""
    nvrtc, found = load()
    number = re.fullmatch(r"sm_(\d+)[af]?", target)
    if number is None or int(number[1]) not in nvrtc.getSupportedArchs():
        import cupy

        raise RuntimeError(f"NVRTC {found} does not know {target}; install one that does: {_package_for(cupy)}")


def compile_cubin(text: str, expression: str, target: str) -> Cubin:
    """Compile one kernel.

    Parameters
    ----------
    text : str
        Everything the kernel needs, as `source.join` returns it.
    expression : str
        The kernel's C++ name, ``"cupyattn::flash_forward<...>"``.
    target : str
        The architecture, ``"sm_90a"``.

    Raises
    ------
    RuntimeError
        NVRTC is not installed, does not know the architecture, or finds an error; its log is in the message.
    ValueError
        The expression does not name a kernel, or the text has kernels that are no templates and come along.
    """
    nvrtc, found = load()
    try:
        check(target)
        program = nvrtc.createProgram(text, "cupyattn.cu", (), ())
    except AttributeError as error:  # another library of that name: CuPy looks for a function when it is called
        import cupy

        raise _unusable(cupy) from error
    try:
        nvrtc.addNameExpression(program, expression)
        try:
            nvrtc.compileProgram(program, _options(target, found))
        except nvrtc.NVRTCError as error:
            rule = f"NVRTC {found} cannot compile {expression} for {target}"
            raise RuntimeError(f"{rule}:\n{_log(nvrtc, program)}") from error
        return _cubin(nvrtc, program, expression, found)
    finally:
        nvrtc.destroyProgram(program)


def _options(target: str, found: str) -> tuple[str, ...]:
    major, minor = map(int, found.split("."))
    return (f"-arch={target}", *OPTIONS, *((SEED,) if (major, minor) >= (12, 9) else ()))


def _cubin(nvrtc: Any, program: int, expression: str, found: str) -> Cubin:
    image = elf.whole(nvrtc.getCUBIN(program))
    name: str = nvrtc.getLoweredName(program, expression)
    kernels = elf.kernels(image)
    if kernels.keys() != {name}:  # the cache finds the kernel in a cubin by its being the only one
        rule = "has to give one kernel, itself; the other kernels of a source have to be templates"
        raise ValueError(f"{expression} {rule}, not {', '.join(sorted(kernels)) or 'none'}")
    return Cubin(image, name, kernels[name], found, _log(nvrtc, program))


def _log(nvrtc: Any, program: int) -> str:
    log: str = nvrtc.getProgramLog(program)
    return log.strip("\0\n ")
