"""The emulated kernels under AddressSanitizer and UndefinedBehaviorSanitizer, held to the definition as ever.

The emulator checks every access by way of `ptx.cuh`; what is left are the kernels' own arrays, shifts, conversions and
sums, and the emulator itself.  The library of a sanitized kernel needs libasan in the process before anything else, so
all runs in children that preload it; their NumPy arrays have red zones, too.  Each coroutine's stack is memory of its
own that ASan knows nothing of: it checks the frames on it, and is told not to look for uses after a return there.

    python tests/attacks/sanitized.py SEED CASE     # one case again, as in a finding
"""

import importlib.util
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import traceback
from pathlib import Path

HERE = Path(__file__).parent

if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

from attacks.outcome import Outcome  # noqa: E402

FLAGS = ("-Og", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
JOBS = 2
WAIT = 240
"""Seconds for one case, most of them g++'s."""
SHARING = 4
"""Cases of one specialisation, where there is much to try with it: g++ is asked once."""
PROBLEMS = 8
"""Calls of a case, at most."""

# ---------------------------------------------------------------------------------------------------
# Calls
# ---------------------------------------------------------------------------------------------------


def _kinds():
    """(name, kernel, the function that makes a case's calls) of every kind; a case is one specialisation or a few.

    Imported late: only children need the emulator.
    """
    from cases import EDITS, LAYOUTS

    kernels = ("flash", "splitkv", "hopper")
    shared = [("visible", kernel, dtype, _visible) for kernel in kernels for dtype in ("float16", "bfloat16")]
    shared += [("visible", kernel, "float32", _visible) for kernel in ("flash", "splitkv")]
    shared += [("lengths", kernel, "float16", _ragged) for kernel in kernels]
    shared += [("pages", kernel, "bfloat16", _paged) for kernel in kernels]
    shared += [("sizes", kernel, "any", _sizes) for kernel in kernels for _ in range(3)]
    shared += [("append", kernel, dtype, _appending) for kernel in kernels for dtype in ("float16", "float8_e4m3fn")]
    tables = [(f"edit: {name}", EDITS[name]) for name in EDITS] + [
        (f"layout: {name}", LAYOUTS[name]) for name in LAYOUTS
    ]
    edited = [
        (name, kernel, "bfloat16" if kernel == "hopper" else "float16", _of_table(make))
        for (name, make), kernel in itertools.product(tables, kernels)
    ]
    return shared, edited


def _tiled(arrays, options, kernel):
    """Small tiles, so that a few keys make many blocks."""
    from emulated import problem_of

    from cupyattn.plan import Tile
    from cupyattn.plan.hopper import hopper_tile

    if kernel == "hopper":
        return {"tile": hopper_tile(problem_of(arrays, options))._replace(block_q=128, block_k=32)}
    return {"tile": Tile(16, 32, 2, 2), "num_splits": 3} if kernel == "splitkv" else {}


def _checking(kernel, schedule, arrays, options, seed=0):
    """The call, or one that does nothing where this kernel is never asked."""
    from emulated import H100, check, problem_of

    from cupyattn.plan import objections_of_hopper

    if kernel == "hopper" and objections_of_hopper(problem_of(arrays, options), H100):
        return lambda: None
    return lambda: check(
        arrays, options, kernel, schedule, dropout_seed=seed, flags=FLAGS, **_tiled(arrays, options, kernel)
    )


def _visible(rng, draw, kernel, dtype):
    """Who sees whom, what is hidden and what is not finite."""
    from cases import HIDDEN, STRAYS, VISIBLE

    names = [(table, name) for table in (VISIBLE, HIDDEN, STRAYS) for name in table]
    for index, (table, name) in enumerate(draw.sample(names, PROBLEMS)):
        arrays, *hidden, options, seed = table[name](rng, dtype)
        yield name, _checking(kernel, index % 3, hidden[0] if hidden else arrays, options, seed)


def _of_table(make):
    def calls(rng, draw, kernel, dtype):
        for schedule in range(3):
            arrays, options, seed = make(rng, dtype)
            yield f"schedule {schedule}", _checking(kernel, schedule, arrays, options, seed)

    return calls


def _packed(rng, draw, dtype):
    from emulated import ragged_operands, ragged_options

    lengths = [[draw.choice([0, 1, draw.randrange(90)]) for _ in range(3)] for _ in range(2)]
    arrays = ragged_operands(rng, dtype, *lengths, heads=(4, 2, 2), behind=(draw.randrange(3), draw.randrange(3)))
    causal = draw.random() < 0.5
    edits = {"causal": True} if causal else {"window_size": (draw.choice([None, 20]), draw.choice([None, 3]))}
    return f"{lengths}, {edits}", arrays, ragged_options(arrays, **edits)


def _ragged(rng, draw, kernel, dtype):
    for index in range(PROBLEMS):
        name, arrays, options = _packed(rng, draw, dtype)
        yield name, _checking(kernel, index % 3, arrays, options)


def _paged(rng, draw, kernel, dtype):
    from emulated import paged

    for index in range(PROBLEMS):
        size = draw.choice([16, 32, 48] if kernel == "hopper" else [1, 5, 16, 24, 64])
        name, arrays, options = _packed(rng, draw, dtype)
        yield f"pages of {size}, {name}", _checking(kernel, index % 3, paged(rng, arrays, size), options)


def _sizes(rng, draw, kernel, dtype):
    """A dtype and head dims, any lengths."""
    from emulated import check, operands, options_of

    dtype = draw.choice(["float16", "bfloat16"] + ["float32"] * (kernel != "hopper"))
    dims = draw.choice([(8, 8), (40, 40), (96, 96), (128, 128), (192, 128), (256, 256), (64, 136), (72, 8)])
    for index in range(PROBLEMS // 2):
        lengths = draw.randrange(1, 80 if kernel == "splitkv" else 200), draw.randrange(1, 300)
        asked = {"causal": draw.random() < 0.5, "alignment": draw.choice(["top-left", "bottom-right"])}
        arrays, options = operands(rng, dtype, "bshd", 1, (2, 1, 2), lengths, dims), options_of(**asked)
        yield (
            f"{dtype} {dims} {lengths} {asked}",
            lambda arrays=arrays, options=options, schedule=index % 3: check(
                arrays, options, kernel, schedule, flags=FLAGS
            ),
        )


def _appending(rng, draw, kernel, dtype):
    """New keys into a cache, rotated, and attention over it."""
    spec = importlib.util.spec_from_file_location("test_append", HERE.parent / "cuda" / "test_append.py")
    append = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = append  # its named tuples look for their module
    spec.loader.exec_module(append)
    append.FLAGS = FLAGS
    eight = append.EIGHT if dtype == "float8_e4m3fn" else {"dtype": dtype}
    kernel = "splitkv" if kernel == "flash" and eight is append.EIGHT else kernel
    names = [name for given, name, _ in append.turns(append.LAYOUTS) if given == kernel]
    for index, name in enumerate(draw.sample(names, PROBLEMS // 2)):
        given = append.LAYOUTS[name]
        rotary = {} if given.get("new", 1) is None else append.ROTARY["halves"]
        case = append.case_of(rng, **{**append.CAUSAL, **rotary, **given, **eight})
        yield name, lambda case=case, schedule=index % 3: append.check(case, kernel, schedule)


def _case(seed, number):
    """(name, its calls): kinds that have many calls in common with one specialisation come first."""
    import numpy as np

    draw = random.Random(f"{seed}-{number}")
    shared, edited = _kinds()
    for group in (shared, edited):
        random.Random(seed).shuffle(group)
    shared.sort(key=lambda kind: kind[3] is not _visible or kind[1] == "hopper")  # many calls, one specialisation
    order = [kind for kind in shared for _ in range(SHARING if kind[3] is _visible else 1)] + edited
    name, kernel, dtype, make = order[number % len(order)]
    rng = np.random.default_rng([seed, number])
    return f"{kernel}, {dtype}, {name}", make(rng, draw, kernel, dtype)


# ---------------------------------------------------------------------------------------------------
# Children
# ---------------------------------------------------------------------------------------------------


def _inside(seed, number):
    """In a child: says each call before it is made, and what is wrong with it after."""
    os.environ.pop("LD_PRELOAD", None)  # g++ needs no sanitizer
    name, calls = _case(seed, number)
    print(json.dumps({"case": name}), flush=True)
    for each, call in calls:
        print(json.dumps({"call": each}), flush=True)
        try:
            call()
        except Exception:
            print(json.dumps({"wrong": traceback.format_exc()[-400:]}), flush=True)
            return  # a launch that failed left its coroutines' frames behind


def _library(name):
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
    return found.strip() if os.path.isabs(found) else None


def _run(seed, number):
    """(calls that were made, what was found or nothing)."""
    options = "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1"
    preload = " ".join(_library(name) for name in ("libasan.so", "libubsan.so"))
    environment = {**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": options, "UBSAN_OPTIONS": "print_stacktrace=1"}
    command = [sys.executable, __file__, "--inside", str(seed), str(number)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=WAIT, check=False)
        out, err, code = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        out, err, code = (error.stdout or b"").decode(), "", f"a hang of {WAIT} s"
    said = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    calls = [x["call"] for x in said if "call" in x]
    wrong = [x["wrong"] for x in said if "wrong" in x]
    where = f"{next((x['case'] for x in said if 'case' in x), '?')}: {calls[-1] if calls else 'before any call'}"
    again = f"python tests/attacks/sanitized.py {seed} {number}"
    marks = ("runtime error", "ERROR: AddressSanitizer")
    reports = [line.strip() for line in err.splitlines() if any(mark in line for mark in marks)]
    if reports:
        lines = err.splitlines()
        place = next(i for i, line in enumerate(lines) if any(mark in line for mark in marks))
        frames = [line.split(" in ", 1)[-1].strip()[:160] for line in lines[place:] if line.lstrip().startswith("#")][
            :3
        ]
        return len(calls), f"{where}: {reports[0][:300]} at {' < '.join(frames)}; {again}"
    if wrong:
        return len(calls), f"{where}: {' '.join(wrong[0].split())}; {again}"
    if code:
        return len(calls), f"{where}: ended with {code}: {' '.join(err[-400:].split())}; {again}"
    return len(calls), ""


def attack(seed: int, cases: int) -> Outcome:
    """`cases` specialisations with some calls each, two at a time: g++ takes most of the time."""
    if shutil.which("g++") is None:
        return Outcome(0, [], "no g++")
    if not all(map(_library, ("libasan.so", "libubsan.so"))):
        return Outcome(0, [], "g++ has no libasan or no libubsan")
    numbers, tried, lost = iter(range(cases)), [], {}
    lock = threading.Lock()

    def work():
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            count, found = _run(seed, number)
            tried.append(count)
            if found:
                lost[number] = found

    workers = [threading.Thread(target=work) for _ in range(JOBS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return Outcome(sum(tried), [lost[number] for number in sorted(lost)], f"{cases} cases, ASan and UBSan together")


if __name__ == "__main__":
    if sys.argv[1] == "--inside":
        _inside(int(sys.argv[2]), int(sys.argv[3]))
    else:
        print(*_run(int(sys.argv[1]), int(sys.argv[2])), sep=" calls; ")
