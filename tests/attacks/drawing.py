"""What a case of the fuzzer is made of: sizes, numbers, memory layouts and options, all of them from its seed."""

from dataclasses import dataclass

import numpy as np
from attacks.witness import ARITHMETIC, BFLOAT16, DTYPES, FLOAT32, INF, NAN

# ---------------------------------------------------------------------------------------------------
# What is drawn
# ---------------------------------------------------------------------------------------------------

EDGES = (63, 64, 65, 127, 128, 129, 255, 256, 257, 383, 384, 385, 511, 512, 513, 600)


class Draw:
    """A case's choices, all of them from its seed."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.is_large = self.chance(0.02)
        self.room = 200_000
        self.dtype = self.one(*DTYPES)
        self.errstate = self.one("raise", "warn", "ignore", "warn")
        self.tame = self.chance(0.4)
        """Normal numbers only, so that every element is compared closely."""

    def chance(self, probability):
        return self.rng.random() < probability

    def one(self, *choices):
        return choices[int(self.rng.integers(len(choices)))]

    def upto(self, most, least=0):
        return int(self.rng.integers(least, most + 1))

    def length(self):
        if self.is_large:  # of one sequence, or a product of two: the oracle is dense
            size = min(self.room, self.one(*EDGES, self.upto(600), self.upto(9)))
            self.room //= max(1, size)
            return size
        kind = self.upto(19)
        return 0 if kind == 0 else 1 if kind < 3 else self.upto(40) if kind < 6 else self.upto(9, 1)

    def few(self, most):
        """A size of another axis: a batch, heads or features; seldom none."""
        return 0 if self.chance(0.02) else self.upto(1 if self.is_large and most < 8 else most, 1)

    def heads(self):
        """(num_heads, num_heads_k, num_heads_v)."""
        heads = self.one(1, 2) if self.is_large else self.few(6)
        divisors = [n for n in range(1, heads + 1) if heads % n == 0] or [0]
        kv = self.one(*divisors)
        return heads, kv, (self.one(*divisors) if self.chance(0.1) else kv)

    def floats(self, *shape, dtype=None, plain=0.7):
        """Numbers of a dtype, plain or of any kind there is, not yet laid out."""
        dtype = self.dtype if dtype is None else dtype
        with np.errstate(all="ignore"):
            x = self.rng.standard_normal(shape)
            if not (self.tame or self.chance(plain)):
                x = self._odd(x)
            x = x.astype(dtype)
        if x.size and x.ndim and self.chance(0.05):  # steps of zero
            axis = self.upto(x.ndim - 1)
            return np.broadcast_to(x.take([0], axis), shape)
        return x

    def _odd(self, x):
        kind = self.upto(11)
        if kind < 3:
            return x * (30.0, 1e4, 1e-3)[kind]
        if kind == 3:
            return x * 0.0  # with zeros of both signs
        if kind == 4:
            return np.broadcast_to(x[..., :1], x.shape) if x.ndim and x.size else x
        if kind == 5:
            return x * self.one(5e-324, 1e-310, 1e-300, 1e-45, 1e-39, 6e-8)
        if kind == 6:
            return x * self.one(1e300, 1e150, 1e38, 1e20, 6e4)
        if kind == 7:
            return np.rint(x)
        x = x.copy()
        for _ in range(self.upto(2, 1) if x.size else 0):
            x.reshape(-1)[self.upto(x.size - 1)] = self.one(NAN, INF, -INF, 1e300, -1e300, 5e-324, -0.0)
        return x

    def laid(self, x, writable=False):
        """The same numbers in memory of another kind."""
        kind = self.upto(13)
        if writable:
            x = x.copy()
        elif 0 in x.strides and x.size > 1:
            return x
        if kind == 0:
            x = np.asfortranarray(x)
        elif kind == 1 and x.ndim:
            axis = self.upto(x.ndim - 1)
            x = np.flip(np.flip(x, axis).copy(), axis)
        elif kind == 2 and x.ndim:
            axis = self.upto(x.ndim - 1)
            twice = np.repeat(x, 2, axis)
            x = twice[tuple(slice(None, None, 2) if i == axis else slice(None) for i in range(x.ndim))]
        elif kind == 3 and x.size:
            memory = bytearray(b"?" + x.tobytes())
            x = np.frombuffer(memory, x.dtype, offset=1).reshape(x.shape)
        elif kind == 4 and x.dtype != BFLOAT16:
            x = x.astype(x.dtype.newbyteorder())
        elif kind == 5 and x.ndim > 1:
            order = self.rng.permutation(x.ndim)
            x = x.transpose(order).copy().transpose(np.argsort(order))
        else:
            x = x.copy()
        if not writable and self.chance(0.15):
            x.flags.writeable = False
        return x

    def compute(self):
        """(compute_dtype as said, the arithmetic that it means)."""
        said = self.one(None, None, None, "float64", np.float64, "float32", np.dtype("float32"))
        return said, ARITHMETIC["float32" if said is not None and np.dtype(said) == np.float32 else "float64"]

    def number(self, value):
        """A number as somebody may write it."""
        kind = self.upto(9)
        return np.float64(value) if kind == 0 else np.array(value) if kind == 1 else float(value)


def band(rows, keys, left, right, diagonal):
    distance = np.arange(keys) - (np.arange(rows)[:, None] + diagonal)
    seen = np.ones((rows, keys), bool)
    if left is not None:
        seen &= distance >= -left
    if right is not None:
        seen &= distance <= right
    return seen, np.abs(distance).astype(np.float64)


@dataclass
class Edits:
    """Options that most functions have: as they are given, and as the oracle takes them."""

    arguments: dict
    fields: dict
    left: int | None = None
    right: int | None = None

    def fields_for(self, rows, keys, bottom_right, sequence=None):
        """For one sequence's lengths."""
        seen, distance = band(rows, keys, self.left, self.right, keys - rows if bottom_right else 0)
        fields = {**self.fields, "seen": seen, "distance": distance}
        if sequence is not None and fields.get("slopes") is not None and fields["slopes"].ndim == 2:
            fields["slopes"] = fields["slopes"][sequence]
        return fields


