"""NVRTC's PTX where `emulated` would have the emulator: what was built, launched and visited meanwhile.

with executed("sm_80") as watch:
    emulated.check(arrays, options, "flash", schedule=1)
watch.forms      # instruction forms that were executed
"""

from collections import Counter
from contextlib import contextmanager
from unittest import mock

import emulator
import ptx


class Watch:
    """The kernels that were built, and what was executed of them since."""

    def __init__(self):
        self.built = []
        """(source, expression, kernel)."""
        self.written = []
        """Copies of all that launches could write to, if they are kept."""
        self._visits = {}

    def add(self, source, expression, kernel):
        self._visits.setdefault(id(kernel), (kernel.visits.copy(), len(kernel.launches)))
        self.built.append((source, expression, kernel))

    def _kernels(self):
        return {id(kernel): kernel for _, _, kernel in self.built}.values()

    @property
    def forms(self):
        """Opcodes with their modifiers, and how often they were executed."""
        found = Counter()
        for kernel in self._kernels():
            for block, visits in zip(kernel.blocks, kernel.visits - self._visits[id(kernel)][0], strict=True):
                for form, number in block.forms.items():
                    found[form] += number * int(visits)
        return +found

    @property
    def instructions(self):
        """Executed by all threads together."""
        new = (kernel.launches[self._visits[id(kernel)][1] :] for kernel in self._kernels())
        return sum(launch.instructions for launches in new for launch in launches)

    def was_launched(self, source, expression):
        """Whether the launcher chose this kernel."""
        return any((source, expression) == (x, y) and kernel.launches for x, y, kernel in self.built)


class Keeping:
    """A kernel whose launches leave a copy of what they wrote."""

    def __init__(self, kernel, written):
        self._kernel, self._written = kernel, written

    def launch(self, record, grid, threads, shared_memory, buffers, *more, **options):
        self._kernel.launch(record, grid, threads, shared_memory, buffers, *more, **options)
        self._written += [array.copy() for array, writable in buffers if writable]


@contextmanager
def executed(target, edit=None, nvrtc=None, folder=None, keeps=False):
    """Until its end `emulator.build` compiles for an architecture by NVRTC; see `ptx.build` for the rest.

    `keeps`: whether what launches write is kept, see `Watch.written`.
    """
    watch = Watch()

    def build(source, expression, sources=None, flags=()):
        kernel = ptx.build(source, expression, folder, sources, target=target, edit=edit, nvrtc=nvrtc)
        watch.add(source, expression, kernel)
        return Keeping(kernel, watch.written) if keeps else kernel

    with mock.patch.multiple(
        emulator, build=build, encode_map=ptx.encode_map, require_compiler=ptx.require_compiler,
        EmulatorError=ptx.ExecutorError, BuildError=ptx.BuildError,
    ):  # fmt: skip
        yield watch
