"""`explain`: what ranks would compute and send, as a value; nothing is computed, and nobody has to be there."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, NamedTuple, TypeAlias

from cupyattn import reading
from cupyattn.allowed import allowed_by
from cupyattn.corridor import plan_for, plan_for_gradients
from cupyattn.distributed.asked import (
    batch_of_one,
    check_alignment,
    check_rank,
    layout_of,
    rows_everywhere,
    sharding_meant,
)
from cupyattn.distributed.rectangles import Band, rectangles_of, shifts_of
from cupyattn.distributed.route import Route, count, route_of
from cupyattn.distributed.sharding import Kind, Sharding
from cupyattn.problem import FLOATS, ITEMSIZE, Alignment, Device, Problem, Shape, Sizes, Spec
from cupyattn.reading import attention_options, read, refusal
from cupyattn.rehearsing import check_device, device_meant

By: TypeAlias = Literal["ring", "ulysses", "decode"]


@dataclass(frozen=True)
class DistributedPlan:
    """What ranks would do.  Prints itself."""

    by: By
    sharding: Sharding
    """Of the keys."""
    flops: tuple[int, ...]
    """Of each rank's two matrix products, five where there are gradients."""
    bytes_sent: tuple[tuple[int, ...], ...]
    """Of each rank, at each step: those of a ring, or the exchanges one after the other.  What ranks agree by before
    they begin, some hundred bytes to each other one, is not counted."""
    device: str = "cpu"
    """What each rank's arrays are on."""
    forward_again: str = ""
    """Why gradients begin with the forward pass, which is then part of the numbers above; empty where they do not."""

    @property
    def balance(self) -> float:
        """The busiest rank's work over the mean; 1 is the best."""
        return max(self.flops) * len(self.flops) / max(1, sum(self.flops))

    def __str__(self) -> str:
        kind, size, lengths = self.sharding.kind, self.sharding.size, self.sharding.seqlens
        keys = f"{lengths[0]} keys" if len(lengths) == 1 else f"{len(lengths)} sequences, {sum(lengths)} keys"
        lines = [f"{self.by} on {size} ranks, {kind}, {keys}"]
        lines += [] if self.device == "cpu" else [f"device: {self.device}"]
        lines.append("rank   flops      bytes sent, step by step")
        for rank, (flops, steps) in enumerate(zip(self.flops, self.bytes_sent, strict=True)):
            shown = [*map(str, steps[:8]), "..."] if len(steps) > 8 else map(str, steps)
            lines.append(f"{rank:<6} {flops:<10.3g} {sum(steps)} = {' + '.join(shown)}")
        lines.append(f"balance: the busiest rank has {self.balance:.3f} of the mean")
        lines += [f"the forward pass again, and then gradients: {self.forward_again}"] if self.forward_again else []
        return "\n".join(lines)


