"""The wing of decisions: how it will be done, as values.

`choose` asks every implementation for its objections to a problem on a device, takes the first that has none, and
returns a `Plan` that prints itself.  Nothing here touches an array or a GPU.

- `values`: what is decided, `Plan` and tiles
- `objections`: what each implementation has against a problem, and the order in which they are asked
- `choosing`: the choice, and what mends a plan when more is known
- `cpu`, `gpu`, `hopper`: the tiles of NumPy, of the flash and split-KV kernels, of the Hopper kernel
- `backward`: the plan of the gradients, and the tiles of their kernels
- `memory`: how much a plan takes besides the operands
- `tiling`: how many tiles sequences take whose lengths are not known yet
- `schedule`: which keys of which rows a thread block has where lengths are data
- `splits`: into how many pieces a decode cuts its keys, by our rule and by those of flash-attn

What only gradients and `explain` need, `backward` and `memory`, is imported when it is first asked for.
"""

import sys
from typing import TYPE_CHECKING

from cupyattn.doors import opened_late
from cupyattn.plan import hopper
from cupyattn.plan.choosing import choose, for_live_keys, with_num_splits
from cupyattn.plan.cpu import cpu_cost, cpu_tile
from cupyattn.plan.gpu import bytes_in_a_ring, bytes_of_a_query, flash_tile, gpu_tile, split_tile
from cupyattn.plan.hopper import (
    ALL_KEYS,
    BOTH_EDGES,
    HEAD_DIMS,
    KEYS_IN_A_BOX,
    RIGHT_EDGE,
    HopperTile,
    Switches,
    base_cluster,
    base_tile,
    hopper_tile,
    padded_dims,
    query_stages,
    rows_per_box,
)
from cupyattn.plan.objections import IMPLEMENTATIONS, LONGEST, objections_of_hopper
from cupyattn.plan.schedule import BY_SHARES, num_sequences, num_words
from cupyattn.plan.splits import FEWEST_KEYS, merging_blocks
from cupyattn.plan.tiling import num_row_tiles, num_tiles, tile_of_round, tiles_if_even
from cupyattn.plan.values import BackwardTile, BackwardTiles, CpuTile, Plan, Tile

if TYPE_CHECKING:
    from cupyattn.plan.backward import (
        OF_BIAS,
        OF_KEYS,
        OF_QUERIES,
        OF_VALUES,
        backward_tile,
        choose_backward,
        heads_per_block,
        hopper_backward_tile,
        hopper_shared_memory_of,
        passes_of,
        shared_memory_of,
    )
    from cupyattn.plan.memory import memory_of

__all__ = [
    "ALL_KEYS",
    "BOTH_EDGES",
    "BY_SHARES",
    "FEWEST_KEYS",
    "HEAD_DIMS",
    "IMPLEMENTATIONS",
    "KEYS_IN_A_BOX",
    "LONGEST",
    "OF_BIAS",
    "OF_KEYS",
    "OF_QUERIES",
    "OF_VALUES",
    "RIGHT_EDGE",
    "BackwardTile",
    "BackwardTiles",
    "CpuTile",
    "HopperTile",
    "Plan",
    "Switches",
    "Tile",
    "backward_tile",
    "base_cluster",
    "base_tile",
    "bytes_in_a_ring",
    "bytes_of_a_query",
    "choose",
    "choose_backward",
    "cpu_cost",
    "cpu_tile",
    "flash_tile",
    "for_live_keys",
    "gpu_tile",
    "heads_per_block",
    "hopper_backward_tile",
    "hopper_shared_memory_of",
    "hopper_tile",
    "memory_of",
    "merging_blocks",
    "num_row_tiles",
    "num_sequences",
    "num_tiles",
    "num_words",
    "objections_of_hopper",
    "padded_dims",
    "passes_of",
    "query_stages",
    "rows_per_box",
    "shared_memory_of",
    "split_tile",
    "tile_of_round",
    "tiles_if_even",
    "with_num_splits",
]

if not TYPE_CHECKING:  # or every misspelt name would be one, of type Any
    __getattr__ = opened_late(
        __name__,
        {
            "backward": (
                "OF_BIAS",
                "OF_KEYS",
                "OF_QUERIES",
                "OF_VALUES",
                "backward_tile",
                "choose_backward",
                "heads_per_block",
                "hopper_backward_tile",
                "hopper_shared_memory_of",
                "passes_of",
                "shared_memory_of",
            ),
            "memory": ("memory_of",),
        },
    )

sys.modules["cupyattn.hopper"] = hopper  # where plans that were pickled before there was this wing look for their tiles
