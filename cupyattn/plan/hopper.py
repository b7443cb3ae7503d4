"""How the Hopper kernel cuts a problem: tile, switches, packing, and the order of tiles.

The numbers are those of FlashAttention-3 where registers allow, which were read from compiled
kernels.  None has been timed yet: `make gpu` has the table of switches that will settle them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from cupyattn.problem import FLOAT8, ITEMSIZE, Problem, Sizes

HEAD_DIMS = (64, 96, 128, 192, 256)
"""Columns of its tiles; what lies between is filled up with zeros."""
KEYS_IN_A_BOX = 8
"""What TMA brings from a page is a multiple of so many keys, as rows of a tile are swizzled."""
ALL_KEYS, RIGHT_EDGE, BOTH_EDGES = 0, 1, 2
"""``Reach`` in ``hopper.cu``."""
HOPPER_MEMORY = 227 * 1024
"""Bytes of shared memory that a block can have on Hopper."""
L2_FOR_KEYS = 32 * 2**20
"""Bytes of keys and values that stay in the second-level cache of an H100 beside everything else."""


class Switches(NamedTuple):
    """What the kernel can do in two ways; see ``HopperSwitches``."""

    ping_pong: bool = True
    overlap: bool = True
    pinned: bool = True
    rescale_first: bool = False
    """Sums shrink while the next block's scores are under way, not when all products have ended."""
    lazy: bool = False
    """... and only where a weight would pass 2^8, which in most tiles it does once or never."""
    weights_in_shared: bool = False
    polynomials: int = 0
    two_level: bool = False
    """Sums of a block are added to those of all, which shrink in the same instruction: neither first nor lazily."""

    def __str__(self) -> str:
        words = [name.replace("_", " ") for name, value in self._asdict().items() if value is True]
        return ", ".join([*words, f"{self.polynomials} of 32 exponentials by polynomial"])


