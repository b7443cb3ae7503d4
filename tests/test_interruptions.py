"""The interrupter itself: it finds every instruction of a call, and says truly what became of the error."""

import dis
import json
import subprocess
import sys
from pathlib import Path

import interruptions
from interruptions import at_every_instruction, instructions

FILE = "somewhere.py"
SOURCE = """
def straight(x):
    y = x + 1
    return [y, x]


def keeps(x):
    try:
        return [x]
    except KeyboardInterrupt:
        return None


class Dropped:
    def __del__(self):
        return [self]


def drops():
    return Dropped() is None
"""
FUNCTIONS = {}
exec(compile(SOURCE, FILE, "exec"), FUNCTIONS)
PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
from interruptions import instructions
functions = {}
exec(compile(sys.argv[2], "somewhere.py", "exec"), functions)
print(json.dumps([instructions(lambda: functions["straight"](1), "somewhere.py") for _ in range(3)]))
"""


def length_of(function):
    """Of a function without branches, but its first, which is behind it when its tracer hears of the call."""
    return sum(x.opname != "RESUME" for x in dis.get_instructions(function))


def test_every_instruction_is_counted_once():
    assert instructions(lambda: FUNCTIONS["straight"](1), FILE) == length_of(FUNCTIONS["straight"]) > 5


def test_before_each_of_them_there_is_an_interruption_that_comes_out():
    found = list(at_every_instruction(lambda: FUNCTIONS["straight"](1), FILE))
    assert found == [(number, True) for number in range(length_of(FUNCTIONS["straight"]))]


def test_one_that_the_call_keeps_to_itself_does_not():
    assert {came_out for _, came_out in at_every_instruction(lambda: FUNCTIONS["keeps"](1), FILE)} == {True, False}


def test_one_in_a_finaliser_goes_nowhere_and_is_not_reported():
    found = [came_out for _, came_out in at_every_instruction(FUNCTIONS["drops"], FILE)]
    assert found.count(False) == length_of(FUNCTIONS["Dropped"].__del__)


def test_the_first_call_that_a_process_traces_has_all_of_them():
    command = [sys.executable, "-c", PROGRAM, str(Path(interruptions.__file__).parent), SOURCE]
    counts = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert counts == [length_of(FUNCTIONS["straight"])] * 3