def draw_edits(
    d, heads, head_dim, batch=1, names=("causal", "window_size", "softmax_scale", "softcap", "alibi_slopes")
):
    said, arithmetic = d.compute()
    edits = Edits({}, {"scale": head_dim**-0.5 if head_dim else 1.0, "arithmetic": arithmetic})
    if said is not None:
        edits.arguments["compute_dtype"] = said
    if "softmax_scale" in names and d.chance(0.3):
        scale = d.one(0.0, 1.0, -0.5, 0.1, 30.0) if d.tame else d.one(0.0, -1.0, 1e-30, 1e-300, 1e30, 1e4, -3.0)
        edits.arguments["softmax_scale"], edits.fields["scale"] = d.number(scale), scale
    if "softcap" in names and d.chance(0.2):
        cap = d.one(0.0, 0.5, 5.0, 30.0) if d.tame else d.one(1e-3, 1e4, 1e-30, 1e30, 2.0)
        edits.arguments["softcap"], edits.fields["softcap"] = d.number(cap), cap
    numbers = np.abs([edits.fields["scale"], edits.fields.get("softcap", 0.0)])
    if ((numbers > 0) & ((numbers > FLOAT32.max) | (numbers < FLOAT32.tiny))).any():
        arithmetic = edits.fields["arithmetic"] = ARITHMETIC["float64"]  # the plan's note says so
    if "window_size" in names and d.chance(0.3):
        window = tuple(d.one(None, -1, 0, 1, 2, 5, 70, 2**31 - 1) for _ in range(2))
        edits.arguments["window_size"] = d.one(window, list(window))
        edits.left, edits.right = (None if side == -1 else side for side in window)
    if "causal" in names and d.chance(0.4):
        edits.arguments["causal"], edits.right = True, 0
    if "alibi_slopes" in names and d.chance(0.15):
        slopes = d.floats(*d.one((heads,), (batch, heads)), dtype=d.one(*DTYPES))
        edits.arguments["alibi_slopes"] = d.laid(slopes)
        edits.fields["slopes"] = arithmetic.read(slopes)
    if "sinks" in names and d.chance(0.2):
        sinks = d.floats(heads, dtype=d.one(*DTYPES)).copy()
        if heads and d.chance(0.3):
            sinks[d.upto(heads - 1)] = d.one(INF, -INF, 100.0)
        edits.arguments["sinks"], edits.fields["sinks"] = d.laid(sinks), arithmetic.read(sinks)
    return edits
