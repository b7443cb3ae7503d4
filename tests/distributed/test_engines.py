"""Ranks that are processes: mpi4py's and torch.distributed's do what threads do, and fail as these do."""

import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import cupyattn
from cupyattn.distributed import TorchComm

SCRIPT = Path(__file__).with_name("process.py")
SECONDS = 600.0
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",  # in a container
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",  # more ranks than cores; of Open MPI 5, then of 4
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}
"""What Open MPI has to be told, and MPICH need not."""


def launcher(engine, size):
    """The command that starts processes, or a skip that says what is missing."""
    if engine == "mpi":
        if find_spec("mpi4py") is None:
            pytest.skip("needs mpi4py")
        beside = Path(sys.executable).with_name("mpiexec")
        command = str(beside) if beside.exists() else shutil.which("mpiexec")
        if command is None:
            pytest.skip("needs mpiexec, of Open MPI or MPICH")
        return [command, "-n", str(size), sys.executable]
    if find_spec("torch") is None:
        pytest.skip("needs torch")
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]


def environment():
    """Of processes that find this package, each on one thread."""
    home = str(Path(cupyattn.__file__).parents[1])
    path = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
    return {**os.environ, **OPEN_MPI, "PYTHONPATH": path, **dict.fromkeys(names, "1")}


def run(engine, size, what):
    return launched([*launcher(engine, size), str(SCRIPT), engine, what])


def launched(call):
    """What the ranks print, and how the launcher ended."""
    ended = subprocess.run(call, capture_output=True, text=True, timeout=SECONDS, env=environment())
    return ended.stdout, ended.stderr, ended.returncode


def run_without_launcher(size, what):
    """What each rank of torch's prints, and how it ended: nobody ends the others when one dies."""
    if find_spec("torch") is None:
        pytest.skip("needs torch")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {**environment(), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    call, pipe = [sys.executable, str(SCRIPT), "torch", what], subprocess.PIPE
    started = [
        subprocess.Popen(call, stdout=pipe, stderr=pipe, text=True, env={**common, "RANK": str(rank)})
        for rank in range(size)
    ]
    try:
        said = [process.communicate(timeout=SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(*texts, process.returncode) for texts, process in zip(said, started, strict=True)]


every_engine = pytest.mark.parametrize("engine", ["mpi", "torch"])


@pytest.mark.parametrize(
    ("engine", "size"),
    [
        ("mpi", 2),
        ("torch", 2),
        pytest.param("mpi", 4, marks=pytest.mark.long),
        pytest.param("torch", 4, marks=pytest.mark.long),
    ],
)
def test_processes_agree_with_one_device(engine, size):
    said, errors, code = run(engine, size, "agree")
    assert code == 0, errors
    assert sorted(re.findall(r"rank (\d) of \d is done", said)) == [str(rank) for rank in range(size)], errors


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.long)])
def test_torch_sends_tensors_where_they_are(size):
    said, errors, code = run("torch", size, "tensors")
    assert code == 0, errors
    assert said.count("is done") == size, errors


@pytest.mark.long
@every_engine
def test_a_process_that_raises_is_heard_of(engine):
    said, errors, _ = run(engine, 2, "raise")
    assert re.search(r"rank 0 after \d s: RankFailed: rank 0: rank 1 gave up: OSError: the cable is out", said), errors


@pytest.mark.long
def test_whoever_waits_for_a_process_that_dies_is_told():
    (said, errors, code), (_, _, of_the_dead) = run_without_launcher(2, "die")
    assert re.search(r"rank 0 after \d s: RankFailed: rank 0: rank 1 is not ", said), errors
    assert (code, of_the_dead) == (0, 3)


@pytest.mark.long
@every_engine
def test_a_process_that_dies_ends_the_others_in_time(engine):
    """By the launcher, if not by an error of theirs; without it there is no result."""
    said, _, code = run(engine, 2, "die")
    assert code != 0
    assert "has a result" not in said


def test_torch_has_another_try_with_the_same_group():
    said, errors, code = run("torch", 2, "again")
    assert code == 0, errors
    assert "rank 0, 0: RankFailed: rank 0: rank 1 gave up: OSError: the cable is out" in said
    assert "rank 0, 1: RankFailed: rank 0: rank 1 said nothing for 1 seconds" in said
    assert said.count("is done") == 2, errors


@pytest.mark.long
@every_engine
def test_processes_that_differ_all_raise_and_go_on(engine):
    said, errors, code = run(engine, 2, "differ")
    assert code == 0, errors
    assert said.count("all ranks have to agree about causal") == 2
    assert said.count("is done") == 2


def test_torch_has_to_be_initialised():
    pytest.importorskip("torch", reason="needs torch")
    with pytest.raises(ValueError, match=r"torch\.distributed has to be initialised"):
        TorchComm()


@pytest.mark.parametrize("timeout", [0, -1.0, np.nan])
def test_a_timeout_that_is_none_is_refused(timeout):
    with pytest.raises(ValueError, match="timeout has to be a positive number of seconds"):
        TorchComm(timeout=timeout)


# ---- Messages that are not over when a call fails, and errors of MPI's own ------------------------


LATE = """
    import os, time
    import numpy as np
    from cupyattn.distributed import MpiComm, RankFailed

    comm = MpiComm(timeout=0.5 if MpiComm().rank == 0 else 60.0)
    if comm.rank == 0:
        try:
            comm.receive((50,), np.float64, 1).wait()
        except RankFailed as error:
            print("rank 0:", error, flush=True)
        others = [np.zeros(50) for _ in range(2000)]  # in the place of what the message was for, if that was given back
        end = time.monotonic() + 4.0
        while time.monotonic() < end:
            comm._comm.Iprobe()
        print("rank 0: overwritten:", sum(x.any() for x in others), flush=True)
    else:
        time.sleep(2.0)
        request = comm._comm.Isend(np.full(50, 7.0), 0, 7001)
        end = time.monotonic() + 3.0
        while time.monotonic() < end:
            request.Test()
    os._exit(0)
"""
FAULTY = """
    import os
    import numpy as np
    from cupyattn.distributed import MpiComm, RankFailed

    comm = MpiComm(timeout=20.0)
    message = comm.receive((5,), np.float64, 1 - comm.rank)

    class Request:
        def Test(self, *_):
            if comm.rank == 1:
                comm.abort("no room")
            else:
                while not comm._comm.Iprobe():
                    pass
            raise comm._mpi.Exception(comm._mpi.ERR_OTHER)

    message.request = Request()
    try:
        message.wait()
    except RankFailed as error:
        print(f"rank {comm.rank}: {error}", flush=True)
    if comm.rank == 0:
        comm._comm.send(None, 1, 9)
    else:  # whoever ends first may have the launcher end the others
        comm._comm.recv(source=0, tag=9)
    os._exit(0)
"""


def said_by_two(text):
    return launched([*launcher("mpi", 2), "-c", textwrap.dedent(text)])[0]


@pytest.mark.long
def test_a_message_that_comes_too_late_is_written_to_nobodys_memory():
    said = said_by_two(LATE)
    assert "rank 0: rank 0: rank 1 said nothing for 0.5 seconds" in said
    assert "rank 0: overwritten: 0" in said


def test_an_error_of_mpis_own_is_the_reason_that_another_gave():
    said = said_by_two(FAULTY)
    assert "rank 0: rank 0: rank 1 gave up: no room" in said
    assert "rank 1: rank 1 gave up: no room" in said
