"""`explain`: what ranks would compute and send, as a value; nothing is computed, and nobody has to be there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from cupyattn import reading
from cupyattn.distributed.asked import layout_of, sharding_meant
from cupyattn.distributed.rectangles import Band, rectangles_of
from cupyattn.distributed.route import Route, count, route_of
from cupyattn.distributed.sharding import Kind, Sharding
from cupyattn.problem import FLOATS, ITEMSIZE, Alignment, Problem, Shape, Spec
from cupyattn.reading import attention_options, read, refusal

By: TypeAlias = Literal["ring", "ulysses", "decode"]
STATE = 8
"""Bytes of a number of a state that has not been rounded, which is float64."""


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

    @property
    def balance(self) -> float:
        """The busiest rank's work over the mean; 1 is the best."""
        return max(self.flops) * len(self.flops) / max(1, sum(self.flops))

    def __str__(self) -> str:
        kind, size, lengths = self.sharding.kind, self.sharding.size, self.sharding.seqlens
        keys = f"{lengths[0]} keys" if len(lengths) == 1 else f"{len(lengths)} sequences, {sum(lengths)} keys"
        lines = [f"{self.by} on {size} ranks, {kind}, {keys}", "rank   flops      bytes sent, step by step"]
        for rank, (flops, steps) in enumerate(zip(self.flops, self.bytes_sent, strict=True)):
            shown = [*map(str, steps[:8]), "..."] if len(steps) > 8 else map(str, steps)
            lines.append(f"{rank:<6} {flops:<10.3g} {sum(steps)} = {' + '.join(shown)}")
        return "\n".join([*lines, f"balance: the busiest rank has {self.balance:.3f} of the mean"])


def explain(
    q: Sequence[int],
    k: Sequence[int],
    v: Sequence[int],
    *,
    size: int,
    by: By = "ring",
    sharding: Sharding | Kind | None = None,
    dtype: str = "float32",
    layout: Literal["bshd", "bhsd"] = "bshd",
    causal: bool = False,
    alignment: Alignment | None = None,
    window_size: tuple[int | None, int | None] = (None, None),
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
    dtype : str
        Of the arrays.
    layout, causal, alignment, window_size, compute_dtype
        As for `attention`.
    backward : bool
        The gradients instead, where out and lse are known.

    Returns
    -------
    DistributedPlan
        Prints itself.

    Raises
    ------
    TypeError, ValueError
        As the functions would.

    Notes
    -----
    Masks and biases, which stay where they are but for `ulysses_attention`, are not counted.

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
    """
    function = "explain"
    reading.choice(function, "by", by, ("ring", "ulysses", "decode"))
    size = reading.integer(function, "size", size, low=1, high=2**20)
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
    shapes = {word: _shape(function, word, shape) for word, shape in (("q", q), ("k", k), ("v", v))}
    packed = isinstance(meant, Sharding) and len(shapes["q"]) == 3
    lead: Shape = (1,) if packed else ()
    specs = {word: Spec(word, (*lead, *shape), kind) for word, shape in shapes.items()}
    problem = read(function, tuple(specs.items()), options)
    sizes = problem.sizes
    keys = layout_of(meant, size, sizes.seqlen_k)
    rows = keys if packed else layout_of(meant, size, sizes.seqlen_q)
    if sum(keys.seqlens) != sizes.seqlen_k or sum(rows.seqlens) != sizes.seqlen_q:
        rule = "sharding has to be of as many tokens as there are"
        raise ValueError(refusal(function, rule, ("sharding", keys), *shapes.items()))
    band = Band(options.window[0], 0 if options.causal else options.window[1], problem.mask.alignment == "bottom-right")
    call = _Call(problem, rows, keys, band, size, reading.flag(function, "backward", backward))
    flops, sent = {"ring": call.ring, "ulysses": call.ulysses, "decode": call.decode}[by]()
    return DistributedPlan(by, keys, tuple(flops), tuple(map(tuple, sent)))


def _shape(function: str, name: str, shape: Any) -> Shape:
    if not isinstance(shape, (tuple, list)):
        rule = f"{name} has to be a shape, of the whole"
        raise TypeError(refusal(function, rule, (name, repr(shape), type(shape).__name__)))
    return reading.integers(function, name, shape)


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

    def __post_init__(self) -> None:
        sizes = self.problem.sizes
        self.item = ITEMSIZE[self.problem.dtype]
        self.wide = ITEMSIZE[self.problem.compute_dtype or "float64"]
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
        found = self.of_a_key * self.item * route.keys_sent(rank, step)
        if self.backward and step:
            found += self.of_a_key * self.wide * count(route.seen_keys(rank, route.owner(rank, step)))
        return found

    def ulysses(self) -> Counts:
        route = route_of(self.rows, self.keys, self.band)
        pairs = sum(map(route.pairs, range(self.size)))
        sizes, size = self.problem.sizes, self.size
        heads = [range(rank * sizes.num_heads // size, (rank + 1) * sizes.num_heads // size) for rank in range(size)]

        def used(rank: int, num_heads_kv: int) -> int:
            group = sizes.num_heads // max(1, num_heads_kv)
            return len({head // group for head in heads[rank]})

        flops = [self.of_a_pair * len(mine) * pairs for mine in heads]
        sent = []
        for rank in range(size):
            others = [other for other in range(size) if other != rank]
            own, own_keys = self.rows.length(rank), self.keys.length(rank)
            others_rows, others_keys = sum(self.rows.seqlens) - own, sum(self.keys.seqlens) - own_keys
            query_heads = sum(len(heads[other]) for other in others)
            of_k, of_v = (sum(used(x, n) for x in others) for n in (sizes.num_heads_k, sizes.num_heads_v))
            item = self.wide if self.backward else self.item
            going = sizes.batch * item * (
                own * query_heads * sizes.head_dim + own_keys * (of_k * sizes.head_dim + of_v * sizes.head_dim_v)
            )  # fmt: skip
            if not self.backward:
                back = sizes.batch * others_rows * len(heads[rank]) * (sizes.head_dim_v + 1) * STATE
                sent.append([going, back])
                continue
            going += sizes.batch * item * own * query_heads * (2 * sizes.head_dim_v + 1)
            mine_k, mine_v = (used(rank, n) for n in (sizes.num_heads_k, sizes.num_heads_v))
            back = sizes.batch * item * (
                others_rows * len(heads[rank]) * sizes.head_dim
                + others_keys * (mine_k * sizes.head_dim + mine_v * sizes.head_dim_v)
            )  # fmt: skip
            sent.append([going, back])
        return flops, sent

    def decode(self) -> Counts:
        sizes = self.problem.sizes
        whole = Sharding("contiguous", 1, (sizes.seqlen_q,))
        shifts = (self.band.shift(sizes.seqlen_q, sizes.seqlen_k),)
        pairs = [
            sum(x.count_visible for x in rectangles_of(whole.pieces[0], pieces, shifts, self.band))
            for pieces in self.keys.pieces
        ]
        rows = sizes.batch * sizes.num_heads * sizes.seqlen_q
        message = rows * sizes.head_dim * self.wide if self.backward else rows * (sizes.head_dim_v + 1) * STATE
        flops = [self.of_a_pair * sizes.num_heads * count for count in pairs]
        return flops, [[(self.size - 1) * message] for _ in range(self.size)]
