"""The GPU's only door.

Arrays on a CUDA device are recognised and planned for; this version of cupyattn has no CUDA kernels
yet, and says so here, together with whatever else is missing on the machine.
"""

from __future__ import annotations

from typing import Any, NoReturn

from cupyattn.plan import Plan
from cupyattn.problem import Device, Problem
from cupyattn.reading import refusal

INSTALL = "install cupyattn[cuda12] or cupyattn[cuda13], whichever CUDA version your driver supports"


def device_of(function: str, title: str, array: Any) -> Device:
    """The GPU an array is on, as the planner needs it.

    Raises
    ------
    ImportError
        CuPy, through which kernels are launched, is not installed.
    RuntimeError
        CuPy finds no driver or no device.
    """
    try:
        import cupy
    except ImportError as error:
        rule = f"the arrays are on a CUDA device ({title}) and CuPy is not installed; {INSTALL}"
        raise ImportError(refusal(function, rule)) from error
    if not cupy.cuda.is_available():
        rule = f"the arrays are on a CUDA device ({title}) and CuPy finds no NVIDIA driver or GPU on this machine"
        raise RuntimeError(refusal(function, rule))
    index = _index(array)
    properties = cupy.cuda.runtime.getDeviceProperties(index)
    return Device(
        properties["name"].decode(),
        "cuda",
        properties["multiProcessorCount"],
        (properties["major"], properties["minor"]),
        properties["sharedMemPerBlockOptin"],
    )


def _index(array: Any) -> int:
    """The CUDA ordinal of a CuPy, torch or JAX array."""
    device = getattr(array, "device", None)
    for name in ("id", "index", "local_hardware_id"):
        index = getattr(device, name, None)
        if isinstance(index, int):
            return index
    return 0


def run(function: str, plan: Plan, problem: Problem) -> NoReturn:
    """Launch the planned kernel."""
    rule = f"the plan is {plan.kernel} on {plan.device}, and this version of cupyattn has no CUDA kernels yet"
    raise NotImplementedError(refusal(function, rule, ("problem", problem)))