def explain(
    q: Sequence[int],
    k: Sequence[int],
    v: Sequence[int],
    *,
    size: int,
    by: By = "ring",
    sharding: Sharding | Kind | None = None,
    seqlens_q: Sequence[int] | None = None,
    dtype: str = "float32",
    device: str | None = None,
    layout: Literal["bshd", "bhsd"] = "bshd",
    causal: bool = False,
    alignment: Alignment | None = None,
    window_size: tuple[int | None, int | None] = (None, None),
    mask: Sequence[int] | None = None,
    bias: Sequence[int] | None = None,
    alibi_slopes: Sequence[int] | None = None,
    compute_dtype: Any = None,
    backward: bool = False,
) -> DistributedPlan:
    """What each rank would compute and send for a call, or for its gradients.

    Parameters
    ----------
    q, k, v : tuple of int
        Shapes of the whole: of all ranks' tokens together.
    size : int
        How many ranks.
    by : {"ring", "ulysses", "decode"}
        `ring_attention`, `ulysses_attention` or `sharded_decode`.
    sharding : Sharding or {"zigzag", "contiguous", "striped"}, optional
        Whose tokens are where.  Default: that of the function.
    seqlens_q : tuple of int, optional
        As for `sharded_decode`: how many queries each packed sequence has.
    dtype : str
        Of the arrays.
    device : str, optional
        "cpu", or a GPU by its name, as for `cupyattn.explain`: what each rank's arrays are on.  Default: the CPU.
    layout, causal, alignment, window_size, compute_dtype
        As for `attention`.
    mask, bias, alibi_slopes : tuple of int, optional
        Shapes of the whole as well.  A bias is taken to be of `dtype`.
    backward : bool
        The gradients instead, by the function's ``_backward``, which is given out and lse.

    Returns
    -------
    DistributedPlan
        Prints itself.

    Raises
    ------
    TypeError, ValueError
        As the functions would.
    NotImplementedError
        No kernel of `device` takes the problem; the message lists each kernel's objections.

    Notes
    -----
    Masks and biases are sent by `ulysses_attention` alone, and gradients of biases by it and by `sharded_decode`, which
    adds up over ranks those of q, bias and slopes.  In rings they stay where they are.

    On the CPU out and lse are of use to gradients where they are in the dtype of the arithmetic, by default float64.
    Where they were rounded, the forward pass comes first, with all that it sends; the plan has it as the first half of
    its steps, and says why.  torch's autograd, which keeps them as they were before they were rounded, has the second
    half alone.

    On GPUs states and gradients travel in float32, and what `ulysses_attention` exchanges besides in the dtype of the
    arrays; on the CPU states do in float64, and gradients in the dtype of the arithmetic.  A sum over ranks, which the
    gradients of `sharded_decode` end with, is counted as one message to each other rank; that of `NcclComm` is NCCL's
    own, which may send less.

    Examples
    --------
    >>> from cupyattn.distributed import explain
    >>> shape = (1, 8192, 32, 128), (1, 8192, 8, 128), (1, 8192, 8, 128)
    >>> print(explain(*shape, size=2, causal=True, dtype="bfloat16"))
    ring on 2 ranks, zigzag, 8192 keys
    rank   flops      bytes sent, step by step
    0      2.75e+11   8388608 = 8388608 + 0
    1      2.75e+11   16777216 = 16777216 + 0
    balance: the busiest rank has 1.000 of the mean
    >>> explain(*shape, size=8, causal=True, sharding="contiguous").balance > 1.8
    True
    >>> call = {"size": 2, "causal": True, "dtype": "bfloat16", "backward": True}
    >>> [sum(explain(*shape, **call, device=device).bytes_sent[0]) for device in ("cpu", "H100")]
    [83886080, 41943040]
    """
    function = "explain"
    reading.choice(function, "by", by, ("ring", "ulysses", "decode"))
    size = reading.integer(function, "size", size, low=1, high=2**20)
    backward = reading.flag(function, "backward", backward)
    options = attention_options(
        function, layout, causal, alignment, window_size, None, 0.0, 0.0, compute_dtype, return_lse=True
    )
    if sharding is None and by != "ring":
        sharding = "contiguous"
    meant = sharding_meant(function, sharding, options, size)
    kind = reading.dtype_name(dtype)
    if kind not in FLOATS:
        rule = f"dtype has to be one of {', '.join(FLOATS)}"
        raise (ValueError if isinstance(dtype, str) else TypeError)(refusal(function, rule, ("dtype", repr(dtype))))
    check_device(function, device)
    given = {"q": q, "k": k, "v": v, "mask": mask, "bias": bias, "alibi_slopes": alibi_slopes}
    shapes = {
        word: _shape(function, word, shape) for word, shape in given.items() if shape is not None or word in "qkv"
    }
    dtypes = {"mask": "bool", "alibi_slopes": "float32"}
    specs = {word: Spec(word, shape, dtypes.get(word, kind)) for word, shape in shapes.items()}
    packed = isinstance(meant, Sharding) and len(shapes["q"]) == 3
    check_rank(function, specs, packed, meant, options.axes)
    if isinstance(meant, Sharding) and packed:
        specs = batch_of_one(function, specs, meant)
    problem = read(function, tuple(specs.items()), options)
    rows, keys = _layouts(function, by, meant, seqlens_q, size, problem.sizes, packed)
    check_alignment(function, options, "alibi_slopes" in shapes, rows, keys)
    band = Band(options.window[0], 0 if options.causal else options.window[1], problem.mask.alignment == "bottom-right")
    there = device_meant(device, None)
    if there.kind == "cuda":
        (plan_for_gradients if backward else plan_for)(function, problem, there, allowed_by(function, None))
    again = _why_again(problem, there) if backward else ""
    calls = [
        _Call(problem, rows, keys, band, size, of_gradients, widths_of(problem, there), shapes)
        for of_gradients in ((False, True) if again else (backward,))
    ]
    flops, sent = _together([{"ring": x.ring, "ulysses": x.ulysses, "decode": x.decode}[by]() for x in calls])
    return DistributedPlan(by, keys, flops, sent, there.name, again)


