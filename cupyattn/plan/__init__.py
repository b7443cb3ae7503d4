"""The wing of decisions: how it will be done, as values."""

import sys

from cupyattn.plan import hopper
from cupyattn.plan.choosing import (
    IMPLEMENTATIONS,
    LONGEST,
    CpuTile,
    Plan,
    Tile,
    choose,
    cpu_tile,
    flash_tile,
    for_live_keys,
    gpu_tile,
    objections_of_hopper,
    split_tile,
    with_num_splits,
)
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
    rows_per_box,
)

__all__ = [
    "ALL_KEYS",
    "BOTH_EDGES",
    "HEAD_DIMS",
    "IMPLEMENTATIONS",
    "KEYS_IN_A_BOX",
    "LONGEST",
    "RIGHT_EDGE",
    "CpuTile",
    "HopperTile",
    "Plan",
    "Switches",
    "Tile",
    "base_cluster",
    "base_tile",
    "choose",
    "cpu_tile",
    "flash_tile",
    "for_live_keys",
    "gpu_tile",
    "hopper_tile",
    "objections_of_hopper",
    "padded_dims",
    "rows_per_box",
    "split_tile",
    "with_num_splits",
]

sys.modules["cupyattn.hopper"] = hopper  # where plans that were pickled before there was this wing look for their tiles
