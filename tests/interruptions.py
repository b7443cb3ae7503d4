"""Ctrl-C at every instruction: what a signal can do anywhere, done everywhere.

for number, interrupted in at_every_instruction(lambda: run_all(tasks, 2), threads.__file__):
    ...  # look at what is left; after the last number the call came to its end
"""

import contextlib
import itertools
import sys


class _Tracer:
    """Raises before an instruction of some files: the one that has so many before it."""

    def __init__(self, files, countdown, error):
        self._files, self._left, self.error = files, countdown, error
        self.has_raised = False

    def __call__(self, frame, event, argument):
        if frame.f_code.co_filename not in self._files or self.has_raised:
            return None
        frame.f_trace = self._at_an_instruction  # Python 3.13 asks for opcodes only where it finds one already
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._at_an_instruction

    def _at_an_instruction(self, frame, event, argument):
        if event == "opcode" and not self.has_raised:
            self._left -= 1
            if self._left < 0:
                self.has_raised = True
                raise self.error
        return self._at_an_instruction


@contextlib.contextmanager
def _traced(tracer):
    before, report = sys.gettrace(), sys.unraisablehook

    def report_others(told):
        """What a finaliser raises goes nowhere, and Python 3.12 closes generators by instructions."""
        if not (tracer.has_raised and isinstance(told.exc_value, tracer.error)):
            report(told)

    sys.unraisablehook = report_others
    sys._getframe().f_trace_opcodes = True  # Python 3.12 traces none unless some frame had asked before settrace
    sys.settrace(tracer)
    try:
        yield
    finally:
        sys.settrace(before)
        sys.unraisablehook = report


def instructions(call, *files):
    """How many instructions of these files a call has."""
    most = 10**9
    tracer = _Tracer(frozenset(files), most, None)
    with _traced(tracer):
        call()
    return most - tracer._left


def interrupted(call, number, *files, error=KeyboardInterrupt):
    """Make a call that is interrupted before an instruction of these files: (whether it came so far, the error out)."""
    tracer = _Tracer(frozenset(files), number, error)
    try:
        with _traced(tracer):
            call()
    except error:
        return tracer.has_raised, True
    return tracer.has_raised, False


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