def _together(counts: list[Counts]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """What is done one after the other: flops of each rank, and all its steps."""
    flops, sent = zip(*counts, strict=True)
    return tuple(map(sum, zip(*flops, strict=True))), tuple(tuple(chain(*x)) for x in zip(*sent, strict=True))


def _layouts(
    function: str, by: By, meant: Sharding | str, seqlens_q: Any, size: int, sizes: Sizes, packed: bool
) -> tuple[Sharding, Sharding]:
    """Of rows and of keys."""
    rows, keys = (layout_of(meant, size, count) for count in (sizes.seqlen_q, sizes.seqlen_k))
    if by == "decode":
        rows = rows_everywhere(function, seqlens_q, sizes.seqlen_q, keys, packed)
    elif seqlens_q is not None:
        rule = "seqlens_q goes with by='decode'; elsewhere packed sequences have as many queries as keys"
        raise ValueError(refusal(function, rule, ("seqlens_q", reprlib.repr(seqlens_q)), ("by", by)))
    if sum(keys.seqlens) != sizes.seqlen_k or sum(rows.seqlens) != sizes.seqlen_q:
        rule = "sharding has to be of as many tokens as there are"
        raise ValueError(refusal(function, rule, ("sharding", keys), ("q", sizes.seqlen_q), ("k", sizes.seqlen_k)))
    return rows, keys


def _why_again(problem: Problem, device: Device) -> str:
    """Why gradients on the CPU make nothing of out and lse, as `run_backward` has it; empty if they do."""
    arithmetic = problem.compute_dtype or "float64"
    if device.kind != "cpu" or problem.dtype == arithmetic:
        return ""
    return f"out and lse were rounded to {problem.out_dtype} and {problem.lse_dtype}, and are wanted in {arithmetic}"


def _shape(function: str, name: str, shape: Any) -> Shape:
    if not isinstance(shape, (tuple, list)):
        rule = f"{name} has to be a shape, of the whole"
        raise TypeError(refusal(function, rule, (name, repr(shape), type(shape).__name__)))
    return reading.integers(function, name, shape)


class Widths(NamedTuple):
    """Bytes of a number that travels."""

    operand: int
    """Of q, k and v, as the caller has them."""
    known: int
    """Of the same where their gradients are wanted, and of out and dout, on the way to who attends these heads."""
    total: int
    """Of gradients, and of lse on the way to them."""
    state: int
    """Of what is merged, and of lse on the way back from who attends these heads."""
    out: int
    """Of out on the way back from there."""


def widths_of(problem: Problem, device: Device) -> Widths:
    """What `Work`, or on a GPU `GpuWork`, makes of a problem's numbers before they are sent."""
    item = ITEMSIZE[problem.dtype]
    if device.kind == "cuda":
        float32 = ITEMSIZE["float32"]
        return Widths(operand=item, known=item, total=float32, state=float32, out=ITEMSIZE[problem.out_dtype])
    wide, float64 = ITEMSIZE[problem.compute_dtype or "float64"], ITEMSIZE["float64"]
    return Widths(operand=item, known=wide, total=wide, state=float64, out=float64)


Counts: TypeAlias = tuple[list[int], list[list[int]]]


@dataclass
class _Call:
    """What is counted."""

    problem: Problem
    rows: Sharding
    keys: Sharding
    band: Band
    size: int
    backward: bool
    widths: Widths
    shapes: Mapping[str, Shape]
    """Of the whole arrays, and of what edits the scores."""

    def __post_init__(self) -> None:
        sizes = self.problem.sizes
        self.of_a_key = sizes.batch * (sizes.num_heads_k * sizes.head_dim + sizes.num_heads_v * sizes.head_dim_v)
        self.of_a_pair = 2 * sizes.batch * (sizes.head_dim + sizes.head_dim_v)
        if self.backward:
            self.of_a_pair = self.of_a_pair * 5 // 2

    def ring(self) -> Counts:
        route = route_of(self.rows, self.keys, self.band)
        heads = self.problem.sizes.num_heads
        flops = [self.of_a_pair * heads * route.pairs(rank) for rank in range(self.size)]
        sent = [[self._of_ring(route, rank, step) for step in range(self.size)] for rank in range(self.size)]
        return flops, sent

    def _of_ring(self, route: Route, rank: int, step: int) -> int:
        found = self.of_a_key * self.widths.operand * route.keys_sent(rank, step)
        if self.backward and step:
            found += self.of_a_key * self.widths.total * count(route.seen_keys(rank, route.owner(rank, step)))
        return found

    def ulysses(self) -> Counts:
        route = route_of(self.rows, self.keys, self.band)
        pairs = sum(map(route.pairs, range(self.size)))
        flops = [self.of_a_pair * len(self._heads(rank)) * pairs for rank in range(self.size)]
        heads = [self._of_heads(rank) + self._of_edits(rank) for rank in range(self.size)]
        tokens = [self._of_tokens(rank) + (self._of_bias(rank) if self.backward else 0) for rank in range(self.size)]
        return flops, [list(of_rank) for of_rank in zip(heads, tokens, strict=True)]

    def _heads(self, rank: int) -> range:
        """Query heads that a rank attends."""
        count, size = self.problem.sizes.num_heads, self.size
        return range(rank * count // size, (rank + 1) * count // size)

    def _used(self, rank: int, num_heads_kv: int) -> int:
        """How many key heads these use."""
        group = self.problem.sizes.num_heads // max(1, num_heads_kv)
        return len({head // group for head in self._heads(rank)})

    def _of_heads(self, rank: int) -> int:
        """Of a rank's own tokens: to others, their heads."""
        sizes, widths = self.problem.sizes, self.widths
        others = [other for other in range(self.size) if other != rank]
        own, own_keys = self.rows.length(rank), self.keys.length(rank)
        query_heads = sum(len(self._heads(other)) for other in others)
        of_k, of_v = (sum(self._used(x, n) for x in others) for n in (sizes.num_heads_k, sizes.num_heads_v))
        numbers = own * query_heads * sizes.head_dim + own_keys * (of_k * sizes.head_dim + of_v * sizes.head_dim_v)
        if not self.backward:
            return sizes.batch * widths.operand * numbers
        of_out, of_lse = own * query_heads * 2 * sizes.head_dim_v, own * query_heads  # out and dout
        return sizes.batch * (widths.known * (numbers + of_out) + widths.total * of_lse)

    def _of_tokens(self, rank: int) -> int:
        """Of a rank's own heads: to others, what was found for their tokens."""
        sizes, widths = self.problem.sizes, self.widths
        rows, keys = (sum(x.seqlens) - x.length(rank) for x in (self.rows, self.keys))
        query_heads = len(self._heads(rank))
        if not self.backward:
            return sizes.batch * rows * query_heads * (sizes.head_dim_v * widths.out + widths.state)
        of_k, of_v = (self._used(rank, n) for n in (sizes.num_heads_k, sizes.num_heads_v))
        of_keys = keys * (of_k * sizes.head_dim + of_v * sizes.head_dim_v)
        return sizes.batch * widths.total * (rows * query_heads * sizes.head_dim + of_keys)

    def _edit(self, name: str) -> tuple[int, bool, int] | None:
        """Of a mask or bias that is of ranks' own rows: batch, whether heads have their own, keys; else it stays."""
        shape = self.shapes.get(name)
        if shape is None:
            return None
        batch, heads, rows, keys = (1,) * (4 - len(shape)) + shape
        if rows == 1 and any(self.rows.length(rank) != 1 for rank in range(self.size)):
            return None
        return batch, heads > 1, keys

    def _of_edits(self, rank: int) -> int:
        """Of masks and biases of a rank's own rows: to others, what edits their heads."""
        found, others = 0, [other for other in range(self.size) if other != rank]
        for name, width in (("mask", 1), ("bias", self.widths.operand)):
            edit = self._edit(name)
            if edit is not None:
                batch, of_heads, keys = edit
                heads = sum(len(self._heads(other)) if of_heads else 1 for other in others)
                found += batch * heads * self.rows.length(rank) * keys * width
        return found

    def _of_bias(self, rank: int) -> int:
        """Of its gradient for a rank's own heads: to others, that of their rows."""
        edit = self._edit("bias")
        if edit is None:
            return 0
        batch, of_heads, keys = edit
        rows = sum(self.rows.seqlens) - self.rows.length(rank)
        return batch * (len(self._heads(rank)) if of_heads else 1) * rows * keys * self.widths.total

    def decode(self) -> Counts:
        sizes = self.problem.sizes
        shifts = shifts_of(self.rows, self.keys, self.band)
        pairs = [
            sum(x.count_visible for x in rectangles_of(self.rows.pieces[0], pieces, shifts, self.band))
            for pieces in self.keys.pieces
        ]
        flops = [self.of_a_pair * sizes.num_heads * count for count in pairs]
        if self.backward:
            summed = [math.prod(self.shapes[name]) for name in ("q", "bias", "alibi_slopes") if name in self.shapes]
            messages = [count * self.widths.total for count in summed]
        else:
            rows = sizes.batch * sizes.num_heads * sizes.seqlen_q
            messages = [rows * (sizes.head_dim_v + 1) * self.widths.state]
        return flops, [[(self.size - 1) * message for message in messages] for _ in range(self.size)]
