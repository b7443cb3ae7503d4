"""What bounds a Hopper kernel, counted: a model, not a measurement; needs NVRTC and nvdisasm, and no GPU.

    python asv_benchmarks/clocks.py [--json FILE]

Of the loop over blocks that all rows see wholly, as ptxas leaves it, clocks of a multiprocessor for one block of keys:
those of the tensor cores, N / 2 for a product of 64 x N x 16 numbers of 16 bits and half of that for 8 bits; of
exponentials, reciprocals and the like, 8 for a warp's; of the issue of instructions, 1 for a warp's; of shared memory,
1 for 128 bytes, of operands that products read there, keys and values that come, and float8 values that are turned. Two
or three warpgroups share all of them. What is largest binds, and the tensor cores' share of it is their utilisation, at
best: latencies, barriers and what is around the loop are not counted.

Instructions are those of the usual way through the loop: what a branch within it leaps over is not counted, which is
the look at what was found in values of the block before, if that was at an edge, and the multiplication of sums where
nothing has to shrink (`Switches.lazy`). "all" counts these, too. "alone" are those behind the last wait, beside which
no product of the same warpgroup runs.

Then the same around the loop, for causal calls of 16k tokens, 16 heads of 128: which share of its time the busiest
multiprocessor is in the loop, if what is around it takes as long as `AROUND` says, which is estimated and not counted.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from resources import loops
from rounds import places_of_blocks

from cupyattn import explain
from cupyattn.cuda.making import catalogue, compiler, source
from cupyattn.plan import ALL_KEYS, RIGHT_EDGE, base_tile
from cupyattn.problem import FLOAT8, ITEMSIZE

LOW_CAP = catalogue.SOFTCAP | catalogue.LOW_CAP
SLOPES = catalogue.ALIBI | catalogue.CAUSAL_ALIBI
FORWARD = {
    "64, causal": ("bfloat16", 64, RIGHT_EDGE, 0),
    "96, causal": ("bfloat16", 96, RIGHT_EDGE, 0),
    "128": ("bfloat16", 128, ALL_KEYS, 0),
    "128, causal": ("bfloat16", 128, RIGHT_EDGE, 0),
    "128, causal, softcap": ("bfloat16", 128, RIGHT_EDGE, LOW_CAP),
    "128, causal, slopes": ("bfloat16", 128, RIGHT_EDGE, SLOPES),
    "256, causal": ("bfloat16", 256, RIGHT_EDGE, 0),
    # Not planned: one stage is all there is room for, or one of values, for which see stages.py.
    "256, causal, 96 keys": ("bfloat16", 256, RIGHT_EDGE, 0, {"block_k": 96, "num_stages": 1}),
    "64, float8": (FLOAT8, 64, ALL_KEYS, 0),
    "128, float8": (FLOAT8, 128, ALL_KEYS, 0),
    "256, float8": (FLOAT8, 256, ALL_KEYS, 0),
}


AROUND = {"its place": 120, "the first weights": 870, "the output": 520}
"""Clocks of a tile beside which no product runs.

