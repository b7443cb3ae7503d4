"""What is asked, without arrays: the nouns of the package.

A `Problem` describes one attention call in integers, floats and short strings.  It is made once per
distinct call by `reading`, it can be printed, hashed, compared and tested without any array library,
and everything after it (`plan`, `cpu`, `cuda`) is a function of it.

The nouns, so that it never becomes a bag of fields:

==============  =====================================================================================
`Sizes`         how many of everything
`Layout`        where sequences, heads and keys lie in the caller's arrays
`Mask`          which keys a query may see: a band around a diagonal, and a boolean array's shape
`ScoreEdits`    what happens to a visible score before the softmax, in this order: scale, softcap,
                ALiBi, bias; and the sinks that join its denominator
==============  =====================================================================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

Array: TypeAlias = Any
"""Of whatever library, to whoever checks types: one that it does not know, or one beside the library of q, k and v."""


class SomeArray(Protocol):
    """What every library's arrays have, as far as types tell."""

    @property
    def shape(self) -> Any: ...
    @property
    def dtype(self) -> Any: ...


A = TypeVar("A", bound=SomeArray)
"""The arrays of one library: those of a call, and its results."""
Shape: TypeAlias = tuple[int, ...]
Alignment: TypeAlias = Literal["top-left", "bottom-right"]
Axes: TypeAlias = Literal["bshd", "bhsd", "thd"]
Implementation: TypeAlias = Literal["numpy", "splitkv", "hopper", "flash"]

