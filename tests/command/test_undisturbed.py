"""Ctrl-C during the import of a package."""

import signal
import sys
import threading

import pytest

from cupyattn.command.undisturbed import import_undisturbed

PRESSED = """
import signal
signal.raise_signal(signal.SIGINT)
whole = True
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The name of a package that is interrupted while it is imported."""
    (tmp_path / "interrupted_package.py").write_text(PRESSED)
    monkeypatch.syspath_prepend(tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts beside it has it ignored
    yield "interrupted_package"
    signal.signal(signal.SIGINT, before)
    sys.modules.pop("interrupted_package", None)


def test_ctrl_c_counts_once_the_package_is_there(package):
    with pytest.raises(KeyboardInterrupt):
        import_undisturbed(package)
    assert sys.modules[package].whole


def test_ctrl_c_is_python_s_own_again_afterwards(package):
    with pytest.raises(KeyboardInterrupt):
        import_undisturbed(package)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_counts_even_if_the_import_fails(package, tmp_path):
    (tmp_path / f"{package}.py").write_text(PRESSED + "raise ImportError")
    with pytest.raises(KeyboardInterrupt):
        import_undisturbed(package)


def test_whoever_ignores_ctrl_c_is_left_alone(package):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert import_undisturbed(package).whole
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_may_import_too(tmp_path, monkeypatch):
    (tmp_path / "a_quiet_package.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    thread = threading.Thread(target=lambda: found.append(import_undisturbed("a_quiet_package")))
    thread.start()
    thread.join()
    assert found == [sys.modules.pop("a_quiet_package")]
