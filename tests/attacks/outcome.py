"""What an attack found."""

from typing import NamedTuple


class Outcome(NamedTuple):
    tried: int
    """Cases: calls, interruptions, processes."""
    lost: list[str]
    """What was torn, wrong, hung or crashed, a line each, with what reruns it."""
    notes: str = ""
    """What could not be tried here, and why."""
