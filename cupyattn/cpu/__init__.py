"""The CPU's wing: attention in NumPy, cut into tasks for the cores of this machine."""

from cupyattn.cpu.backward import memory_of_machine, run, run_backward
from cupyattn.cpu.threads import num_cores

__all__ = ["memory_of_machine", "num_cores", "run", "run_backward"]