class HopperTile(NamedTuple):
    """How one thread block of the Hopper kernel cuts the problem."""

    block_q: int
    """Rows: of one head, or of the tokens of ``heads_per_unit`` heads that share their keys."""
    block_k: int
    num_stages: int
    reach: int
    """Which keys can be hidden from a row: by the ends of its sequence, to the right, on both sides."""
    heads_per_unit: int = 1
    units_per_section: int = 1
    """Units whose tiles take turns, so that their keys stay in the second-level cache."""
    persistent: bool = False
    """One thread block to a multiprocessor, which takes one tile after the other."""
    cluster: int = 1
    """Thread blocks with neighbouring tiles, each of which loads its share of the keys and values for all of them."""
    switches: Switches = Switches()

    @property
    def num_warps(self) -> int:
        return 4 * (1 + self.block_q // 64)

    @property
    def tokens(self) -> int:
        """Whole tokens to a tile."""
        return self.block_q // self.heads_per_unit


def padded_dims(sizes: Sizes, dtype: str) -> tuple[int, int]:
    """Columns of the tiles of keys and of values."""
    wide, wide_v = (min(x for x in HEAD_DIMS if x >= size) for size in (sizes.head_dim, sizes.head_dim_v))
    if (wide, wide_v) == (192, 128) and dtype != FLOAT8:
        return wide, wide_v
    return max(wide, wide_v), max(wide, wide_v)


def base_cluster(head_dim: int, reach: int, dtype: str) -> int:
    """Blocks of a cluster, where `may_cluster` lets them be: more than one where few rows read wide keys."""
    return 2 if reach == ALL_KEYS and head_dim >= 128 and dtype != FLOAT8 else 1


def query_stages(queries: int, beside: int) -> int:
    """How many tiles of queries of so many bytes there are room for beside everything else but barriers.

    With two the next tile's queries come while this one's are multiplied; ``kQueryStages`` in ``hopper.cuh``.
    """
    return 2 if 2 * queries + beside + 1024 <= HOPPER_MEMORY else 1


def may_cluster(problem: Problem, tile: HopperTile, cluster: int) -> bool:
    """Whether so many neighbouring tiles always see the same blocks of keys, and these lie in one piece."""
    num_row_tiles, layout = -(-problem.sizes.seqlen_q // tile.tokens), problem.layout
    return tile.reach == ALL_KEYS and not layout.ragged and layout.page_size is None and num_row_tiles % cluster == 0


def rows_per_box(block_k: int, page_size: int) -> int:
    """Keys of a page that are brought at once: they divide pages and blocks."""
    return math.gcd(block_k, page_size)


def _block_of_pages(block_k: int, page_size: int, dtype: str) -> int:
    """The largest block of at least two thirds of the keys whose boxes hold most, up to 64 keys.

    Pages of 256 keys would be brought to blocks of 176 by 16 keys at a time, to blocks of 128 by 128.
    """
    step = 32 if dtype == FLOAT8 else 16
    sizes = range(block_k, 2 * block_k // 3 - 1, -step)
    return max(sizes, key=lambda size: (min(64, rows_per_box(size, page_size)), size))


def reach_of(problem: Problem) -> int:
    mask = problem.mask
    if mask.left is not None:
        return BOTH_EDGES
    return ALL_KEYS if mask.right is None else RIGHT_EDGE


def base_tile(head_dim: int, head_dim_v: int, reach: int, dtype: str) -> HopperTile:
    """The tile of padded head_dims under a mask of such a reach.

    How sums shrink was decided by instructions, as `asv_benchmarks/clocks.py` counts them, in blocks where nothing has
    to: of 16 bits it is lazily and first.  That leaves out a multiplication for each number of the output, and what is
    left behind the last wait, where no product runs beside it, is a quarter to a third of what it was.
    """
    local = reach == BOTH_EDGES
    if dtype == FLOAT8:
        return _float8_tile(head_dim, reach)
    narrow = Switches(rescale_first=True, lazy=True)
    if head_dim == 64:
        return HopperTile(192, 128, 2, reach, switches=narrow)
    if head_dim == 96:
        return HopperTile(192, 112, 2, reach, switches=narrow)
    if head_dim == 128:
        return HopperTile(128, 176 if reach == ALL_KEYS else 128, 2, reach, switches=narrow)
    # The longer products of wide heads hide the softmax without turns.
    wide = narrow._replace(ping_pong=False)
    if head_dim == 192:
        return HopperTile(128, 96 if local else 128 if head_dim_v == 128 else 112, 2, reach, switches=wide)
    return HopperTile(128, 64 if local else 80, 2, reach, switches=wide)


def _float8_tile(head_dim: int, reach: int) -> HopperTile:
    """The same for float8: half the bytes leave room for more keys, sums in two levels take registers."""
    if head_dim <= 128:
        return HopperTile(128, {64: 192, 96: 160, 128: 128}[head_dim], 2, reach, switches=Switches(two_level=True))
    # Sums of a block in two halves, where scores have been.
    switches = Switches(overlap=False, pinned=False, two_level=True)
    return HopperTile(128, 160 if head_dim == 192 else 64 if reach == BOTH_EDGES else 128, 2, reach, switches=switches)


def _num_tiles(tile: HopperTile, sizes: Sizes) -> int:
    """Row tiles of a batch, all sequences as long as the longest."""
    return -(-sizes.seqlen_q // tile.tokens) * (sizes.num_heads // tile.heads_per_unit) * sizes.batch


def hopper_tile(problem: Problem) -> HopperTile:
    """The tile of a problem, packed where that makes a tenth fewer of them."""
    sizes = problem.sizes
    head_dim, head_dim_v = padded_dims(sizes, problem.dtype)
    reach = reach_of(problem)
    tile = base_tile(head_dim, head_dim_v, reach, problem.dtype)
    page_size = problem.layout.page_size
    if page_size is not None:
        tile = tile._replace(block_k=_block_of_pages(tile.block_k, page_size, problem.dtype))
    group = sizes.queries_per_pair
    if 1 < group <= tile.block_q:
        packed = tile._replace(heads_per_unit=group)
        if _num_tiles(packed, sizes) < 0.9 * _num_tiles(tile, sizes):
            tile = packed
    if reach == ALL_KEYS:
        cluster = base_cluster(head_dim, reach, problem.dtype)
        return tile._replace(persistent=True, cluster=cluster if may_cluster(problem, tile, cluster) else 1)
    # Longest first across the heads whose keys fit into the cache together.
    keys = max(1, sizes.seqlen_k * (head_dim + head_dim_v) * ITEMSIZE[problem.dtype])
    heads = 1 << max(0, (L2_FOR_KEYS // keys).bit_length() - 1)
    units = max(1, sizes.batch * sizes.num_heads // tile.heads_per_unit)
    section = min(units, heads * group // tile.heads_per_unit)
    # Where lengths are data nobody knows which tiles are long; the GPU shares them out better than a rule.
    return tile._replace(units_per_section=section, persistent=not problem.layout.lengths_are_data)
