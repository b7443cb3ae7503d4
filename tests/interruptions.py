"""Ctrl-C at every instruction: what a signal can do anywhere, done everywhere.

for number, interrupted in at_every_instruction(lambda: run_all(tasks, 2), threads.__file__):
    ...  # look at what is left; after the last number the call came to its end
"""

import itertools
import sys


class _Tracer:
    """Raises before an instruction of some files: the one that has so many before it."""

    def __init__(self, files, countdown, error):
        self._files, self._left, self._error = files, countdown, error
        self.has_raised = False

    def __call__(self, frame, event, argument):
        if frame.f_code.co_filename not in self._files or self.has_raised:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._at_an_instruction

    def _at_an_instruction(self, frame, event, argument):
        if event == "opcode" and not self.has_raised:
            self._left -= 1
            if self._left < 0:
                self.has_raised = True
                raise self._error
        return self._at_an_instruction


def instructions(call, *files):
    """How many instructions of these files a call has."""
    most = 10**9
    tracer, before = _Tracer(frozenset(files), most, None), sys.gettrace()
    sys.settrace(tracer)
    try:
        call()
    finally:
        sys.settrace(before)
    return most - tracer._left


def interrupted(call, number, *files, error=KeyboardInterrupt):
    """Make a call that is interrupted before an instruction of these files: (whether it came so far, the error out)."""
    tracer = _Tracer(frozenset(files), number, error)
    before, came_out = sys.gettrace(), False
    sys.settrace(tracer)
    try:
        call()
    except error:
        came_out = True
    finally:
        sys.settrace(before)
    return tracer.has_raised, came_out


def at_every_instruction(call, *files, error=KeyboardInterrupt, first=0, step=1):
    """Make the call again and again, each time interrupted one instruction (or `step`) of these files later.

    Yields the number of instructions before the interruption, and whether the error came out of the call; ends with
    the first call that nothing interrupted.
    """
    for number in itertools.count(first, step):
        has_raised, came_out = interrupted(call, number, *files, error=error)
        if not has_raised:
            return
        yield number, came_out
