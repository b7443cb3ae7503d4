"""Bytes of keys and values that a decode has under way on a multiprocessor: a model, not a measurement; needs NVRTC and
nvdisasm, and no GPU.

    python asv_benchmarks/flight.py [--device H200] [--only "128 float8"]

A memory as far away as it is wide wants so many bytes under way at all times: 4.8 TB/s over 132 multiprocessors and
1 us are 36 KB.  Of the split-KV kernel that a plan chooses, from its machine code: what a lane copies beside the
arithmetic in one turn of the walk over keys is a stage, and while one is computed all others are under way.  Where
keys come through registers instead, no more is than a lane loads before it stores.  Blocks side by side are what shared
memory, registers and the plan let it be.
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from resources import instructions

from cupyattn.cuda.making import catalogue, compiler, source
from cupyattn.plan import split_tile
from cupyattn.plan.splits import BLOCKS_PER_UNIT
from cupyattn.problem import FLOAT8, NAMED_DEVICES

KERNELS = {
    f"{head_dim} {name}": (dtype, head_dim)
    for name, dtype in (("bfloat16", "bfloat16"), ("float8", FLOAT8), ("float32", "float32"))
    for head_dim in (64, 96, 128, 192, 256)
}


class Flight(NamedTuple):
    """Of a kernel on a multiprocessor."""

    registers: int
    blocks: int
    warps: int
    stages: int
    stage: int
    """Bytes that a warp brings in a turn."""
    alone: bool
    """They go by themselves."""

    @property
    def bytes(self):
        return self.blocks * self.warps * self.stage * (self.stages - 1 if self.alone else 1)


def walk_of(found, loops):
    """The loop over keys: the shortest one of products and of copies, or else of loads."""
    bodies = [body for body in (found[start : stop + 1] for start, stop in loops) if has(body, "HMMA")]
    copying = [body for body in bodies if has(body, "LDGSTS")]
    return min(copying or (body for body in bodies if has(body, "LDG")), key=len)


def has(body, name):
    return any(re.search(rf"\b{name}\b", text) for text in body)


def waits(text):
    """Bytes that a lane has under way whenever it begins to store to shared memory what it has loaded."""
    loads = [size_of(line) if re.search(r"\bLDG\b", line) else 0 for line in text]
    stores = [re.search(r"\bSTS\b", line) is not None for line in text]
    each, waiting, loading, found = sum(loads) / max(1, sum(stores)), 0.0, False, []
    for size, stored in zip(loads, stores, strict=True):
        if stored and loading:
            found.append(waiting)
        waiting += size - each * stored
        loading = bool(size) or (loading and not stored)
    return found


def size_of(load):
    width = re.search(r"\.(64|128)\b", load)
    return int(width[1]) // 8 if width else 4


def flight_of(dtype, head_dim, device):
    tile = split_tile(-(-head_dim // 32) * 32, 1, dtype, device.shared_memory)
    what = catalogue.splitkv(dtype, head_dim, head_dim, tile, True, 0, False)
    target = compiler.target_for(device.compute_capability)
    cubin = compiler.compile_cubin(source.join(what.source), what.expression, target)
    with tempfile.TemporaryDirectory() as folder:
        body = walk_of(*instructions(cubin, Path(folder)))
    copies = sum(re.search(r"\bLDGSTS\S*\.128\b", text) is not None for text in body)
    per_lane = 16 * copies if copies else int(max(waits(body), default=0))
    by_registers = 65536 // (-(-cubin.resources.registers // 8) * 8 * what.threads)
    by_memory = (device.shared_memory + 1024) // (what.shared_memory + 1024)
    blocks = min(BLOCKS_PER_UNIT, by_registers, by_memory)
    return Flight(cubin.resources.registers, blocks, tile.num_warps, tile.num_stages, 32 * per_lane, copies > 0)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="H200", help="%(default)s, or another that cupyattn knows")
    parser.add_argument("--only", default="", help="kernels with these words in their names")
    given = parser.parse_args(arguments)
    device = NAMED_DEVICES[given.device]
    print(f"{'head_dim':<16}{'registers':>9}{'blocks':>8}{'warps':>7}{'stages':>8}{'stage':>8}{'under way':>11}")
    for name, kernel in KERNELS.items():
        if given.only in name:
            row = flight_of(*kernel, device)
            stage = f"{row.stage / 1024:.1f} KB"
            side_by_side = f"{row.registers:>9}{row.blocks:>8}{row.warps:>7}{row.stages:>8}"
            print(f"{name:<16}{side_by_side}{stage:>8}{row.bytes // 1024:>8} KB")


if __name__ == "__main__":
    main()