FLOATS = ("float16", "bfloat16", "float32", "float64")
"""What every function takes, and gives back in kind."""
FLOAT8 = "float8_e4m3fn"
"""What attention takes besides: 4 bits of exponent, 3 of fraction, no infinity.  Nothing is ever rounded to it but
what rotary embeddings make of it."""
ITEMSIZE = {FLOAT8: 1, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class Spec(NamedTuple):
    """An array without its values: the argument's name as the caller knows it, shape and dtype name."""

    name: str
    shape: Shape
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE.get(self.dtype, 1)


class Span(NamedTuple):
    """The half-open range of keys (or rows) from `start` up to `stop`; empty if stop <= start."""

    start: int
    stop: int

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __contains__(self, index: object) -> bool:
        return isinstance(index, int) and self.start <= index < self.stop


@dataclass(frozen=True, slots=True)
class Mask:
    """The keys a query may see: a band around the diagonal, and a boolean array on top of it.

    Causal is ``Mask(right=0)``.  The diagonal of query ``row`` is the key ``row + offset``, where the
    offset is 0 (``"top-left"``) or ``seqlen_k - seqlen_q`` (``"bottom-right"``).

    >>> band = Mask(right=0, alignment="bottom-right")
    >>> [tuple(band.visible_keys(row, seqlen_q=2, seqlen_k=5)) for row in range(2)]
    [(0, 4), (0, 5)]
    """

    left: int | None = None
    """Keys seen before the diagonal; None: all of them."""
    right: int | None = None
    """Keys seen after the diagonal; None: all of them, 0: causal."""
    alignment: Alignment = "bottom-right"
    array: Shape | None = None
    """Shape of the boolean array (True: may be seen) that broadcasts to (..., heads, seqlen_q, seqlen_k)."""

    @property
    def has_band(self) -> bool:
        return self.left is not None or self.right is not None

    def band_width(self, seqlen_k: int) -> int | None:
        """The most keys that the band lets a row see; None if there is no band."""
        if not self.has_band:
            return None
        if self.left is None or self.right is None:
            return seqlen_k
        return min(seqlen_k, self.left + 1 + self.right)

    def offset(self, seqlen_q: int, seqlen_k: int) -> int:
        """The key on the diagonal of row 0."""
        return seqlen_k - seqlen_q if self.alignment == "bottom-right" else 0

    def visible_keys(self, row: int, seqlen_q: int, seqlen_k: int) -> Span:
        """The keys inside the band of query `row`."""
        diagonal = row + self.offset(seqlen_q, seqlen_k)
        start = 0 if self.left is None else max(0, diagonal - self.left)
        stop = seqlen_k if self.right is None else min(seqlen_k, diagonal + self.right + 1)
        return Span(start, stop)

    def touched(self, rows: Span, seqlen_q: int, seqlen_k: int) -> Span:
        """The keys that at least one of `rows` sees (the band is monotone, so they are one span)."""
        first = self.visible_keys(rows.start, seqlen_q, seqlen_k)
        last = self.visible_keys(rows.stop - 1, seqlen_q, seqlen_k)
        return Span(first.start, last.stop)

    def whole(self, rows: Span, seqlen_q: int, seqlen_k: int) -> Span:
        """The keys that every one of `rows` sees."""
        first = self.visible_keys(rows.start, seqlen_q, seqlen_k)
        last = self.visible_keys(rows.stop - 1, seqlen_q, seqlen_k)
        return Span(last.start, first.stop)

    def count_visible(self, seqlen_q: int, seqlen_k: int) -> int:
        """How many (query, key) pairs the band lets through."""
        if not self.has_band:
            return seqlen_q * seqlen_k
        offset = self.offset(seqlen_q, seqlen_k)

        def below(shift: int) -> int:
            """Sum over rows of min(seqlen_k, max(0, row + offset + shift)), in closed form."""
            first = min(seqlen_q, max(0, -(offset + shift)))  # rows before this one count nothing
            full = min(seqlen_q, max(first, seqlen_k - offset - shift))  # rows from here on count seqlen_k
            climbing = full - first
            return (
                climbing * (offset + shift)
                + (full * (full - 1) - first * (first - 1)) // 2
                + ((seqlen_q - full) * seqlen_k)
            )

        stops = seqlen_q * seqlen_k if self.right is None else below(self.right + 1)
        starts = 0 if self.left is None else below(-self.left)
        return max(0, stops - starts)


class Distances(NamedTuple):
    """Rows and keys that are some of a sequence's tokens, evenly spaced: ``|first + step * (row - key)|`` apart.

    However the mask is aligned.
    """

    first: int
    """Tokens from key 0 to row 0."""
    step: int
    """Tokens from each row to the next, and from each key."""


@dataclass(frozen=True, slots=True)
class ScoreEdits:
    """What happens to the score of a visible pair, in order: scale, softcap, ALiBi, bias; then sinks."""

    softmax_scale: float
    softcap: float = 0.0
    """``softcap * tanh(score / softcap)``; 0: off."""
    alibi_slopes: Shape | None = None
    """Shape (heads,) or (batch, heads): ``-slope * |diagonal - key|`` is added."""
    distances: Distances | None = None
    """What is in the place of ``|diagonal - key|`` there; None: nothing is."""
    bias: Shape | None = None
    """Shape of the added array, broadcasting to (..., heads, seqlen_q, seqlen_k)."""
    sinks: bool = False
    """One logit per head that joins the denominator and has no value."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where sequences, heads and keys lie in the caller's arrays."""

    axes: Axes
    """"bshd": (batch, seqlen, heads, head_dim); "bhsd": (..., heads, seqlen, head_dim);
    "thd": (tokens, heads, head_dim), cut into sequences by cu_seqlens."""
    page_size: int | None = None
    """Keys per page if k and v are (pages, page_size, heads, head_dim), found through a block_table."""
    cached: bool = False
    """k and v are a cache: how many of its keys are live, and where a sequence lies in it, is data."""
    seqlens: bool = False
    """How many rows and keys of each sequence there are is data, and the others are as if they were not there."""

    @property
    def ragged(self) -> bool:
        return self.axes == "thd"

    @property
    def lengths_are_data(self) -> bool:
        """How many keys a sequence has is not known before arrays are looked at."""
        return self.ragged or self.cached or self.seqlens


@dataclass(frozen=True)
class Sizes:
    """How many of everything.  In a ragged problem the seqlens are the longest ones."""

    batch_shape: Shape
    num_heads: int
    num_heads_k: int
    num_heads_v: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    total_q: int = 0
    """Rows of q in a ragged problem."""

    @cached_property
    def batch(self) -> int:
        return math.prod(self.batch_shape)

    @cached_property
    def queries_per_pair(self) -> int:
        """How many neighbouring query heads share both their key head and their value head."""
        per_k = self.num_heads // max(1, self.num_heads_k)
        per_v = self.num_heads // max(1, self.num_heads_v)
        return max(1, math.gcd(per_k, per_v))


@dataclass(frozen=True)
class Problem:
    """What is asked, without arrays."""

    sizes: Sizes
    layout: Layout
    dtype: str
    """Of q, k and v: one of FLOATS, or FLOAT8."""
    mask: Mask
    edits: ScoreEdits
    dropout_p: float = 0.0
    compute_dtype: str | None = None
    """Of the arithmetic; None: the device's own choice (float64 on the CPU)."""
    needs_lse: bool = False
    needs_dropout_mask: bool = field(default=False, repr=False)
    """flash-attn's S_dmask is wanted: the normalised weights, negative where dropout drops."""

    def __hash__(self) -> int:
        """Remembered: a problem is looked up at every call."""
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        """Without the hash: strings hash differently in every process."""
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}

    @cached_property
    def _hash(self) -> int:
        return hash((self.sizes, self.layout, self.dtype, self.mask, self.edits, self.dropout_p, self.compute_dtype))

    @property
    def offset(self) -> int:
        """The key on the diagonal of row 0, where lengths are not data."""
        return self.mask.offset(self.sizes.seqlen_q, self.sizes.seqlen_k)

    @cached_property
    def flops(self) -> int:
        """Floating-point operations of the two matrix products over the visible band.

        A ragged problem counts its longest lengths: the real ones are data.
        """
        sizes = self.sizes
        visible = self.mask.count_visible(sizes.seqlen_q, sizes.seqlen_k)
        return 2 * sizes.batch * sizes.num_heads * visible * (sizes.head_dim + sizes.head_dim_v)

    @cached_property
    def bytes(self) -> int:
        """Bytes that have to move at least once: q, k, v in, out (and lse) out; a broadcast batch counts in full."""
        sizes, item = self.sizes, ITEMSIZE[self.dtype]
        queries = sizes.batch * sizes.num_heads * sizes.seqlen_q
        keys = sizes.batch * sizes.seqlen_k
        moved = queries * (sizes.head_dim * item + sizes.head_dim_v * ITEMSIZE[self.out_dtype])
        moved += keys * (sizes.num_heads_k * sizes.head_dim + sizes.num_heads_v * sizes.head_dim_v) * item
        return moved + (queries * ITEMSIZE[self.lse_dtype] if self.needs_lse else 0)

    @property
    def out_dtype(self) -> str:
        """That of q, k and v; bfloat16 if that is FLOAT8, as flash-attn 3 has it."""
        return "bfloat16" if self.dtype == FLOAT8 else self.dtype

    @property
    def lse_dtype(self) -> str:
        return "float64" if self.dtype == "float64" else "float32"

    @cached_property
    def out_shape(self) -> Shape:
        """Shape of the output in the caller's layout."""
        s = self.sizes
        if self.layout.axes == "thd":
            return (s.total_q, s.num_heads, s.head_dim_v)
        if self.layout.axes == "bshd":
            return (*s.batch_shape, s.seqlen_q, s.num_heads, s.head_dim_v)
        return (*s.batch_shape, s.num_heads, s.seqlen_q, s.head_dim_v)

    @cached_property
    def lse_shape(self) -> Shape:
        """Shape of the log-sum-exp: (..., heads, seqlen_q), or (heads, total_q) if ragged."""
        s = self.sizes
        if self.layout.ragged:
            return (s.num_heads, s.total_q)
        return (*s.batch_shape, s.num_heads, s.seqlen_q)

    @cached_property
    def state(self) -> dict[str, Spec]:
        """Shape and dtype of out and lse, which together are what gradients can be computed from."""
        return {
            "out": Spec("out", self.out_shape, self.out_dtype),
            "lse": Spec("lse", self.lse_shape, self.lse_dtype),
        }

    @cached_property
    def results(self) -> dict[str, Spec]:
        """Shape and dtype of each result, by name."""
        results = {name: spec for name, spec in self.state.items() if name == "out" or self.needs_lse}
        if self.needs_dropout_mask:
            sizes = self.sizes
            shape = (sizes.batch, sizes.num_heads, sizes.seqlen_q, sizes.seqlen_k)
            results["dropout_mask"] = Spec("S_dmask", shape, self.out_dtype)
        return results


