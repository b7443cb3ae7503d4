"""A ring of two processes on two cores against one process on one, measured here and now.

    python asv_benchmarks/processes.py [--seqlen 8192] [--turns 3] [--save NAME]

Needs mpi4py and its mpiexec.  Each process keeps to a core of its own, and its BLAS to one thread; one and two take
turns.  A time of one is `attention` by rank 0 while the other process sleeps; a time of two is `ring_attention` from
where both begin to where both are done.  The best of the turns counts, and their ratio is to be at most 0.6.  Both find
the same, which is checked.  --save writes results/NAME.json as well.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

BAR = 0.6
PROCESSES = 2
ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
OPEN_MPI = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
"""What Open MPI has to be told in a container."""
CAUSAL, DTYPES = ("full", "causal"), ("float64", "float32")
CLOSE = {"float64": 1e-12, "float32": 1e-5}


def rows_of(comm, seqlen, turns):
    """What one process has measured; all of it on rank 0."""
    return [row_of(comm, seqlen, turns, *case) for case in product(CAUSAL, DTYPES)]


def row_of(comm, seqlen, turns, causal, dtype):
    import numpy as np
    from benchmarks.common import draw

    from cupyattn import attention
    from cupyattn.distributed import Sharding, ring_attention, shard_sequence

    whole = draw(seqlen, dtype)
    layout = Sharding("zigzag", comm.size, (seqlen,))
    mine = [np.ascontiguousarray(shard_sequence(x, layout, comm.rank, axis=2)) for x in whole]
    options = {"layout": "bhsd", "causal": causal == "causal"}
    ring = ring_attention(*mine, comm=comm, sharding=layout, **options)
    best, calls = {1: np.inf, PROCESSES: np.inf}, {1: lambda: attention(*whole, **options)}
    calls[PROCESSES] = lambda: ring_attention(*mine, comm=comm, sharding=layout, **options)
    for _, number in product(range(turns), calls):
        together(comm)
        began, found = time.perf_counter(), calls[number]() if number > comm.rank else None
        together(comm)
        best[number] = min(best[number], time.perf_counter() - began)
        if number == 1 and comm.rank == 0:
            alike = shard_sequence(found, layout, 0, axis=2)
            np.testing.assert_allclose(ring, alike, rtol=CLOSE[dtype], atol=CLOSE[dtype])
    return {
        "benchmark": "Processes.ring",
        "params": {"seqlen": seqlen, "causal": causal, "arrays": dtype},
        "value": best[PROCESSES] / best[1],
        "unit": "time / one process with one thread",
        "bar": BAR,
        "seconds": {str(number): seconds for number, seconds in best.items()},
    }


def together(comm):
    """Wait for all others, asleep."""
    import numpy as np

    comm.all_gather(np.zeros(1))


def rank(seqlen, turns):
    """One of the processes."""
    from mpi4py import MPI

    from cupyattn.distributed import MpiComm

    comm = MpiComm(timeout=600.0)
    cores = json.loads(os.environ["CORES"])
    os.sched_setaffinity(0, {cores[comm.rank % len(cores)]})
    rows = rows_of(comm, seqlen, turns)
    if comm.rank == 0:
        print(json.dumps({"mpi": MPI.Get_library_version().splitlines()[0].split(",")[0].strip("\0"), "rows": rows}))


def measured(seqlen, turns):
    """The rows, by processes that are started for them."""
    beside = Path(sys.executable).with_name("mpiexec")
    command = str(beside) if beside.exists() else shutil.which("mpiexec")
    if command is None:
        raise SystemExit("needs mpiexec, of Open MPI or MPICH")
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < PROCESSES:
        raise SystemExit(f"needs {PROCESSES} cores, and has {len(cores)}")
    environment = {**os.environ, **ONE_THREAD, **OPEN_MPI, "CORES": json.dumps(cores)}
    own = [sys.executable, __file__, "--rank", "--seqlen", str(seqlen), "--turns", str(turns)]
    ended = subprocess.run([command, "-n", str(PROCESSES), *own], env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(ended.stdout + ended.stderr)
    return json.loads(ended.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seqlen", type=int, default=8192, help="of the whole; default 8192")
    parser.add_argument("--turns", type=int, default=3, help="of which the best counts; default 3")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json as well")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        rank(arguments.seqlen, arguments.turns)
        return
    from benchmarks import SUITE
    from table import Neighbours, machine, show

    neighbours = Neighbours()
    found = measured(arguments.seqlen, arguments.turns)
    busy = neighbours.cores()
    rows = [{**row, "cores busy with others": busy} for row in found["rows"]]
    result = {"machine": {**machine(), "mpi": found["mpi"]}, "rows": rows}
    print("\n".join(show(result["machine"], rows)))
    for row in rows:
        print(", ".join(map(str, row["params"].values())), *(f"{n}: {s:.3f} s" for n, s in row["seconds"].items()))
    if arguments.save:
        path = SUITE / "results" / f"{arguments.save}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
