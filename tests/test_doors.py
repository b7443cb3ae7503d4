"""Doors that open late: what is found, what is kept, who comes at once."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import cupyattn

DOOR = """
from cupyattn.doors import opened_late

__getattr__ = opened_late(__name__, {"kitchen": ("stove", "larder"), "cellar": ()})
"""


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A package with a door and two rooms, one of which has a function of its own name."""
    folder = tmp_path / "a_house"
    folder.mkdir()
    (folder / "__init__.py").write_text(DOOR)
    (folder / "kitchen.py").write_text("stove = []\n")
    (folder / "cellar.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("a_house")
    for name in [name for name in sys.modules if name.partition(".")[0] == "a_house"]:
        del sys.modules[name]


def test_a_room_is_imported_when_a_name_in_it_is_asked_for(house):
    assert "a_house.kitchen" not in sys.modules
    assert house.stove is sys.modules["a_house.kitchen"].stove


def test_a_name_stays_at_the_door_once_it_was_found(house):
    found = house.stove
    assert vars(house)["stove"] is found


def test_what_was_put_at_the_door_is_found_there(house, monkeypatch):
    monkeypatch.setattr(house, "stove", "another")
    from a_house import stove

    assert stove == "another"


def test_a_room_can_be_asked_for_itself(house):
    assert house.cellar is sys.modules["a_house.cellar"]


def test_what_nobody_has_is_refused_as_python_does(house):
    with pytest.raises(AttributeError, match="module 'a_house' has no attribute 'attic'"):
        house.attic  # noqa: B018


def test_a_name_that_its_room_lacks_is_not_kept(house):
    for _ in range(2):
        with pytest.raises(AttributeError, match="larder"):
            house.larder  # noqa: B018


AT_ONCE = """
import sys, threading
sys.path.insert(0, sys.argv[1])
import cupyattn
found, start = [], threading.Barrier(16)
def ask(first):
    start.wait()
    names = cupyattn.__all__[first:] + cupyattn.__all__[:first]
    found.append({name: getattr(cupyattn, name) for name in names})
threads = [threading.Thread(target=ask, args=(2 * i,)) for i in range(16)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(found) == 16
assert all(other[name] is found[0][name] for other in found for name in found[0])
"""


def test_threads_that_ask_for_everything_at_once_find_the_same():
    call = [sys.executable, "-W", "error", "-c", AT_ONCE, str(Path(cupyattn.__file__).parents[1])]
    assert subprocess.run(call, capture_output=True, text=True, timeout=300).stderr == ""
