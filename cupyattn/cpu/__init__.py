"""The CPU's wing: attention in NumPy, cut into tasks for the cores of this machine.

`run` and `run_backward` take a plan, a problem and its operands.  From the door inwards:

- `forward`, `backward`: the two passes, a list of tasks each
- `tasks`: in which order these run and add up; `threads`: running them on cores, the BLAS held to one thread;
  `team`: on cores where threads of torch's wait
- `cutting`: the problem into parts, `part`: one of them, `tiles`: into tiles and blocks of keys
- `views`: the arithmetic's view of a tile; `edits`: of what edits its scores; `bounded`: of what needs no maximum
- `flash`: the arithmetic of a tile, twin of the CUDA kernels; `hiding`: what it does about hidden keys
- `places`: where rows and keys lie; `facts`: what is known of the keys; `scratch`: memory that is used again
- `machine`: how many cores, how much memory

Both passes are imported when they are first run: a machine's GPU needs neither, and inference only one of them.
"""

from typing import TYPE_CHECKING

from cupyattn.cpu.machine import memory_of_machine, num_cores
from cupyattn.cpu.team import lent_by_torch
from cupyattn.doors import opened_late

if TYPE_CHECKING:
    from cupyattn.cpu.backward import run_backward
    from cupyattn.cpu.forward import run

__all__ = ["lent_by_torch", "memory_of_machine", "num_cores", "run", "run_backward"]

if not TYPE_CHECKING:  # or every misspelt name would be one, of type Any
    __getattr__ = opened_late(__name__, {"forward": ("run",), "backward": ("run_backward",)})
