"""What articles have tables of: standard against flash attention, GQA, a cache, packed batches.  All float32.

`docs/making/results.py` sets the results beside the figures that circulate.
"""

import sys

import numpy as np

import cupyattn

from . import CHECKOUT, memory
from .common import CAUSAL, Benchmark, draw, fastest, tracked, with_cupyattn, with_naive

LENGTHS = [512, 1024, 2048, 4096]


class Standard(Benchmark):
    """Time over that of the naive formula, which keeps all scores."""

    params = (LENGTHS, CAUSAL)
    param_names = ("seqlen", "causal")
    slow = (4096,)

    def setup(self, seqlen, causal):
        self.arrays = draw(seqlen, "float32")

    @tracked("time / naive", name="Prefill: time over the naive formula's, 512 to 4096")
    def track_time(self, seqlen, causal):
        ours = with_cupyattn(*self.arrays, causal, "float32")
        mine, naive = fastest(ours, with_naive(*self.arrays, causal), turns=self.turns)
        return mine / naive


class StandardMemory(Benchmark):
    """Growth of the resident set above q, k and v during one call."""

    params = (["cupyattn", "naive"], LENGTHS)
    param_names = ("contender", "seqlen")
    slow = (4096,)

    def setup(self, contender, seqlen):
        memory.check_that_peaks_are_told()

    @tracked("MB", name="Prefill: peak memory, 512 to 4096")
    def track_peak(self, contender, seqlen):
        return memory.peak_in_a_process(contender, seqlen, "float32") / 1e6


class Grouped(Benchmark):
    """Time with 8 key heads for 32 query heads, over that of the same call on keys repeated for each query head."""

    cases = {"prefill, 1024 tokens": (1024, 1024), "decode, 4096 keys": (1, 4096)}  # noqa: RUF012 - of no instance
    params = (list(cases), ["in each call", "before"])
    param_names = ("case", "repeated")

    def setup(self, case, repeated):
        seqlen_q, seqlen_k = self.cases[case]
        rng = np.random.default_rng(seqlen_q)
        self.q = rng.standard_normal((1, seqlen_q, 32, 128), np.float32)
        self.k, self.v = rng.standard_normal((2, 1, seqlen_k, 8, 128), np.float32)

    @tracked("time / repeated", name="GQA: time over that with repeated keys")
    def track_time(self, case, repeated):
        q, k, v = self.q, self.k, self.v
        whole = k.repeat(4, axis=2), v.repeat(4, axis=2)

        def attend(k, v):
            return cupyattn.attention(q, k, v, causal=True, alignment="bottom-right", compute_dtype="float32")

        again = (lambda: attend(*whole)) if repeated == "before" else lambda: attend(k.repeat(4, 2), v.repeat(4, 2))
        shared, peer = fastest(lambda: attend(k, v), again, turns=min(self.turns, 3))
        return shared / peer


class Cached(Benchmark):
    """Seconds for each of 16 new tokens of a small decoder, the reading of the prompt included."""

    params = (["with", "without"], [64, 256, 1024])
    param_names = ("cache", "prompt")
    slow = (1024,)
    new = 16

    def setup(self, cache, prompt):
        examples = str(CHECKOUT / "examples")
        if examples not in sys.path:
            sys.path.insert(0, examples)
        try:
            import decoder
        except ImportError:
            raise NotImplementedError("there is no examples/decoder.py in this checkout") from None
        sizes = decoder.Sizes(num_heads_kv=4)
        self.model = decoder.Decoder(decoder.draw_weights(sizes), sizes, "float32")
        self.ids = np.arange(prompt)[None] % sizes.vocab_size

    def generate(self, cache):
        """The ids, prompt and all."""

        def step(ids, caches):
            return self.model(ids, caches).argmax(axis=-1, keepdims=True)

        def none_yet():
            return [cupyattn.DynamicCache() for _ in range(self.model.sizes.num_layers)]

        ids, caches = self.ids, none_yet()
        new = step(ids, caches)
        for _ in range(self.new - 1):
            ids = np.concatenate([ids, new], axis=1)
            new = step(new, caches) if cache == "with" else step(ids, none_yet())
        return np.concatenate([ids, new], axis=1)

    @tracked("s / token", name="Generation: time of a token, with a cache and without")
    def track_rate(self, cache, prompt):
        (seconds,) = fastest(lambda: self.generate(cache), turns=min(self.turns, 3))
        return seconds / self.new


class Padded(Benchmark):
    """Sequences end to end, over the same in a padded batch whose mask hides the padding."""

    params = (["16 to 512", "16 to 128, one of 512"], CAUSAL)
    param_names = ("lengths", "causal")
    sequences, longest = 32, 512

    def setup(self, lengths, causal):
        rng = np.random.default_rng(0)
        counts = rng.integers(16, 1 + (128 if "one" in lengths else self.longest), self.sequences)
        counts[0] = self.longest
        self.counts, self.causal = counts, causal == "causal"
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        self.packed = rng.standard_normal((3, self.starts[-1], 8, 64), np.float32)
        self.real = np.arange(self.longest) < counts[:, None]  # (batch, seqlen): is a token
        self.padded = np.zeros((3, self.sequences, self.longest, 8, 64), np.float32)
        self.padded[:, self.real] = self.packed

    def attend_packed(self):
        q, k, v = self.packed
        return cupyattn.flash_attn_varlen_func(
            q, k, v, self.starts, self.starts, self.longest, self.longest, causal=self.causal, compute_dtype="float32"
        )

    def attend_padded(self):
        mask = self.real[:, None, None, :]
        return cupyattn.attention(*self.padded, mask=mask, causal=self.causal, compute_dtype="float32")

    @tracked("time / padded", name="Packed sequences: time over a padded batch's")
    def track_time(self, lengths, causal):
        packed, padded = fastest(self.attend_packed, self.attend_padded, turns=min(self.turns, 3))
        return packed / padded

    @tracked("tokens / padded tokens", name="Packed sequences: tokens over a padded batch's")
    def track_tokens(self, lengths, causal):
        return float(self.real.mean())