@dataclass(frozen=True, slots=True)
class Device:
    """What the planner knows of a place to work."""

    name: str
    kind: Literal["cpu", "cuda"]
    num_units: int = 1
    """Threads of a CPU, streaming multiprocessors of a GPU."""
    compute_capability: tuple[int, int] | None = None
    shared_memory: int = 0
    """Bytes of shared memory one thread block may use."""
    tensor_maps: bool = True
    """Whether the driver can be asked to encode tensor maps, which the Hopper kernel needs."""


NAMED_DEVICES = {
    device.name: device
    for device in (
        Device("A100", "cuda", 108, (8, 0), 163 * 1024),
        Device("A10", "cuda", 72, (8, 6), 99 * 1024),
        Device("RTX3090", "cuda", 82, (8, 6), 99 * 1024),
        Device("L4", "cuda", 58, (8, 9), 99 * 1024),
        Device("L40S", "cuda", 142, (8, 9), 99 * 1024),
        Device("RTX4090", "cuda", 128, (8, 9), 99 * 1024),
        Device("H100", "cuda", 132, (9, 0), 227 * 1024),
        Device("H200", "cuda", 132, (9, 0), 227 * 1024),
        Device("B200", "cuda", 148, (10, 0), 227 * 1024),
        Device("RTX5090", "cuda", 170, (12, 0), 99 * 1024),
        Device("T4", "cuda", 40, (7, 5), 64 * 1024),
        Device("V100", "cuda", 80, (7, 0), 96 * 1024),
    )
}
"""GPUs `explain` can plan for without having one."""