Its place is looked for before the walk and, in the output's clocks, behind it: three quotients, each of which hangs on
the one before.  A multiplication, a shift and a remainder of uniform registers take about 36 clocks; a division of
numbers nobody knows before, from reciprocals by way of floats, took about 100, and the two places 300 and 700.
"""
ALONE = {"the block's beginning": 1000, "the first keys and queries": 900}
"""And those of a tile that has a thread block to itself, which were there before blocks took one after the other."""
SEQLENS = (2048, 4096, 8192, 16384)


class Clocks(NamedTuple):
    """Of one block, for all warpgroups together."""

    instructions: int
    """Of a warp."""
    all: int
    alone: int
    tensor: int
    special: int
    issue: int
    shared: int

    @property
    def binds(self):
        return max(("tensor", "special", "issue", "shared"), key=lambda name: getattr(self, name))

    @property
    def utilisation(self):
        return self.tensor / getattr(self, self.binds)


def operand_bytes(product):
    """What a product reads in shared memory: of 32 bytes along its sum, right rows, and left ones if they lie there."""
    rows, where = re.search(r"GMMA\.64x(\d+)x\S+ R\d+, (gdesc|R)", product).groups()
    return 32 * (int(rows) + (64 if where == "gdesc" else 0))


def clocks_of(loop, warpgroups, bytes_of_block):
    body = loop.usual()
    products = [re.search(r"[HQ]GMMA\.64x(\d+)x(\d+)", text) for text in body]
    tensor = sum(int(found[1]) // (2 if found[2] == "16" else 4) * int(found[2]) // 16 for found in products if found)
    read = sum(operand_bytes(text) for text, found in zip(body, products, strict=True) if found)
    shared = -(-(warpgroups * read + bytes_of_block) // 128)
    special = 8 * sum("MUFU" in text for text in body)
    alone = next(count for count, text in enumerate(reversed(body)) if "WARPGROUP.DEPBAR" in text)
    of_all = (warpgroups * count for count in (tensor, special, len(body)))
    return Clocks(len(body), len(loop.body), alone, *of_all, shared)


def loop_of(cubin, is_walk):
    """The shortest innermost loop of products whose waits are those of the walk."""
    with tempfile.TemporaryDirectory() as folder:
        found = list(loops(cubin, Path(folder)))
    return min((loop for loop in found if is_walk(loop.body)), key=lambda loop: len(loop.body))


def waits(body):
    return [text.split("gsb0, ")[1] for text in body if "WARPGROUP.DEPBAR" in text]


def of_forward(dtype, head_dim, reach, edits, other=None):
    tile = base_tile(head_dim, head_dim, reach, dtype)._replace(**other or {})
    what = catalogue.hopper(dtype, head_dim, head_dim, tile, True, edits)
    cubin = compiler.compile_cubin(source.join(what.source), what.expression, "sm_90a")
    least = 3 if dtype == FLOAT8 and head_dim > 128 else 2  # its sums come in two parts
    loop = loop_of(cubin, lambda body: len(waits(body)) == least and any("GMMA" in text for text in body))
    comes = tile.block_k * head_dim * ITEMSIZE[dtype]
    times = 4 if dtype == FLOAT8 else 2  # keys come and values; those of float8 are read and written to be turned
    return clocks_of(loop, tile.block_q // 64, times * comes)


def around(clocks_of_block):
    """For each length: of the busiest multiprocessor's time, what it is in the loop; and that of a block to a tile."""
    found = {}
    for seqlen in SEQLENS:
        batch = 16384 // seqlen
        shape = (batch, seqlen, 16, 128)
        plan = explain(shape, shape, shape, dtype="bfloat16", device="H200", causal=True)
        of_blocks = places_of_blocks(plan, seqlen, 16 * batch)
        per_tile = plan.tile.tokens / plan.tile.block_k
        work = [[(place + 1) * per_tile * clocks_of_block for place in places] for places in of_blocks]
        mean = sum(map(sum, work)) / len(work)
        busiest = max(sum(its) + len(its) * sum(AROUND.values()) for its in work)
        by_itself = mean + sum(map(len, work)) / len(work) * sum((*AROUND.values(), *ALONE.values()))
        found[seqlen] = (mean / busiest, mean / by_itself)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    given = parser.parse_args()
    table = {name: of_forward(*case) for name, case in FORWARD.items()}
    counts = f"{'instructions':>14}{'all':>6}{'alone':>7}"
    print(f"{'head_dim':<24}{counts}{'tensor':>8}{'special':>9}{'issue':>7}{'shared':>8}  binds    utilisation")
    for name, row in table.items():
        clocks = f"{row.tensor:>8}{row.special:>9}{row.issue:>7}{row.shared:>8}  {row.binds:<9}"
        print(f"{name:<24}{row.instructions:>14}{row.all:>6}{row.alone:>7}{clocks}{row.utilisation:.2f}")
    causal = table["128, causal"]
    shares = around(max(causal.tensor, causal.special, causal.issue, causal.shared))
    print("\nof the time in the loop   a block to a tile, perfectly shared out")
    for seqlen, (share, by_itself) in shares.items():
        print(f"{seqlen:>6} causal, 128  {share:>7.3f}{by_itself:>10.3f}")
    if given.json:
        figures = {name: {**row._asdict(), "binds": row.binds} for name, row in table.items()}
        given.json.write_text(
            json.dumps({"nvrtc": compiler.version(), "clocks": figures, "in_the_loop": shares}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
