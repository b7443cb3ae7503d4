"""Numbers under each other."""

import pytest

from cupyattn.command.table import aligned, of_bytes


def test_words_begin_and_numbers_end_together():
    rows = [("name", "ms"), ("a", "12.5"), ("longer", "1")]
    assert aligned(rows) == "name      ms\na       12.5\nlonger     1"


def test_lines_end_without_spaces():
    assert aligned([("a", "b"), ("long", "")], left=2) == "a     b\nlong"


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (1234, "1.2 kB"),
        (5e6, "5.0 MB"),
        (3e9, "3.0 GB"),
        (7e15, "7000.0 TB"),
    ],
)
def test_bytes_are_said_as_people_say_them(count, words):
    assert of_bytes(count) == words
