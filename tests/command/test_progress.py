"""How far it is: on a terminal alone."""

import io
import sys

import pytest

from cupyattn.command import progress
from cupyattn.command.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def plain(monkeypatch):
    """Without tqdm."""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.mark.parametrize("with_tqdm", [False, True])
def test_what_is_no_terminal_is_told_nothing(with_tqdm, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    if not with_tqdm:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    stream = io.StringIO()
    with Progress(3, "compiling", stream) as told:
        for number in range(3):
            clock.now += 5.0
            told.step(f"kernel {number}")
    assert stream.getvalue() == ""


def test_without_tqdm_there_is_a_line_every_two_seconds_with_the_time_left(plain):
    stream = Terminal()
    with Progress(8, "compiling", stream) as told:
        for number in range(4):
            plain.now += 1.5
            told.step(f"kernel {number}")
    assert stream.getvalue().splitlines() == [
        "compiling: 25%, 00:09 left  kernel 1",
        "compiling: 50%, 00:06 left  kernel 3",
    ]


def test_a_step_counts_by_its_size(plain):
    stream = Terminal()
    with Progress(8, "measuring", stream) as told:
        told.step("short", 1)
        plain.now = 6.0
        told.step("long", 5)
    assert stream.getvalue() == "measuring: 75%, 00:02 left  long\n"


def test_with_tqdm_there_is_one_line_that_is_gone_at_the_end():
    pytest.importorskip("tqdm")
    stream = Terminal()
    with Progress(4, "compiling", stream) as told:
        for number in range(4):
            told.step(f"kernel {number}")
    text = stream.getvalue()
    assert "compiling:" in text
    assert "left" in text
    assert "\n" not in text
    assert text.split("\r")[-1].strip() == ""


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "00:00"), (65, "01:05"), (6000, "100:00")])
def test_time_is_said_as_on_a_clock(seconds, words):
    assert progress._clock(seconds) == words
