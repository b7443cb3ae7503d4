"""What stages of keys and values are worth on Hopper where heads have 256 columns: a model, not a measurement.

    python asv_benchmarks/stages.py

Two warpgroups, who share the tensor cores, and the one thread that fetches, each as `hopper.cu` has it, run against a
clock: scores of a block are asked for, then the product of the block before; its softmax runs beside that product; a
slot is handed back when both have read it, and filled when the thread that fetches comes to it.  Tensor cores take
products as they are asked for; boxes come one after the other.  What is assumed, and may be otherwise on a GPU: how
long it takes until a box's first byte is there, how fast the others come, and what handing a slot over costs.

A row for each tile and number of stages: clocks for each key, in which tensor cores alone need 32, for a near and fast
second-level cache, one that all multiprocessors ask at once, and a slow one.
"""

import heapq
import itertools
from typing import NamedTuple

HEAD_DIM, ROWS, ITEM = 256, 64, 2
SOFTMAX = 5.5
"""Clocks of a warpgroup's softmax for each key, of its own instructions; `clocks.py` counts 330 for 80 keys, of which
four warps on four schedulers issue one a clock, and both warpgroups share these."""
TAIL = 60
"""And behind its last wait, where nothing runs beside it."""
HANDED_OVER = 60
"""From the last reader's arrival at a barrier until the thread that fetches has asked for a box, and the like."""
BLOCKS = 400


class Memory(NamedTuple):
    latency: int
    """Clocks until the first byte comes."""
    rate: int
    """Bytes a clock."""


MEMORIES = {"near": Memory(600, 64), "shared": Memory(800, 40), "slow": Memory(1000, 32)}


class Tile(NamedTuple):
    block_k: int
    key_stages: int
    value_stages: int
    value_parts: int = 1
    """Each with slots, barriers and products of its own."""

    @property
    def shared_bytes(self):
        one = self.block_k * HEAD_DIM * ITEM
        return 2 * ROWS * HEAD_DIM * ITEM + (self.key_stages + self.value_stages) * one


TILES = (Tile(64, 2, 2), Tile(80, 2, 2), Tile(96, 1, 1), Tile(96, 2, 1), Tile(96, 1, 2), Tile(96, 2, 1, 2))


class Clock:
    """Runs generators that yield when to go on, or a counter and the number that they wait for."""

    def __init__(self):
        self.now, self._order, self._queue, self._waiting = 0.0, itertools.count(), [], []

    def start(self, process, at=None):
        heapq.heappush(self._queue, (self.now if at is None else at, next(self._order), process))

    def run(self):
        while self._queue:
            self.now, _, process = heapq.heappop(self._queue)
            wish = next(process, None)
            if isinstance(wish, tuple):
                self._waiting.append((*wish, process))
            elif wish is not None:
                self.start(process, wish)
            self._wake()

    def _wake(self):
        ready = [x for x in self._waiting if len(x[0]) >= x[1]]
        self._waiting = [x for x in self._waiting if len(x[0]) < x[1]]
        for _, _, process in ready:
            self.start(process)


class Line:
    """What takes one thing after the other: tensor cores, the way from the second-level cache."""

    def __init__(self, clock):
        self.clock, self.free = clock, 0.0

    def take(self, clocks):
        self.free = max(self.free, self.clock.now) + clocks
        return self.free


def told(clock, counter, at):
    """Has a counter go up then."""

    def process():
        yield at
        counter.append(at)

    clock.start(process())


def clocks_a_key(tile, memory):
    clock = Clock()
    tensor, link = Line(clock), Line(clock)
    parts = range(tile.value_parts)
    full_keys, full_values = [], [[] for _ in parts]
    empty_keys, empty_values = [], [[] for _ in parts]
    product = tile.block_k * HEAD_DIM / 32  # of a warpgroup, scores or output
    box = tile.block_k * HEAD_DIM * ITEM

    def load(full, size):
        told(clock, full, link.take(size / memory.rate) + memory.latency)

    def fetch():
        for block in range(BLOCKS):
            if block >= tile.key_stages:
                yield empty_keys, 2 * (block - tile.key_stages + 1)
                yield clock.now + HANDED_OVER
            load(full_keys, box)
            if block == 0:
                continue
            for part in parts:
                if block > tile.value_stages:
                    yield empty_values[part], 2 * (block - tile.value_stages)
                    yield clock.now + HANDED_OVER
                load(full_values[part], box / tile.value_parts)

    ends = []

    def multiply():
        for block in range(BLOCKS - 1):
            yield full_keys, block + 1
            scores = tensor.take(product)
            outs = []
            if block:
                for part in parts:
                    yield full_values[part], block
                    outs.append(tensor.take(product / tile.value_parts))
            yield max(clock.now, scores)
            empty_keys.append(clock.now)
            yield clock.now + SOFTMAX * tile.block_k
            for part, end in enumerate(outs):
                yield max(clock.now, end)
                empty_values[part].append(clock.now)
            yield clock.now + TAIL
        ends.append(clock.now)

    clock.start(fetch())
    clock.start(multiply())
    clock.start(multiply(), 1.0)
    clock.run()
    return max(ends) / (BLOCKS - 1) / tile.block_k


def main():
    print(f"{'tile':<34}{'shared memory':>14}" + "".join(f"{name:>9}" for name in MEMORIES))
    for tile in TILES:
        name = f"128 x {tile.block_k}, {tile.key_stages} of keys, {tile.value_stages} of values"
        name += " in halves" if tile.value_parts == 2 else ""
        found = "".join(f"{clocks_a_key(tile, memory):>9.1f}" for memory in MEMORIES.values())
        print(f"{name:<44}{tile.shared_bytes // 1024:>4} KB{found}")


if __name__ == "__main__":
    main()
