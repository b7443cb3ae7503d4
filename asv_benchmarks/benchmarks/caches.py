"""KV caches on the CPU: what appending costs, and what pages cost and save.

One layer, eight heads of size 64, float32.  Less is better everywhere.
"""

import numpy as np

import cupyattn

from .common import HEAD_DIM, HEADS, Benchmark, fastest, named, tracked

APPENDS = 4096
PAGE_SIZE = 64


class Concatenated:
    """What a decoder without a cache does."""

    def __init__(self):
        self.k = self.v = None

    def append(self, k, v):
        self.k = k if self.k is None else np.concatenate([self.k, k], axis=1)
        self.v = v if self.v is None else np.concatenate([self.v, v], axis=1)


CACHES = {
    "dynamic": lambda: cupyattn.DynamicCache(),
    "static": lambda: cupyattn.StaticCache(APPENDS),
    "sliding": lambda: cupyattn.SlidingWindowCache(256),
    "paged": lambda: cupyattn.PagedCache(APPENDS // PAGE_SIZE, PAGE_SIZE),
    "offloaded": lambda: cupyattn.OffloadedCache(),
    "concatenate": Concatenated,
}


def draw(batch, seqlen):
    """Standard normal tokens, for k and v alike."""
    return np.random.default_rng(seqlen).standard_normal((batch, seqlen, HEADS, HEAD_DIM), np.float32)


def appending(contender, count):
    """A call that appends one token at a time to a new cache."""
    token = draw(1, 1)

    def append_all():
        cache = CACHES[contender]()
        for _ in range(count):
            cache.append(token, token)

    return append_all


class Appends(Benchmark):
    """Time of 512 appends of one token to a new cache."""

    params = (list(CACHES),)
    param_names = ("contender",)
    rounds, repeat, warmup_time = 1, (3, 7, 5.0), 0.2

    def setup(self, contender):
        self.call = appending(contender, 512)

    @named("Caches: time of 512 appends")
    def time_appends(self, contender):
        self.call()


class Growth(Benchmark):
    """Time of 4096 appends of one token, over that of a cache whose memory was asked for once."""

    params = (["dynamic", "sliding", "paged", "offloaded"],)
    param_names = ("contender",)

    @tracked("time / static", {"dynamic": 3.0, "sliding": 3.0}.get, "Caches: appends over a static cache's")
    def track_appends(self, contender):
        mine, static = fastest(appending(contender, APPENDS), appending("static", APPENDS), turns=self.turns)
        return mine / static


BARS = {"static": 1.1, "paged": 1.5}


class Decode(Benchmark):
    """Time of one token's attention, for each of four sequences, over that of a dynamic cache."""

    params = (["static", "paged", "offloaded"], [1024, 4096])
    param_names = ("contender", "seqlen")
    slow, batch = (4096,), 4

    def setup(self, contender, seqlen):
        k, q = draw(self.batch, seqlen), draw(self.batch, 1)
        self.calls = []
        for name in (contender, "dynamic"):
            cache = cupyattn.PagedCache(self.batch * APPENDS // PAGE_SIZE) if name == "paged" else CACHES[name]()
            cache.append(k, k)
            self.calls.append(lambda cache=cache: cache.attend(q))

    @tracked(
        "time / dynamic",
        lambda contender, _: BARS.get(contender),
        "Caches: decoding over a dynamic cache's",
    )
    def track_attend(self, contender, seqlen):
        mine, dynamic = fastest(*self.calls, turns=self.turns)
        return mine / dynamic


class Cascade(Benchmark):
    """Time of one token's attention for forks of one prompt, common pages read once, over reading them for each."""

    params = ([4, 32], [1024, 4096])
    param_names = ("forks", "prompt")
    slow = (4096,)

    def setup(self, forks, prompt):
        self.cache = cupyattn.PagedCache(prompt // PAGE_SIZE + 2 * forks, PAGE_SIZE)
        tokens = draw(1, prompt)
        self.cache.append(tokens, tokens)
        self.cache.reorder([0] * forks)
        own = draw(forks, 10)
        self.cache.append(own, own)
        self.q = draw(forks, 1)

    @tracked("time / each", 1.0, "Caches: a common prompt read once, over once for each")
    def track_attend(self, forks, prompt):
        shared, each = fastest(
            lambda: self.cache.attend(self.q, cascade=True), lambda: self.cache.attend(self.q), turns=self.turns
        )
        return shared / each
