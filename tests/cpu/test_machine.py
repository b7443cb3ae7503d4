"""What this machine has for us."""

import os
import sys
import threading

import pytest

from cupyattn.cpu.machine import _num_running, is_crowded


def says(monkeypatch, text):
    monkeypatch.setattr("cupyattn.cpu.machine.num_cores", os.cpu_count)
    monkeypatch.setattr("cupyattn.cpu.machine._num_running", lambda: 1)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(os, "read", lambda file, most: text)


@pytest.mark.parametrize(("more", "crowded"), [(0, False), (1, True)])
def test_is_crowded_counts_threads_that_run_now(monkeypatch, more, crowded):
    says(monkeypatch, b"0.00 0.00 0.00 %d/87 4066\n" % (2 * os.cpu_count() + more))
    assert is_crowded() == crowded


def test_threads_of_its_own_crowd_nobody_out(monkeypatch):
    says(monkeypatch, b"0.00 0.00 0.00 %d/87 4066\n" % (2 * os.cpu_count() + 1))
    assert is_crowded()
    monkeypatch.setattr("cupyattn.cpu.machine._num_running", lambda: 2)
    assert not is_crowded()


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="no /proc/self/task here")
def test_threads_that_wait_are_not_counted():
    stop = threading.Event()
    threads = [threading.Thread(target=stop.wait) for _ in range(5)]
    for thread in threads:
        thread.start()
    try:
        counts = [_num_running() for _ in range(20)]
        assert min(counts) >= 1, "who asks runs"
        assert min(counts) <= len(os.listdir("/proc/self/task")) - len(threads)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_is_not_crowded_for_who_has_some_cores_alone(monkeypatch):
    says(monkeypatch, b"0.00 0.00 0.00 %d/87 4066\n" % (9 * os.cpu_count()))
    assert is_crowded()
    monkeypatch.setattr("cupyattn.cpu.machine.num_cores", lambda: os.cpu_count() - 1)
    assert not is_crowded()


@pytest.mark.parametrize("text", [b"", b"0.1 0.2 0.3", b"0.1 0.2 0.3 many/87 1", b"0.1 0.2 0.3 9 1"])
def test_is_not_crowded_where_what_the_system_says_cannot_be_read(monkeypatch, text):
    says(monkeypatch, text)
    assert not is_crowded()


def test_is_not_crowded_where_the_system_says_nothing(monkeypatch):
    def missing(path, flags):
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "open", missing)
    assert not is_crowded()


@pytest.mark.skipif(not os.path.exists("/proc/loadavg"), reason="no /proc/loadavg here")
def test_is_crowded_leaves_no_file_open():
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(5):
        is_crowded()
    assert set(os.listdir("/proc/self/fd")) == before
